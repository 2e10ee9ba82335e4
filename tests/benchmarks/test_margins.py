"""benchmarks.margins: that it runs whole at toy size."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import margins
from tests import detectors


def test_margins_are_compared_before_and_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    people = tmp_path / "people"
    for person in range(4):
        for number in range(5 if person < 3 else 2):
            marks = [(48 + 16 * (number % 3), 48 + 16 * (number % 2), 16)]
            detectors.save(people / f"P{person}" / f"{number}.png", (160, 160), marks, seed=person)
    detector = tmp_path / "detector.onnx"
    detector.write_bytes(detectors.graph())
    words = ["margins", str(people), "--detector", str(detector)]
    options = "--weights none --epochs 1 --image-size 32 --architecture resnet14-narrow --margins 0 0.3"
    monkeypatch.setattr(sys, "argv", [*words, *options.split()])
    margins.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["people"] == 3
    assert list(told["errors"]) == ["central square, 0.6", "aligned, margin 0", "aligned, margin 0.3"]
    for found in told["errors"].values():
        assert list(found) == ["closest before training", "closest", "classifier"]
        assert all(rate["n"] == told["held_out"] for rate in found.values())
