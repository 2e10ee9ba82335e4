import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrieval.errors import InputError, Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.alignment import apply, face_transform
from retrieval.images.decoders import Decoders, decode_here
from retrieval.images.photo_reader import DetectionClock, FaceSelection, PhotoReader
from retrieval.images.picture import upright
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.system import isolation
from tests.detectors import detector, drawn

SIZE = 56
PREPROCESSING = Preprocessing(SIZE, 1.0, faces=FaceAlignment(detector().sha256))
READER = PhotoReader(PREPROCESSING, detector())

MARKS = [(64, 64, 16), (256, 96, 32), (448, 144, 16)]
THREE = drawn((560, 320), MARKS, seed=3)
LEFT, MIDDLE, RIGHT = range(3)

EXIF_INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def rejection(source: pixels.ImageSource, selection: FaceSelection = FaceSelection()) -> tuple[Reason, str]:
    with pytest.raises(UnreadableImage) as caught:
        READER.read(source, selection)
    return caught.value.reason, caught.value.detail


def far(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference of two pictures in levels."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def test_the_largest_and_most_central_face_is_aligned() -> None:
    (found,) = READER.read(THREE)
    assert found.face is not None
    assert found.face.box[2] == pytest.approx(6 * 32)
    # The nose of the template is where the middle of the mark is: yellow.
    column, row = (np.array([56.0252, 71.7366]) + 0.5) * SIZE / 112
    assert found.pixels[int(row), int(column)].tolist() == [255, 255, 0]
    assert np.array_equal(READER.square(THREE), found.pixels)


def test_all_faces_come_from_left_to_right() -> None:
    found = READER.read(THREE, FaceSelection("all"))
    assert [one.face.landmarks[2][0] for one in found] == pytest.approx([72.5, 272.5, 456.5])
    assert far(found[LEFT].pixels, found[RIGHT].pixels) > 5
    assert np.array_equal(found[MIDDLE].pixels, READER.read(THREE)[0].pixels)


def test_a_photo_is_rejected_for_what_its_faces_are() -> None:
    assert rejection(drawn((300, 200), [])) == (Reason.NO_FACE, "no face was found in it")
    assert rejection(THREE, FaceSelection("one")) == (
        Reason.SEVERAL_FACES,
        "it shows 3 faces and one is asked for",
    )
    assert rejection(THREE, FaceSelection(min_side=200)) == (
        Reason.FACE_TOO_SMALL,
        "its face has 192 pixels, and 200 is the limit",
    )
    blurred = FaceSelection(min_sharpness=1e6)
    assert rejection(THREE, blurred)[0] is Reason.FACE_BLURRED


def test_small_faces_do_not_count_as_several() -> None:
    (found,) = READER.read(THREE, FaceSelection("one", min_side=150))
    assert found.face is not None
    assert found.face.side == pytest.approx(192)


def test_limits_leave_the_other_faces_of_a_photo() -> None:
    assert len(READER.read(THREE, FaceSelection("all", min_side=150))) == 1
    sharpness = sorted(one.sharpness for one in READER.read(THREE, FaceSelection("all")))
    assert len(READER.read(THREE, FaceSelection("all", min_sharpness=sharpness[1]))) == 2


def test_a_turned_face_is_rejected_if_a_limit_is_set(shared: Path) -> None:
    reader = real_reader(shared)
    photo = shared / "data/lfw/George_W_Bush/George_W_Bush_0001.jpg"
    (found,) = reader.read(photo)
    assert found.face is not None
    assert 0 < abs(found.face.yaw) < 1
    with pytest.raises(UnreadableImage, match=r"its face is turned by 0\.\d\d, and 0 is the limit"):
        reader.read(photo, FaceSelection(max_yaw=0))


def real_reader(shared: Path, size: int = 112, **alignment: Any) -> PhotoReader:
    from retrieval.models.detectors import open_detector

    found = open_detector(shared / "weights/yunet_s_640_640.onnx")
    return PhotoReader(Preprocessing(size, 1.0, faces=FaceAlignment(found.sha256, **alignment)), found)


@pytest.mark.parametrize(
    ("version", "landmarks"),
    [
        (1, [100.735, 111.973, 147.727, 112.990, 119.525, 139.459, 105.148, 161.837, 145.282, 160.016]),
        (2, [100.795, 112.071, 147.484, 113.091, 119.468, 139.416, 105.098, 161.735, 145.045, 159.915]),
    ],
)
def test_a_version_of_the_alignment_finds_the_landmarks_that_it_found_when_it_came(
    shared: Path, version: int, landmarks: list[float]
) -> None:
    """Models of version 1 stay comparable with what is enrolled."""
    (found,) = real_reader(shared, version=version).read(shared / "data/lfw/AJ_Cook/AJ_Cook_0001.jpg")
    assert found.face is not None
    assert np.ravel(found.face.landmarks) == pytest.approx(landmarks, abs=0.02)


def test_with_faces_none_and_without_a_detector_the_picture_is_taken_as_it_is() -> None:
    expected = pixels.read(THREE, size=SIZE)
    (found,) = READER.read(THREE, FaceSelection("none"))
    assert found.face is None
    assert np.array_equal(found.pixels, expected)
    plain = PhotoReader(Preprocessing(SIZE, 1.0))
    assert np.array_equal(plain.square(THREE), expected)
    assert plain.find(THREE) == []


def test_find_returns_faces_of_any_size() -> None:
    tiny = drawn((200, 100), [(64, 40, 8)])
    assert rejection(tiny, FaceSelection(min_side=60))[0] is Reason.FACE_TOO_SMALL
    assert [face.box[2] for face in READER.find(tiny)] == pytest.approx([48])


def test_inspect_returns_all_faces_and_the_one_that_is_read() -> None:
    inspected = READER.inspect(THREE)
    assert inspected.found == tuple(READER.find(THREE))
    assert inspected.main is not None
    assert inspected.main.face == inspected.found[MIDDLE]
    assert np.array_equal(inspected.main.pixels, READER.square(THREE))
    plain = PhotoReader(Preprocessing(SIZE, 1.0))
    for nothing in (READER.inspect(drawn((300, 200), [])), plain.inspect(THREE)):
        assert (nothing.found, nothing.main) == ((), None)


def test_the_side_of_the_input_is_what_the_template_covers_in_the_photo() -> None:
    (face,) = READER.find(drawn((200, 160), [(64, 48, 16)]))
    faces = FaceAlignment(detector().sha256, margin=0.25)
    wider = PhotoReader(replace(PREPROCESSING, faces=faces), detector())
    assert wider.input_side(face) == pytest.approx(1.5 * READER.input_side(face))
    eyes = 32 / 35.2  # pixels of the photo for each of the template, by the distance of the eyes
    assert READER.input_side(face) == pytest.approx(112 * eyes, rel=0.1)


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_orientation_of_a_photo_changes_no_pixel_of_its_face(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = THREE.transpose(EXIF_INVERSE[orientation])
    assert np.array_equal(np.asarray(upright(stored, orientation)), np.asarray(THREE))
    expected = READER.read(THREE, FaceSelection("all"))
    found = READER.read(encoded(stored, kind, exif=exif), FaceSelection("all"))
    for one, other in zip(found, expected, strict=True):
        assert one.face == other.face
        assert far(one.pixels, other.pixels) < 0.05


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("GIF", "P")],
)
def test_a_file_of_any_format_gives_the_faces_of_its_picture(kind: str, mode: str) -> None:
    picture = THREE.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = READER.read(encoded(picture, kind, **options), FaceSelection("all"))
    for one, other in zip(found, READER.read(picture, FaceSelection("all")), strict=True):
        assert one.face == other.face
        assert np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("times", [2, 6, 12])
