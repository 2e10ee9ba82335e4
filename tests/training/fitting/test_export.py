"""The exported graph gives the network's own answers, whatever the number of photos, or is not written."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import retrieval
from retrieval.errors import RunError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network, Projection
from training.fitting.export import TOLERANCE, export


@pytest.fixture(scope="module")
def graph(bundle: ModelBundle) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle.graph_path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("number", [1, 2, 7])
def test_the_graph_answers_as_the_network_for_any_number_of_photos(
    network: Network, graph: onnxruntime.InferenceSession, number: int
) -> None:
    """Within 1e-4 of the length of an embedding."""
    pixels = np.random.default_rng(number).integers(0, 256, (number, 32, 32, 3), np.uint8)
    embedding, probabilities = graph.run(["embedding", "probabilities"], {"pixels": pixels})
    with torch.inference_mode():
        expected, logits = network(torch.from_numpy(pixels))
    assert embedding.shape == (number, 2048)
    assert embedding.dtype == probabilities.dtype == np.float32
    difference = np.linalg.norm(embedding - expected.numpy(), axis=1) / np.linalg.norm(expected, axis=1)
    assert difference.max() < 1e-4
    np.testing.assert_allclose(probabilities, torch.softmax(logits, 1).numpy(), atol=1e-5)


def test_the_graph_takes_pixels_and_gives_embeddings_and_probabilities(
    graph: onnxruntime.InferenceSession,
) -> None:
    """The number of photos is the only size that is left open."""
    (pixels,) = graph.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape[1:]) == ("pixels", "tensor(uint8)", [32, 32, 3])
    assert isinstance(pixels.shape[0], str)
    outputs = [(output.name, output.type, output.shape[1:]) for output in graph.get_outputs()]
    assert outputs == [
        ("embedding", "tensor(float)", [2048]),
        ("probabilities", "tensor(float)", [6]),
    ]


def test_the_bundle_has_the_networks_weights_bit_for_bit(network: Network, bundle: ModelBundle) -> None:
    stored = load_file(bundle.weights_path)
    state = network.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())


def test_the_card_says_what_was_exported_and_with_which_versions(bundle: ModelBundle) -> None:
    card = json.loads((bundle.folder / "bundle.json").read_text("utf-8"))
    assert card["architecture"] == "resnet14-narrow"
    assert card["dimension"] == 2048
    assert card["preprocessing"] == {"size": 32, "crop": 1.0}
    assert card["recipe"] == {"epochs": 0}
    assert card["versions"]["faceprint"] == retrieval.__version__
    for package in ("torch", "torchvision", "onnx", "numpy", "pillow"):
        assert card["versions"][package] == version(package)


_CHOICES = [
    Embedding(length="unit"),
    Embedding(layers=("layer3", "layer4"), pooling="gem"),
    Embedding("unit", ("layer3", "layer4"), "gem", 5, True),
]


@pytest.fixture(scope="module", params=_CHOICES, ids=str)
def chosen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The narrow network, exported with another embedding."""
    embedding: Embedding = request.param
    torch.manual_seed(0)
    network = Network(3, architecture="resnet14-narrow").eval()
    projection = Projection(torch.rand(3072), torch.randn(5, 3072))
    network.embed_as(embedding, projection if embedding.dimensions else None)
    return export(
        network,
        tmp_path_factory.mktemp("models") / "chosen",
        labels=("Ada", "Bo", "Cy"),
        reader=PhotoReader(Preprocessing(size=32, crop=1.0)),
        recipe={},
        split={},
        figures={},
        sample=np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8),
    )


def test_every_constant_of_a_graph_has_a_use(chosen: ModelBundle, bundle: ModelBundle) -> None:
    """onnxruntime warns of the others whenever the model is loaded."""
    for one in (chosen, bundle):
        graph = onnx.load(one.graph_path).graph
        used = {name for node in graph.node for name in node.input}
        assert {constant.name for constant in graph.initializer} <= used


def test_both_engines_give_the_embeddings_that_a_bundle_says(chosen: ModelBundle) -> None:
    """Pooling, projection and length are inside the graph and inside the torch engine."""
    assert ModelBundle.load(chosen.folder) == chosen
    chosen.verify()
    pixels = np.random.default_rng(5).integers(0, 256, (4, 32, 32, 3), np.uint8)
    answers = [
        Embedder.open(chosen, device="cpu", engine=engine).embed(pixels)
        for engine in ("onnxruntime", "torch")
    ]
    for answer in answers:
        assert answer.vectors.shape == (4, chosen.dimension)
        lengths = np.linalg.norm(answer.vectors, axis=1)
        assert (np.abs(lengths - 1) < 1e-6).all() == (chosen.embedding.length == "unit")
    one, other = (answer.vectors for answer in answers)
    assert np.abs(one - other).max() < 1e-4 * np.linalg.norm(one, axis=1).max()


def test_in_fewer_bits_the_projection_and_the_length_stay_in_float32(chosen: ModelBundle) -> None:
    """A length of exactly 1 has an error of 1e-7, not of bfloat16's 4e-3; distances drift a little."""
    pixels = np.random.default_rng(5).integers(0, 256, (4, 32, 32, 3), np.uint8)
    embedder = Embedder.open(chosen, device="cpu", engine="torch", precision="bf16")
    vectors = embedder.embed(pixels).vectors
    assert vectors.dtype == np.float32
    if chosen.embedding.length == "unit":
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert embedder.drift is not None
    assert 0 < embedder.drift.mean < 0.1


class _TwoFaced(Network):
    """A network whose graph is a little different, as a bug of the export would make it."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = super().forward(pixels)
        return embedding * (1 + 3 * TOLERANCE), logits


def test_a_graph_that_differs_from_its_network_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = _TwoFaced(2, architecture="resnet14-narrow")
    with pytest.raises(RunError) as caught:
        export(
            network,
            tmp_path / "model",
            labels=("Ada", "Bo"),
            reader=PhotoReader(Preprocessing(size=32, crop=1.0)),
            recipe={},
            split={},
            figures={},
            sample=np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8),
        )
    assert str(caught.value) == (
        "The exported graph differs from the network by 3.0e-04 (at most 1e-04 is allowed); "
        "the model was not written."
    )
    assert not (tmp_path / "model").exists()
