"""Network: torchvision's ResNet50 with its own normalisation, and Caffe's."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from retrieval.errors import InputError
from retrieval.models.bundle import Embedding
from retrieval.models.network import (
    ARCHITECTURES,
    CosineClassifier,
    Network,
    Projection,
    layer_table,
    variant_of,
)
from tests.caffe import caffe_embedding

NARROW = "resnet14-narrow"


def test_the_keys_are_torchvisions_and_mean_and_std() -> None:
    with torch.device("meta"):
        ours, theirs = Network(1000).state_dict(), resnet50().state_dict()
    assert [name for name in ours if name not in ("mean", "std")] == list(theirs)
    assert ours.keys() - theirs.keys() == {"mean", "std"}
    assert all(ours[name].shape == tensor.shape for name, tensor in theirs.items())


@pytest.mark.parametrize("labels", [2, 62, 1000])
def test_the_layer_table_counts_every_learnable_of_resnet50(labels: int) -> None:
    """25,557,032 with ImageNet's thousand classes; each class costs 2048 weights and a bias."""
    with torch.device("meta"):
        network = Network(labels)
    total = sum(row.total_learnables for row in layer_table(network, 224))
    assert total == 25_557_032 - 2049 * (1000 - labels)
    assert total == sum(parameter.numel() for parameter in network.parameters())


def test_the_layer_table_of_resnet50_has_the_papers_activations() -> None:
    with torch.device("meta"):
        rows = layer_table(Network(62), 224)
    activations = {row.name: row.activations for row in rows}
    expected = {
        "input": (224, 224, 3),
        "conv1": (112, 112, 64),
        "maxpool": (56, 56, 64),
        "layer1.2.conv3": (56, 56, 256),
        "layer2.3.conv3": (28, 28, 512),
        "layer3.5.conv3": (14, 14, 1024),
        "layer4.2.conv3": (7, 7, 2048),
        "avgpool": (1, 1, 2048),
        "fc": (62,),
        "probabilities": (62,),
    }
    assert {name: activations[name] for name in expected} == expected
    assert [row.name for row in rows if row.name in expected] == list(expected)


def test_the_layer_table_of_resnet50_lists_each_layer_that_a_picture_passes() -> None:
    """The ReLU of a block is one module that works three times, so it has three rows."""
    with torch.device("meta"):
        rows = layer_table(Network(62), 224)
    assert Counter(row.kind for row in rows) == {
        "Image Input": 1,
        "Convolution": 53,
        "Batch Normalization": 53,
        "ReLU": 49,
        "Max Pooling": 1,
        "Global Average Pooling": 1,
        "Fully Connected": 1,
        "Softmax": 1,
    }


