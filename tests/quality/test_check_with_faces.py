"""A check with a face detector: what it finds, what is left to train on, its page, and the command."""

import base64
import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from retrieval.errors import InputError
from retrieval.images.face_detector import FaceDetector
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.detectors import open_detector
from retrieval.models.network import Network
from retrieval.quality.check_page import page
from retrieval.quality.dataset_check import Check, check
from retrieval.quality.findings import DataFinding, Kind
from retrieval.quality.photo_set import CheckOptions
from tests.cli.test_app import Faceprint
from tests.detectors import COLOURS, detector, drawn, graph, save
from training.data import dataset
from training.fitting.export import export

SMALL = CheckOptions(preprocessing=Preprocessing(32, 1.0))
READER = PhotoReader(Preprocessing(32, 1.0, faces=FaceAlignment(detector().sha256)), detector())
MARK = (64, 48, 16)


@pytest.fixture
def faceprint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Faceprint:
    return Faceprint(capsys, monkeypatch)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Three identities of four photos; of one of them, a photo without a face and one with three."""
    for number in range(12):
        save(tmp_path / "people" / "ABC"[number % 3] / f"{number}.png", (200, 160), [MARK], seed=number)
    nobody(tmp_path / "people/A/nobody.png")
    save(tmp_path / "people/A/three.png", (560, 320), [(64, 64, 16), (256, 96, 32), (448, 144, 16)], seed=21)
    return tmp_path / "people"


def nobody(path: Path) -> None:
    """Saves a coloured picture without a face, another one for each identity."""
    picture = drawn((200, 160), [], seed=ord(path.parent.name))
    ImageDraw.Draw(picture).rectangle((20, 20, 60, 60), fill=(200, 60, 20))
    picture.save(path)


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """The file of the detector."""
    (tmp_path / "marks.onnx").write_bytes(graph())
    return tmp_path / "marks.onnx"


def found(done: Check) -> dict[Kind, DataFinding]:
    return {finding.kind: finding for finding in done.findings}


def names(finding: DataFinding) -> list[str]:
    return [Path(item.photos[0].path or "").name for item in finding.items]


def test_photos_without_a_face_and_with_several_are_found_and_no_other(people: Path) -> None:
    done = check(os.fspath(people), detector=detector(), options=SMALL)
    assert {kind: names(finding) for kind, finding in found(done).items()} == {
        Kind.NO_FACE: ["nobody.png"],
        Kind.SEVERAL_FACES: ["three.png"],
    }
    assert (done.photos, done.readable, done.harms) == (14, 14, False)
    (three,) = found(done)[Kind.SEVERAL_FACES].items
    assert three.photos[0].box == (176.5, 16.5, 192, 192)


def test_without_a_detector_nothing_is_said_about_faces(people: Path) -> None:
    done = check(os.fspath(people), options=SMALL)
    assert done.findings == ()
    assert done.options == SMALL
    assert done.as_json()["options"]["detector"] is None


def test_the_halves_and_the_cleaned_list_have_the_photos_that_train_takes(
    people: Path, tmp_path: Path
) -> None:
    nobody(people / "B" / "nobody.png")
    done = check(os.fspath(people), detector=detector(), options=SMALL)
    split = dataset.load(people, validation_fraction=0.3, min_images=None, seed=0, reader=READER)
    assert {one.name: (one.training, one.validation) for one in done.people} == {
        label: tuple(
            sum(sample.label == number for sample in half) for half in (split.train, split.validation)
        )
        for number, label in enumerate(split.labels)
    }
    taken = {os.fspath(one.path) for one in (*split.train, *split.validation)}
    assert {path for path, _ in done.cleaned} == taken
    assert {(Path(path or "").name, kind) for path, _, kind in done.left_out} == {
        ("nobody.png", Kind.NO_FACE)
    }


def test_an_identity_with_one_face_among_its_photos_cannot_be_split(people: Path) -> None:
    save(people / "D" / "face.png", (200, 160), [MARK], seed=40)
    nobody(people / "D" / "nobody.png")
    finding = found(check(os.fspath(people), detector=detector(), options=SMALL))[Kind.SINGLE_PHOTO]
    assert finding.count == 1
    assert "fewer than 2 readable photos with a face" in finding.says


def test_a_copy_with_a_face_stays_where_its_original_has_none(people: Path) -> None:
    """In the smaller copy the mark no longer fills a cell of the detector."""
    picture = drawn((320, 256), [(96, 96, 32)], seed=50)
    picture.save(people / "C" / "with.png")
    picture.resize((300, 240)).save(people / "C" / "again.png")
    done = check(os.fspath(people), detector=detector(), options=SMALL)
    assert "again.png" in names(found(done)[Kind.NO_FACE])
    assert Kind.NEAR_COPY in found(done) or Kind.ACROSS_SPLIT_NEAR in found(done)
    assert os.fspath(people / "C" / "with.png") in {path for path, _ in done.cleaned}


def test_a_face_without_edges_is_blurred(people: Path) -> None:
    """The mark has the grey level of all that is around it."""
    level = sum(COLOURS[16]) // 3
    picture = Image.new("RGB", (240, 240), (level,) * 3)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((96, 112, 111, 127), fill=COLOURS[16])
    draw.rectangle((200, 0, 239, 239), fill=(0, 0, 0))
    picture.save(people / "B" / "soft.png")
    finding = found(check(os.fspath(people), detector=detector(), options=SMALL))[Kind.FACE_BLURRED]
    assert names(finding) == ["soft.png"]
    assert finding.items[0].detail == "sharpness 0.3"


def test_wide_photos_with_a_face_are_no_odd_shapes(people: Path) -> None:
    save(people / "B" / "wide.png", (480, 160), [MARK], seed=60)
    assert Kind.STRETCHED in found(check(os.fspath(people), options=SMALL))
    assert Kind.STRETCHED not in found(check(os.fspath(people), detector=detector(), options=SMALL))


@pytest.fixture(scope="module")
def aligned(network: Network, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    folder = tmp_path_factory.mktemp("models") / "aligned"
    sample = READER.square(drawn((200, 160), [MARK]))[None]
    return export(
        network, folder, labels=tuple("ABCDEF"), reader=READER, recipe={}, split={}, figures={}, sample=sample
    )


def test_the_detector_of_a_model_is_used_and_labels_of_photos_without_a_face_are_not_judged(
    people: Path, aligned: ModelBundle
) -> None:
    heard: list[str] = []
    done = check(
        os.fspath(people), model=aligned, options=SMALL, on_photo=lambda stage, _: heard.append(stage)
    )
    assert names(found(done)[Kind.NO_FACE]) == ["nobody.png"]
    assert done.judged == heard.count("embedding") == 13
    assert done.options.preprocessing.faces == aligned.preprocessing.faces


def test_a_second_detector_beside_that_of_the_model_is_refused(people: Path, aligned: ModelBundle) -> None:
    with pytest.raises(InputError, match="has a face detector of its own; leave `detector` out"):
        check(os.fspath(people), model=aligned, detector=detector(), options=SMALL)


# Real photographs


@pytest.fixture(scope="module")
def yunet(shared: Path) -> FaceDetector:
    return open_detector(shared / "weights/yunet_s_640_640.onnx")


def test_real_faces_that_are_tiny_blurred_and_turned_are_told_from_good_ones(
    shared: Path, yunet: FaceDetector, tmp_path: Path
) -> None:
    lfw = shared / "data/lfw"
    for name in ("George_W_Bush", "Colin_Powell", "Tony_Blair"):
        (tmp_path / name).mkdir()
        for number in range(1, 4):
            file = f"{name}_{number:04}.jpg"
            (tmp_path / name / file).write_bytes((lfw / name / file).read_bytes())
    turned = "Jacques_Chirac_0010.jpg"
    (tmp_path / "Tony_Blair" / turned).write_bytes((lfw / "Jacques_Chirac" / turned).read_bytes())
    with Image.open(lfw / "Serena_Williams/Serena_Williams_0001.jpg") as picture:
        picture.resize((44, 44)).save(tmp_path / "Tony_Blair" / "tiny.png")
        picture.resize((44, 44)).resize((250, 250)).save(tmp_path / "Colin_Powell" / "blurred.png")
    done = check(
        os.fspath(tmp_path), detector=yunet, options=CheckOptions(preprocessing=Preprocessing(112, 1.0))
    )
    listed = {kind: names(one) for kind, one in found(done).items() if kind.startswith("face-")}
    assert listed == {
        Kind.FACE_TOO_SMALL: ["tiny.png"],
        Kind.FACE_BLURRED: ["blurred.png"],
        Kind.FACE_TURNED: [turned],
    }


# The page


def pictures(html: str, kind: Kind) -> list[np.ndarray]:
    """The pictures of a finding, (H, W, 3) uint8."""
    section = html.split(f'<section id="{kind}">')[1].split("</section>")[0]
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", section)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def share(picture: np.ndarray, colour: tuple[int, ...]) -> float:
    """The share of the pixels that have a colour, nearly."""
    return float((np.abs(picture.astype(int) - colour).max(2) < 60).mean())


def test_the_page_shows_the_face_in_place_of_the_photo(people: Path) -> None:
    save(people / "A" / "corner.png", (640, 160), [(16, 16, 16)], seed=70)
    save(people / "B" / "corner.png", (640, 160), [(16, 16, 16)], seed=70)
    whole = page(check(os.fspath(people), options=SMALL)).decode()
    faces = page(check(os.fspath(people), detector=detector(), options=SMALL)).decode()
    (before, _), (after, _) = pictures(whole, Kind.TWO_NAMES), pictures(faces, Kind.TWO_NAMES)
    assert before.shape == (64, 256, 3)
    assert after.shape == (256, 256, 3)
    # The mark is 16 of 160 pixels: the height of the photo is less than the context of the face.
    assert share(after, COLOURS[16]) == pytest.approx((16 / (1.6 * 96)) ** 2, rel=0.2)
    assert share(after, (0, 0, 0)) < 0.05


def test_the_page_shows_all_of_a_photo_with_several_faces_and_frames_the_one_that_is_taken(
    people: Path,
) -> None:
    (picture,) = pictures(
        page(check(os.fspath(people), detector=detector(), options=SMALL)).decode(), Kind.SEVERAL_FACES
    )
    assert picture.shape == (146, 256, 3)
    yellow = (np.abs(picture.astype(int) - (0xFF, 0xC8, 0x3D)).max(2) < 60).nonzero()
    across = (yellow[1].min(), yellow[1].max())
    assert across == pytest.approx((176.5 * 256 / 560, 368.5 * 256 / 560), abs=3)


def test_the_page_says_whether_faces_were_searched_for(people: Path) -> None:
    assert "that takes a detector" in page(check(os.fspath(people), options=SMALL)).decode()
    html = page(check(os.fspath(people), detector=detector(), options=SMALL)).decode()
    assert "32 pixels, aligned faces" in html


# The command


def test_the_command_finds_faces_with_a_detector_and_says_where_it_has_none(
    faceprint: Faceprint, people: Path, marks: Path, tmp_path: Path
) -> None:
    target, cleaned = tmp_path / "found.json", tmp_path / "clean.csv"
    status, out, err = faceprint(
        "check", people, "--detector", marks, "--image-size", 32, "--json-file", target, "--fix", cleaned
    )
    assert (status, err) == (0, "")
    assert "Photos without a face" in out
    assert "ingest --faces one rejects all of them" in " ".join(out.split())
    assert "No faces were searched for" not in out
    told = json.loads(target.read_text())
    assert told["options"]["detector"] == detector().sha256
    none, several = told["findings"]
    assert (none["kind"], none["count"], several["kind"], several["count"]) == (
        "no-face", 1, "several-faces", 1,
    )  # fmt: skip
    assert "box" not in none["items"][0]["photos"][0]
    assert several["items"][0]["photos"][0]["box"] == [176.5, 16.5, 192, 192]
    with cleaned.open(newline="") as lines:
        assert "nobody.png" not in {Path(row["path"]).name for row in csv.DictReader(lines)}
    status, out, _ = faceprint("check", people)
    assert (status, "No faces were searched for; --detector yunet does that." in out) == (0, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--detector", "none.onnx"), "The face detector none.onnx cannot be read"),
        (("--detector", "yunet", "--crop", "0.5"), "--crop is of no use with --detector"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(
    faceprint: Faceprint, people: Path, options: tuple[str, ...], sentence: str
) -> None:
    status, _, err = faceprint("check", people, *options)
    assert status == 2
    assert sentence in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--detector", "MARKS"), "has a face detector of its own; leave --detector out"),
        (("--crop", "0.5"), "--crop is of no use with the model"),
    ],
)
def test_options_beside_a_model_that_aligns_faces_are_refused(
    faceprint: Faceprint,
    people: Path,
    marks: Path,
    aligned: ModelBundle,
    options: tuple[str, str],
    sentence: str,
) -> None:
    name, value = options
    command = ("check", people, "--model", aligned.folder, name, marks if value == "MARKS" else value)
    status, _, err = faceprint(*command)
    assert status == 2
    assert sentence in " ".join(err.split())
