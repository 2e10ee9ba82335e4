"""Network: torchvision's ResNet50 with its own normalisation; where its parameters come from."""

import pickle
import re
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from retrieval.errors import InputError, WeightsError
from retrieval.models.bundle import Embedding
from retrieval.models.network import CosineClassifier, Network, Projection, Start, build, layer_table

NARROW = "resnet14-narrow"
STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


@cache
def narrow(*, seed: int = 7, blocks: int = 1, classes: int = 10) -> dict[str, Tensor]:
    """The state dict of torchvision's own ResNet in the shape of the narrow network, all blocks alive."""
    torch.manual_seed(seed)
    state = ResNet(Bottleneck, [1, 1, blocks, 1], num_classes=classes, width_per_group=4).state_dict()
    for name in state:
        if name.endswith("bn3.weight"):
            state[name] = torch.full_like(state[name], 0.5)
    return state


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def built(path: Path) -> tuple[Network, Start]:
    return build(3, weights=str(path), architecture=NARROW)


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        built(path)
    return str(caught.value)


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


def _as_safetensors(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def _as_torch(path: Path, state: Any) -> Path:
    torch.save(state, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def _parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `nn.DataParallel` names its parameters."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "write",
    [
        _as_safetensors,
        _as_torch,
        lambda path, state: _as_torch(path, _parallel(state)),
        lambda path, state: _as_safetensors(path, _parallel(state)),
        lambda path, state: _as_torch(path, {"state_dict": state, "epoch": 90}),
        lambda path, state: _as_torch(path, {"state_dict": _parallel(state), "epoch": 90}),
        lambda path, state: _as_torch(path, {**state, "projection.weight": torch.zeros(2)}),
    ],
    ids=["safetensors", "pth", "parallel-pth", "parallel-safetensors", "checkpoint", "both", "other-head"],
)
def test_a_whole_file_gives_everything_but_the_last_layer(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    given = narrow()
    path = write(tmp_path / "given", given)
    network, start = built(path)
    assert start == Start(path.name, ())
    state = network.state_dict()
    for name, tensor in without(given, "fc.").items():
        assert torch.equal(state[name], tensor), name
    assert state["fc.weight"].shape == (3, 2048)


def test_the_last_layer_is_new_even_where_the_file_has_one_of_the_same_size(tmp_path: Path) -> None:
    given = narrow(classes=3)
    network, _ = built(_as_torch(tmp_path / "given", given))
    assert not torch.equal(network.fc.weight, given["fc.weight"])


def test_the_normalisation_stays_imagenets_whatever_a_file_says(tmp_path: Path) -> None:
    given = {**narrow(), "mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    network, _ = built(_as_safetensors(tmp_path / "given", given))
    plain = Network(3, architecture=NARROW)
    assert torch.equal(network.mean, plain.mean)
    assert torch.equal(network.std, plain.std)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    given = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in narrow().items()
    }
    network, _ = built(_as_safetensors(tmp_path / "half", given))
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.conv1.weight, given["conv1.weight"].float())


@pytest.mark.parametrize("write", [_as_safetensors, _as_torch], ids=["safetensors", "pth"])
@pytest.mark.parametrize(
    "absent", [("layer4",), ("layer3", "layer4"), ("bn1", "layer2")], ids=lambda names: "+".join(names)
)
def test_what_a_partial_file_lacks_starts_fresh_as_the_identity(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path], absent: tuple[str, ...]
) -> None:
    """A fresh block's last batch norm is zero; the blocks that were given keep theirs."""
    given = without(narrow(), "fc.", *(f"{module}." for module in absent))
    network, start = built(write(tmp_path / "part", given))
    assert start.fresh == absent
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in given.items())
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        expected = 0.0 if stage in absent else 0.5
        assert state[f"{stage}.0.bn3.weight"].unique().tolist() == [expected]
        assert state[f"{stage}.0.conv3.weight"].count_nonzero() > 0


def test_without_weights_everything_starts_fresh() -> None:
    network, start = build(3, weights="none", architecture=NARROW)
    assert start == Start("none", STAGES)
    assert not any(getattr(network, f"layer{stage}")[0].bn3.weight.any() for stage in (1, 2, 3, 4))


def test_the_same_seed_starts_from_the_same_parameters() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build(3, weights="none", architecture=NARROW)[0].state_dict()

    one, again, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


