"""The picture of an answer: sizes, frames, and what happens when a photo or a name does not fit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from retrieval.images.panel import PanelRow, Tile, _font, panel

TILE, LEFT, TOP = 180, 28, 60  # where the first query lies
SECOND = LEFT + TILE + 42  # where its first match begins
RED = (210, 30, 40)


def picture(width: int = 60, height: int = 60, colour: tuple[int, int, int] = RED) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def tile(source: Any = None, title: str = "Ann", note: str = "0.5", agrees: bool | None = None) -> Tile:
    return Tile(picture() if source is None else source, title, note, agrees)


def drawn(*rows: PanelRow, heading: str = "Closest photos") -> NDArray[np.uint8]:
    return np.asarray(panel(rows, heading=heading))


def inside(canvas: NDArray[np.uint8], left: int = LEFT, top: int = TOP) -> NDArray[np.uint8]:
    """The square that a picture may fill."""
    return canvas[top : top + TILE, left : left + TILE]


def box_of(canvas: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (both exclusive) of everything that has exactly this colour."""
    rows, columns = np.nonzero((canvas == colour).all(axis=-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@pytest.mark.parametrize(
    ("matches", "size"),
    [
        ([], (236, 100)),
        ([0], (236, 340)),
        ([1], (458, 340)),
        ([3], (846, 340)),
        ([3, 0, 1], (846, 820)),
    ],
)
def test_a_panel_is_as_wide_as_its_longest_row_and_as_high_as_its_rows(
    matches: list[int], size: tuple[int, int]
) -> None:
    image = panel([PanelRow(tile(), [tile()] * number) for number in matches], heading="Closest photos")
    assert (image.mode, image.size) == ("RGB", size)


def test_the_last_match_ends_at_the_margin() -> None:
    canvas = drawn(PanelRow(tile(picture(colour=(0, 0, 1))), [tile()] * 3))
    assert box_of(canvas, RED) == (SECOND, TOP, canvas.shape[1] - LEFT, TOP + TILE)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (60, 60, (0, 0, 180, 180)),
        (100, 50, (0, 45, 180, 135)),
        (50, 100, (45, 0, 135, 180)),
        (900, 300, (0, 60, 180, 120)),
        (2, 1, (0, 45, 180, 135)),
        (2000, 1, (0, 89, 180, 90)),
    ],
)
def test_a_picture_fills_its_tile_whole_in_the_middle_and_unstretched(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    canvas = drawn(PanelRow(tile(picture(width, height)), []))
    left, top, right, bottom = box
    assert box_of(canvas, RED) == (LEFT + left, TOP + top, LEFT + right, TOP + bottom)


def test_a_path_bytes_and_an_array_draw_the_same_tile(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), np.asarray(picture()), picture()]
    canvases = [drawn(PanelRow(tile(source), [tile(source)])) for source in sources]
    assert all(np.array_equal(canvas, canvases[0]) for canvas in canvases)


@pytest.mark.parametrize(("agrees", "colour"), [(True, "#1a7f4b"), (False, "#b3362b"), (None, "#d8dde4")])
def test_a_match_that_agrees_has_a_green_frame_one_that_does_not_a_red_one_others_a_grey_one(
    agrees: bool | None, colour: str
) -> None:
    canvas = drawn(PanelRow(tile(picture(colour=(0, 0, 1))), [tile(agrees=agrees)]))
    frame = canvas[TOP - 2 : TOP + TILE + 2, SECOND - 2 : SECOND + TILE + 2].copy()
    assert np.array_equal(frame[2:-2, 2:-2], np.full((TILE, TILE, 3), RED))
    frame[2:-2, 2:-2] = ImageColor.getrgb(colour)
    assert np.unique(frame.reshape(-1, 3), axis=0).tolist() == [list(ImageColor.getrgb(colour))]


def test_a_photo_that_is_gone_is_an_empty_tile_that_says_why(tmp_path: Path) -> None:
    """Words on paper, another word for another reason, and every other tile as it would be."""
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8")
    gone = drawn(PanelRow(tile(), [tile(tmp_path / "gone.jpg", agrees=True), tile()]))
    damaged = drawn(PanelRow(tile(), [tile(tmp_path / "damaged.jpg", agrees=True), tile()]))
    blank = drawn(PanelRow(tile(), [tile(picture(colour=(255, 255, 255)), agrees=True), tile()]))
    for canvas in (gone, damaged):
        assert 0.01 < (inside(canvas, SECOND) != 255).any(axis=-1).mean() < 0.1
        outside = canvas.copy()
        inside(outside, SECOND)[...] = 255
        assert np.array_equal(outside, blank)
    assert not np.array_equal(gone, damaged)


@pytest.mark.parametrize("line", ["title", "note"])
def test_a_long_name_is_shortened_to_the_width_of_its_tile(line: str) -> None:
    """Nothing of it lies beside the tile; what fits is kept, whatever is cut off."""
    long, longer = (drawn(PanelRow(tile(**{line: "Wendelin " * n}), [tile()])) for n in (20, 40))
    short = drawn(PanelRow(tile(), [tile()]))
    under = slice(TOP + TILE + 2, None)
    assert np.array_equal(long, longer)
    assert np.array_equal(long[under, LEFT + TILE :], short[under, LEFT + TILE :])
    ink = (long[under, LEFT : LEFT + TILE] < 200).any(axis=(0, 2))
    assert ink[-30:].any()


def test_a_name_that_fits_is_written_whole() -> None:
    """A letter more at its end is seen, down to the last that has room."""
    names = ["Wendelin"[:length] for length in range(1, 9)]
    canvases = [drawn(PanelRow(tile(title=name), [])) for name in names]
    for before, after in pairwise(canvases):
        assert not np.array_equal(before, after)


def test_a_long_heading_ends_at_the_margin() -> None:
    canvas = drawn(PanelRow(tile(), []), heading="M" * 300)
    assert (canvas[: TOP - 2] < 128).any()
    assert (canvas[: TOP - 2, -LEFT:] == 255).all()


@pytest.mark.parametrize("text", ["", "日本語", "two\nlines", "nul\0", "half a \ud83d pair"])
def test_any_name_can_be_drawn(text: str) -> None:
    image = panel([PanelRow(tile(title=text, note=text), [tile()])], heading=text)
    assert image.size == (458, 340)


@pytest.mark.parametrize("letter", "éöŁßñğЖΩعة")
def test_names_of_many_languages_have_letters_in_the_font(letter: str) -> None:
    font = _font(15)
    assert bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))
