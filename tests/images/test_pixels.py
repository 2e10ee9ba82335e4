"""From any picture, whole or broken, to the pixels of a network."""

import hashlib
import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from retrieval.errors import InputError, Reason, UnreadableImage
from retrieval.images import pixels
from tests.broken import make_broken, without_rights
from training.synthetic_faces import draw_face

Levels = NDArray[np.uint8]


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Levels:
    """A picture without symmetry and without detail finer than a pixel."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    blue = 255 * (x / width) ** 2 * (1 - y / height)
    return np.rint(np.stack([red, green, blue], axis=-1)).astype(np.uint8)


def noisy(width: int, height: int, seed: int = 0) -> Levels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def difference(a: Levels, b: Levels) -> NDArray[np.int64]:
    return np.abs(a.astype(np.int64) - b)


def reason_of(source: Any, size: int = 16) -> Reason:
    with pytest.raises(UnreadableImage) as caught:
        pixels.read(source, size=size)
    return caught.value.reason


# Broken files


@pytest.mark.parametrize("heard", ["error", "ignore"])
def test_each_of_twenty_broken_files_has_its_reason(heard: Any, tmp_path: Path) -> None:
    """The reason does not depend on what becomes of Pillow's warnings, and a pipe makes nobody wait."""
    expected = make_broken(tmp_path)
    assert len(expected) == 20
    with warnings.catch_warnings():
        warnings.simplefilter(heard)
        assert {name: reason_of(tmp_path / name) for name in expected} == expected


def test_a_broken_file_has_the_same_reason_when_its_bytes_are_given(tmp_path: Path) -> None:
    expected = make_broken(tmp_path)
    files = [name for name in expected if (tmp_path / name).is_file()]
    assert len(files) == 18
    assert {name: reason_of((tmp_path / name).read_bytes()) for name in files} == {
        name: expected[name] for name in files
    }


def test_thumbnails_of_broken_files_have_the_same_reasons(tmp_path: Path) -> None:
    def reason(name: str) -> Reason:
        with pytest.raises(UnreadableImage) as caught:
            pixels.thumbnail(tmp_path / name, side=16)
        return caught.value.reason

    expected = make_broken(tmp_path)
    assert {name: reason(name) for name in expected} == expected


AVIF = b"\0\0\0\x1cftypavif\0\0\0\0mif1miaf"


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", Reason.EMPTY_FILE, "the file is empty"),
        (bytes(4096), Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"PK\x03\x04" + bytes(60), Reason.NOT_AN_IMAGE, "it is a zip archive"),
        (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"<HTML><svg/></HTML>", Reason.NOT_AN_IMAGE, "it is a web page"),
        (b"<?xml version='1.0'?><feed/>", Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"about <svg", Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"<svg/>", Reason.UNSUPPORTED_FORMAT, "it is an SVG drawing; convert it to PNG"),
        (b"<!DOCTYPE svg>\n<svg/>", Reason.UNSUPPORTED_FORMAT, "it is an SVG drawing; convert it to PNG"),
        (b"DDS \x7c\0\0\0" + bytes(120), Reason.UNSUPPORTED_FORMAT, "it is a DDS texture; convert it to PNG"),
        (
            b"\x01\xda\1\1\0\3\0\x20\0\x20\0\3" + bytes(500),
            Reason.UNSUPPORTED_FORMAT,
            "it is an SGI picture; convert it to PNG",
        ),
        (b"\x01\xda\5\1\0\3" + bytes(500), Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"\x0a\5\1\7" + bytes(124), Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"\n\5\1\nnotes", Reason.NOT_AN_IMAGE, "its bytes are no image that we know"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", Reason.NOT_AN_IMAGE, "it is a video"),
        (AVIF, Reason.DAMAGED, "its header is damaged"),
        (b"GIF89a", Reason.DAMAGED, "its header is damaged"),
        (b"\x89PNG\r\n\x1a\n", Reason.DAMAGED, "its header is damaged"),
        (b"BM" + bytes(30), Reason.DAMAGED, "its header is damaged"),
        (b"MM\0*\0\0", Reason.DAMAGED, "its header is damaged"),
        (b"RIFF\x04\0\0\0WEBP", Reason.DAMAGED, "its header is damaged"),
        (b"RIFF\xff\0\0\0WEBPVP8 \xf0\0\0\0", Reason.TRUNCATED, "the file ends before the picture does"),
        (b"P5 4 4 255\n123", Reason.TRUNCATED, "the file ends before the picture does"),
        (b"P3 2 1 255\n1 2", Reason.TRUNCATED, "the file ends before the picture does"),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else "",
)
def test_bytes_that_are_no_picture_are_named_for_what_they_are(
    data: bytes, reason: Reason, detail: str
) -> None:
    with pytest.raises(UnreadableImage) as caught:
        pixels.read(data, size=8)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)
    assert str(caught.value) == f"The image cannot be read: {detail} ({reason})."


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("PCX", "1"), ("PCX", "L"), ("PCX", "P"), ("PCX", "RGB"), ("SGI", "L"), ("SGI", "RGB"), ("DDS", "RGB")],
)
def test_pictures_of_formats_that_are_not_read_are_said_to_be_pictures(file_format: str, mode: str) -> None:
    picture = Image.fromarray(noisy(9, 7)).convert(mode)
    assert reason_of(encoded(picture, file_format)) is Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP"])
