"""Colour profiles: a photo and its copy in another space give the same pixels, where the model says so."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from retrieval.errors import BundleError
from retrieval.images import colour, pixels
from retrieval.images.decoders import Decoders, decode_here
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import Embedding, ModelBundle, fingerprint_of
from tests.images.test_pixels import Levels, difference, encoded, smooth

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def xyz(*numbers: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(number * 65536) for number in numbers))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, of a display."""
    tags = {
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(79),
    } | tags
    start = 128 + 4 + 12 * len(tags)
    table, body = b"", b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + xyz(0.9642, 1, 0.8249)[8:]
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def rgb(primaries: list[tuple[float, float, float]], gamma: float) -> bytes:
    names = (b"r", b"g", b"b")
    tags = {name + b"XYZ": xyz(*primary) for name, primary in zip(names, primaries, strict=True)}
    return profile(b"RGB ", tags | {name + b"TRC": curve(gamma) for name in names})


# Columns of their matrices to XYZ (D50), of the profiles in use.
PROFILES = {
    "Display P3": rgb([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)], 2.2),
    "Adobe RGB": rgb([(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)], 2.199),
    "ProPhoto": rgb([(0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249)], 1.8),
    "linear": rgb([(0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)], 1.0),
}
GREY = profile(b"GRAY", {b"kTRC": curve(1.0)})


def in_space(levels: Levels, name: bytes) -> Image.Image:
    """The same picture with its colours in another space."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(name))
    source = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(Image.fromarray(levels), source, target)


def muted(width: int, height: int) -> Levels:
    """Colours that every space has."""
    return (smooth(width, height) // 2 + 64).astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_converted_copy_gives_the_pixels_of_its_photo_where_profiles_are_heeded(
    name: str, file_format: str
) -> None:
    levels = muted(64, 48)
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 98, "subsampling": 0}
    options = options if file_format in ("WEBP", "JPEG") else {}
    copy = encoded(in_space(levels, PROFILES[name]), file_format, icc_profile=PROFILES[name], **options)
    plain = pixels.read(levels, size=24, colour="srgb")
    heeded = difference(pixels.read(copy, size=24, colour="srgb"), plain)
    passed_over = difference(pixels.read(copy, size=24), plain)
    assert heeded.mean() < 1
    assert passed_over.mean() > 4 * heeded.mean()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("space", ["srgb", "none", "damaged", "of another mode", "absurd"])
def test_a_profile_that_says_nothing_changes_nothing(mode: str, space: str) -> None:
    """Neither does sRGB's own, whatever the mode of the picture."""
    image = Image.fromarray(muted(20, 20)).convert(mode)
    other = GREY if mode in ("RGB", "RGBA", "P", "CMYK") else PROFILES["ProPhoto"]
    absurd = rgb([(0.0, 0.0, 0.0)] * 3, 2.2)
    said = {"srgb": SRGB, "none": b"", "damaged": SRGB[:200], "of another mode": other, "absurd": absurd}[
        space
    ]
    image.info["icc_profile"] = said
    assert np.array_equal(pixels.read(image, size=16, colour="srgb"), pixels.read(image, size=16))


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_shown_of_a_converted_copy_is_what_is_shown_of_its_photo(name: str) -> None:
    levels = muted(64, 48)
    copy = encoded(in_space(levels, PROFILES[name]), "PNG", icc_profile=PROFILES[name])
    shown, plain = np.asarray(pixels.thumbnail(copy, side=24)), np.asarray(pixels.thumbnail(levels, side=24))
    assert difference(shown, plain).mean() < 1
    damaged = encoded(Image.fromarray(levels), "PNG", icc_profile=PROFILES[name][:200])
    assert np.array_equal(np.asarray(pixels.thumbnail(damaged, side=24)), plain)


def test_what_is_shown_of_levels_of_grey_goes_by_their_profile() -> None:
    grey = encoded(Image.new("L", (8, 8), 64), "PNG", icc_profile=GREY)
    # 64 of 255 in linear light are 137 in sRGB.
    assert np.asarray(pixels.thumbnail(grey, side=8)).reshape(-1, 3).tolist() == [[137] * 3] * 64


def test_levels_of_grey_have_profiles_too() -> None:
    levels = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    data = encoded(Image.fromarray(levels), "PNG", icc_profile=GREY)
    found = pixels.read(data, size=64, colour="srgb")[0, :, 0] / 255
    linear = levels[0] / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    # Little CMS rounds the darkest levels.
    assert np.abs(found - expected)[2:].max() < 0.02


def test_transparency_lies_over_white_in_every_space() -> None:
    image = Image.new("RGBA", (9, 9), (10, 20, 30, 0))
    data = encoded(image, "PNG", icc_profile=PROFILES["ProPhoto"])
    assert pixels.read(data, size=9, colour="srgb").min() >= 254


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SRGB) - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(SRGB)),
)
def test_any_profile_gives_the_same_pixels_every_time(changes: list[tuple[int, int]], end: int) -> None:
    data = bytearray(SRGB)
    for place, value in changes:
        data[place] = value
    picture = encoded(Image.fromarray(muted(12, 12)), "PNG", icc_profile=bytes(data[:end]) or None)
    first = pixels.read(picture, size=8, colour="srgb")
    colour._transform.cache_clear()
    assert np.array_equal(first, pixels.read(picture, size=8, colour="srgb"))


