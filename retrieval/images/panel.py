"""Panels: draws a query beside its closest photos (the paper's figure 5) with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from retrieval.errors import UnreadableImage
from retrieval.images import pixels
from retrieval.system.paths import shown

_TILE: Final = 180
_GAP: Final = 14
_MARGIN: Final = 28
_LINE: Final = 20
_INK: Final = "#1d2430"
_FAINT: Final = "#6b7482"
_PAPER: Final = "#ffffff"
_FRAME: Final = "#d8dde4"
_RIGHT: Final = "#1a7f4b"
_WRONG: Final = "#b3362b"
_BOX: Final = "#ffc83d"


@dataclass(frozen=True)
class Tile:
    """One picture with two lines under it.

    Attributes:
        source: the picture; an unreadable one is drawn as an empty tile with the reason.
        title: the upper line, such as an identity.
        note: the lower line, such as a distance.
        agrees: draws a green (True) or red (False) frame; None draws a plain one.
        box: left, top, width and height of a face in the upright picture, in pixels; it is drawn.
    """

    source: pixels.ImageSource
    title: str
    note: str
    agrees: bool | None = None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class PanelRow:
    """A query and its closest photos, nearest first."""

    query: Tile
    matches: Sequence[Tile]


def panel(rows: Sequence[PanelRow], *, heading: str) -> Image.Image:
    """Draws rows of a query and its matches, one row under the other.

    Returns:
        An RGB image, as wide as the longest row needs.
    """
    columns = 1 + max((len(row.matches) for row in rows), default=0)
    row_height = _TILE + 2 * _LINE + _GAP + 6
    width = 2 * _MARGIN + columns * _TILE + (columns - 1) * _GAP + (_GAP * 2 if columns > 1 else 0)
    height = 2 * _MARGIN + 44 + row_height * len(rows)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 8), _shortened(heading, width - 2 * _MARGIN, 20), _INK, _font(20))
    top = _MARGIN + 32
    for row in rows:
        _draw_row(canvas, row, top)
        top += row_height
    return canvas


def _draw_row(canvas: Image.Image, row: PanelRow, top: int) -> None:
    _draw_tile(canvas, row.query, _MARGIN, top)
    # A wider gap and a line separate the query from its matches.
    left = _MARGIN + _TILE + 3 * _GAP
    if row.matches:
        middle = _MARGIN + _TILE + (3 * _GAP) // 2
        ImageDraw.Draw(canvas).line((middle, top, middle, top + _TILE + 2 * _LINE), _FRAME, 2)
    for tile in row.matches:
        _draw_tile(canvas, tile, left, top)
        left += _TILE + _GAP


def _draw_tile(canvas: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    frame = {None: _FRAME, True: _RIGHT, False: _WRONG}[tile.agrees]
    draw.rectangle((left - 2, top - 2, left + _TILE + 1, top + _TILE + 1), outline=frame, width=2)
    try:
        picture, whole = pixels.sized_thumbnail(tile.source, side=_TILE)
        if max(picture.size) < _TILE:
            scale = _TILE / max(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        corner = left + (_TILE - picture.width) // 2, top + (_TILE - picture.height) // 2
        if tile.box is not None:
            _draw_box(picture, tile.box, picture.width / whole[0])
        canvas.paste(picture, corner)
    except UnreadableImage as error:
        words = f"photo is gone\n({error.reason})"
        draw.multiline_text((left + 16, top + _TILE // 2 - 16), words, _FAINT, _font(14))
    draw.text((left, top + _TILE + 6), _shortened(tile.title, _TILE, 15), _INK, _font(15))
    draw.text((left, top + _TILE + 6 + _LINE), _shortened(tile.note, _TILE, 13), _FAINT, _font(13))


def _draw_box(picture: Image.Image, box: tuple[float, float, float, float], scale: float) -> None:
    """Draws the box of a face, which may reach beyond the picture."""
    left, top, width, height = (scale * side for side in box)
    ImageDraw.Draw(picture).rectangle((left, top, left + width, top + height), outline=_BOX, width=2)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the bundled DejaVu Sans (Latin, Greek, Cyrillic, Arabic and more), the same on all systems."""
    return ImageFont.truetype(Path(__file__).parent / "fonts" / "DejaVuSans.ttf", size)


def _shortened(text: str, width: int, size: int) -> str:
    """Returns the text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = shown(text, lambda letter: " ")
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
