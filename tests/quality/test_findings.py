"""Every finding says what it always said: whole outputs on prepared data sets, kept in findings.json."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrieval.images.preprocessing import Preprocessing
from retrieval.quality.dataset_check import check
from retrieval.quality.findings import Kind
from retrieval.quality.photo_set import CheckOptions
from tests.quality.test_dataset_check import draw, drawn, saved_again

_EXPECTED = Path(__file__).with_name("findings.json")
# `test_finding_rules` has these.
_OF_FACES = (Kind.NO_FACE, Kind.FACE_TOO_SMALL, Kind.SEVERAL_FACES, Kind.FACE_BLURRED, Kind.FACE_TURNED)
_INPUT = Preprocessing(size=32, crop=1.0)


def spoiled(folder: Path) -> CheckOptions:
    """Four identities, one of many photos and one of few, and most of what can be wrong with photos."""
    drawn(folder, number=6)
    drawn(folder, people=4, number=2)
    for number in range(70):
        draw(folder / "p0" / f"more{number:02}.png", 500 + number)
    shutil.copy(folder / "p0" / "0_0.png", folder / "p1" / "stolen.png")
    saved_again(folder / "p0" / "0_2.png", folder / "p2" / "again.jpg")
    for number in range(6):
        shutil.copy(folder / "p1" / f"1_{number}.png", folder / "p1" / f"y{number}.png")
        saved_again(folder / "p2" / f"2_{number}.png", folder / "p2" / f"z{number}.jpg")
    (folder / "p0" / "no.jpg").write_bytes(b"no picture")
    (folder / "p0" / "empty.jpg").write_bytes(b"")
    (folder / "p0" / "none.jpg").write_bytes(b"")
    odd(folder / "p0")
    draw(folder / "alone" / "1.png", 900)
    draw(folder / "loose.png", 901)
    return CheckOptions(preprocessing=_INPUT)


def odd(folder: Path) -> None:
    """Flat, dark, bright, stretched, tiny and grey pictures."""
    Image.new("RGB", (96, 96), (200, 10, 10)).save(folder / "flat.png")
    draw(folder / "wide.png", 700, (300, 96))
    draw(folder / "tiny.png", 703, (20, 20))
    draw(folder / "grey.png", 702, kind="L")
    black = np.zeros((96, 96, 3), np.uint8)
    black[:24, :24, 0] = 255
    Image.fromarray(black).save(folder / "dark.png")
    Image.fromarray(255 - black).save(folder / "bright.png")


def left_out(folder: Path) -> CheckOptions:
    """Identities that train is told to leave out."""
    draw(drawn(folder) / "few" / "1.png", 900)
    return CheckOptions(min_images=3, seed=5, validation_fraction=0.5, preprocessing=_INPUT)


def one_person(folder: Path) -> CheckOptions:
    """A single identity that can be split, of small photos."""
    for number in range(4):
        draw(folder / "only" / f"{number}.png", number, (20, 24))
    return CheckOptions(preprocessing=_INPUT)


def mostly_grey(folder: Path) -> CheckOptions:
    """Grey pictures, and one in colour."""
    for number in range(4):
        draw(folder / "a" / f"{number}.png", number, kind="L")
        draw(folder / "b" / f"{number}.png", 10 + number, kind="RGB" if number == 1 else "L")
    return CheckOptions(preprocessing=_INPUT)


_SETS: dict[str, Callable[[Path], CheckOptions]] = {
    one.__name__: one for one in (spoiled, left_out, one_person, mostly_grey)
}


def told(name: str, folder: Path) -> Any:
    """What `check --json` says, with paths below the folder, and without digits that decoders differ in."""
    folder.mkdir()
    options = _SETS[name](folder)
    text = json.dumps(check(os.fspath(folder), options=options).as_json(), indent=1)
    text = text.replace(os.fspath(folder), "DATA")
    return json.loads(re.sub(r"correlation [01]\.\d+", "correlation", text))


@pytest.mark.parametrize("name", list(_SETS))
def test_the_whole_output_of_a_check_is_the_expected_one(name: str, tmp_path: Path) -> None:
    assert told(name, tmp_path / "d") == json.loads(_EXPECTED.read_text("utf-8"))[name]


def test_the_prepared_sets_show_every_finding_that_needs_no_model_and_no_detector() -> None:
    expected = json.loads(_EXPECTED.read_text("utf-8"))
    kinds = {finding["kind"] for output in expected.values() for finding in output["findings"]}
    assert kinds == set(Kind) - {Kind.WRONG_LABEL, *_OF_FACES}
