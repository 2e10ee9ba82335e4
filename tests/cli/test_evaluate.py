"""`faceprint evaluate` as a user types it: what it prints and writes, and how it ends."""

import json
from pathlib import Path

import pytest

from retrieval.models.bundle import ModelBundle

# The command as the other commands' tests run it.
from tests.cli.test_app import Faceprint, faceprint
from training.synthetic_faces import draw_faces

__all__ = ["faceprint"]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 people with 10 photos: 36 of them are searched for."""
    return draw_faces(tmp_path_factory.mktemp("people"), identities=12, photos=10, size=48)


def test_figures_are_printed_with_intervals_and_kept(
    faceprint: Faceprint, bundle: ModelBundle, people: Path, tmp_path: Path
) -> None:
    (people / "notes.txt").write_text("whoever reads this")
    status, out, err = faceprint("evaluate", bundle.folder, people, "--out", tmp_path / "e")
    assert status == 0, err
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    closest = metrics["closed"]["ranking"]["closest"]
    assert f"{100 * closest['value']:.1f} %" in out
    assert f"{100 * closest['low']:.1f} to {100 * closest['high']:.1f}" in out
    assert "raw pixels" in out
    assert "note: In no person's folder, and left out: 1 file." in out
    assert (tmp_path / "e" / "photos.csv").read_text().count("\n") == 37

    status, out, _ = faceprint(
        "evaluate", "--compare", tmp_path / "e", tmp_path / "e", "--out", tmp_path / "c"
    )
    assert status == 0
    assert "closest-image agreement" in out
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["common"] == 36


def test_an_open_set_as_json_is_the_whole_tree(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path
) -> None:
    """6 people of 6 photos each cannot be told from strangers: nobody is one."""
    status, _, err = faceprint("evaluate", bundle.folder, faces, "--protocol", "open", "--min-images", 6)
    assert (status, err.count("\n")) == (2, 1)
    assert "Every person in" in err
    status, out, _ = faceprint("evaluate", bundle.folder, faces, "--json")
    assert status == 0
    assert json.loads(out)["closed"]["ranking"]["closest"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 12,
        "method": "too few: 12, and it takes 30",
    }


def test_progress_and_results_are_lines_of_json(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path
) -> None:
    status, out, err = faceprint("evaluate", bundle.folder, faces, "--log-json")
    assert (status, err) == (0, "")
    *lines, last = map(json.loads, out.splitlines())
    doing = [(line["doing"], line["total"]) for line in lines if line["event"] == "start"]
    assert doing == [("embedding", 36), ("measuring", None)]
    assert last["event"] == "done"
    assert last["metrics"]["closed"]["probes"] == 12


def test_two_models_are_evaluated_and_compared_at_once(
    faceprint: Faceprint, bundle: ModelBundle, people: Path
) -> None:
    status, out, err = faceprint("evaluate", "--compare", bundle.folder, bundle.folder, people)
    assert status == 0, err
    assert "1.0000" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "{model}", "nowhere"), "There is no folder nowhere"),
        (("evaluate", "nowhere", "{faces}"), "nowhere"),
        (("evaluate", "{model}", "{faces}", "--out", "{model}"), "is a model or a gallery"),
        (("evaluate", "{model}", "{faces}", "{faces}"), "A third folder goes with --compare"),
        (
            ("evaluate", "{model}", "{faces}", "--val-fraction", "1"),
            "--val-fraction must lie between 0 and 1",
        ),
        (("evaluate", "--compare", "{faces}", "{faces}"), "holds no evaluation"),
        (
            ("evaluate", "--compare", "{faces}", "{faces}", "--log-json"),
            "--log-json is of no use with --compare",
        ),
        (("evaluate", "--compare", "{model}", "{model}"), "is a model; to compare models, name the photos"),
        (("evaluate", "{model}", "{faces}", "--gallery", "nowhere"), "nowhere"),
    ],
)
def test_what_a_user_does_wrong_is_one_sentence_and_status_2(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, arguments: tuple[str, ...], said: str
) -> None:
    places = {"{model}": str(bundle.folder), "{faces}": str(faces)}
    status, out, err = faceprint(*(places.get(one, one) for one in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("faceprint: ")
    assert err.count("\n") == 1
    assert said in err
