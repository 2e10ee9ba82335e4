"""The exported graph gives the network's own answers, whatever the number of photos, or is not written."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import retrieval
from retrieval.bundle import ModelBundle, Preprocessing
from retrieval.errors import RunError
from training.export import TOLERANCE, export
from training.model import Network


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
    for package in ("torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow"):
        assert card["versions"][package] == version(package)


class _TwoFaced(Network):
    """A network whose graph comes out a little different, as a bug of an exporter would make it."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = super().forward(pixels)
        factor = 1 + 3 * TOLERANCE if torch.compiler.is_exporting() else 1.0
        return embedding * factor, logits


def test_a_graph_that_differs_from_its_network_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = _TwoFaced(2, architecture="resnet14-narrow")
    with pytest.raises(RunError) as caught:
        export(
            network,
            tmp_path / "model",
            labels=("Ada", "Bo"),
            preprocessing=Preprocessing(size=32, crop=1.0),
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
