"""Enrolls one face of a photo, which a person chose on the page of a search; the others stay unknown."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.database.records import FaceRegion, NewFace
from retrieval.embedding.outcome import Outcome
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.images.detection import DetectedFace
from retrieval.service.photos import check_pixels
from retrieval.service.settings import Limits
from retrieval.sources.photos import Photo

# Left, top, width and height in pixels of the upright photo.
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class EmbeddedFace:
    """A face of a photo with its embedding, to be enrolled.

    Attributes:
        face: its name, the SHA-256 of the photo's bytes, and where the face is in the photo.
        vectors: (1, d) float32.
        fingerprint: of the model that found and embedded it.
    """

    face: NewFace
    vectors: NDArray[np.float32]
    fingerprint: str

    def enroll_into(self, gallery: Gallery) -> Outcome:
        """Enrolls the face; the outcome is durable then.

        Raises:
            ModelMismatch: the gallery switched models since the face was embedded.
            InputError: the name cannot be stored.
            StorageError, GalleryBusy: nothing was enrolled.
        """
        [outcome] = gallery.enroll_vectors([self.face], self.vectors, fingerprint=self.fingerprint)
        return outcome


def parse_box(text: str) -> Box:
    """Returns a box from four numbers that are separated by commas.

    Raises:
        InputError: they are not four finite numbers, or have no width or height.
    """
    try:
        left, top, width, height = map(float, text.split(","))
    except ValueError:
        width = height = left = top = math.nan
    if not all(map(math.isfinite, (left, top, width, height))) or width <= 0 or height <= 0:
        raise InputError("`box` is not the box of a face: give left, top, width and height in pixels.")
    return left, top, width, height


def embed_face(gallery: Gallery, photo: Photo, box: Box, limits: Limits) -> EmbeddedFace:
    """Finds a face of a photo again at its box, and embeds it. May be called by several threads at once.

    Args:
        gallery: with a model that finds faces.
        photo: the name of the face as identity, and the bytes of the photo as content.
        box: of the face, as a search of this photo returned it.
        limits: of requests.

    Raises:
        UnreadableImage: the photo cannot be read, or no face is at the box.
        InputError: the gallery's model takes photos as they are.
        RunError: as `Embedder.embed`.
    """
    assert isinstance(photo.content, bytes)
    gallery.model.current()
    _, embedder = gallery.model.loaded()
    reader = embedder.photo_reader
    if reader.detector is None:
        raise InputError(
            "The gallery's model has no face detector and takes photos as they are; leave out `box`."
        )
    check_pixels(photo.content, limits)
    image = reader.read_again(photo.content, DetectedFace(box, (), 1.0), seconds=limits.photo_seconds)
    assert image.face is not None  # of a reader with a detector
    face = NewFace(
        photo.identity,
        None,
        pixels.content_sha256(photo.content),
        dict(photo.metadata),
        region=FaceRegion(image.face, image.sharpness),
    )
    return EmbeddedFace(face, embedder.embed(image.pixels[None]).vectors, embedder.bundle.fingerprint)
