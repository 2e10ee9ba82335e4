"""The page of a data set check: renders a `Check` as one HTML file with thumbnails."""

from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retrieval.errors import UnreadableImage
from retrieval.images import pixels
from retrieval.pages import html
from retrieval.quality.dataset_check import Check
from retrieval.quality.finding_rules import RULES
from retrieval.quality.findings import DataFinding, Kind, Shown
from retrieval.sources import photos
from retrieval.system.paths import is_url

# The most cases shown of a finding, and the most photos of a case.
SHOWN: Final = 30
PHOTOS_SHOWN: Final = 4

# Side of a thumbnail in pixels: twice the displayed side, for high-resolution screens.
_SIDE: Final = 256

# Context on each side of a face's box in its thumbnail, as a share of the box's longer side.
_CONTEXT: Final = 0.3

_FRAME: Final = "#ffc83d"

TITLES: Final = {rule.kind: rule.title for rule in RULES}


def page(check: Check) -> bytes:
    """Returns the page with embedded pictures.

    Where a photo's face is known, its picture is the face; of a photo with several faces it is the whole
    photo, with a frame around the face that is taken. An unreadable photo is an empty tile with the reason.
    """
    return html.render(
        "retrieval.quality",
        "check.html.jinja",
        filters={"amount": amount, "picture": _picture},
        check=check,
        summary=summary(check),
        usable=sum(1 for person in check.people if person.training),
        titles=TITLES,
        shown=SHOWN,
        photos_shown=PHOTOS_SHOWN,
    )


def amount(finding: DataFinding) -> str:
    """Returns the number of photos or identities of a finding, with the unit."""
    several = {"photo": "photos", "identity": "identities"}[finding.unit]
    return f"{finding.count:,} {finding.unit if finding.count == 1 else several}"


def summary(check: Check) -> str:
    """Returns a sentence with the numbers of photos and identities, and their split."""
    usable = [person for person in check.people if person.training]
    learned, held = sum(one.training for one in usable), sum(one.validation for one in usable)
    photo = "photo" if check.readable == 1 else "photos"
    identity = "identity" if len(check.people) == 1 else "identities"
    return (
        f"{check.readable:,} {photo} of {len(check.people):,} {identity}; train would learn from {learned:,} "
        f"and hold out {held:,}, of {len(usable):,} identities."
        + (f" Passed over: {check.passed_over}." if check.passed_over else "")
    )


def _picture(shown: Shown, kind: Kind) -> Markup:
    if shown.path is None or is_url(shown.path):
        return html.gone("not on this machine")
    try:
        content = photos.read_content(shown.path)
        if shown.box is None:
            picture = pixels.thumbnail(content, side=_SIDE)
        elif kind is Kind.SEVERAL_FACES:
            picture = _framed(content, shown.box)
        else:
            picture = _cropped(content, shown.box)
    except UnreadableImage as error:
        return html.gone(error.reason)
    return html.photo(html.data_url(picture), alt="")


def _framed(content: bytes, box: tuple[float, float, float, float]) -> Image.Image:
    """Returns the whole photo with a frame around a box."""
    picture, (width, _) = pixels.sized_thumbnail(content, side=_SIDE)
    left, top, across, down = (side * picture.width / width for side in box)
    ImageDraw.Draw(picture).rectangle((left, top, left + across, top + down), outline=_FRAME, width=3)
    return picture


def _cropped(content: bytes, box: tuple[float, float, float, float]) -> Image.Image:
    """Returns the square around a box, moved and shrunk so that it lies within the photo."""

    def locate(view: pixels.View) -> list[NDArray[np.float64]]:
        left, top, across, down = box
        side = min((1 + 2 * _CONTEXT) * max(across, down), view.width, view.height)
        x = min(max(left + across / 2 - side / 2, 0), view.width - side)
        y = min(max(top + down / 2 - side / 2, 0), view.height - side)
        return [np.array([[1.0, 0, -x], [0, 1, -y]]) * (_SIDE / side)]

    return Image.fromarray(pixels.align(content, size=_SIDE, locate=locate, colour="srgb")[0])
