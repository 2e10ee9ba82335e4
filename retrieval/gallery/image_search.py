"""Search by images, for `Gallery`.

One pass through the network yields both the embedding and the classifier's prediction.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import GalleryDamaged, InputError, ModelMismatch
from retrieval.gallery.active_model import ActiveModel
from retrieval.images import pixels
from retrieval.images.detection import DetectedFace
from retrieval.images.photo_reader import FaceSelection
from retrieval.images.pixels import ImageSource
from retrieval.index.segments import Exclude
from retrieval.models.bundle import FORGOTTEN
from retrieval.search.decisions import Decision
from retrieval.search.nearest import (
    Found,
    Match,
    PeopleResult,
    PersonMatch,
    Prediction,
    SearchResult,
    faces_near_vectors,
    people_near_vectors,
)
from retrieval.search.question import PeopleQuestion, PhotoQuestion, Question
from retrieval.storage.any_vault import AnyVault

_T = TypeVar("_T")

# Images for each pass through the network.
_EMBED_BATCH: Final = 32

# How often a search is tried while the gallery switches models.
_ATTEMPTS: Final = 5

# Embeddings (n, d).
Vectors: TypeAlias = NDArray[np.float32]

# Searches for each embedding in a snapshot of the generation with the given number.
Nearest: TypeAlias = Callable[[Vectors, Exclude, int], list[Found[_T]]]

# The matches of a face, the classifier's prediction, the decision with both taken into account, and where the
# face is in its image.
_Answer: TypeAlias = tuple[tuple[_T, ...], Prediction | None, Decision | None, DetectedFace | None]


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of a search, and which faces of them are searched for.

    Attributes:
        images: in order.
        selection: which faces of an image, for a model with a face detector.
        exclude_self: leave out the stored faces with exactly the bytes of the image.
    """

    images: Iterable[ImageSource]
    selection: FaceSelection
    exclude_self: bool


def one_face(selection: FaceSelection) -> FaceSelection:
    """Returns a selection of one face of each image.

    Raises:
        InputError: it is one of all faces.
    """
    if selection.faces == "all":
        raise InputError("This search is for one face of each image; call `search_faces` for all of them.")
    return selection


def faces_near_images(
    model: ActiveModel, pictures: Pictures, asked: PhotoQuestion
) -> Iterator[list[SearchResult]]:
    """Yields the nearest stored photos to each face of each image, in order; see `Gallery.search_faces`."""

    def nearest(vectors: Vectors, exclude: Exclude, generation: int) -> list[Found[Match]]:
        return faces_near_vectors(model.vault, vectors, exclude, asked=asked, generation=generation)

    for answers in _answers(model, pictures, asked, nearest):
        yield [SearchResult(*answer) for answer in answers]


def people_near_images(
    model: ActiveModel, pictures: Pictures, asked: PeopleQuestion
) -> Iterator[list[PeopleResult]]:
    """Yields the nearest identities to each face of each image, in order."""

    def nearest(vectors: Vectors, exclude: Exclude, generation: int) -> list[Found[PersonMatch]]:
        return people_near_vectors(model.vault, vectors, exclude, asked=asked, generation=generation)

    for answers in _answers(model, pictures, asked, nearest):
        yield [PeopleResult(*answer) for answer in answers]


def _answers(
    model: ActiveModel, pictures: Pictures, asked: Question, nearest: Nearest[_T]
) -> Iterator[list[_Answer[_T]]]:
    """Embeds images batch by batch, and yields the answers to the faces of each."""
    images = iter(pictures.images)
    while batch := list(islice(images, _EMBED_BATCH)):
        yield from _answers_of_batch(model, dataclasses.replace(pictures, images=batch), asked, nearest)


def _answers_of_batch(
    model: ActiveModel, pictures: Pictures, asked: Question, nearest: Nearest[_T]
) -> Iterator[list[_Answer[_T]]]:
    images = list(pictures.images)
    for _ in range(_ATTEMPTS):
        generation = model.current()
        with asked.explanation.timed("load"):
            embedder = model.loaded()[1]
        with asked.explanation.timed("read"):
            reader = embedder.photo_reader
            faces = [reader.read(image, pictures.selection) for image in images]
        with asked.explanation.timed("embed"):
            embedded = embedder.embed(np.stack([face.pixels for some in faces for face in some]))
        exclude = ids_of_same_bytes(model.vault, images) if pictures.exclude_self else [()] * len(images)
        of_each = [one for one, some in zip(exclude, faces, strict=True) for _ in some]
        with suppress(ModelMismatch):
            found = nearest(embedded.vectors, of_each if pictures.exclude_self else None, generation.id)
            predicted = map(partial(with_prediction, model.bundle.labels), found, embedded.probabilities)
            return ([(*next(predicted), face.face) for face in some] for some in faces)
    raise GalleryDamaged(f"The model of {model.vault.name} changes faster than it can be asked; try again.")


def with_prediction(
    labels: Sequence[str], found: Found[_T], probabilities: NDArray[np.float32]
) -> tuple[tuple[_T, ...], Prediction | None, Decision | None]:
    """Returns the answer with the classifier's prediction; the decision states whether the two agree."""
    prediction, decision = _prediction(labels, probabilities), found.decision
    if decision is not None and prediction is not None:
        decision = decision.beside(prediction.identity, labels)
    return tuple(found), prediction, decision


def ids_of_same_bytes(vault: AnyVault, images: Sequence[ImageSource]) -> list[tuple[int, ...]]:
    """Returns the ids of the stored faces of the photo with exactly the bytes of each image."""
    digests = [
        pixels.content_sha256(pixels.read_bytes(image) if isinstance(image, str | os.PathLike) else image)
        for image in images
    ]
    with vault.store.read() as reader:
        known = reader.photos_by_sha256(set(digests))
    return [known[digest].face_ids if digest in known else () for digest in digests]


def _prediction(labels: Sequence[str], probabilities: NDArray[np.float32]) -> Prediction | None:
    """Returns the label with the greatest probability; outputs of forgotten identities do not count.

    None for a model without a classifier.
    """
    if not labels:
        return None
    known = np.array([label != FORGOTTEN for label in labels])
    best = int(np.where(known, probabilities, -1).argmax())
    return Prediction(labels[best], float(probabilities[best]))
