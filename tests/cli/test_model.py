"""`faceprint model import` as a user types it, and what the other commands say of such a model."""

import json
from pathlib import Path

import pytest

from retrieval.models.bundle import ModelBundle
from tests.cli.test_app import Faceprint, faceprint
from tests.onnx_networks import network, saved

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(network(), tmp_path / "network.onnx")


def test_a_file_is_imported_and_the_model_shown(faceprint: Faceprint, file: Path, tmp_path: Path) -> None:
    how = ("--colour", "bgr", "--mean", "127.5,100,90", "--std", 128, "--length", "raw")
    status, out, err = faceprint("model", "import", file, "--out", tmp_path / "m", *how)
    made = ModelBundle.load(tmp_path / "m")
    assert (status, err) == (0, "")
    assert out == (
        "imported network.onnx: 8 numbers for central square of 1 x the shorter side, 16 x 16 pixels, "
        f"colours converted to sRGB; fingerprint {made.fingerprint[:12]}\n"
    )
    assert (made.recipe["mean"], made.recipe["std"]) == ([127.5, 100.0, 90.0], [128.0] * 3)
    status, out, err = faceprint("model", tmp_path / "m")
    assert (status, err) == (0, "")
    for words in ("none: an imported model has no classifier", "output fc1, raw length, 8 float32 numbers"):
        assert words in out
    assert "Imported from" in out
    assert "held out" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mean", "x", "--std", 1), "--mean is x; give one number, or three with commas."),
        (
            (),
            "The file does not say how the network takes pictures: give --colour, or a --preset (arcface, "
            "sface, adaface).",
        ),
        (
            ("--preset", "arcface", "--margin", 0.1),
            "--margin is of use only with --detector; add that, or leave --margin out.",
        ),
    ],
)
def test_a_wrong_option_is_a_sentence(
    faceprint: Faceprint, file: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    status, out, err = faceprint("model", "import", file, "--out", tmp_path / "m", *options)
    assert (status, out, err) == (2, "", f"faceprint: {said}\n")


def test_a_model_in_a_folder_called_import_is_shown_by_its_path(
    faceprint: Faceprint, imported: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported.save(tmp_path / "import")
    monkeypatch.chdir(tmp_path)
    status, out, _ = faceprint("model", "./import")
    assert status == 0
    assert imported.fingerprint in out


def test_what_takes_a_trained_model_refuses_it(
    faceprint: Faceprint, imported: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    folder = imported.folder
    for arguments, used in (
        (("model", folder, "--layer-table"), "shown as a table of layers"),
        (("derive", folder, "--out", tmp_path / "d", "--length", "raw"), "derived from"),
        (("evaluate", folder, faces, "--weights", "w.pt"), "compared with itself before fine-tuning"),
    ):
        assert faceprint(*arguments) == (
            2,
            "",
            f"faceprint: The model {folder} was imported and cannot be {used}; name a model of "
            "`faceprint train`.\n",
        )


def test_searches_print_and_draw_answers_without_a_prediction(
    faceprint: Faceprint, imported: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    photo = min(faces.glob("*/*.jpg"))
    assert faceprint("ingest", tmp_path / "g", faces, "--model", imported.folder)[0] == 0
    status, out, _ = faceprint("search", tmp_path / "g", photo, "-k", 2, "--plot", tmp_path / "a.png")
    assert status == 0
    assert "classifier" not in out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert faceprint("calibrate", tmp_path / "g", "--fpir", 0.1)[0] == 0
    status, out, _ = faceprint("search", tmp_path / "g", photo, "--json", "--plot", tmp_path / "b.png")
    (answer,) = json.loads(out)
    assert (answer.keys(), answer["decision"]["classifier_agrees"]) == (
        {"query", "decision", "matches"},
        None,
    )
    status, out, _ = faceprint("info", tmp_path / "g")
    assert "none; 16 x 16 pixels" in out


def test_evaluations_and_checks_take_it(
    faceprint: Faceprint, imported: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    status, out, err = faceprint("evaluate", imported.folder, faces, "--out", tmp_path / "e")
    assert status == 0, err
    assert "closest image shows the person" in out
    assert "the likeliest is right" not in out
    assert "before fine-tuning" not in out
    measured = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert measured["closed"]["classifier"] is None
    page = (tmp_path / "e" / "report.html").read_text()
    assert "The network was imported; on whom it was trained is not known." in page
    assert "The classifier knows nobody" not in page
    status, out, err = faceprint("check", faces, "--model", imported.folder, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["judged"] == 36
