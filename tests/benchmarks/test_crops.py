"""benchmarks.crops: that it runs whole at toy size, and what a square around a box shows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import crops
from retrieval.images.alignment import apply
from retrieval.images.detection import DetectedFace
from retrieval.models.importing import import_model
from tests import detectors, onnx_networks


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten people with 10 photos each, and ten with three; each photo shows one marked face."""
    folder = tmp_path_factory.mktemp("people")
    for person in range(20):
        name = f"P{person:02}"
        for number in range(1, 11 if person < 10 else 4):
            marks = [(48 + 16 * (number % 3), 48 + 16 * (number % 2), 16)]
            detectors.save(folder / name / f"{name}_{number:04}.png", (160, 160), marks, seed=person)
    return folder


def lines(*, first: int) -> list[str]:
    """Ten pairs of one person and ten of two people."""
    same = [f"P{row % 8:02}\t{first + row // 8}\t{first + 1 + row // 8}" for row in range(10)]
    return [*same, *(f"P{row % 8:02}\t{first}\tP{(row + 1) % 8:02}\t{first}" for row in range(10))]


def test_three_crops_of_the_same_photos_are_compared(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = onnx_networks.saved(onnx_networks.network(), tmp_path / "network.onnx")
    options = {"colour": "rgb", "mean": 127.5, "std": 128, "detector": detectors.detector()}
    model = import_model(network, tmp_path / "model", **options)  # type: ignore[arg-type]
    listed, chosen = tmp_path / "pairs.txt", tmp_path / "choose.txt"
    pairs = lines(first=4)
    listed.write_text("\n".join(["2\t5", *pairs[:5], *pairs[10:15], *pairs[5:10], *pairs[15:], ""]), "utf-8")
    chosen.write_text("\n".join(["10", *lines(first=1), ""]), "utf-8")
    words = [model.folder, people, listed, "--choose", chosen, "--crops", 1, 0.5, "--margins", -0.1, 0]
    monkeypatch.setattr(sys, "argv", ["crops", *map(str, words), "--min-images", "10"])
    crops.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    squares = ["central square, 1 of the photo", "central square, 0.5 of the photo"]
    boxes = ["box, margin -0.1", "box, margin 0"]
    assert list(told["chosen on"]) == [*squares, *boxes, "aligned"]
    assert {len(folds) for folds in told["chosen on"].values()} == {10}
    best = [max(ways, key=lambda way: np.mean(told["chosen on"][way])) for ways in (squares, boxes)]
    assert list(told["pairs"]) == list(told["open"]) == [*best, "aligned"]
    assert {len(folds) for folds in told["pairs"].values()} == {2}
    assert all(0 <= value[0] <= 1 for value in (one["closest"] for one in told["open"].values()))


def test_the_square_around_a_box_has_its_middle_and_its_longer_side() -> None:
    face = DetectedFace((10.0, 20.0, 40.0, 60.0), ((0.0, 0.0),) * 5, 1.0)
    matrix = crops.box_matrix(face, size=90, margin=0.25)
    # The middle is (30, 50); the side is 60 and a quarter of it on each side.
    corners = np.array([[30.0, 50], [-15, 5], [75, 95]])
    assert apply(matrix, corners).tolist() == [[45, 45], [0, 0], [90, 90]]


def test_pairs_of_one_fold_are_dealt_into_ten(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("\n".join(["10", *lines(first=1), ""]), "utf-8")
    pairs = crops.chosen_pairs(path)
    assert [sum(pair.fold == fold and pair.same for pair in pairs) for fold in range(10)] == [1] * 10
    assert len(pairs) == 20
