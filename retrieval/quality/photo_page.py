"""Pages of photos for reports: findings with photos side by side, as one self-contained HTML file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeAlias

from markupsafe import Markup
from PIL import Image

from retrieval.errors import Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.detection import DetectedFace
from retrieval.images.photo_reader import FaceImage, PhotoReader
from retrieval.pages import html
from retrieval.sources import photos
from retrieval.sources.archives import Shelf
from retrieval.sources.remote import NOTHING_FETCHED, Fetching

# Reads a photo's bytes from one of its paths.
_Read: TypeAlias = Callable[[str], bytes]

# Side of a photo on a sheet, in pixels: twice the displayed side, for high-resolution screens and printers.
_SIDE: Final = 224


@dataclass(frozen=True, slots=True)
class Picture:
    """A photo with a line under it.

    Attributes:
        paths: where its bytes may be; the first path that has them is shown.
        sha256: of its bytes, in hex; a file with other bytes is not shown.
        caption: the line.
        place: where the face in question is, of several; None for the main one.
    """

    paths: Sequence[str]
    sha256: str
    caption: str
    place: DetectedFace | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Photos under one name; doubted ones have a red frame."""

    name: str
    pictures: Sequence[Picture]
    doubted: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """A finding: what was found, what to do, its score, and the photos that show it, side by side."""

    says: str
    next: str
    score: str
    groups: Sequence[Group]


@dataclass(frozen=True, slots=True)
class Section:
    """Findings of one kind under a heading, with a sentence about them."""

    heading: str
    words: str
    items: Sequence[Item]


@dataclass(frozen=True, slots=True)
class Table:
    """A small table; columns of numbers are aligned to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


def sheet(
    title: str,
    words: Sequence[str],
    table: Table,
    sections: Iterable[Section],
    fetching: Fetching = NOTHING_FETCHED,
    reader: PhotoReader | None = None,
) -> bytes:
    """Returns one HTML file in UTF-8, with embedded photos.

    With a `reader` that has a face detector, a photo is shown as the aligned face that is embedded; where it
    has no face, and without a detector, as the whole photo.

    An unreadable photo, or a file with other bytes, is a box with its name and the reason; so is a photo at
    an address, unless `fetching` allows to fetch it.
    """
    if reader is not None:
        shown = replace(reader.preprocessing, size=_SIDE, colour="srgb")
        reader = PhotoReader(shown, reader.detector)
    with Shelf() as shelf:
        read = partial(photos.read_stored, shelf, fetching=fetching)
        return html.render(
            "retrieval.quality",
            "sheet.html.jinja",
            filters={"photo": partial(_photo, read=read, reader=reader)},
            title=title,
            words=words,
            table=table,
            sections=sections,
        )


def _photo(picture: Picture, *, read: _Read, reader: PhotoReader | None) -> Markup:
    try:
        content = _content(picture, read)
        face = None if reader is None else _face(picture, content, reader)
        if face is None:
            url = html.thumbnail_url(content, side=_SIDE)
        else:
            url = html.data_url(Image.fromarray(face.pixels))
    except UnreadableImage as error:
        name = picture.paths[0] if picture.paths else "a photo without a path"
        return html.gone(f"{name}: {error.detail}")
    return html.photo(url, alt=picture.caption)


def _face(picture: Picture, content: bytes, reader: PhotoReader) -> FaceImage | None:
    """Returns the face in question; None where the photo has no face.

    Raises:
        UnreadableImage: there is none where it was, or the photo cannot be read.
    """
    if picture.place is None or reader.detector is None:
        return reader.inspect(content).main
    return reader.read_again(content, picture.place)


def _content(picture: Picture, read: _Read) -> bytes:
    """Returns the bytes of a photo, from the first of its files that still has them.

    Raises:
        UnreadableImage: no file has them.
    """
    problem = UnreadableImage(Reason.MISSING, "it was enrolled without a file")
    for path in picture.paths:
        try:
            content = read(path)
        except UnreadableImage as error:
            problem = error
            continue
        if pixels.content_sha256(content) == picture.sha256:
            return content
        problem = UnreadableImage(Reason.MISSING, "the file has other bytes by now")
    raise problem
