"""benchmarks.recipes: which people it takes, and that it runs whole at toy size."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import recipes
from training.synthetic_faces import draw_faces


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn people with 4, and two with 7 photos."""
    folder = tmp_path_factory.mktemp("people")
    draw_faces(folder / "few", identities=3, photos=4, size=48)
    draw_faces(folder / "many", identities=2, photos=7, size=48)
    for name in ("few", "many"):
        for person in (folder / name).iterdir():
            person.rename(folder / f"{name} {person.name}")
        (folder / name).rmdir()
    return folder


def test_people_are_taken_by_how_many_photos_they_have(people: Path) -> None:
    few, many = recipes.chosen(people, 2, 5, 0), recipes.chosen(people, 7, 7, 0)
    assert (len(few.labels), len(few.train) + len(few.validation)) == (3, 12)
    assert (len(many.labels), len(many.train) + len(many.validation)) == (2, 14)
    assert all(name.startswith("many ") for name in many.labels)


def test_it_runs_whole(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--weights none --least 4 --most 7 --epochs 1 --image-size 32 --crop 1 --only paper modern"
    monkeypatch.setattr(
        sys, "argv", ["recipes", str(people), *arguments.split(), "--architecture", "resnet14-narrow"]
    )
    recipes.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["variant"] for row in told["rows"]] == ["paper", "modern"]
    assert told["identities"] == 5
    for row in told["rows"]:
        assert row["classifier"]["n"] == told["validation"]
        assert 0 <= row["closest_unit"]["value"] <= 1
