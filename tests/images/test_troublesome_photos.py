"""Photographs of kinds that give trouble, by a real detector: each ends as `docs/faces.md` promises."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from retrieval.errors import Reason, UnreadableImage
from retrieval.images.photo_reader import FaceImage, FaceSelection, PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.detectors import open_detector
from training.synthetic_faces import draw_faces

PEOPLE = ("Colin_Powell", "Laura_Bush", "Serena_Williams", "Vladimir_Putin", "Jennifer_Capriati", "Hans_Blix")


@pytest.fixture(scope="module")
def reader(shared: Path) -> PhotoReader:
    found = open_detector(shared / "weights/yunet_s_640_640.onnx")
    return PhotoReader(Preprocessing(112, 1.0, faces=FaceAlignment(found.sha256)), found)


@pytest.fixture(scope="module")
def people(shared: Path) -> list[Image.Image]:
    return [Image.open(shared / f"data/lfw/{name}/{name}_0001.jpg").convert("RGB") for name in PEOPLE]


@pytest.fixture(scope="module")
def plain(reader: PhotoReader, people: list[Image.Image]) -> np.ndarray:
    """The aligned face of the first photo."""
    return reader.square(people[0])


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of the grey levels of two pictures, where neither is black, as beyond the border."""
    both = (one > 0).any(2) & (other > 0).any(2)
    return float(np.corrcoef(one[both].mean(1), other[both].mean(1))[0, 1])


def with_orientation(picture: Image.Image, orientation: int) -> bytes:
    turns = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90"]
    name = [*turns, "TRANSVERSE", "ROTATE_270"][orientation]
    stored = picture if name is None else picture.transpose(Image.Transpose[name])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "JPEG", quality=95, exif=exif)


def within(picture: Image.Image, size: tuple[int, int], at: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, (120, 130, 140))
    canvas.paste(picture, at)
    return canvas


ONE_FACE: dict[str, Callable[[Image.Image], bytes | Image.Image]] = {
    **{
        f"EXIF orientation {n}": (lambda photo, n=n: with_orientation(photo, n))  # type: ignore[misc]
        for n in range(1, 9)
    },
    "grey": lambda photo: encoded(photo.convert("L"), "JPEG", quality=95),
    "CMYK": lambda photo: encoded(photo.convert("CMYK"), "JPEG", quality=95),
    "palette": lambda photo: encoded(photo.quantize(256), "PNG"),
    "16 bits": lambda photo: encoded(
        Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"
    ),
    "transparent": lambda photo: encoded(photo.convert("RGBA"), "WEBP", quality=95),
    "very wide": lambda photo: encoded(within(photo, (6000, 250), (4000, 0)), "JPEG", quality=95),
    "very tall": lambda photo: encoded(within(photo, (250, 6000), (0, 300)), "PNG"),
    "on its left side": lambda photo: photo.rotate(90, expand=True),
    "on its right side": lambda photo: photo.rotate(270, expand=True),
    "upside down": lambda photo: photo.rotate(180),
    "tilted by 30 degrees": lambda photo: photo.rotate(30, Image.Resampling.BICUBIC),
    "off centre": lambda photo: within(photo, (900, 700), (600, 420)),
    "mat of 16 megapixels": lambda photo: encoded(
        within(photo.resize((1000, 1000)), (4900, 3300), (3600, 100)), "JPEG", quality=90
    ),
    "small in a large photo": lambda photo: encoded(
        within(photo.resize((160, 160), Image.Resampling.LANCZOS), (2400, 1800), (1700, 300)),
        "JPEG",
        quality=95,
    ),
}


@pytest.mark.parametrize("kind", ONE_FACE)
def test_the_face_is_found_and_aligned(
    kind: str, reader: PhotoReader, people: list[Image.Image], plain: np.ndarray
) -> None:
    (found,) = reader.read(ONE_FACE[kind](people[0]), FaceSelection("all"))
    # Landmarks move by some pixels from picture to picture; a face that is not upright has no likeness.
    assert likeness(found.pixels, plain) > (0.5 if kind.startswith("tilted") else 0.75)
    assert nearest(found, people, reader) == PEOPLE[0]


