"""Where a network's parameters come from: a download, files in each format and layout, random numbers."""

import pickle
import re
import urllib.request
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
from torchvision.models.resnet import Bottleneck, ResNet

from retrieval.errors import InputError, WeightsError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network, architecture_of, variant_of
from tests.caffe import caffe_embedding
from training.fitting.export import export
from training.networks.initialize import Start, build

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


def unreadable(path: Path) -> str:
    return (
        f"{path} cannot be read as safetensors, as a torch state dict of tensors or as a pickle of numpy "
        "arrays; copy it whole again, or give a file in one of these formats."
    )


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
    assert start == Start(path.name, (), "torchvision")
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
    assert start == Start(path.name, ("layer4",), "torchvision")
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
    assert refusal(path) == unreadable(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_a_file_is_refused(tmp_path: Path, suffix: str) -> None:
    write = _as_torch if suffix == ".pth" else _as_safetensors
    path = write(tmp_path / "half", narrow())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(path) == unreadable(path)


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
    asked = "pathlib.Path.mkdir" if kind == "pickle" else "objects other than tensors"
    assert refusal(path) == (
        f"{path} is refused, and nothing in it was run: it asks for {asked}, and only tensors and numpy "
        "arrays are read; give the weights as safetensors."
    )
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


def _caffes(architecture: str = NARROW) -> dict[str, NDArray[np.float32]]:
    """Random weights in VGGFace2's layout, all batch norms alive, with a classifier of 7 identities."""
    torch.manual_seed(11)
    network = Network(7, architecture=architecture)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    # What reaches bn1 is that much larger where pixels are not divided.
    torch.nn.init.uniform_(network.bn1.running_var, 100, 5000)
    return {
        name: tensor.numpy()
        for name, tensor in network.state_dict().items()
        if name not in ("mean", "std") and not name.endswith("num_batches_tracked")
    }


def _pickled(path: Path, state: dict[str, NDArray[np.float32]]) -> Path:
    path.write_bytes(pickle.dumps(state, protocol=2))
    return path


def _vggface2s(state: dict[str, NDArray[np.float32]], pixels: NDArray[np.uint8]) -> Tensor:
    """The embeddings that VGGFace2's network gives: blue, green, red from 0 to 255 less its means."""
    bgr = pixels[..., ::-1].astype(np.float64) - [91.4953, 103.8827, 131.0912]
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    return caffe_embedding(tensors, torch.from_numpy(bgr).permute(0, 3, 1, 2))


def _pixels(size: int, n: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def _embedded(network: Network, pixels: NDArray[np.uint8]) -> Tensor:
    with torch.inference_mode():
        embedding: Tensor = network.eval()(torch.from_numpy(pixels))[0]
    return embedding


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("architecture", "size"), [(NARROW, 64), (NARROW, 75), ("resnet50", 224)])
def test_a_pickle_of_arrays_computes_what_caffe_computed(
    tmp_path: Path, architecture: str, size: int
) -> None:
    state, pixels = _caffes(architecture), _pixels(size)
    path = _pickled(tmp_path / "resnet50_ft_weight.pkl", state)
    network, start = build(3, weights=str(path), architecture=architecture)
    assert start == Start(path.name, (), "vggface2")
    assert network.architecture == f"{architecture}-caffe"
    assert network.fc.weight.shape == (3, 2048)
    expected = _vggface2s(state, pixels)
    assert _apart(_embedded(network, pixels), expected) < 1e-5
    # The same file loads as torchvision's too, and computes something else.
    other, start = build(3, weights=str(path), architecture=architecture, layout="torchvision")
    assert start == Start(path.name, (), "torchvision")
    assert other.architecture == architecture
    assert _apart(_embedded(other, pixels), expected) > 0.1


@pytest.mark.parametrize("part", ["stride and pooling", "colours", "means", "division"])
def test_each_difference_of_the_layouts_matters(tmp_path: Path, part: str) -> None:
    """A network with one of them wrong is far from Caffe's; the others are right."""
    state, pixels = _caffes(), _pixels(64)
    network, _ = build(3, weights=str(_pickled(tmp_path / "w.pkl", state)), architecture=NARROW)
    if part == "stride and pooling":
        wrong = Network(3, architecture=NARROW)
        wrong.load_state_dict(network.state_dict())
        network = wrong
    elif part == "colours":
        pixels = pixels[..., ::-1].copy()
    else:
        network.normalise(*{"means": ((0,) * 3, (1,) * 3), "division": ((131, 104, 91), (58,) * 3)}[part])
    assert _apart(_embedded(network, pixels), _vggface2s(state, _pixels(64))) > 1e-3


@pytest.mark.parametrize("write", [_as_safetensors, _as_torch], ids=["safetensors", "pth"])
def test_vggface2s_weights_in_torchs_formats_want_their_layout(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    state = _caffes()
    path = write(tmp_path / "vggface2", {name: torch.from_numpy(array) for name, array in state.items()})
    assert refusal(path).endswith("say `weights_layout='vggface2'` or `weights_layout='torchvision'`.")
    network, start = build(3, weights=str(path), architecture=NARROW, layout="vggface2")
    assert start == Start(path.name, (), "vggface2")
    assert _apart(_embedded(network, _pixels(64)), _vggface2s(state, _pixels(64))) < 1e-5


def test_a_partial_file_of_vggface2s_layout_starts_the_rest_fresh(tmp_path: Path) -> None:
    part = {
        name: array for name, array in _caffes().items() if not name.startswith(("conv1", "layer4", "fc"))
    }
    network, start = build(3, weights=str(_pickled(tmp_path / "w.pkl", part)), architecture=NARROW)
    assert start.fresh == ("conv1", "layer4")
    assert not network.layer4[0].bn3.weight.any()
    assert network.mean.flatten().tolist() == pytest.approx([131.0912, 103.8827, 91.4953])
    assert network.std.unique().tolist() == [1]


def test_a_network_in_caffes_form_takes_torchvisions_weights_in_torchvisions(tmp_path: Path) -> None:
    network, _ = build(
        3, weights=str(_as_torch(tmp_path / "given", narrow())), architecture=f"{NARROW}-caffe-cosine"
    )
    assert network.architecture == f"{NARROW}-cosine"


def test_vggface2s_senet_is_refused(tmp_path: Path) -> None:
    """Its file is published beside the ResNet50's and looks like it."""
    state = {**_caffes(), "layer1.0.fc1.weight": np.zeros((1, 256, 1, 1), np.float32)}
    path = _pickled(tmp_path / "senet50_ft_weight.pkl", state)
    assert refusal(path) == (
        f"{path.name} is not a ResNet50's weights: a ResNet50 has no layer1.0.fc1.weight; "
        "give a file made for ResNet50."
    )


@pytest.mark.parametrize("weights", ["none", "imagenet"])
def test_a_layout_without_a_file_is_an_input_error(weights: str) -> None:
    with pytest.raises(InputError) as caught:
        build(3, weights=weights, architecture=NARROW, layout="vggface2")
    assert str(caught.value) == (
        f"`weights_layout` describes a file, and `weights='{weights}'` is none; leave it out."
    )


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_the_bundle_of_vggface2s_weights_computes_what_caffe_computed(
    tmp_path: Path, engine: str, classifier: str
) -> None:
    """Its graph and both engines; opening it compares them with the reference in numpy too."""
    state, pixels = _caffes(), _pixels(64)
    path = _pickled(tmp_path / "w.pkl", state)
    network, _ = build(3, weights=str(path), architecture=architecture_of(NARROW, classifier))
    bundle = export(
        network,
        tmp_path / "model",
        labels=("a", "b", "c"),
        reader=PhotoReader(Preprocessing(size=64, crop=1.0)),
        recipe={},
        split={},
        figures={},
        sample=pixels,
    )
    assert bundle.architecture == variant_of(architecture_of(NARROW, classifier), caffe=True)
    with Embedder.open(ModelBundle.load(bundle.folder), device="cpu", engine=engine) as embedder:
        found = torch.from_numpy(embedder.embed(pixels).vectors)
    assert _apart(found, _vggface2s(state, pixels)) < 1e-5