def test_a_picture_cut_in_half_is_truncated_in_every_format_that_can_tell(file_format: str) -> None:
    data = encoded(Image.fromarray(noisy(64, 48)), file_format)
    assert pixels.read(data, size=8).shape == (8, 8, 3)
    assert reason_of(data[: len(data) // 2]) is Reason.TRUNCATED


@pytest.mark.parametrize("heard", ["error", "ignore"])
@pytest.mark.parametrize(
    ("size", "reason"), [((10_000, 8_901), Reason.TOO_MANY_PIXELS), ((10_000, 8_900), Reason.TRUNCATED)]
)
def test_the_limit_of_pixels_is_89_million_and_is_found_before_decoding(
    size: tuple[int, int], reason: Reason, heard: Any
) -> None:
    """The picture within the limit fails later, at its first missing row."""
    header = b"P6 %d %d 255\n" % size
    with warnings.catch_warnings():
        warnings.simplefilter(heard)
        assert reason_of(header + bytes(600)) is reason


def test_an_error_about_a_file_names_the_file_and_one_about_bytes_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImage) as caught:
        pixels.read(tmp_path / "a.jpg", size=8)
    assert str(caught.value) == f"{tmp_path / 'a.jpg'} cannot be read: the file is empty (empty-file)."


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("nothing", Reason.MISSING, "there is no such file"),
        ("file/inside", Reason.MISSING, "there is no such file"),
        ("nul\0byte", Reason.MISSING, "no file can have this name"),
        ("half a \ud83d pair", Reason.MISSING, "no file can have this name"),
        ("n" * 300, Reason.IO_ERROR, "File name too long"),
        ("folder", Reason.NOT_A_FILE, "it is not a regular file"),
        ("pipe", Reason.NOT_A_FILE, "it is not a regular file"),
        ("/dev/zero", Reason.NOT_A_FILE, "it is not a regular file"),
        ("loop", Reason.LINK_LOOP, "it is a symbolic link that leads back to itself"),
        ("empty", Reason.EMPTY_FILE, "the file is empty"),
    ],
)
def test_what_is_no_readable_file_is_said(name: str, reason: Reason, detail: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(UnreadableImage) as caught:
            pixels.read_bytes(path)
        assert (caught.value.reason, caught.value.detail) == (reason, detail)
        assert reason_of(path) is reason


def test_a_file_that_nobody_may_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "private.png"
    path.write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    with without_rights(path):
        assert reason_of(path) is Reason.NO_PERMISSION
    assert pixels.read(path, size=4).shape == (4, 4, 3)


def test_read_bytes_takes_as_many_bytes_as_it_is_told_and_not_one_more(tmp_path: Path) -> None:
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    assert pixels.read_bytes(path, max_bytes=10) == b"0123456789"
    with pytest.raises(UnreadableImage) as caught:
        pixels.read_bytes(path, max_bytes=9)
    assert caught.value.reason is Reason.TOO_MANY_BYTES
    assert caught.value.detail == "it has 10 bytes and 9 is the limit"


def test_a_file_of_more_than_128_mib_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    path.touch()
    os.truncate(path, 128 * 2**20 + 1)  # a hole: it takes no room on the disk
    assert reason_of(path) is Reason.TOO_MANY_BYTES


SAMPLES = {
    name: encoded(Image.fromarray(smooth(24, 17)), *how[:1], **dict(how[1:]))
    for name, how in {
        "jpeg": ("JPEG",),
        "progressive": ("JPEG", ("progressive", True)),
        "png": ("PNG",),
        "gif": ("GIF",),
        "webp": ("WEBP",),
        "bmp": ("BMP",),
        "tiff": ("TIFF",),
        "ppm": ("PPM",),
        "jpeg2000": ("JPEG2000",),
    }.items()
}


@st.composite
def mutated_pictures(draw: st.DrawFn) -> bytes:
    """A good file with some bytes changed, then perhaps cut, then perhaps followed by others."""
    data = bytearray(draw(st.sampled_from(sorted(SAMPLES.values()))))
    for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=6)):
        data[place] = draw(st.integers(0, 255))
    end = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return bytes(data[:end]) + draw(st.binary(max_size=8))


