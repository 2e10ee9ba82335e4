"""benchmarks.seeds, pairs and strangers: that they run whole at toy size, and what they may not mix."""

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import pairs, seeds, strangers
from benchmarks.strangers import Kept
from training.synthetic_faces import draw_faces

TRAINED = "--weights none --epochs 1 --image-size 32 --crop 1 --precision fp32 --architecture resnet14-narrow"


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn people with 9 photos each, of whom 36 photos are held out."""
    return draw_faces(tmp_path_factory.mktemp("people"), identities=12, photos=9, size=48)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: Path) -> Any:
    """Runs a benchmark; what it prints, and its JSON line."""

    def run(module: ModuleType, *arguments: object) -> tuple[str, Any]:
        words = [*map(str, arguments), "--keep", str(kept), *TRAINED.split()]
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        module.main()
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return run


def test_seeds_are_laid_side_by_side_and_models_are_kept(run: Any, people: Path) -> None:
    arguments = [seeds, people, "--recipes", "modern", "--min-images", 2, "--seeds"]
    out, told = run(*arguments, 0, 1)
    assert out.count("training ") == 2
    rows = told["rows"]
    assert {"modern: classifier", "modern: closest image", "closest image by pixels"} <= rows.keys()
    for row in rows.values():
        one, other = row["values"]
        assert row["mean"] == pytest.approx((one + other) / 2)
        # Student's t for one degree of freedom.
        assert row["reach"] == pytest.approx(12.706 * abs(one - other) / 2, rel=1e-3)
    again, told_again = run(*arguments, 0)
    assert "training " not in again
    assert {name: row["values"] for name, row in told_again["rows"].items()} == {
        name: row["values"][:1] for name, row in rows.items()
    }


def test_a_single_seed_has_no_interval() -> None:
    assert seeds.reach([0.5]) is None
    assert "+-" not in seeds.in_words("classifier", [0.5])


def test_a_model_is_asked_about_people_whom_it_does_not_know(run: Any, people: Path, kept: Path) -> None:
    names = sorted(path.name for path in people.iterdir())
    lines = ["4\t4"]
    for fold in range(4):
        one, other = names[2 * fold : 2 * fold + 2]
        lines += [f"{name}\t{n}\t{n + 1}" for name in (one, other) for n in (1, 3)]
        lines += [f"{one}\t{n}\t{other}\t{n}" for n in range(1, 5)]
    listed = kept / "pairs.txt"
    listed.write_text("\n".join([*lines, ""]), "utf-8")
    out, told = run(pairs, people, listed, "--min-images", 2)
    learned = {
        half: {
            row["identity"] for row in csv.DictReader((kept / f"{half}.csv").read_text("utf-8").splitlines())
        }
        for half in ("half-a", "half-b", "outside")
    }
    assert learned == {"half-a": set(names[:4]), "half-b": set(names[4:8]), "outside": set(names[8:])}
    assert {len(folds) for folds in told.values()} == {4}
    assert {"pixels", "modern, learned from people who are in no pair"} < told.keys()
    assert "standard error" in out


def test_folds_that_cannot_be_halved_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("3\t1\n", "utf-8")
    with pytest.raises(SystemExit, match="3 folds"):
        pairs.cut(tmp_path / "pairs.txt", tmp_path)


def test_what_a_calibration_promised_is_looked_up_with_others(run: Any, people: Path) -> None:
    for number, person in enumerate(sorted(people.iterdir())):
        # Eight people keep 9 photos and are enrolled, four are strangers with 8.
        if number >= 8:
            next(person.iterdir()).unlink()
    out, told = run(strangers, people, "--min-images", 9, "--splits", 2, "--fpir", 0.2)
    assert told["missed"].keys() == {"modern", "pixels", "eigenfaces"}
    assert {(one["split"], one["fpir"]) for one in told["kept"]} == {(0, 0.2), (0, 0.1), (1, 0.2), (1, 0.1)}
    assert {one["n"] for one in told["kept"]} == {16}
    assert all(one["inside"] == (one["low"] <= one["observed"] <= one["high"]) for one in told["kept"])
    assert "lie within the interval" in out


def test_the_ends_of_an_interval_are_inside() -> None:
    assert Kept(0, 0.1, 1.0, 0.05, 0.2, 0.05, 100).inside
    assert not Kept(0, 0.1, 1.0, 0.05, 0.2, 0.21, 100).inside
