"""The page of a data set check: renders a `Check` as one HTML file with thumbnails."""

from typing import Final

from markupsafe import Markup

from retrieval.errors import UnreadableImage
from retrieval.pages import html
from retrieval.quality.dataset_check import Check
from retrieval.quality.finding_rules import RULES
from retrieval.quality.findings import DataFinding, Shown
from retrieval.sources import photos
from retrieval.system.paths import is_url

# The most cases shown of a finding, and the most photos of a case.
SHOWN: Final = 30
PHOTOS_SHOWN: Final = 4

# Side of a thumbnail in pixels: twice the displayed side, for high-resolution screens.
_SIDE: Final = 256

TITLES: Final = {rule.kind: rule.title for rule in RULES}


def page(check: Check) -> bytes:
    """Returns the page with embedded pictures; an unreadable photo is an empty tile with the reason."""
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


def _picture(shown: Shown) -> Markup:
    if shown.path is None or is_url(shown.path):
        return html.gone("not on this machine")
    try:
        return html.photo(html.thumbnail_url(photos.read_content(shown.path), side=_SIDE), alt="")
    except UnreadableImage as error:
        return html.gone(error.reason)