def test_a_large_jpeg_is_decoded_at_the_scale_that_its_faces_need(times: int) -> None:
    """The scaled decode differs from the full decode by a few levels, as that of `pixels.read` does."""
    large = THREE.resize((560 * times, 320 * times), Image.Resampling.BILINEAR)
    faces = READER.read(THREE, FaceSelection("all"))
    scaled = np.array([[times, 0, 0], [0, times, 0]])

    def locate(view: pixels.View) -> list[np.ndarray]:
        assert (view.width, view.height) == large.size
        assert view.pixels[..., 0].size <= 1280 * 960
        points = [apply(scaled, np.array(one.face.landmarks)) for one in faces if one.face is not None]
        return [face_transform(each, size=SIZE, template="arcface", margin=0) for each in points]

    found = pixels.align(encoded(large, "JPEG", quality=95), size=SIZE, locate=locate)
    whole = pixels.align(large, size=SIZE, locate=locate)
    for one, other, small in zip(found, whole, faces, strict=True):
        assert far(one, other) < 2
        assert far(one, small.pixels) < 4


def test_beyond_the_border_a_face_is_black() -> None:
    picture = THREE.crop((48, 48, 560, 320))
    (found, *_) = READER.read(picture, FaceSelection("all"))
    (inside, *_) = READER.read(THREE, FaceSelection("all"))
    assert found.face is not None
    assert found.face.box[0] < 0
    assert (found.pixels[:, 0] == 0).all()
    black = (found.pixels == 0).all(2)
    assert 0.1 < black.mean() < 0.6
    assert far(found.pixels[~black], inside.pixels[~black]) < 1


