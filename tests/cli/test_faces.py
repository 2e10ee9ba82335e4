"""The commands with a model that has a face detector: options, output and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieval import Gallery, ModelBundle, ingest
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.network import Network
from tests.cli.test_app import Faceprint
from tests.detectors import detector, drawn, graph, save
from training.fitting.export import export

ALIGNED = Preprocessing(32, 1.0, faces=FaceAlignment(detector().sha256))


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.fixture(scope="module")
def aligned(network: Network, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    reader = PhotoReader(ALIGNED, detector())
    return export(
        network,
        tmp_path_factory.mktemp("models") / "aligned",
        labels=tuple("ABCDEF"),
        reader=reader,
        recipe={},
        split={},
        figures={},
        sample=np.stack([reader.square(drawn((200, 160), [(64, 48, 16)]))]),
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("Ada", "Bo")):
        save(folder / name / "left.png", (320, 200), [(64, 64, 16)], seed=number)
        save(folder / name / "right.png", (320, 200), [(224, 96, 16)], seed=number)
    save(folder / "Bo" / "two.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    save(folder / "Bo" / "nobody.png", (320, 200), [], seed=8)
    return folder


@pytest.fixture(scope="module")
def first(aligned: ModelBundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("enrolled") / "g"
    with Gallery.create(folder, aligned) as made:
        ingest(made, [photos])
    return folder


@pytest.fixture
def gallery(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "g"))


def test_ingest_says_which_photos_have_no_face(
    faceprint: Faceprint, aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    report = tmp_path / "r.jsonl"
    command = ("ingest", tmp_path / "g", photos, "--model", aligned.folder, "--report", report)
    status, out, err = faceprint(*command)
    assert (status, err) == (0, "")
    assert "found 6 = enrolled 5 + already known 0 + duplicate 0 + rejected 1" in out
    (line,) = map(json.loads, report.read_text().splitlines())
    assert (line["path"], line["reason"]) == (str(photos / "Bo/nobody.png"), "no-face")


def test_faces_one_rejects_photos_of_several_people(
    faceprint: Faceprint, aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    _, out, _ = faceprint("ingest", tmp_path / "g", photos, "--model", aligned.folder, "--faces", "one")
    assert "enrolled 4" in out
    assert "several-faces" in out


def test_limits_on_faces_reject_with_their_reasons(
    faceprint: Faceprint, aligned: ModelBundle, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.npy"
    _, said, _ = faceprint("embed", aligned.folder, photos, "--out", out, "--min-face", 150)
    assert "embedded 1 + rejected 5" in said
    assert "face-too-small" in said
    status, _, err = faceprint("embed", aligned.folder, photos, "--out", out, "--min-sharpness", 1e6)
    assert status == 2
    assert "Not one of the 6 files could be embedded" in err


def test_search_answers_for_each_face_with_its_box(
    faceprint: Faceprint, gallery: Path, tmp_path: Path
) -> None:
    group = save(tmp_path / "group.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    status, out, _ = faceprint("search", gallery, group, "--json")
    assert status == 0
    answers = json.loads(out)
    assert [answer["query"] for answer in answers] == [str(group)] * 2
    assert [answer["face"]["box"] for answer in answers] == [[24.5, 24.5, 96, 96], [208.5, -15.5, 192, 192]]
    assert [(answer["face"]["number"], answer["face"]["of"]) for answer in answers] == [(1, 2), (2, 2)]
    _, out, _ = faceprint("search", gallery, group)
    assert f"{group} (face 1 of 2, 96 x 96 at 24, 24)" in out.replace("\n", "")
    _, out, _ = faceprint("search", gallery, group, "--json", "--faces", "largest")
    assert json.loads(out) == [answers[1] | {"face": answers[1]["face"] | {"number": 1, "of": 1}}]
    _, out, _ = faceprint("search", gallery, group, "--json", "--faces", "none")
    (answer,) = json.loads(out)
    assert "face" not in answer


def test_a_part_of_a_picture_is_searched_for_and_its_face_is_placed_in_the_whole(
    faceprint: Faceprint, gallery: Path, tmp_path: Path
) -> None:
    group = save(tmp_path / "group.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    status, out, _ = faceprint("search", gallery, group, "--json", "--crop", "16,16,128,128")
    assert status == 0
    (answer,) = json.loads(out)
    assert answer["face"]["box"] == [24.5, 24.5, 96, 96]
    status, _, err = faceprint("search", gallery, group, "--crop", "400,0,100,100")
    assert status == 2
    assert "has 480 x 200 pixels, so --crop is not inside it" in " ".join(err.split())


def test_all_faces_of_photos_without_names_are_counted_and_get_names(
    faceprint: Faceprint, aligned: ModelBundle, tmp_path: Path
) -> None:
    save(tmp_path / "p" / "a.png", (640, 200), [(64, 64, 16), (288, 64, 32), (512, 96, 16)], seed=1)
    save(tmp_path / "p" / "b.png", (320, 200), [(64, 64, 16)], seed=2)
    where, summary = tmp_path / "g", tmp_path / "s.json"
    command = ("ingest", where, tmp_path / "p", "--model", aligned.folder, "--summary", summary)
    status, out, _ = faceprint(*command)
    assert status == 0
    assert "found 2 = enrolled 2" in out
    assert "4 faces in the 2 photos that were enrolled" in out
    assert json.loads(summary.read_text())["faces"] == 4
    assert faceprint("assign-identity", where, "Ada", 2, 4)[:2] == (0, "2 faces changed to Ada\n")
    _, out, _ = faceprint("search", where, "--face", 2, "--json", "-k", 3)
    (answer,) = json.loads(out)
    found = {match["face_id"]: match for match in answer["matches"]}
    assert found[4]["identity"] == "Ada"
    assert found[1]["box"] == [24.5, 24.5, 96, 96]
    status, _, err = faceprint("assign-identity", where, "Ada", 9)
    assert (status, "There is no face 9" in err) == (2, True)
    status, out, _ = faceprint("ingest", where, tmp_path / "p", "--faces", "one")
    assert "already known 2" in out


def test_a_picture_without_a_face_is_said_and_the_others_are_answered(
    faceprint: Faceprint, gallery: Path, photos: Path
) -> None:
    nobody, left = photos / "Bo/nobody.png", photos / "Bo/left.png"
    status, out, err = faceprint("search", gallery, nobody, left, "--json")
    assert status == 2
    refused, answered = json.loads(out)
    assert refused["error"]["reason"] == "no-face"
    assert answered["matches"][0]["identity"] == "Bo"
    assert f"faceprint: {nobody} cannot be read: no face was found in it (no-face)." in err.replace("\n", " ")


def test_a_plot_shows_the_box_of_each_face(faceprint: Faceprint, gallery: Path, tmp_path: Path) -> None:
    group = save(tmp_path / "group.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    picture = tmp_path / "answers.png"
    status, _, _ = faceprint("search", gallery, group, "--plot", picture, "-k", 1)
    assert status == 0
    shown = np.asarray(Image.open(picture))
    assert (shown == [0xFF, 0xC8, 0x3D]).all(2).sum() > 300


def test_model_shows_how_faces_are_found(faceprint: Faceprint, aligned: ModelBundle) -> None:
    _, out, _ = faceprint("model", aligned.folder)
    assert "faces aligned by five landmarks, 32 x 32 pixels" in out
    assert detector().sha256 in out.replace("\n", "").replace(" ", "")


def test_train_aligns_faces_and_the_model_carries_the_detector(faceprint: Faceprint, tmp_path: Path) -> None:
    file = tmp_path / "marks.onnx"
    file.write_bytes(graph())
    for number in range(8):
        save(tmp_path / "data" / "AB"[number % 2] / f"{number}.png", (160, 120), [(64, 48, 16)], seed=number)
    save(tmp_path / "data" / "A" / "nobody.png", (160, 120), [])
    options = ("--weights", "none", "--epochs", 1, "--image-size", 32, "--detector", file, "--margin", 0.2)
    status, _, _ = faceprint("train", tmp_path / "data", "--out", tmp_path / "m", *options)
    assert status == 0
    made = ModelBundle.load(tmp_path / "m")
    assert made.preprocessing.faces == FaceAlignment(detector().sha256, margin=0.2)
    photos = [*made.split["train"], *made.split["validation"]]
    assert len(photos) == 8
    assert "A/nobody.png" not in photos


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "d", "--out", "m", "--margin", "0.2"), "--margin is of use only with --detector"),
        (
            ("train", "d", "--out", "m", "--detector", "none.onnx"),
            "The face detector none.onnx cannot be read",
        ),
        (("train", "d", "--out", "m", "--detector", "yunet", "--crop", "0.5"), "--crop is of no use with"),
        (("ingest", "g", "p", "--faces", "two"), "--faces is 'two'; choose of largest, one, all, none"),
        (("search", "g", "p.png", "--faces", "both"), "--faces is 'both'; choose of largest, one, all, none"),
        (("search", "g", "p.png", "--crop", "1,2,3"), "--crop takes left, top, width and height in pixels"),
        (("search", "g", "p.png", "--crop", "1,2,0,4"), "--crop takes left, top, width and height in pixels"),
        (
            ("search", "g", "p.png", "--crop", "1,2,3,4", "--exclude-self"),
            "--exclude-self compares whole pictures",
        ),
    ],
)
def test_options_that_cannot_be_are_one_sentence(
    faceprint: Faceprint,
    arguments: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = faceprint(*arguments)
    assert status == 2
    assert sentence in " ".join(err.split())


def test_options_on_faces_are_refused_for_a_model_without_a_detector(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    command = ("ingest", tmp_path / "g", faces, "--model", bundle.folder, "--faces", "one")
    status, _, err = faceprint(*command)
    assert status == 2
    assert "has no face detector and takes pictures as they are" in " ".join(err.split())
    assert not (tmp_path / "g").exists()
