"""What runs is what the fingerprint covers: wrong graphs, cards and runtimes are told by their answers."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

from retrieval.errors import BundleError
from retrieval.images.preprocessing import Preprocessing
from retrieval.models import numpy_network, self_test
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import ARCHITECTURES, Network, Projection
from retrieval.system import proof_cache


def test_each_architecture_is_tested() -> None:
    assert ARCHITECTURES.keys() == numpy_network.ARCHITECTURES


@pytest.mark.parametrize("size", [32, 37])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("resnet14")])
@pytest.mark.parametrize(
    "embedding",
    [
        Embedding(),
        Embedding("unit", ("layer2", "layer4")),
        Embedding(layers=("layer3",), pooling="gem"),
        Embedding("unit", ("layer3", "layer4"), "gem", 16, True),
    ],
    ids=str,
)
def test_numpy_and_torch_compute_the_same(architecture: str, embedding: Embedding, size: int) -> None:
    torch.manual_seed(3)
    network = Network(5, architecture=architecture, embedding=embedding).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    if embedding.dimensions is not None:
        features = network.features_of(embedding)
        matrix = torch.randn(embedding.dimensions, features) / features**0.5
        network.embed_as(embedding, Projection(torch.rand(features), matrix))
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    picture = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    with torch.inference_mode():
        vectors, logits = network(torch.from_numpy(picture[None]))
        chances = torch.softmax(logits, 1)
    found, probabilities = numpy_network.embed(tensors, embedding, picture, architecture=architecture)
    assert np.linalg.norm(found - vectors[0].numpy()) < self_test.TOLERANCE / 50 * np.linalg.norm(found)
    np.testing.assert_allclose(probabilities, chances[0].numpy(), atol=1e-5)


def rebuilt(bundle: ModelBundle, folder: Path, change: Callable[[onnx.ModelProto], object]) -> ModelBundle:
    """The bundle with another graph whose hash stands in the card: weights and fingerprint are genuine."""
    model = onnx.load(bundle.graph_path)
    change(model)
    given = {field.name: getattr(bundle, field.name) for field in dataclasses.fields(bundle)}
    for name in ("folder", "fingerprint", "files"):
        del given[name]
    made = ModelBundle.create(
        folder, tensors=load_file(bundle.weights_path), graph=model.SerializeToString(), **given
    )
    assert made.fingerprint == bundle.fingerprint
    return made


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if one.name.endswith(name))


def scaled(model: onnx.ModelProto, name: str, factor: float) -> None:
    tensor = initializer(model, name)
    array = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def constant(model: onnx.ModelProto) -> None:
    """Every picture gets the same embedding."""
    for node in model.graph.node:
        node.output[:] = ["unused" if name == "embedding" else name for name in node.output]
        node.input[:] = ["unused" if name == "embedding" else name for name in node.input]
    zero = numpy_helper.from_array(np.zeros((1,), np.float32), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.append(helper.make_node("Mul", ["unused", "zero"], ["embedding"]))


def first_of_a_batch(model: onnx.ModelProto) -> None:
    """The embedding of the first picture is everybody's."""
    for node in model.graph.node:
        node.output[:] = ["each" if name == "embedding" else name for name in node.output]
        node.input[:] = ["each" if name == "embedding" else name for name in node.input]
    for number in (0, 1):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number]), f"at {number}"))
    model.graph.node.extend(
        [
            helper.make_node("Slice", ["each", "at 0", "at 1", "at 0"], ["first"]),
            helper.make_node("Shape", ["each"], ["shape"]),
            helper.make_node("Expand", ["first", "shape"], ["embedding"]),
        ]
    )


def other_weights(model: onnx.ModelProto) -> None:
    scaled(model, "layer4.0.conv2.weight", 1.5)


def other_classes(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "fc.weight")
    array = 50 * numpy_helper.to_array(tensor)[::-1]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def no_rectifier(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Identity"


@pytest.mark.parametrize("change", [constant, first_of_a_batch, other_weights, other_classes, no_rectifier])
def test_a_forged_graph_under_a_genuine_fingerprint_is_refused(
    bundle: ModelBundle, tmp_path: Path, change: Callable[[onnx.ModelProto], object]
) -> None:
    forged = rebuilt(bundle, tmp_path / "forged", change)
    forged.verify()
    with pytest.raises(BundleError) as caught:
        Embedder.open(forged, device="cpu", engine="onnxruntime")
    assert str(caught.value) == (
        f"The model {forged.folder} does not answer as its weights do: model.onnx or onnxruntime is wrong; "
        "copy the model whole again, or install that package anew."
    )


def test_a_graph_with_a_loop_is_refused_before_it_runs(bundle: ModelBundle, tmp_path: Path) -> None:
    def endless(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Loop", ["", "zero"], []))

    forged = rebuilt(bundle, tmp_path / "forged", endless)
    with pytest.raises(
        BundleError, match=r"is not run: it has control flow \(Loop\); export the model again"
    ):
        Embedder.open(forged, device="cpu", engine="onnxruntime")


def renamed(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "vector"
    model.graph.node.append(helper.make_node("Identity", ["embedding"], ["vector"]))


def test_a_graph_without_its_outputs_is_refused(bundle: ModelBundle, tmp_path: Path) -> None:
    forged = rebuilt(bundle, tmp_path / "forged", renamed)
    with pytest.raises(BundleError, match=r"must take pixels and give embedding and probabilities"):
        Embedder.open(forged, device="cpu", engine="onnxruntime")


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ("Ada",)},
        {"dimension": 1024},
        {"preprocessing": Preprocessing(size=48, crop=1.0)},
    ],
    ids=["labels", "dimension", "size"],
)
def test_a_card_that_disagrees_with_the_graph_is_refused(bundle: ModelBundle, change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx and bundle\.json disagree: "):
        Embedder.open(dataclasses.replace(bundle, **change), device="cpu", engine="onnxruntime")


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_weights_of_another_fingerprint_are_refused(
    bundle: ModelBundle, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    claimed = dataclasses.replace(bundle, fingerprint="0" * 64)
    with pytest.raises(BundleError, match="states another fingerprint than its weights have"):
        Embedder.open(claimed, device="cpu", engine=engine)


def test_answers_are_tested_once_for_each_graph_and_runtime(
    bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = itertools.count()
    embedder = Embedder.open(bundle, device="cpu", engine="onnxruntime")

    def run(pixels: Any) -> Any:
        next(asked)
        return embedder._run(pixels)

    for _ in range(2):
        self_test.check_engine(bundle, "onnxruntime", "cpu", run)
    monkeypatch.setattr("onnxruntime.__version__", "99")
    self_test.check_engine(bundle, "onnxruntime", "cpu", run)
    assert next(asked) == 2  # a picture alone, and among others
    assert proof_cache.is_proven(self_test._fact(bundle, "onnxruntime", "cpu"))
