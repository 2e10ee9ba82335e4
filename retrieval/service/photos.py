"""Photos for the service: their limits, and the stored photos that it shows."""

import dataclasses
import io
from collections.abc import Iterator

from PIL import Image

from retrieval.database.records import Face
from retrieval.errors import InputError, NotFound, Reason, UnreadableImage
from retrieval.gallery.gallery import Gallery
from retrieval.images import containers, pixels
from retrieval.images.photo_reader import FaceSelection, PhotoReader
from retrieval.service.settings import Limits
from retrieval.sources.archives import Shelf
from retrieval.sources.photos import read_stored
from retrieval.sources.remote import NOTHING_FETCHED


def require_detector(gallery: Gallery, selection: FaceSelection) -> None:
    """Checks that the gallery's model finds faces, where a request says which.

    Raises:
        InputError: it takes photos as they are.
    """
    chosen = dataclasses.replace(selection, faces="auto") != FaceSelection("auto")
    if (chosen or selection.faces in ("one", "none")) and gallery.bundle.preprocessing.faces is None:
        raise InputError(
            "The gallery's model has no face detector and takes photos as they are, so `faces` and limits on "
            "faces are of no use; leave them out."
        )


def check_pixels(content: bytes, limits: Limits) -> None:
    """Checks the size in the header; formats that are decoded in a process have the library's limits.

    Raises:
        UnreadableImage: the photo has more pixels than the limit.
    """
    header = containers.parse(content)
    if header is not None and header.width * header.height > limits.pixels:
        raise UnreadableImage(
            Reason.TOO_MANY_PIXELS,
            f"it has {header.width * header.height:,} pixels, and {limits.pixels:,} is the limit",
        )


def thumbnail(gallery: Gallery, face: Face, *, side: int, whole: bool, seconds: float) -> bytes:
    """Returns a small picture of a stored face as JPEG.

    The photo is read only from a path that it was enrolled from, and only while that has its bytes. Addresses
    are not fetched.

    Args:
        gallery: the gallery.
        face: the face.
        side: the longer side of the picture in pixels, at most.
        whole: show the whole photo; otherwise the aligned face, where the model aligns faces.
        seconds: the time limit for decoding.

    Raises:
        NotFound: no path has the photo's bytes any more.
        UnreadableImage, RunError: the photo cannot be decoded.
    """
    content = next(_contents(face), None)
    if content is None:
        raise NotFound(f"The photo of face {face.id} is no longer where it was enrolled from.")
    detected = None if face.region is None else face.region.detected
    reader = gallery.photo_reader
    if whole or detected is None or reader.detector is None:
        small = pixels.thumbnail(content, side=side, seconds=seconds)
    else:
        shown = dataclasses.replace(reader.preprocessing, size=side, colour="srgb")
        aligned = PhotoReader(shown, reader.detector).read_again(content, detected, seconds=seconds)
        small = Image.fromarray(aligned.pixels)
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=85)
    return data.getvalue()


def _contents(face: Face) -> Iterator[bytes]:
    """Yields the bytes at the paths of a face that are still those of its photo."""
    with Shelf() as shelf:
        for path in face.paths:
            try:
                content = read_stored(shelf, path, NOTHING_FETCHED)
            except UnreadableImage:
                continue  # another path may have them
            if pixels.content_sha256(content) == face.sha256:
                yield content
