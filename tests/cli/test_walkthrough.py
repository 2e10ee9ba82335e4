"""The steps of `faceprint demo`, with few photos and the narrowest network: what they write and count."""

import re
from pathlib import Path

import pytest
from PIL import Image

from retrieval.cli import walkthrough
from retrieval.cli.walkthrough import Plan
from retrieval.gallery.gallery import Gallery
from tests.service.server import Server

PLAN = Plan(
    identities=4,
    photos=10,
    strangers=10,
    stranger_photos=2,
    visitors=6,
    size=32,
    epochs=1,
    architecture="resnet14-narrow",
)


def people(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/*.jpg")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    walkthrough.run(None, out, PLAN)
    return out


def test_learned_people_strangers_and_visitors_are_different_people(demo: Path) -> None:
    sets = [people(demo / name) for name in ("photos", "strangers", "visitors")]
    assert [len(each) for each in sets] == [4, 10, 6]
    assert len(set.union(*sets)) == 20


def test_only_training_photos_of_the_learned_people_are_enrolled(demo: Path) -> None:
    with Gallery.open(demo / "gallery") as gallery:
        info = gallery.info()
        calibration = gallery.calibration()
    assert (info.faces, info.identities) == (28, 4)
    assert calibration is not None
    assert (calibration.searches, calibration.people, calibration.fpir) == (20, 10, PLAN.fpir)


def test_the_picture_has_a_row_each_for_three_people_and_two_strangers(demo: Path) -> None:
    with Image.open(demo / "search.png") as picture:
        assert 5 * 180 < picture.height < 6 * 240


def test_a_second_demo_replaces_the_first_and_counts_every_photo(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walkthrough.run(None, demo, PLAN)
    said = capsys.readouterr().out
    assert "Drew 40 photos of 4 people, and 26 of 16 strangers." in said
    assert "calibrated with 20 photos of 10 strangers" in said
    named = re.search(r"12 held-out photos: (\d+) named rightly, (\d+) wrongly, (\d+) UNKNOWN", said)
    assert named is not None
    assert sum(map(int, named.groups())) == 12
    strange = re.search(r"6 photos of as many strangers, none seen before: (\d+) UNKNOWN, (\d+) given", said)
    assert strange is not None
    assert sum(map(int, strange.groups())) == 6
    assert len(re.findall(r"^a stranger ", said, re.MULTILINE)) == 3
    assert said.endswith(f"  faceprint demo --serve --out {demo}\n")


def test_a_demo_that_is_there_is_served_as_it_is(demo: Path, tmp_path: Path) -> None:
    before = (demo / "search.png").stat().st_mtime_ns
    command = ("demo", "--serve", "--out", demo)
    with Server(demo / "gallery", tmp_path / "log", command=command) as server:
        shown = server.client.get("/people").text
    assert all(f"<b><bdi>{name}</bdi></b>" in shown for name in people(demo / "photos"))
    assert (demo / "search.png").stat().st_mtime_ns == before


def test_own_photos_are_searched_without_strangers(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walkthrough.run(faces, tmp_path / "out", PLAN)
    said = capsys.readouterr().out
    assert "12 held-out photos: " in said
    assert "stranger" not in said
    assert "UNKNOWN" not in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "faceprint-demo.json",
        "model",
        "gallery",
        "search.png",
    }