def mostly_header() -> st.SearchStrategy[bytes]:
    """The first bytes of a good file, then anything."""
    heads = [data[:length] for data in SAMPLES.values() for length in (4, 12, 30)] + [AVIF]
    return st.builds(lambda head, rest: head + rest, st.sampled_from(heads), st.binary(max_size=200))


@settings(max_examples=600, deadline=None)
@given(st.one_of(st.binary(max_size=300), mostly_header(), mutated_pictures()))
def test_any_bytes_become_pixels_or_an_unreadable_image(data: bytes) -> None:
    try:
        square = pixels.read(data, size=9, crop=0.8)
    except UnreadableImage:
        return
    assert (square.dtype, square.shape) == (np.uint8, (9, 9, 3))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.int64),
        np.zeros((4, 4), bool),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_an_array_of_another_type_or_shape_is_an_input_error(array: Any) -> None:
    """It is the caller's mistake, not a picture that cannot be read."""
    wanted = (
        "An image array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), "
        f"not {array.dtype} {array.shape}."
    )
    for use in (lambda: pixels.read(array, size=8), lambda: pixels.content_sha256(array)):
        with pytest.raises(InputError) as caught:
            use()
        assert (type(caught.value), str(caught.value)) == (InputError, wanted)


# One picture, however it is given


def test_a_png_gives_the_same_pixels_by_path_bytes_array_and_pil_image(tmp_path: Path) -> None:
    levels = noisy(61, 40)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(levels), "PNG"))
    loaded = Image.open(io.BytesIO(path.read_bytes()))
    loaded.load()
    expected = pixels.read(levels, size=23, crop=0.9)
    assert (expected.dtype, expected.shape) == (np.uint8, (23, 23, 3))
    sources = [path, str(path), path.read_bytes(), Image.open(io.BytesIO(path.read_bytes())), loaded]
    for source in (*sources, Image.fromarray(levels), np.asfortranarray(levels), levels[::-1][::-1]):
        assert np.array_equal(pixels.read(source, size=23, crop=0.9), expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "a.pdf", "a", "a.PNG"])
def test_the_extension_decides_nothing(name: str, tmp_path: Path) -> None:
    levels = smooth(12, 12)
    (tmp_path / name).write_bytes(encoded(Image.fromarray(levels), "PNG"))
    assert np.array_equal(pixels.read(tmp_path / name, size=12), levels)


