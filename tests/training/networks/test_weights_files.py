"""Files of weights: each format and way of naming gives the same tensors, and hostile files are refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retrieval.errors import InputError, WeightsError
from tests.training.networks.test_numpy_pickle import Calls, by_python_2
from training.networks.weights_files import LAYOUTS, WeightsFile, check_layout, read, recognize

NAME = "conv1.weight"
NUMBERS = np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32)


def pickled(path: Path, state: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(state, protocol))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read(path)
    return str(caught.value)


def unreadable(path: Path) -> str:
    return (
        f"{path} cannot be read as safetensors, as a torch state dict of tensors or as a pickle of numpy "
        "arrays; copy it whole again, or give a file in one of these formats."
    )


def as_tensors(state: Any) -> Any:
    return {
        name: as_tensors(value) if isinstance(value, dict) else torch.from_numpy(value)
        for name, value in state.items()
    }


def _old_torch(path: Path, state: Any) -> Path:
    torch.save(as_tensors(state), path, _use_new_zipfile_serialization=False)
    return path


def _torch(path: Path, state: Any) -> Path:
    torch.save(as_tensors(state), path)
    return path


@pytest.mark.parametrize("write", [pickled, _torch, _old_torch])
@pytest.mark.parametrize(
    "state",
    [
        {NAME: NUMBERS},
        {f"module.{NAME}": NUMBERS},
        {f"backbone.{NAME}": NUMBERS},
        {f"model.{NAME}": NUMBERS},
        {f"module.model.backbone.{NAME}": NUMBERS},
        {"state_dict": {f"module.{NAME}": NUMBERS}},
    ],
    ids=["plain", "module", "backbone", "model", "all", "nested"],
)
def test_every_format_and_prefix_gives_the_same_tensors(
    tmp_path: Path, write: Callable[[Path, Any], Path], state: dict[str, Any]
) -> None:
    found = read(write(tmp_path / "weights", state))
    assert found.arrays is (write is pickled)
    assert {name: tensor.numpy().tolist() for name, tensor in found.tensors.items()} == {
        NAME: NUMBERS.tolist()
    }


def test_prefixes_of_safetensors_are_removed(tmp_path: Path) -> None:
    save_file({f"backbone.{NAME}": torch.from_numpy(NUMBERS)}, tmp_path / "w.safetensors")
    found = read(tmp_path / "w.safetensors")
    assert not found.arrays
    assert torch.equal(found.tensors[NAME], torch.from_numpy(NUMBERS))


@pytest.mark.parametrize("protocol", [0, 2])
def test_a_pickle_of_python_2_is_read(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "w.pkl").write_bytes(by_python_2(NUMBERS, NAME.encode(), protocol=protocol))
    assert read(tmp_path / "w.pkl").tensors[NAME].numpy().tolist() == NUMBERS.tolist()


def test_tensors_of_two_networks_are_refused(tmp_path: Path) -> None:
    path = pickled(tmp_path / "w.pkl", {NAME: NUMBERS, f"model.{NAME}": NUMBERS + 1})
    assert refusal(path) == (
        f"{path} holds conv1.weight of two networks; give a file with the tensors of one of them."
    )


@pytest.mark.parametrize(
    "content",
    [{"epoch": 3}, {0: NUMBERS}, [NUMBERS], {"state_dict": NUMBERS}, {"a": {"b": {"c": NUMBERS}}}],
    ids=["numbers", "numbered", "list", "nested", "deep"],
)
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = pickled(tmp_path / "w.pkl", content)
    assert refusal(path) == f"{path} does not hold a state dict (names with tensors)."


@pytest.mark.parametrize("where", ["alone", "beside", "nested"])
def test_a_hostile_pickle_is_refused_in_one_sentence_and_runs_nothing(tmp_path: Path, where: str) -> None:
    trap = tmp_path / "trap"
    hostile: Any = Calls(os.mkdir, str(trap))
    state = {"alone": hostile, "beside": {NAME: NUMBERS, "x": hostile}, "nested": {"state_dict": hostile}}
    path = pickled(tmp_path / "w.pkl", state[where])
    assert refusal(path) == (
        f"{path} is refused, and nothing in it was run: it asks for {os.mkdir.__module__}.mkdir, and only "
        "tensors and numpy arrays are read; give the weights as safetensors."
    )
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_truncated_pickle_is_refused(tmp_path: Path, protocol: int, share: float) -> None:
    whole = pickle.dumps({NAME: NUMBERS}, protocol)
    path = tmp_path / "w.pkl"
    path.write_bytes(whole[: int(share * len(whole))])
    assert refusal(path) == unreadable(path)


def test_numbers_that_many_arrays_share_are_not_multiplied(tmp_path: Path) -> None:
    """1 MB that 10,000 arrays refer to would be 10 GB."""
    once = by_python_2(np.zeros((100, 2500), np.float32), NAME.encode())
    state, end = once[: -len(b"tbs.")], b"q\x07tbs"
    again = (
        b"U\x05%05dcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(Kd"
        b"M\xc4\x09th\x06\x89h\x07tbs"
    )
    path = tmp_path / "w.pkl"
    path.write_bytes(state + end + b"".join(again % number for number in range(10_000)) + b".")
    assert refusal(path) == unreadable(path)


def test_a_pickle_larger_than_any_resnet50_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pkl"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no space on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda _path: pytest.fail("it was read"))
    assert refusal(path) == unreadable(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no weights file"):
        read(tmp_path / "absent")


def _file(*, arrays: bool, variance: float = 1.0) -> WeightsFile:
    tensors = {NAME: torch.from_numpy(NUMBERS), "bn1.running_var": torch.full((4,), variance)}
    return WeightsFile(tensors, arrays)


def test_arrays_are_vggface2s_and_tensors_torchvisions() -> None:
    assert recognize(_file(arrays=True), "w") == "vggface2"
    assert recognize(_file(arrays=False), "w") == "torchvision"
    assert recognize(WeightsFile({}, arrays=False), "w") == "torchvision"


def test_tensors_that_expect_pixels_of_0_to_255_are_not_taken_for_torchvisions() -> None:
    """Their variance is about 3,400 times that of normalised pixels."""
    squared = float((NUMBERS**2).sum() / 4)
    assert recognize(_file(arrays=False, variance=1.4 * squared), "w") == "torchvision"
    with pytest.raises(WeightsError) as caught:
        recognize(_file(arrays=False, variance=1.4 * 58**2 * squared), "w")
    assert str(caught.value) == (
        "w has torchvision's names, but its first layer expects pixels of 0 to 255, as VGGFace2's ResNet50 "
        "does and torchvision's does not; say `weights_layout='vggface2'` or `weights_layout='torchvision'`."
    )


@pytest.mark.photographs
def test_imagenets_weights_are_torchvisions(shared: Path) -> None:
    found = read(shared / "weights" / "resnet50-imagenet-through-layer3.safetensors")
    assert recognize(found, "w") == "torchvision"


def test_a_layout_that_does_not_exist_is_an_input_error() -> None:
    for name in ("auto", *LAYOUTS):
        check_layout(name)
    with pytest.raises(InputError) as caught:
        check_layout("caffe")
    assert str(caught.value) == (
        "There is no layout caffe of weights; choose of auto, torchvision, vggface2."
    )