def test_a_face_that_shrinks_much_has_no_stairs() -> None:
    """Compared with the same face of a picture that was shrunk with an antialiased filter beforehand."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    large = Image.fromarray(noise)

    def locate(view: pixels.View) -> list[np.ndarray]:
        return [np.array([[32 / view.width, 0, 0], [0, 32 / view.height, 0]])]

    (found,) = pixels.align(large, size=32, locate=locate)
    expected = np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR))
    assert far(found, expected) < 1.5
    assert float(found.std()) < 12


def test_a_margin_shows_more_of_the_picture() -> None:
    yellow = []
    for margin in (0.0, 0.3):
        chosen = FaceAlignment(detector().sha256, margin=margin)
        (found,) = PhotoReader(Preprocessing(SIZE, 1.0, faces=chosen), detector()).read(THREE)
        yellow.append((found.pixels[..., 0].astype(int) - found.pixels[..., 2] > 64).sum())
    # Each side of the mark is smaller by 1 + 2 x 0.3.
    assert yellow[0] / yellow[1] == pytest.approx(1.6**2, rel=0.15)


def test_threads_and_processes_give_the_same_faces() -> None:
    contents = [encoded(THREE), encoded(drawn((300, 200), [])), encoded(THREE, "JPEG"), b"no picture", THREE]
    for selection in (FaceSelection(), FaceSelection("all"), FaceSelection("none")):
        clock = DetectionClock()
        with Decoders(1, reader=READER, ahead=1) as decoders:
            found = decoders(contents, READER, selection, clock=clock)
        assert (clock.seconds > 0) == (selection.faces != "none")
        for one, other in zip(found, decode_here(contents, READER, selection), strict=True):
            if isinstance(other, UnreadableImage):
                assert isinstance(one, UnreadableImage)
                assert (one.reason, one.detail) == (other.reason, other.detail)
            else:
                assert isinstance(one, list)
                assert [face.face for face in one] == [face.face for face in other]
                assert all(
                    np.array_equal(face.pixels, same.pixels) for face, same in zip(one, other, strict=True)
                )


def test_a_reader_can_be_sent_to_another_process() -> None:
    again = pickle.loads(pickle.dumps(READER))
    assert again.preprocessing == PREPROCESSING
    assert np.array_equal(again.square(THREE), READER.square(THREE))


def test_a_reader_takes_the_detector_that_the_preprocessing_states() -> None:
    with pytest.raises(InputError, match="states another face detector"):
        PhotoReader(PREPROCESSING)
    with pytest.raises(InputError, match="states another face detector"):
        PhotoReader(Preprocessing(SIZE, 1.0), detector())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"faces": "both"}, "`faces` is 'both'; choose of auto, largest, one, all, none."),
        ({"min_side": -1.0}, "`min_side` is -1.0; it must be at least 0."),
        ({"max_yaw": float("nan")}, "`max_yaw` is nan; it must be at least 0."),
    ],
)
def test_a_selection_that_cannot_be_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        FaceSelection(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": 0.0}, "The least score of a face is 0.0; it must be above 0 and at most 1."),
        ({"margin": 2.5}, "The margin around a face is 2.5; it must be between 0 and 2."),
        ({"template": "cat"}, "There is no template cat; choose of arcface."),
    ],
)
def test_an_alignment_that_cannot_be_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        FaceAlignment("0" * 64, **options)
    assert str(caught.value) == sentence


def test_a_photo_without_a_face_does_not_cost_the_process_that_decodes_it() -> None:
    nobody = encoded(drawn((300, 200), []), "BMP")
    assert rejection(nobody)[0] is Reason.NO_FACE
    idle = set(isolation._pool._idle[pixels._PROGRAM])
    assert rejection(nobody)[0] is Reason.NO_FACE
    assert set(isolation._pool._idle[pixels._PROGRAM]) == idle