@pytest.mark.parametrize(
    "file_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF", "GIF", "JPEG"]
)
def test_every_format_of_photographs_is_read(file_format: str) -> None:
    """Within 6 levels on average, which is what a GIF's palette costs."""
    levels = smooth(64, 64)
    options = {"lossless": True} if file_format == "WEBP" else {}
    found = pixels.read(encoded(Image.fromarray(levels), file_format, **options), size=64)
    exact = file_format in ("PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000")
    assert difference(found, levels).mean() <= (0 if exact else 6)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_pictures_in_a_file_the_first_is_read(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert difference(pixels.read(data, size=8), pixels.read(frames[0], size=8)).max() <= 2


def test_reading_leaves_a_callers_image_as_it_was() -> None:
    """Even a JPEG that is not decoded yet, whose decoder could be asked for an eighth."""
    face = draw_face(1, 1, size=640)
    data = encoded(face, "JPEG", exif=turned(6))
    images = [Image.open(io.BytesIO(data)), face.convert("P"), face.convert("RGBA"), face.convert("I;16")]
    for image in images:
        untouched = Image.open(io.BytesIO(data)) if image is images[0] else image.copy()
        pixels.read(image, size=32)
        pixels.thumbnail(image, side=32)
        pixels.content_sha256(image)
        assert (image.mode, image.size, image.info) == (untouched.mode, untouched.size, untouched.info)
        assert image.tobytes() == untouched.tobytes()


# Turned upright


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# What a camera that is held so stores of an upright picture, in NumPy's words and not in Pillow's.
STORED: dict[int, Callable[[Levels], Levels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize(("width", "height"), [(48, 31), (30, 47), (40, 40)])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_gives_the_pixels_of_the_upright_picture(
    orientation: int, file_format: str, width: int, height: int
) -> None:
    """Within one level: rows and columns are rounded in another order."""
    upright = smooth(width, height)
    options = {"lossless": True} if file_format == "WEBP" else {}
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, file_format, exif=turned(orientation), **options)
    expected = pixels.read(upright, size=20, crop=0.9)
    assert difference(pixels.read(data, size=20, crop=0.9), expected).max() <= 1
    small = pixels.thumbnail(upright, side=20)
    found = pixels.thumbnail(data, side=20)
    assert found.size == small.size
    assert difference(np.asarray(found), np.asarray(small)).max() <= 1


@pytest.mark.parametrize("orientation", STORED)
def test_a_large_jpeg_is_turned_upright_after_its_scaled_decode(orientation: int) -> None:
    """Within 4 levels, which is more than the compression costs and far less than a wrong turn."""
    upright = smooth(643, 481)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, "JPEG", quality=95, exif=turned(orientation))
    assert difference(pixels.read(data, size=32), pixels.read(upright, size=32)).max() <= 4


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    levels = smooth(16, 16)
    data = encoded(Image.fromarray(levels), "PNG", exif=turned(orientation))
    assert np.array_equal(pixels.read(data, size=16), levels)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_beside_a_good_picture_does_no_harm(exif: bytes, file_format: str) -> None:
    image = Image.fromarray(smooth(16, 16))
    expected = pixels.read(encoded(image, file_format), size=16)
    assert np.array_equal(pixels.read(encoded(image, file_format, exif=exif), size=16), expected)


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment right behind its first marker."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


ADOBE = b"Adobe\0\x64\0\0\0\0\1"


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("length", [4, 5, 6, 7, 11, 12])
def test_a_cut_segment_of_adobe_costs_no_jpeg_and_changes_no_pixel(mode: str, length: int) -> None:
    """Whole it says what the colours are; of 12 bytes it is whole, and says what they are anyway."""
    jpeg = encoded(Image.fromarray(noisy(24, 24)).convert(mode), "JPEG", quality=95)
    body = ADOBE[:11] + b"\0" if mode == "CMYK" else ADOBE
    bare = jpeg.replace(b"\xff\xee\0\x0e" + ADOBE[:11] + b"\0", b"")
    assert (len(bare) < len(jpeg)) == (mode == "CMYK")
    expected = pixels.read(jpeg, size=24)
    assert np.array_equal(pixels.read(with_segment(bare, 0xEE, body[:length]), size=24), expected)


def with_transparency(png: bytes, body: bytes) -> bytes:
    """A PNG with a chunk tRNS before its data."""
    start = png.index(b"IDAT") - 4
    chunk = b"tRNS" + body
    whole = struct.pack(">L", len(body)) + chunk + struct.pack(">L", zlib.crc32(chunk))
    return png[:start] + whole + png[start:]


@pytest.mark.parametrize(
    ("mode", "lengths"),
    [
        ("RGB", [0, 2, 5, 7]), ("L", [0, 1, 3, 6]), ("1", [0, 1, 3]), ("I;16", [1, 3]), ("P", [0, 257]),
        ("RGBA", [0, 2, 6]), ("LA", [0, 2]),
    ],
)  # fmt: skip
def test_a_transparency_of_a_length_that_is_none_costs_no_png_and_changes_no_pixel(
    mode: str, lengths: list[int]
) -> None:
    """As in libpng; one of the right length counts."""
    deep = np.random.default_rng(3).integers(0, 2**16, (24, 24), dtype=np.uint16)
    image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(noisy(24, 24)).convert(mode)
    png = encoded(image, "PNG")
    expected = pixels.read(png, size=24)
    for length in lengths:
        assert np.array_equal(pixels.read(with_transparency(png, bytes(length)), size=24), expected), length


def test_a_transparency_of_the_right_length_lets_white_through() -> None:
    levels = np.full((8, 8, 3), 90, np.uint8)
    levels[:4] = (0, 7, 0)
    png = encoded(Image.fromarray(levels), "PNG")
    white = levels.copy()
    white[:4] = 255
    assert np.array_equal(pixels.read(with_transparency(png, b"\0\0\0\7\0\0"), size=8), white)
    assert np.array_equal(pixels.read(with_transparency(png, b"\0\7"), size=8), levels)


# Any mode becomes RGB

RAMP: Levels = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
ALPHA: Levels = np.ascontiguousarray(RAMP.T)
RED, GREEN, HALF_BLUE = (200, 10, 20), (30, 180, 40), (0, 0, 250)


def grey(levels: NDArray[Any]) -> Levels:
    return np.repeat(np.rint(levels).astype(np.uint8)[..., None], 3, axis=2)


def over_white(colour: NDArray[Any], alpha: NDArray[Any]) -> Levels:
    share = alpha.astype(np.float64)[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def palette_image(mode: str = "P") -> Image.Image:
    """Three vertical stripes: red, green and blue."""
    image = Image.new("P", (9, 9))
    image.putpalette([*RED, *GREEN, *HALF_BLUE])
    image.putdata([x // 3 for _ in range(9) for x in range(9)])
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(np.tile(np.repeat(np.uint8([255, 0, 51]), 3), (9, 1))))
    return image


def stripes(*colours: tuple[int, int, int]) -> Levels:
    return np.tile(np.repeat(np.uint8(colours), 3, axis=0)[None], (9, 1, 1))


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([smooth(16, 16), ALPHA]))


def grey_with_alpha(mode: str = "LA") -> Image.Image:
    return Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]).convert(mode)