def test_the_layer_table_spells_out_sizes() -> None:
    with torch.device("meta"):
        rows = {row.name: row for row in layer_table(Network(62), 224)}
    assert rows["conv1"].learnables == ("Weight 7x7x3x64",)
    assert rows["bn1"].learnables == ("Weight 64", "Bias 64")
    assert rows["bn1"].states == ("Running-mean 64", "Running-var 64")
    assert rows["fc"].learnables == ("Weight 62x2048", "Bias 62")
    assert rows["input"].states == ("Mean 1x1x3", "Std 1x1x3")


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_table_leaves_the_network_as_it_was(training: bool) -> None:
    network = Network(3, architecture=NARROW).train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layer_table(network, 32)
    assert network.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_forward_is_torchvisions_resnet_on_normalised_floats() -> None:
    """Uint8 pixels go in; scaling to 0..1 and ImageNet's mean and deviation are the network's own affair."""
    torch.manual_seed(0)
    theirs = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=4).eval()
    ours = Network(5, architecture=NARROW).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    pixels = torch.randint(0, 256, (3, 40, 48, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        embedding, logits = ours(pixels)
        expected = theirs(floats)
        theirs.fc = torch.nn.Identity()
        features = theirs(floats)
    assert embedding.shape == (3, 2048)
    assert embedding.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding, features, rtol=1e-4, atol=1e-4)


def _alive(architecture: str, *, seed: int) -> Network:
    """A network all of whose tensors differ from what they begin as."""
    torch.manual_seed(seed)
    network = Network(5, architecture=architecture).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


@pytest.mark.parametrize(("architecture", "size"), [(f"{NARROW}-caffe", n) for n in (33, 64, 68, 75, 224)])
def test_caffes_form_is_the_network_that_caffe_ran(architecture: str, size: int) -> None:
    """Against functions of float64 that know no torchvision, at sizes with and without cut windows."""
    ours = _alive(architecture, seed=size)
    ours.normalise((131.0, 104.0, 91.0), (2.0, 1.0, 0.5))
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    mean, std = torch.tensor([131.0, 104.0, 91.0]), torch.tensor([2.0, 1.0, 0.5])
    with torch.inference_mode():
        embedding, _ = ours(pixels)
    expected = caffe_embedding(ours.state_dict(), ((pixels - mean) / std).permute(0, 3, 1, 2))
    assert (embedding - expected).norm() < 1e-5 * expected.norm()


def test_the_variants_of_an_architecture_have_the_same_tensors_and_other_answers() -> None:
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    plain = _alive(NARROW, seed=1)
    caffe = Network(5, architecture=variant_of(NARROW, caffe=True)).eval()
    caffe.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        one, other = plain(pixels)[0], caffe(pixels)[0]
    assert (one - other).norm() > 0.1 * one.norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_has_both_variants(name: str) -> None:
    plain, caffe = (variant_of(name, caffe=caffe) for caffe in (False, True))
    assert "caffe" not in plain
    assert caffe.replace("-caffe", "") == plain
    assert name in (plain, caffe)


def _activations(network: Network, pixels: Tensor) -> dict[str, NDArray[np.float64]]:
    """What each stage gives, (n, channels, places), caught as it passes."""
    caught: dict[str, NDArray[np.float64]] = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(network, name).register_forward_hook(
            lambda _module, _inputs, x, name=name: caught.update({name: x.flatten(2).double().numpy()})
        )
    with torch.inference_mode():
        network(pixels)
    return caught


@pytest.mark.parametrize("layers", [("layer4",), ("layer3",), ("layer3", "layer4"), ("layer1", "layer4")])
@pytest.mark.parametrize("pooling", ["avg", "gem"])
@pytest.mark.parametrize("length", ["raw", "unit"])
@pytest.mark.parametrize("dimensions", [None, 5])
def test_an_embedding_is_pooled_layers_projected_and_brought_to_its_length(
    layers: tuple[str, ...], pooling: Any, length: Any, dimensions: int | None
) -> None:
    """As numpy has it in float64; and the classifier answers as if nothing had been chosen."""
    torch.manual_seed(3)
    plain = Network(4, architecture=NARROW).eval()
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    found = _activations(plain, pixels)
    parts = [found[layer] for layer in layers]
    if pooling == "gem":
        expected = np.concatenate([np.cbrt((part.clip(1e-6) ** 3).mean(2)) for part in parts], 1)
    else:
        expected = np.concatenate([part.mean(2) for part in parts], 1)
    random = np.random.default_rng(1)
    mean, matrix = random.random(expected.shape[1]), random.normal(size=(5, expected.shape[1]))
    projection = None
    if dimensions:
        expected = (expected - mean) @ matrix.T
        projection = Projection(*(torch.from_numpy(part).float() for part in (mean, matrix)))
    if length == "unit":
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    with torch.inference_mode():
        _, logits = plain(pixels)
        plain.embed_as(Embedding(length, layers, pooling, dimensions), projection)
        embedding, same = plain(pixels)
    assert torch.equal(logits, same)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (3, plain.dimension) == expected.shape
    assert np.abs(embedding.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_projection_lies_among_the_weights_and_goes_when_it_is_not_wanted_any_more() -> None:
    network = Network(4, architecture=NARROW, embedding=Embedding(dimensions=7))
    state = network.state_dict()
    assert (state["projection_mean"].shape, state["projection_matrix"].shape) == ((2048,), (7, 2048))
    network.embed_as(Embedding())
    assert network.dimension == 2048
    assert not [name for name in network.state_dict() if name.startswith("projection")]


def test_a_projection_to_more_numbers_than_there_are_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        Network(4, architecture=NARROW, embedding=Embedding(layers=("layer3",), dimensions=1025))
    assert str(caught.value) == (
        "layer3 give 1,024 numbers, which cannot be projected to 1,025 dimensions; choose fewer."
    )


def test_the_layer_table_names_another_embedding_and_its_projection() -> None:
    embedding = Embedding("unit", ("layer3", "layer4"), "avg", 7)
    *others, last = layer_table(Network(4, architecture=NARROW, embedding=embedding), 32)
    assert others == layer_table(Network(4, architecture=NARROW), 32)
    assert (last.name, last.kind, last.activations) == ("embedding", str(embedding), (7,))
    assert last.states == ("Mean 3072", "Matrix 7x3072")


def test_the_logits_of_cosines_do_not_depend_on_lengths() -> None:
    classifier = CosineClassifier(8, 3)
    features = torch.randn(5, 8)
    logits = classifier(features)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], classifier.weight[None], dim=2)
    torch.testing.assert_close(logits, 16 * cosines)
    torch.testing.assert_close(classifier(7 * features), logits)


def test_a_network_with_cosines_has_no_bias_and_a_row_in_the_table() -> None:
    network = Network(4, architecture="resnet14-narrow-cosine")
    assert "fc.bias" not in network.state_dict()
    (row,) = [row for row in layer_table(network, 32) if row.name == "fc"]
    assert (row.kind, row.learnables) == ("Fully Connected (cosines)", ("Weight 4x2048",))