@pytest.mark.photographs
def test_imagenet_weights_through_layer3_leave_layer4_fresh(shared: Path) -> None:
    path = shared / "weights" / "resnet50-imagenet-through-layer3.safetensors"
    network, start = build(62, weights=str(path))
    assert start == Start(path.name, ("layer4",))
    state = network.state_dict()
    given = load_file(path)
    assert all(torch.equal(state[name], tensor) for name, tensor in given.items())
    assert not any(state[f"layer4.{block}.bn3.weight"].any() for block in range(3))


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({**narrow(), "conv1.weight": torch.zeros(64, 1, 7, 7)}, "conv1.weight has another shape"),
        ({**narrow(), "layer4.0.bn3.bias": torch.zeros(3)}, "layer4.0.bn3.bias has another shape"),
        (narrow(blocks=2), "a ResNet50 has no layer3.1.[a-z0-9_.]+"),
        ({"features.0.weight": torch.zeros(3)}, "none of its tensors has a ResNet50's name"),
        ({"fc.weight": torch.zeros(3, 2048)}, "none of its tensors has a ResNet50's name"),
        ({}, "none of its tensors has a ResNet50's name"),
    ],
    ids=["grey", "shape", "deeper", "other", "only-fc", "empty"],
)
@pytest.mark.parametrize("write", [_as_safetensors, _as_torch], ids=["safetensors", "pth"])
def test_weights_of_another_network_are_refused(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path], state: dict[str, Tensor], problem: str
) -> None:
    path = write(tmp_path / "other", state)
    said = f"{path.name} is not a ResNet50's weights: {problem}; give a file made for ResNet50."
    assert re.fullmatch(said, refusal(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("content", [b"", b"these are no weights\n", b"PK\x03\x04 half a zip"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert refusal(path) == f"{path} cannot be read as safetensors or as a torch state dict of tensors."


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_a_file_is_refused(tmp_path: Path, suffix: str) -> None:
    write = _as_torch if suffix == ".pth" else _as_safetensors
    path = write(tmp_path / "half", narrow())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(path) == f"{path} cannot be read as safetensors or as a torch state dict of tensors."


class _Code:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.mkdir, (self.folder,))


@pytest.mark.parametrize("kind", ["torch", "pickle", "inside"])
def test_a_file_with_code_in_it_is_refused_and_the_code_never_runs(tmp_path: Path, kind: str) -> None:
    path, trap = tmp_path / "weights.pth", _Code(tmp_path / "trap")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap if kind == "torch" else {**narrow(), "fc.bias": trap}, path)
    assert refusal(path) == f"{path} cannot be read as safetensors or as a torch state dict of tensors."
    assert not trap.folder.exists()


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {0: torch.zeros(3)}, {"state_dict": torch.zeros(3)}],
    ids=["tensor", "list", "numbers", "numbered", "nested"],
)
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = _as_torch(tmp_path / "weights", content)
    assert refusal(path) == f"{path} does not hold a state dict (names with tensors)."


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_a_missing_weights_file_is_an_input_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError) as caught:
        build(3, weights=str(path), architecture=NARROW)
    assert str(caught.value) == (
        f"There is no weights file {path}; give imagenet, none or the path of a file."
    )


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch has downloaded nothing yet, and urllib has not yet looked for a proxy."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.mark.usefixtures("empty_cache")
def test_without_a_network_imagenet_weights_are_an_input_error_with_two_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way to the network leads through a proxy that nobody runs."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError) as caught:
        build(3, weights="imagenet", architecture=NARROW)
    message = str(caught.value)
    assert message.startswith("ImageNet weights cannot be downloaded from torchvision's server (")
    assert "refused" in message
    assert message.endswith("; give a file as `weights`, or start from nothing with `weights='none'`.")


@pytest.mark.usefixtures("empty_cache")
def test_a_download_that_is_not_torchvisions_file_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as the page on which a hotel's network asks for a password."""
    page = tmp_path / "page.html"
    page.write_text("<html>Welcome!</html>")
    monkeypatch.setattr(torch.hub, "urlopen", lambda _request: urllib.request.urlopen(page.as_uri()))
    with pytest.raises(InputError, match=r"cannot be downloaded .*invalid hash value.* as `weights`, or "):
        build(3, weights="imagenet", architecture=NARROW)


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