DEEP = (np.arange(256, dtype=np.uint32).reshape(16, 16) * 257).astype(np.uint16)
FLOATS = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
CMYK = np.dstack([smooth(16, 16), RAMP // 2])
ON_WHITE = over_white(smooth(16, 16), ALPHA)
GREY_ON_WHITE = over_white(grey(RAMP), ALPHA)

# name: source, expected RGB, levels by which they may differ
MODES: dict[str, tuple[Any, Levels, int]] = {
    "1": (Image.fromarray(RAMP > 100), grey((RAMP > 100) * 255), 0),
    "1 png": (encoded(Image.fromarray(RAMP > 100), "PNG"), grey((RAMP > 100) * 255), 0),
    "L": (Image.fromarray(RAMP), grey(RAMP), 0),
    "L array": (RAMP, grey(RAMP), 0),
    "L png": (encoded(Image.fromarray(RAMP), "PNG"), grey(RAMP), 0),
    "L png with a transparent level": (
        encoded(Image.fromarray(RAMP), "PNG", transparency=7),
        grey(np.where(RAMP == 7, 255, RAMP)),
        0,
    ),
    "LA": (grey_with_alpha(), GREY_ON_WHITE, 1),
    "LA png": (encoded(grey_with_alpha(), "PNG"), GREY_ON_WHITE, 1),
    "La": (grey_with_alpha("La"), GREY_ON_WHITE, 2),
    "P": (palette_image(), stripes(RED, GREEN, HALF_BLUE), 0),
    "P png": (encoded(palette_image(), "PNG"), stripes(RED, GREEN, HALF_BLUE), 0),
    "P gif with a transparent colour": (
        encoded(palette_image(), "GIF", transparency=1),
        stripes(RED, (255, 255, 255), HALF_BLUE),
        0,
    ),
    "P png with a transparent colour": (
        encoded(palette_image(), "PNG", transparency=1),
        stripes(RED, (255, 255, 255), HALF_BLUE),
        0,
    ),
    "P png with alpha for each colour": (
        encoded(palette_image(), "PNG", transparency=bytes([255, 0, 51])),
        stripes(RED, (255, 255, 255), (204, 204, 254)),
        1,
    ),
    "P with alpha in its palette": (
        Image.new("RGBA", (9, 9), (200, 0, 0, 0)).quantize(),
        stripes(*[(255, 255, 255)] * 3),
        0,
    ),
    "PA": (palette_image("PA"), stripes(RED, (255, 255, 255), (204, 204, 254)), 1),
    "RGB": (Image.fromarray(smooth(16, 16)), smooth(16, 16), 0),
    "RGB png with a transparent colour": (
        encoded(Image.new("RGB", (9, 9), GREEN), "PNG", transparency=GREEN),
        stripes(*[(255, 255, 255)] * 3),
        0,
    ),
    "RGBX": (Image.fromarray(smooth(16, 16)).convert("RGBX"), smooth(16, 16), 0),
    "RGBA": (rgba(), ON_WHITE, 1),
    "RGBA array": (np.asarray(rgba()), ON_WHITE, 1),
    "RGBA png": (encoded(rgba(), "PNG"), ON_WHITE, 1),
    "RGBA webp": (encoded(rgba(), "WEBP", lossless=True, exact=True), ON_WHITE, 1),
    "RGBa": (rgba().convert("RGBa"), ON_WHITE, 2),
    "CMYK tiff": (
        encoded(Image.frombytes("CMYK", (16, 16), CMYK.tobytes()), "TIFF"),
        np.rint((255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255).astype(np.uint8),
        1,
    ),
    "CMYK jpeg": (
        encoded(Image.new("CMYK", (9, 9), (255, 51, 0, 51)), "JPEG"),
        stripes(*[(0, 163, 204)] * 3),
        3,
    ),
    "YCbCr": (Image.fromarray(smooth(16, 16)).convert("YCbCr"), smooth(16, 16), 4),
    "YCbCr jpeg": (encoded(Image.new("RGB", (9, 9), RED), "JPEG"), stripes(RED, RED, RED), 2),
    "HSV": (Image.fromarray(smooth(16, 16)).convert("HSV"), smooth(16, 16), 6),
    "LAB": (Image.frombytes("LAB", (9, 9), bytes([255, 0, 0]) * 81), stripes(*[(255, 255, 255)] * 3), 1),
    "I;16": (Image.fromarray(DEEP), grey(RAMP), 0),
    "I;16 png": (encoded(Image.fromarray(DEEP), "PNG"), grey(RAMP), 0),
    "I;16 png, rounded": (encoded(Image.fromarray(DEEP // 257 * 255), "PNG"), grey(RAMP * (255 / 257)), 0),
    "I;16 tiff": (encoded(Image.fromarray(DEEP), "TIFF"), grey(RAMP), 0),
    "I;16B": (Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), grey(RAMP), 0),
    "I;16L": (Image.frombytes("I;16L", (16, 16), DEEP.astype("<u2").tobytes()), grey(RAMP), 0),
    "I;16N": (Image.frombytes("I;16N", (16, 16), DEEP.tobytes()), grey(RAMP), 0),
    "I": (Image.fromarray(DEEP.astype(np.int32)), grey(RAMP), 0),
    "I pgm": (b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(), grey(RAMP), 0),
    "F to 1": (Image.fromarray(FLOATS), grey(RAMP), 0),
    "F tiff to 1": (encoded(Image.fromarray(FLOATS), "TIFF"), grey(RAMP), 0),
    "F tiff to 255": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), grey(RAMP), 0),
    "F black": (Image.new("F", (9, 9), 0), stripes(*[(0, 0, 0)] * 3), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_with_its_own_levels(name: str) -> None:
    """Transparency lies over white, 16 bits are scaled and not clipped."""
    source, expected, tolerance = MODES[name]
    side = len(expected)
    found = pixels.read(source, size=side)
    assert (found.dtype, found.shape) == (np.uint8, (side, side, 3))
    assert difference(found, expected).max() <= tolerance
    assert difference(np.asarray(pixels.thumbnail(source, side=side)), expected).max() <= tolerance


def test_no_mode_of_pillow_is_missing_from_that_list() -> None:
    assert set(Image.MODES) <= {name.split()[0] for name in MODES}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_no_levels_are_an_unsupported_mode(value: float) -> None:
    levels = np.zeros((4, 4), np.float32)
    levels[1, 2] = value
    with pytest.raises(UnreadableImage) as caught:
        pixels.read(encoded(Image.fromarray(levels), "TIFF"), size=4)
    assert caught.value.reason is Reason.UNSUPPORTED_MODE
    assert caught.value.detail == "it has pixels that are not finite numbers"


# Cropped and resized


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 255),
    height=st.integers(1, 255),
    size=st.integers(3, 70),
    crop=st.floats(0.05, 1, exclude_min=True),
)
def test_the_crop_is_the_central_square_of_its_share_of_the_shorter_side(
    width: int, height: int, size: int, crop: float
) -> None:
    """On a ramp, where a filtered pixel shows its place: each is within one level of where it must be."""
    y, x = np.mgrid[0:height, 0:width]
    square = pixels.read(np.stack([x, y, x], axis=-1).astype(np.uint8), size=size, crop=crop)
    side = max(1.0, crop * min(width, height))
    place = (np.arange(size) + 0.5) * side / size - 0.5
    # The outermost pixels may lean inwards, where the filter meets the picture's edge.
    inner = slice(1, -1)
    expected_x, expected_y = (width - side) / 2 + place, (height - side) / 2 + place
    assert np.abs(square[inner, inner, 0] - expected_x[None, inner]).max() <= 1
    assert np.abs(square[inner, inner, 1] - expected_y[inner, None]).max() <= 1


@pytest.mark.parametrize("crop", [1.0, 0.5])
@pytest.mark.parametrize("cell", [1, 2])
def test_a_checkerboard_finer_than_the_result_becomes_even_grey(cell: int, crop: float) -> None:
    """Without antialiasing it would stay black and white, or show waves."""
    y, x = np.mgrid[0:512, 0:512] // cell
    board = ((x + y) % 2 * 255).astype(np.uint8)
    square = pixels.read(board, size=16, crop=crop)
    assert np.abs(square.astype(float) - 127.5).max() <= 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_the_smallest_and_thinnest_pictures_are_read(shape: tuple[int, int]) -> None:
    assert np.array_equal(pixels.read(np.full(shape, 77, np.uint8), size=5, crop=0.1), np.full((5, 5, 3), 77))


# A large JPEG is decoded at a fraction of its size


@cache
def large_face() -> Image.Image:
    return draw_face(3, 1, size=1200)


def photo(width: int, height: int, *, noise: float = 8.0) -> Levels:
    """A face before a grey wall, with the noise of a sensor in every pixel."""
    side = min(width, height)
    canvas = np.full((height, width, 3), 120.0)
    top, left = (height - side) // 2, (width - side) // 2
    canvas[top : top + side, left : left + side] = np.asarray(large_face().resize((side, side)))
    canvas += np.random.default_rng(0).normal(0, noise, canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def texture(cells: int) -> Levels:
    """Random colours, `cells` of them across the picture, blended."""
    coarse = Image.fromarray(noisy(cells, cells * 3 // 4))
    return np.asarray(coarse.resize((1600, 1200), Image.Resampling.BICUBIC))


def black_and_white() -> Levels:
    """The hardest picture there is: every pixel black or white, by chance."""
    return (noisy(1600, 1200) // 128 * 255).astype(np.uint8)


def drafted_and_full(levels: Levels, path: Path, size: int, crop: float = 1.0) -> NDArray[np.int64]:
    """By how many levels the scaled decode of a JPEG's path differs from its full decode."""
    Image.fromarray(levels).save(path, "JPEG", quality=95)
    with Image.open(path) as full:
        full.load()
        return difference(pixels.read(path, size=size, crop=crop), pixels.read(full, size=size, crop=crop))


@pytest.mark.parametrize(
    ("make", "mean", "percentile"),
    [
        (lambda: photo(1600, 1200, noise=0), 0.5, 2),
        (lambda: photo(1600, 1200), 0.5, 2),
        (lambda: photo(1600, 1200, noise=40), 1, 3),
        (lambda: texture(100), 1, 3),
        (lambda: texture(400), 1, 3),
        (black_and_white, 2, 8),
    ],
    ids=["face", "noisy face", "very noisy face", "texture", "fine texture", "black and white noise"],
)
def test_a_scaled_decode_is_within_two_levels_of_the_full_one_on_average(
    make: Callable[[], Levels], mean: float, percentile: float, tmp_path: Path
) -> None:
    """1600 x 1200 read at 112. Measured with Pillow 13 and libjpeg-turbo 3.2, mean and 99th percentile:

    face 0.2 and 1, with noise 0.2 and 1, with much noise 0.5 and 2, texture 0.6 and 2, fine texture 0.6
    and 2; black and white noise, which no camera makes, 1.7 and 6.
    """
    levels = drafted_and_full(make(), tmp_path / "a.jpg", 112)
    assert 0 < levels.mean() < mean  # at 0, nothing was scaled and this test would show nothing
    assert np.percentile(levels, 99) <= percentile


@pytest.mark.parametrize(
    ("size", "crop"), [((1597, 999), 1.0), ((1607, 1207), 1.0), ((903, 1605), 1.0), ((1201, 1203), 0.75)]
)
def test_a_scaled_decode_stays_in_place_when_the_size_is_no_multiple_of_eight(
    size: tuple[int, int], crop: float, tmp_path: Path
) -> None:
    """Measured: mean 0.2 to 0.4, 99th percentile 1, maximum 3.

    It was 10 and 23 when the scale was taken from the rounded sizes.
    """
    levels = drafted_and_full(photo(*size), tmp_path / "a.jpg", 112, crop)
    assert 0 < levels.mean() < 0.6
    assert np.percentile(levels, 99) <= 2
    assert levels.max() <= 6


@pytest.mark.parametrize(("size", "scaled"), [(75, True), (100, True), (101, False), (224, False)])
def test_a_jpeg_is_scaled_only_when_twice_the_pixels_asked_for_are_left(
    size: int, scaled: bool, tmp_path: Path
) -> None:
    """The crop of 0.5 leaves 400 of 800 pixels, half of them 200."""
    levels = drafted_and_full(photo(1000, 800), tmp_path / "a.jpg", size, crop=0.5)
    assert bool(levels.any()) is scaled


@pytest.mark.photographs
def test_a_scaled_decode_of_enlarged_photographs_is_as_close(shared: Path, tmp_path: Path) -> None:
    """Five of LFW at 1600 x 1600. Measured: mean 0.1 to 0.2, 99th percentile 1, maximum 2."""
    for photograph in sorted((shared / "data" / "lfw").glob("A*/*_0001.jpg"))[:5]:
        with Image.open(photograph) as image:
            large = np.asarray(image.convert("RGB").resize((1600, 1600), Image.Resampling.BICUBIC))
        levels = drafted_and_full(large, tmp_path / "a.jpg", 112)
        assert 0 < levels.mean() < 0.5
        assert np.percentile(levels, 99) <= 2


# What a picture is known by


def test_bytes_are_known_by_their_own_sha256() -> None:
    assert pixels.content_sha256(b"not even a picture") == hashlib.sha256(b"not even a picture").hexdigest()


arrays = st.builds(
    lambda shape, values: np.resize(np.uint8(values), shape),
    st.sampled_from([(2, 2), (1, 4), (4, 1), (2, 2, 3), (2, 2, 4)]),
    st.lists(st.sampled_from([0, 1, 255]), min_size=1, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(arrays, arrays)
def test_two_pictures_are_known_alike_exactly_when_their_rgb_pixels_are_alike(a: Levels, b: Levels) -> None:
    def shown(array: Levels) -> Levels:
        return np.asarray(pixels.thumbnail(array, side=4))

    alike = pixels.content_sha256(a) == pixels.content_sha256(b)
    assert alike == np.array_equal(shown(a), shown(b))


def test_an_image_its_array_and_its_undecoded_file_are_known_alike() -> None:
    levels = smooth(20, 13)
    file = encoded(Image.fromarray(levels), "PNG")
    known = pixels.content_sha256(levels)
    assert known == pixels.content_sha256(Image.fromarray(levels))
    assert known == pixels.content_sha256(Image.open(io.BytesIO(file)))
    assert known != pixels.content_sha256(file)
    assert len(known) == 64
    assert set(known) <= set("0123456789abcdef")


def test_palette_transparency_and_orientation_make_another_picture() -> None:
    """Their stored pixels are the same, and what is read of them is not."""
    other_palette = palette_image()
    other_palette.putpalette([*GREEN, *RED, *HALF_BLUE])
    images = [
        palette_image(),
        other_palette,
        Image.open(io.BytesIO(encoded(palette_image(), "PNG", transparency=1))),
        Image.open(io.BytesIO(encoded(palette_image(), "PNG", exif=turned(3)))),
    ]
    assert len({image.tobytes() for image in images}) == 1
    assert len({pixels.content_sha256(image) for image in images}) == 4


def test_a_broken_image_object_has_no_sha256() -> None:
    data = encoded(Image.fromarray(noisy(64, 48)), "JPEG")
    with pytest.raises(UnreadableImage) as caught:
        pixels.content_sha256(Image.open(io.BytesIO(data[: len(data) // 2])))
    assert caught.value.reason is Reason.TRUNCATED


# For showing to a person


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(200, 100, (50, 25)), (100, 200, (25, 50)), (50, 50, (50, 50)), (30, 20, (30, 20)), (1000, 1, (50, 1))],
)
def test_a_thumbnail_is_the_whole_picture_no_larger_than_asked_or_than_it_was(
    width: int, height: int, size: tuple[int, int]
) -> None:
    levels = smooth(width, height)
    image = pixels.thumbnail(levels, side=50)
    assert (image.mode, image.size) == ("RGB", size)
    expected = Image.fromarray(levels).resize(size, Image.Resampling.BOX)
    assert difference(np.asarray(image), np.asarray(expected)).mean() < 2


def test_an_unreadable_image_crosses_a_process_border_unchanged() -> None:
    error = UnreadableImage(Reason.TRUNCATED, "the file ends", "a.jpg")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, again.detail, str(again)) == (error.reason, error.detail, str(error))
