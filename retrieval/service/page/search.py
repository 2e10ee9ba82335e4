"""The page of searches: a photo with a box around every face, and for each who it is and what is near."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.pages.html import data_url
from retrieval.search.answers import Answer
from retrieval.search.nearest import Match
from retrieval.service.engine import Answered
from retrieval.service.page.rendering import CLOSEST, is_partial, page
from retrieval.service.queries import read_search
from retrieval.service.routes.common import ServiceOf, needs, unless_gone
from retrieval.service.schemas import SearchOptions
from retrieval.service.settings import Limits
from retrieval.service.tokens import Scope

# The longer side of the photo in the answer, in pixels.
_SIDE: Final = 1024
# How far the axis of distances goes beyond the farthest of what it shows.
_BEYOND: Final = 1.12
# The part of the photo that a label takes, in percent of its height; and how far its text is from a box, in
# pixels of the screen: above, below, or within.
_LABEL_PERCENT: Final = 8.0
_ABOVE, _BELOW, _WITHIN = -9, 20, 24
# Context around a face in its own picture, as a share of its sides.
_AROUND: Final = 0.2

# Left, top, width and height.
Box: TypeAlias = tuple[float, float, float, float]

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Scope.READ))])


@dataclass(frozen=True, slots=True)
class Mark:
    """A distance on the axis of a face.

    Attributes:
        percent: where, of the length of the axis.
        is_own: whether the photo is of the person that the decision names.
    """

    percent: float
    is_own: bool


@dataclass(frozen=True, slots=True)
class ShownFace:
    """A face of the photo, with its answer.

    Attributes:
        number: which one, from the left.
        label: a name, "UNKNOWN", or, without a threshold, the name of the closest photo and a question mark.
        state: "named", "unknown" or "open": not decided, for want of a threshold.
        answer: the answer.
        matches: the closest photos, nearest first.
        percents: the box in percent of the photo's sides.
        around: the box with some context, in pixels of the photo.
        label_percent, label_pixels: where its label stands from the top: a part of the photo's height, and
            pixels.
        marks, threshold: distances of the closest photos and of the threshold on the axis, in percent.
        farthest: the distance at the end of the axis.
    """

    number: int
    label: str
    state: str
    answer: Answer
    matches: Sequence[Match]
    percents: Box
    around: Box
    label_percent: float
    label_pixels: int
    marks: tuple[Mark, ...]
    threshold: float | None
    farthest: float


@dataclass(frozen=True, slots=True)
class ShownPhoto:
    """The photo that was searched for, as a data URL, its sides in pixels, and its faces.

    `is_whole` says that the model takes photos as they are, so that the box is what it sees.
    """

    name: str
    url: str
    width: int
    height: int
    is_whole: bool
    faces: tuple[ShownFace, ...]


@router.get("/")
async def show_search(request: Request, service: ServiceOf) -> Response:
    """Where a photo is given."""
    return page(request, "search", photo=None, **await run_in_threadpool(_about, service.gallery))


@router.post("/search")
async def search(request: Request, service: ServiceOf) -> Response:
    """The faces of a photo, each with its answer."""
    query, _ = await read_search(request, SearchOptions(k=CLOSEST), service.limits)
    if not isinstance(query.content, bytes):
        raise InputError("The page takes photos alone; `/v1/search` takes stored faces and vectors too.")
    answered = await unless_gone(request, service.engine.submit(query), service.limits.answer_seconds)
    photo = await run_in_threadpool(
        _shown, service.gallery, query.name, query.content, answered, service.limits
    )
    about = await run_in_threadpool(_about, service.gallery)
    return page(request, "answers" if is_partial(request) else "search", photo=photo, **about)


def _about(gallery: Gallery) -> dict[str, Any]:
    """Returns what the page says of the gallery."""
    with gallery.vault.store.read() as reader:
        state = gallery.vault.state(reader)
    return {
        "stored": state.faces,
        "is_calibrated": state.calibration is not None,
        "folder": gallery.name,
    }


def _shown(gallery: Gallery, name: str, content: bytes, answered: Answered, limits: Limits) -> ShownPhoto:
    small, (width, height) = pixels.sized_thumbnail(content, side=_SIDE, seconds=limits.photo_seconds)
    crop = gallery.bundle.preprocessing.crop
    faces = tuple(_face(answer, width, height, crop) for answer in answered.answers)
    is_whole = all(answer.face is None for answer in answered.answers)
    return ShownPhoto(name, data_url(small), width, height, is_whole, faces)


def _face(answer: Answer, width: int, height: int, crop: float) -> ShownFace:
    box = _central_square(width, height, crop) if answer.face is None else answer.face.box
    percents = _percents(box, width, height)
    label_percent, label_pixels = _label_place(percents)
    decision, matches = answer.decision, answer.matches or ()
    threshold = None if decision is None else decision.threshold
    far = [match.distance for match in matches] + ([] if threshold is None else [threshold])
    farthest = max(far, default=0.0) * _BEYOND or 1.0
    label, state = _label(answer)
    return ShownFace(
        number=answer.number,
        label=label,
        state=state,
        answer=answer,
        matches=matches,
        percents=percents,
        around=box if answer.face is None else _with_context(box),
        label_percent=label_percent,
        label_pixels=label_pixels,
        marks=tuple(
            Mark(100 * match.distance / farthest, state == "named" and match.face.identity == label)
            for match in matches
        ),
        threshold=None if threshold is None else 100 * threshold / farthest,
        farthest=farthest,
    )


def _label(answer: Answer) -> tuple[str, str]:
    """Returns what a face is called, and whether that is a name, UNKNOWN, or open."""
    if answer.decision is None:
        closest = next((one.face.identity for one in answer.matches or () if one.face.identity), None)
        return ("nobody" if closest is None else f"{closest}?"), "open"
    if answer.decision.identity is None:
        return "UNKNOWN", "unknown"
    return answer.decision.identity, "named"


def _percents(box: Box, width: int, height: int) -> Box:
    left, top, wide, high = box
    return (100 * left / width, 100 * top / height, 100 * wide / width, 100 * high / height)


def _with_context(box: Box) -> Box:
    left, top, wide, high = box
    return (
        left - _AROUND * wide,
        top - _AROUND * high,
        wide * (1 + 2 * _AROUND),
        high * (1 + 2 * _AROUND),
    )


def _label_place(percents: Box) -> tuple[float, int]:
    """Returns where the label of a box stands: above it, below it, or within, where there is place for it."""
    _, top, _, high = percents
    if top >= _LABEL_PERCENT:
        return top, _ABOVE
    if top + high <= 100 - _LABEL_PERCENT:
        return top + high, _BELOW
    return max(top, 0.0), _WITHIN


def _central_square(width: int, height: int, crop: float) -> Box:
    """Returns what a model sees of a photo that it takes as it is."""
    side = crop * min(width, height)
    return ((width - side) / 2, (height - side) / 2, side, side)