def rejection(reader: PhotoReader, source: bytes | Image.Image, faces: str = "largest") -> Reason:
    with pytest.raises(UnreadableImage) as caught:
        reader.read(source, FaceSelection(faces))  # type: ignore[arg-type]
    return caught.value.reason


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (64, 64), (3000, 2000)])
def test_a_picture_of_nobody_has_no_face(size: tuple[int, int], reader: PhotoReader) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    soft = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))
    for picture in (Image.fromarray(noise), soft, Image.new("RGB", size, "white")):
        assert rejection(reader, picture) is Reason.NO_FACE


@pytest.fixture(scope="module")
def six(people: list[Image.Image]) -> Image.Image:
    """Six photos side by side, 3 x 2."""
    canvas = Image.new("RGB", (750, 500))
    for number, photo in enumerate(people):
        canvas.paste(photo, (250 * (number % 3), 250 * (number // 3)))
    return canvas


def nearest(found: FaceImage, people: list[Image.Image], reader: PhotoReader) -> str:
    likenesses = [likeness(found.pixels, reader.square(photo)) for photo in people]
    return PEOPLE[int(np.argmax(likenesses))]


def test_six_faces_are_found_from_left_to_right(
    six: Image.Image, people: list[Image.Image], reader: PhotoReader
) -> None:
    found = reader.read(encoded(six, "JPEG", quality=95), FaceSelection("all", min_side=60))
    # One of the photos has another person in it.
    assert len(found) == 7
    columns = [int(one.face.landmarks[2][0] // 250) for one in found if one.face is not None]
    assert columns == sorted(columns)
    assert {nearest(one, people, reader) for one in found} == set(PEOPLE)


def test_two_people_under_one_name_are_rejected_if_asked(
    people: list[Image.Image], reader: PhotoReader
) -> None:
    two = Image.fromarray(np.concatenate([np.asarray(people[0]), np.asarray(people[1])], axis=1))
    assert rejection(reader, two, "one") is Reason.SEVERAL_FACES
    assert len(reader.read(two, FaceSelection("all"))) == 2
    assert len(reader.read(two)) == 1


def test_a_face_at_the_border_is_aligned_with_black_beyond_it(
    people: list[Image.Image], plain: np.ndarray, reader: PhotoReader
) -> None:
    cut = people[0].crop((75, 0, 250, 250))
    (found,) = reader.read(cut)
    black = (found.pixels == 0).all(2)
    assert 0.01 < black.mean() < 0.5
    assert likeness(found.pixels, plain) > 0.75


def test_a_blurred_face_has_a_low_sharpness(people: list[Image.Image], reader: PhotoReader) -> None:
    (sharp,) = reader.read(people[0])
    (blurred,) = reader.read(people[0].filter(ImageFilter.GaussianBlur(4)))
    assert blurred.sharpness < sharp.sharpness / 3


def test_a_mirrored_face_is_turned_to_the_other_side(people: list[Image.Image], reader: PhotoReader) -> None:
    for photo in people:
        (found,), (mirrored,) = reader.read(photo), reader.read(ImageOps.mirror(photo))
        assert found.face is not None
        assert mirrored.face is not None
        assert mirrored.face.yaw == pytest.approx(-found.face.yaw, abs=0.15)


def test_the_landmarks_of_a_face_move_little_when_its_photo_is_shifted(
    people: list[Image.Image], reader: PhotoReader
) -> None:
    """`find` gives the detector's landmarks, `read` those of the close-ups."""
    spreads = []
    for photo in people:
        places = [(160 + 5 * number, 90 + 7 * number) for number in range(6)]
        pictures = [within(photo, (700, 500), place) for place in places]
        raw = [max(reader.find(picture), key=lambda face: face.side) for picture in pictures]
        exact = [reader.read(picture)[0].face for picture in pictures]
        for faces in (raw, exact):
            points = [np.subtract(face.landmarks, at) for face, at in zip(faces, places, strict=True) if face]
            spreads.append(np.std(points, axis=0).mean())
    assert np.mean(spreads[1::2]) < 0.75 * np.mean(spreads[::2])
    assert np.mean(spreads[1::2]) < 0.8


def test_a_drawn_face_is_a_face_or_none_and_never_an_error(reader: PhotoReader, tmp_path: Path) -> None:
    for path in draw_faces(tmp_path, identities=3, photos=2, size=200).glob("*/*.jpg"):
        faces = reader.find(path)
        assert len(faces) <= 1
        if faces:
            assert reader.square(path).shape == (112, 112, 3)
        else:
            assert rejection(reader, path.read_bytes()) is Reason.NO_FACE
