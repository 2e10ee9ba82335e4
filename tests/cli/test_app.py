"""The commands as a user types them: what they print, and how they end."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from retrieval.bulk.ingest import ingest
from retrieval.cli import app
from retrieval.console import terminal
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from tests.broken import make_broken
from training.synthetic_faces import draw_faces

Result = tuple[int, str, str]

# Typer builds all commands anew for each call, which takes most of the time of a command that is refused.
_built = functools.cache(typer.main.get_command)


class Faceprint:
    """`faceprint ARGS` in this process: its exit status and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys = capsys
        self.monkeypatch = monkeypatch

    def __call__(self, *arguments: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["faceprint", *map(str, arguments)])
        self.monkeypatch.setenv("COLUMNS", "160")
        self.monkeypatch.setattr(typer.main, "get_command", _built)
        status: object = 0
        try:
            app.main()
        except SystemExit as ended:
            status = ended.code or 0
        output = self.capsys.readouterr()
        assert isinstance(status, int)
        return status, output.out, output.err


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.fixture(scope="module")
def first_gallery(bundle: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery of the drawn faces; no test changes it."""
    folder = tmp_path_factory.mktemp("enrolled") / "g"
    with Gallery.create(folder, bundle) as gallery:
        assert ingest(gallery, [faces]).enrolled == 36
    return folder


@pytest.fixture
def enrolled(first_gallery: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(first_gallery, tmp_path / "g"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn people with three photos each: a whole ResNet50 learns them in little time."""
    return draw_faces(tmp_path_factory.mktemp("few"), identities=2, photos=3, size=48)


def test_ingest_makes_the_gallery_and_accounts_for_every_file(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    status, out, _ = faceprint("ingest", tmp_path / "g", faces, "--model", bundle.folder)
    assert status == 0
    assert "found 36 = enrolled 36 + already known 0 + duplicate 0 + rejected 0" in out


def test_the_commands_that_walk_folders_pass_over_what_exclude_says_and_print_how_much(
    faceprint: Faceprint, enrolled: Path, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(faces, tmp_path / "photos")
    shutil.copytree(faces, tmp_path / "photos" / "@eaDir")
    excluded = (tmp_path / "photos", "--exclude", "*_0001.jpg", "--exclude", "*_0002.jpg")
    line = "passed over: 36 files in 1 folder of @eaDir; 6 files of *_0001.jpg; 6 files of *_0002.jpg"
    _, out, _ = faceprint("ingest", enrolled, *excluded, "--summary", tmp_path / "summary.json")
    assert "found 24 =" in out
    assert line in out.splitlines()
    rules = json.loads((tmp_path / "summary.json").read_text())["passed_over"]
    assert [(one["rule"], one["files"]) for one in rules] == [
        ("*_0001.jpg", 6),
        ("*_0002.jpg", 6),
        ("@eaDir", 36),
    ]
    _, out, _ = faceprint("embed", bundle.folder, *excluded, "--out", tmp_path / "v.npy")
    assert line in out.splitlines()
    _, out, _ = faceprint("check", *excluded)
    assert "24 photos of 6 identities" in out
    assert line.removeprefix("passed") in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments",
    [("ingest", "g", "--retry", "r.jsonl", "--exclude", "x"), ("calibrate", "g", "--exclude", "x")],
)
def test_exclude_without_anything_to_walk_is_an_input_error(
    faceprint: Faceprint, arguments: tuple[str, ...]
) -> None:
    status, _, err = faceprint(*arguments)
    assert (status, "--exclude is of use only with" in err) == (2, True)


def test_a_new_gallerys_model_is_loaded_once(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was loaded to know that it runs is the one that embeds."""
    loaded, load = [], Embedder.open.__func__

    def counted(cls: type[Embedder], *arguments: Any, **options: Any) -> Embedder:
        loaded.append(load(cls, *arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(Embedder, "open", classmethod(counted))
    status, _, _ = faceprint("ingest", tmp_path / "g", faces, "--model", bundle.folder)
    assert (status, len(loaded)) == (0, 1)


def test_a_model_that_does_not_run_leaves_no_gallery(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle.folder, tmp_path / "m")
    card = json.loads((tmp_path / "m" / "bundle.json").read_text())
    (tmp_path / "m" / "bundle.json").write_text(json.dumps({**card, "labels": card["labels"][:-1]}))
    status, _, err = faceprint("ingest", tmp_path / "g", faces, "--model", tmp_path / "m")
    assert status == 2
    assert err.startswith(f"faceprint: {tmp_path / 'm' / 'model.onnx'} and bundle.json disagree: ")
    assert not (tmp_path / "g").exists()


def test_ingest_again_enrolls_nothing_and_says_so(faceprint: Faceprint, enrolled: Path, faces: Path) -> None:
    status, out, _ = faceprint("ingest", enrolled, faces)
    assert status == 0
    assert "found 36 = enrolled 0 + already known 36 + duplicate 0 + rejected 0" in out
    assert "Nothing new" in out


def test_the_report_has_a_line_with_a_reason_for_each_broken_file(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    expected = make_broken(tmp_path / "bad")
    shutil.copy(sorted(faces.glob("*/*.jpg"))[0], tmp_path / "bad" / "zz good copy.jpg")
    report = tmp_path / "report.jsonl"
    status, out, _ = faceprint("ingest", enrolled, tmp_path / "bad", "--report", report)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert status == 1  # the dangling link may be there again another time
    assert {
        Path(line["path"]).name: line["reason"] for line in lines if line["status"] == "rejected"
    } == expected
    assert [line["status"] for line in lines].count("duplicate") == 1
    assert "found 21 = enrolled 0 + already known 0 + duplicate 1 + rejected 20" in out


def test_ingest_of_nothing_but_broken_files_is_an_input_error(
    faceprint: Faceprint, enrolled: Path, tmp_path: Path
) -> None:
    make_broken(tmp_path / "bad")
    status, _, err = faceprint("ingest", enrolled, tmp_path / "bad")
    assert (status, err.splitlines()[-1]) == (
        2,
        "faceprint: Not one of the 20 files could be enrolled; --report FILE says why.",
    )


@pytest.mark.parametrize(("strict", "status"), [(False, 0), (True, 1)])
def test_a_bad_file_changes_the_exit_status_only_when_asked(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path, strict: bool, status: int
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jpg").write_bytes(b"")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "more" / "b.png")
    found = faceprint("ingest", enrolled, tmp_path / "more", *(["--strict"] if strict else []))
    assert found[0] == status


def test_search_json_is_one_list_with_prediction_and_matches(
    faceprint: Faceprint, enrolled: Path, faces: Path
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))[:2]
    status, out, _ = faceprint("search", enrolled, *photos, "--json", "-k", 3)
    answers = json.loads(out)
    assert status == 0
    assert [answer["query"] for answer in answers] == [str(photo) for photo in photos]
    first = answers[0]
    assert set(first) == {"query", "prediction", "matches"}
    assert set(first["prediction"]) == {"identity", "probability"}
    assert [match["rank"] for match in first["matches"]] == [1, 2, 3]
    assert first["matches"][0] == {
        "rank": 1,
        "face_id": 1,
        "identity": photos[0].parent.name,
        "path": str(photos[0]),
        "distance": 0.0,
    }


def test_search_prints_a_table_with_names_and_distances(
    faceprint: Faceprint, enrolled: Path, faces: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0]
    status, out, _ = faceprint("search", enrolled, photo, "-k", 2)
    assert status == 0
    assert "classifier: " in out
    assert photo.parent.name in out
    assert "0.000" in out


def test_search_plot_draws_a_picture(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0]
    status, _, _ = faceprint("search", enrolled, photo, "--plot", tmp_path / "answer.png")
    assert status == 0
    with Image.open(tmp_path / "answer.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 6 * 180


@pytest.mark.parametrize(
    ("done", "seconds", "said"),
    [(64, 0.0, ""), (64, 2.0, "32 photos/s, 0:29 left"), (1000, 10.0, "100 photos/s, 0:00 left")],
)
def test_the_pace_is_that_of_the_whole_run(done: int, seconds: float, said: str) -> None:
    assert terminal.pace(done, 1000, seconds) == said


def test_a_bad_picture_among_the_queries_is_said_and_the_others_are_answered(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"<html>")
    photo = sorted(faces.glob("*/*.jpg"))[0]
    status, out, err = faceprint("search", enrolled, bad, photo, "--json")
    answers = json.loads(out)
    assert status == 2
    assert answers[0]["error"]["reason"] == "not-an-image"
    assert answers[1]["matches"][0]["distance"] == 0.0
    assert f"{bad} cannot be read: it is a web page (not-an-image)." in err


def test_info_says_what_is_in_the_gallery(faceprint: Faceprint, enrolled: Path, bundle: ModelBundle) -> None:
    status, out, _ = faceprint("info", enrolled, "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["faces"], facts["identities"], facts["fingerprint"]) == (36, 6, bundle.fingerprint)
    status, out, _ = faceprint("info", enrolled)
    assert status == 0
    assert "36 of 6 identities" in out
    assert "of vectors in 1 file, " in out


def test_model_shows_the_card_and_the_layers(faceprint: Faceprint, bundle: ModelBundle) -> None:
    status, out, _ = faceprint("model", bundle.folder, "--layer-table")
    assert status == 0
    assert bundle.fingerprint in out
    for word in ("Convolution", "Batch Normalization", "Fully Connected", "Softmax"):
        assert word in out


def test_train_then_ingest_then_search_from_a_folder_of_photos(
    faceprint: Faceprint, few: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    status, out, _ = faceprint(
        "train", few, "--out", model, "--weights", "none", "--epochs", 1, "--image-size", 32
    )
    assert status == 0
    assert "validation accuracy" in out
    for name in ("bundle.json", "model.onnx", "model.safetensors", "report.html", "metrics.json"):
        assert (model / name).is_file()
    assert faceprint("ingest", tmp_path / "g", few, "--model", model)[0] == 0
    status, out, _ = faceprint("search", tmp_path / "g", sorted(few.glob("*/*.jpg"))[5], "--json")
    assert (status, json.loads(out)[0]["matches"][0]["face_id"]) == (0, 6)


def _another_model(bundle: ModelBundle, folder: Path) -> Path:
    """The same network for another crop, which is another model."""
    from dataclasses import replace

    from safetensors.numpy import load_file

    tensors = load_file(bundle.weights_path)
    preprocessing = replace(bundle.preprocessing, crop=0.5)
    ModelBundle.create(
        folder,
        tensors=tensors,
        graph=bundle.graph_path.read_bytes(),
        architecture=bundle.architecture,
        labels=bundle.labels,
        preprocessing=preprocessing,
        dimension=bundle.dimension,
        recipe={},
        split={},
        figures={},
        versions={},
        created_at=bundle.created_at,
    )
    return folder


def test_a_gallery_refuses_another_model(
    faceprint: Faceprint, enrolled: Path, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    other = _another_model(bundle, tmp_path / "other")
    status, _, err = faceprint("ingest", enrolled, faces, "--model", other)
    assert status == 2
    assert "was made with another model" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("search", "{tmp}/none", "x.jpg"), "There is no gallery {tmp}/none"),
        (("info", "{tmp}"), "{tmp} is not a gallery: it has no gallery.db."),
        (("model", "{tmp}/none"), "There is no model folder {tmp}/none"),
        (("model", "{tmp}"), "{tmp} is not a model: it has no bundle.json"),
        (("ingest", "{tmp}/g", "{faces}"), "There is no gallery {tmp}/g; pass --model MODEL to make one."),
        (("ingest", "{tmp}/g", "{faces}/no", "--model", "{model}"), "There is no file or folder {faces}/no"),
        (("ingest", "{tmp}/g", "{empty}", "--model", "{model}"), "There are no photos in {empty}"),
        (("ingest", "{tmp}/g", "{faces}", "--model", "{tmp}"), "{tmp} is not a model"),
        (("train", "{tmp}/none", "--out", "{tmp}/m"), "There is no folder {tmp}/none"),
        (("train", "{empty}", "--out", "{tmp}/m"), "{empty} has no photos"),
        (("train", "{one}", "--out", "{tmp}/m"), "takes two identities at least"),
        (("train", "{single}", "--out", "{tmp}/m"), "--min-images 2"),
        (("train", "{faces}", "--out", "{model}"), "holds a finished model already"),
        (("train", "{faces}", "--out", "{tmp}/m", "--weights", "{tmp}/w"), "There is no weights file"),
        (("train", "{faces}", "--out", "{tmp}/m", "--lr", "0"), "--lr must be above 0"),
        (("train", "{faces}", "--out", "{tmp}/m", "--crop", "1.5"), "--crop must be above 0 and at most 1"),
        (("train", "{faces}", "--out", "{tmp}/m", "--weights", "none", "--device", "warp"), "no device warp"),
        (("demo", "--out", "{faces}"), "is not empty and holds no earlier demo"),
        (("demo", "--data", "{tmp}/none", "--out", "{tmp}/d"), "There is no folder {tmp}/none"),
        (("train", "{faces}", "--out", "{faces}/m"), "would lie among the photos of {faces}"),
        (("ingest", "{tmp}/g", "{faces}", "--model", "{model}", "--report", "{tmp}"), "{tmp} is a folder"),
        (("ingest", "{tmp}/g", "{faces}", "--model", "{model}", "--report", "{tmp}/n/r"), "{tmp}/n for"),
        (("info", "{photo}"), "{photo} is a file; a gallery is a folder."),
    ],
)  # fmt: skip
def test_what_a_user_does_wrong_is_one_sentence_and_status_2(
    faceprint: Faceprint,
    bundle: ModelBundle,
    faces: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    places = {"tmp": tmp_path / "t", "faces": faces, "model": bundle.folder}
    photo = places["photo"] = sorted(faces.glob("*/*.jpg"))[0]
    for name in ("empty", "one", "single"):
        places[name] = tmp_path / name
        places[name].mkdir()
    (tmp_path / "t").mkdir()
    shutil.copytree(photo.parent, places["one"] / "Only")
    shutil.copytree(photo.parent, places["single"] / "Many")
    (places["single"] / "Lone").mkdir()
    shutil.copy(photo, places["single"] / "Lone" / "1.jpg")

    status, _, err = faceprint(*(argument.format(**places) for argument in arguments))

    said = err.strip().splitlines()[-1]
    assert status == 2
    assert said.startswith("faceprint: ")
    assert sentence.format(**places) in said
    assert "Traceback" not in err
    assert not any(place.exists() for place in (tmp_path / "t" / "g", tmp_path / "t" / "m"))


def test_a_demo_does_not_take_the_photos_that_it_would_remove(faceprint: Faceprint, tmp_path: Path) -> None:
    photos = tmp_path / "demo" / "photos"
    (photos / "Ada").mkdir(parents=True)
    (tmp_path / "demo" / "faceprint-demo.json").write_text("{}")
    status, _, err = faceprint("demo", "--data", photos, "--out", tmp_path / "demo")
    assert status == 2
    assert "which the demo makes anew" in err
    assert (photos / "Ada").is_dir()


def test_a_name_with_control_characters_does_not_reach_the_terminal(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "more" / "Eve and [bold]Bob[/] \u202e"
    folder.mkdir(parents=True)
    photo = folder / "a\x1b[2J\n.png"
    Image.new("RGB", (40, 40), "red").save(photo)
    assert faceprint("ingest", enrolled, tmp_path / "more")[0] == 0
    status, out, _ = faceprint("search", enrolled, photo, "-k", 1)
    assert status == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]Bob[/]" in out


def test_two_first_ingests_at_once_make_one_gallery(bundle: ModelBundle, faces: Path, tmp_path: Path) -> None:
    half = sorted(path for path in faces.iterdir())
    parts = [tmp_path / "one", tmp_path / "two"]
    for part, people in zip(parts, (half[:3], half[3:]), strict=True):
        for person in people:
            shutil.copytree(person, part / person.name)
    children = [_child("ingest", tmp_path / "g", part, "--model", bundle.folder) for part in parts]
    for child in children:
        _, err = child.communicate()
        assert child.returncode == 0, err
    listed = subprocess.run(
        [sys.executable, "-m", "retrieval.cli.app", "info", str(tmp_path / "g"), "--json"],
        capture_output=True,
        check=True,
    )
    facts = json.loads(listed.stdout)
    assert (facts["faces"], facts["identities"]) == (36, 6)


def test_weights_that_are_not_a_resnet50s_are_refused(
    faceprint: Faceprint, faces: Path, tmp_path: Path
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    status, _, err = faceprint(
        "train", faces, "--out", tmp_path / "m", "--weights", tmp_path / "w.safetensors"
    )
    assert status == 2
    assert "cannot be read as safetensors" in err


def test_a_gallery_of_a_newer_version_is_refused(faceprint: Faceprint, enrolled: Path) -> None:
    import sqlite3

    connection = sqlite3.connect(enrolled / "gallery.db")
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    status, _, err = faceprint("info", enrolled)
    assert status == 2
    assert "was made by a newer version of faceprint" in err


@pytest.mark.parametrize(
    "arguments", [(), ("train",), ("evaluate",), ("model",), ("ingest",), ("search",), ("info",), ("demo",)]
)
def test_every_command_has_help(faceprint: Faceprint, arguments: tuple[str, ...]) -> None:
    """The page of commands is made of it; `tests/docs/test_site.py` says so."""
    status, out, _ = faceprint(*arguments, "--help")
    assert status == 0
    assert "Usage: faceprint" in out


def test_a_missing_argument_is_status_2(faceprint: Faceprint) -> None:
    assert faceprint("search")[0] == 2


def test_the_version_is_the_packages(faceprint: Faceprint) -> None:
    import retrieval

    assert faceprint("--version")[1].strip() == f"faceprint {retrieval.__version__}"


def _child(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "retrieval.cli.app", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_during_training_leaves_a_checkpoint_that_resume_goes_on_from(
    faceprint: Faceprint, few: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    common = ["train", few, "--out", model, "--weights", "none", "--image-size", 32, "--epochs"]
    child = _child(*common, 40, "--batch-size", 4)
    while not (model / "checkpoint.safetensors").exists():
        assert child.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    assert not (model / "bundle.json").exists()
    status, _, err = faceprint(*common, 41, "--batch-size", 4, "--resume")
    assert status == 2
    assert "with epochs 40 (now 41)" in err


def test_importing_the_library_does_not_import_torch() -> None:
    code = (
        "import sys; from retrieval import *; import retrieval.cli.app; "
        "assert 'torch' not in sys.modules and 'training' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['faceprint', '--help']\n"
        "from retrieval.cli import app as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'faiss', 'sqlalchemy', 'onnxruntime', 'torch', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_search_imports_only_what_it_needs(enrolled: Path, faces: Path) -> None:
    code = (
        "import sys; sys.argv = ['faceprint', 'search', *sys.argv[1:]]\n"
        "from retrieval.cli import app as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "needless = {'torch', 'scipy', 'pyarrow', 'fsspec', 'fastapi', 'jinja2', 'alembic', 'urllib.request',"
        " 'http.client', 'rich._emoji_codes', 'training', 'retrieval.bulk', 'retrieval.quality',"
        " 'retrieval.service', 'retrieval.pages'} & set(sys.modules)\n"
        "print(sorted(needless))"
    )
    photo = next(faces.glob("*/*.jpg"))
    done = subprocess.run([sys.executable, "-c", code, enrolled, photo], check=True, capture_output=True)
    assert photo.parent.name in done.stdout.decode()
    assert done.stdout.decode().splitlines()[-1] == "[]"


def test_an_evaluation_imports_torch_only_for_the_network_before_fine_tuning() -> None:
    code = "import sys, training.commands.evaluate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Metadata


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ingest_sets_what_a_table_says_and_again_changes_nothing(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    rows = [f"{photo},{2000 + number},00{number}" for number, photo in enumerate(photos[:12])]
    table = write(tmp_path / "m.csv", "path,year,badge", *rows, "gone.jpg,1,1")
    command = ("ingest", tmp_path / "g", faces, "--model", bundle.folder, "--metadata", table)
    report = tmp_path / "r.jsonl"
    status, out, _ = faceprint(*command, "--report", report)
    assert status == 0
    assert "enrolled 36" in out
    said = f"metadata: 12 faces set, 0 unchanged, 1 path unknown\n1 line in {report}\n"
    assert out.endswith(said)
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {
            "path": str(tmp_path / "gone.jpg"),
            "identity": None,
            "status": "unknown",
            "reason": None,
            "detail": "metadata of nothing enrolled",
            "face_id": None,
            "replaced": None,
        }
    ]
    status, out, _ = faceprint(*command)
    assert (status, out.splitlines()[-1]) == (0, "metadata: 0 faces set, 12 unchanged, 1 path unknown")
    status, out, _ = faceprint("search", tmp_path / "g", photos[3], photos[20], "-k", 1, "--json")
    (first,), (second,) = (answer["matches"] for answer in json.loads(out))
    assert first["metadata"] == {"year": 2003, "badge": "003"}
    assert "metadata" not in second


def test_the_lines_of_a_report_are_counted_with_those_of_metadata(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    """36 photos that are known already, a file that is no photo, and a row about no photo."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    table = write(tmp_path / "m.csv", "path,year", "gone.jpg,1")
    command = ("ingest", enrolled, faces, broken, "--metadata", table, "--report", tmp_path / "r.jsonl")
    _, out, _ = faceprint(*command)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 38
    assert out.endswith(f"38 lines in {tmp_path / 'r.jsonl'}\n")


def test_ingest_of_metadata_alone_needs_a_gallery_and_no_source(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    name = sorted(path.name for path in faces.iterdir())[0]
    table = write(tmp_path / "people.csv", "identity,country", f"{name},FR", "Nobody,IT", "Noone,IT")
    report, printed = tmp_path / "r.jsonl", "metadata: 1 identity set, 0 unchanged, 2 identities unknown\n"
    status, out, _ = faceprint("ingest", enrolled, "--metadata", table, "--report", report)
    assert (status, out) == (0, f"{printed}2 lines in {report}\n")
    with Gallery.open(enrolled) as gallery:
        assert gallery.identity_metadata([name]) == {name: {"country": "FR"}}
        assert gallery.info().faces == 36
    status, _, err = faceprint("ingest", tmp_path / "none", "--metadata", table)
    assert (status, err) == (
        2,
        f"faceprint: There is no gallery {tmp_path / 'none'}; make one with `faceprint ingest`.\n",
    )
    assert not (tmp_path / "none").exists()


def test_a_malformed_table_is_found_before_anything_is_enrolled(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    table = write(tmp_path / "m.csv", "path,year", "a.jpg,1", "b.jpg")
    status, out, err = faceprint(
        "ingest", tmp_path / "g", faces, "--model", bundle.folder, "--metadata", table
    )
    assert (status, out) == (2, "")
    assert err == f"faceprint: Line 3 of {table} has 1 values; there are 2 columns.\n"
    assert not (tmp_path / "g").exists()


def test_ingest_without_anything_to_do_says_what_to_name(faceprint: Faceprint, enrolled: Path) -> None:
    status, _, err = faceprint("ingest", enrolled)
    assert status == 2
    assert err.startswith("faceprint: Name sources, or --retry REPORT, or --embeddings FILE;")


# What machines read


def test_a_log_of_json_has_only_objects_and_ends_with_the_summary(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    expected = make_broken(tmp_path / "bad")
    status, out, err = faceprint(
        "ingest", tmp_path / "g", faces, tmp_path / "bad", "--model", bundle.folder, "--log-json"
    )
    events = [json.loads(line) for line in out.splitlines()]
    assert status == 1  # the dangling link may be there again another time
    assert len(err.splitlines()) == 1
    assert (events[0]["event"], events[-1]["event"]) == ("start", "done")
    rejected = [event for event in events if event["event"] == "rejected"]
    assert {Path(event["path"]).name: event["reason"] for event in rejected} == expected
    summary = events[-1]["summary"]
    assert (summary["found"], summary["enrolled"], summary["rejected"]) == (56, 36, 20)
    assert summary["found"] == sum(summary[n] for n in ("enrolled", "known", "duplicate", "rejected"))
    assert summary["bottleneck"] in [stage["name"] for stage in summary["stages"]]


def test_progress_is_logged_every_second_with_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrieval.console import progress
    from retrieval.embedding.outcome import Outcome, Status

    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    with progress.JsonLog("enrolling", progress.Total(4)) as log:
        log.note(Outcome("/a.jpg", None, Status.ENROLLED, 1))
        log.note(Outcome("/b.jpg", "Kim", Status.KNOWN, 2))
    start, first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert start == {"event": "start", "doing": "enrolling", "total": 4}
    assert (first["done"], second["done"], second["total"], second["rejected"]) == (1, 2, 4, 0)
    assert second["photos_per_second"] > 0
    assert second["seconds_left"] >= 0


def test_a_total_is_counted_beside_a_run_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval.console import progress

    monkeypatch.setattr(progress, "_MIN_SECONDS_TO_COUNT", 0.01)
    counted = threading.Event()
    total = progress.Total(lambda: (counted.set(), 7)[1])
    total.start()
    counted.wait()
    total.stop()
    while total.number is None:
        time.sleep(0.01)
    assert total.number == 7
    short = progress.Total(lambda: 1 // 0)
    short.stop()
    assert short.number is None


def test_the_summary_is_written_to_a_file(
    faceprint: Faceprint, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    status, _, _ = faceprint("ingest", enrolled, faces, "--rehash", "--summary", tmp_path / "s.json")
    assert status == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["found"], summary["known"], summary["interrupted"]) == (36, 36, False)
    assert summary["bytes_read"] == sum(path.stat().st_size for path in faces.glob("*/*.jpg"))


def test_all_rates_of_a_report_are_by_the_seconds_until_the_last_photo_was_durable() -> None:
    """Making searches quick comes afterwards, and photos are not read by then."""
    from retrieval.bulk.ingest import IngestReport
    from retrieval.cli.photo_runs import how_quick
    from retrieval.system.pipeline import Meter

    read = Meter("read", workers=2)
    read.busy_seconds = 4.0
    done = IngestReport(
        seconds=10.0, optimizing_seconds=6.0, bytes_read=8_000_000, stages=(read,), enrolled=40
    )
    summary = done.summary()
    assert (summary["photos_per_second"], summary["megabytes_per_second"]) == (10.0, 2.0)
    assert how_quick(done).startswith(
        "10 photos/s, 2.0 MB/s read, the busiest stage was read (50% of the time), "
    )


@pytest.mark.parametrize("name", ["out.parquet", "out.npy"])
def test_embed_writes_a_row_for_each_photo_and_a_line_for_each_broken_file(
    name: str, faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.jpg").write_bytes(b"")
    out, report = tmp_path / name, tmp_path / "r.jsonl"
    status, shown, _ = faceprint(
        "embed", bundle.folder, faces, tmp_path / "bad", "--out", out, "--report", report
    )
    assert status == 0
    assert "found 37 = embedded 36 + rejected 1" in shown
    (line,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert (line["reason"], line["status"]) == ("empty-file", "rejected")
    assert out.exists()
    status, shown, _ = faceprint(
        "embed", bundle.folder, faces, tmp_path / "bad", "--out", out, "--strict", "--log-json"
    )
    assert status == 1
    assert json.loads(shown.splitlines()[-1])["summary"]["embedded"] == 36


def test_what_embed_wrote_can_be_ingested(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    faceprint("embed", bundle.folder, faces, "--out", tmp_path / "out.parquet")
    Gallery.create(tmp_path / "g", bundle).close()
    status, out, _ = faceprint("ingest", tmp_path / "g", "--embeddings", tmp_path / "out.parquet")
    assert status == 0
    assert "enrolled 36" in out


def test_embed_of_nothing_but_broken_files_is_an_input_error_and_no_file(
    faceprint: Faceprint, bundle: ModelBundle, tmp_path: Path
) -> None:
    make_broken(tmp_path / "bad")
    status, _, err = faceprint("embed", bundle.folder, tmp_path / "bad", "--out", tmp_path / "out.npy")
    assert (status, err.splitlines()[-1]) == (
        2,
        "faceprint: Not one of the 20 files could be embedded; --report FILE says why.",
    )
    assert not (tmp_path / "out.npy").exists()


def test_a_list_of_pictures_from_a_device_that_has_no_end_is_refused(
    faceprint: Faceprint, enrolled: Path
) -> None:
    status, _, err = faceprint("search", enrolled, "--paths", "/dev/zero")
    assert (status, err) == (
        2,
        "faceprint: The list /dev/zero cannot be read: it is a device, not a file.\n",
    )
