"""The training command refuses layouts that make no sense, and weights that want to run code."""

import os
import pickle
from pathlib import Path

import pytest

from tests.cli.test_app import Faceprint, faceprint
from tests.training.networks.test_numpy_pickle import Calls

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("none", "torchvision"),
            "--weights-layout describes a file, and --weights none is none; leave it out.",
        ),
        (("imagenet", "vggface2"), "--weights-layout describes a file, and --weights imagenet is none;"),
        (("w.pkl", "caffe"), "--weights-layout must be auto, torchvision, vggface2"),
    ],
)
def test_a_layout_that_makes_no_sense_is_an_input_error(
    faceprint: Faceprint, faces: Path, tmp_path: Path, arguments: tuple[str, str], told: str
) -> None:
    weights, layout = arguments
    status, _, err = faceprint(
        "train", faces, "--out", tmp_path / "m", "--weights", weights, "--weights-layout", layout
    )
    assert status == 2
    assert told in err
    assert not (tmp_path / "m").exists()


def test_a_hostile_pickle_is_one_sentence_and_runs_nothing(
    faceprint: Faceprint, faces: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"conv1.weight": Calls(os.mkdir, str(trap))}, 2))
    status, _, err = faceprint("train", faces, "--out", tmp_path / "m", "--weights", path)
    assert status == 2
    assert "w.pkl is refused, and nothing in it was run: it asks for " in err
    assert "Traceback" not in err
    assert not trap.exists()