def test_processes_heed_profiles_as_threads_do() -> None:
    copy = encoded(in_space(muted(40, 40), PROFILES["ProPhoto"]), "PNG", icc_profile=PROFILES["ProPhoto"])
    reader = PhotoReader(Preprocessing(16, 1.0, "srgb"))
    with Decoders(1, reader=reader, ahead=1) as decoders:
        ((found,),) = decoders([copy], reader)
    ((expected,),) = decode_here([copy], reader)
    ((other,),) = decode_here([copy], PhotoReader(Preprocessing(16, 1.0)))
    assert np.array_equal(found.pixels, expected.pixels)
    assert not np.array_equal(found.pixels, other.pixels)


# In the card and the fingerprint


def test_a_model_that_passes_profiles_over_keeps_the_card_and_the_fingerprint_that_it_had() -> None:
    tensors: dict[str, NDArray[np.float32]] = {"weight": np.arange(6, dtype=np.float32)}
    old = fingerprint_of(tensors, architecture="resnet50", preprocessing=Preprocessing(size=224, crop=1.0))
    new = fingerprint_of(
        tensors, architecture="resnet50", preprocessing=Preprocessing(size=224, crop=1.0, colour="srgb")
    )
    assert old == "deba49f9c428bd3cb80e33079ecf464abc979e6b73ec19711ec05e243ac347e0"
    assert new != old


@pytest.mark.parametrize(
    ("wanted", "embedding", "version"),
    [
        (Preprocessing(8, 1.0), Embedding(), 1),
        (Preprocessing(8, 1.0), Embedding(length="unit"), 2),
        (Preprocessing(8, 1.0, "srgb"), Embedding(), 3),
        (Preprocessing(8, 1.0, "srgb"), Embedding(length="unit"), 3),
    ],
)
def test_a_card_says_what_becomes_of_profiles_and_older_versions_refuse_it(
    wanted: Preprocessing, embedding: Embedding, version: int, make_card: Callable[..., ModelBundle]
) -> None:
    bundle = make_card(wanted, embedding)
    text = (bundle.folder / "bundle.json").read_text()
    assert f'"format": {version}' in text
    assert ('"colour": "srgb"' in text) == (wanted.colour == "srgb")
    assert ModelBundle.load(bundle.folder).preprocessing == wanted
    bundle.verify()


@pytest.fixture
def make_card(tmp_path: Path) -> Callable[..., ModelBundle]:
    def make(wanted: Preprocessing, embedding: Embedding) -> ModelBundle:
        return ModelBundle.create(
            tmp_path / "m",
            tensors={"weight": np.zeros(3, np.float32)},
            graph=b"graph",
            architecture="resnet50",
            labels=("Ada",),
            preprocessing=wanted,
            dimension=3,
            recipe={},
            split={},
            figures={},
            versions={},
            created_at="2026-01-01T00:00:00Z",
            embedding=embedding,
        )

    return make


def test_another_use_of_profiles_needs_a_newer_version(make_card: Callable[..., ModelBundle]) -> None:
    card = make_card(Preprocessing(8, 1.0, "srgb"), Embedding()).folder / "bundle.json"
    card.write_text(card.read_text().replace('"colour": "srgb"', '"colour": "rec2020"'))
    with pytest.raises(BundleError, match="upgrade faceprint"):
        ModelBundle.load(card.parent)


def test_a_profile_of_ink_is_heeded() -> None:
    """One for CMYK, made of a table of two steps for each ink, whose darkest colour is black."""
    table = np.zeros((2, 2, 2, 2, 3), np.uint16)
    for at in np.ndindex(2, 2, 2, 2):
        light = (1 - at[0]) * (1 - at[3]), (1 - at[1]) * (1 - at[3]), (1 - at[2]) * (1 - at[3])
        table[at] = np.rint(
            np.array([(0.3 + 0.7 * np.mean(light)) * 65280 if any(light) else 0, 32896, 32896])
        )
    lines = np.array([0, 65535], ">u2").tobytes()
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    body = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + identity + struct.pack(">HH", 2, 2)
    body += lines * 4 + table.astype(">u2").tobytes() + lines * 3
    data = bytearray(profile(b"CMYK", {b"A2B0": body}))
    data[12:16], data[20:24] = b"prtr", b"Lab "
    image = Image.new("CMYK", (9, 9), (255, 0, 0, 0))
    image.info["icc_profile"] = bytes(data)
    red, green, blue = pixels.read(image, size=9, colour="srgb")[4, 4].tolist()
    assert max(red, green, blue) - min(red, green, blue) <= 3  # the table knows greys only
    assert 150 < red < 230
    assert pixels.read(image, size=9)[4, 4].tolist() == [0, 255, 255]
