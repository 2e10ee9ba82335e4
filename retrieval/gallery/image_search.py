"""Search by images, for `Gallery`.

One pass through the network yields both the embedding and the classifier's prediction.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import GalleryDamaged, ModelMismatch
from retrieval.gallery.active_model import ActiveModel
from retrieval.images import pixels
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
from retrieval.storage.vault import Vault

_T = TypeVar("_T")

# Images for each pass through the network.
_EMBED_BATCH: Final = 32

# How often a search is tried while the gallery switches models.
_ATTEMPTS: Final = 5

# Embeddings (n, d).
Vectors: TypeAlias = NDArray[np.float32]

# For each embedding, the id of a face to leave out of its answer, or None; None as a whole leaves out none.
Exclude: TypeAlias = Sequence[int | None] | None

# Searches for each embedding in a snapshot of the generation with the given number.
Nearest: TypeAlias = Callable[[Vectors, Exclude, int], list[Found[_T]]]

# The matches of an image, the classifier's prediction, and the decision with both taken into account.
_Answer: TypeAlias = tuple[tuple[_T, ...], Prediction | None, Decision | None]


def faces_near_images(
    model: ActiveModel, images: Iterable[pixels.ImageSource], asked: PhotoQuestion, *, exclude_self: bool
) -> list[SearchResult]:
    """Returns the nearest stored photos to each image, in order; see `Gallery.search_many`."""

    def nearest(vectors: Vectors, exclude: Exclude, generation: int) -> list[Found[Match]]:
        return faces_near_vectors(model.vault, vectors, exclude, asked=asked, generation=generation)

    found = _answers(model, images, asked, nearest, exclude_self=exclude_self)
    return [SearchResult(matches, prediction, decision) for matches, prediction, decision in found]


def people_near_images(
    model: ActiveModel, images: Iterable[pixels.ImageSource], asked: PeopleQuestion, *, exclude_self: bool
) -> list[PeopleResult]:
    """Returns the nearest identities to each image, in order; see `Gallery.search_people`."""

    def nearest(vectors: Vectors, exclude: Exclude, generation: int) -> list[Found[PersonMatch]]:
        return people_near_vectors(model.vault, vectors, exclude, asked=asked, generation=generation)

    found = _answers(model, images, asked, nearest, exclude_self=exclude_self)
    return [PeopleResult(people, prediction, decision) for people, prediction, decision in found]


def _answers(
    model: ActiveModel,
    images: Iterable[pixels.ImageSource],
    asked: Question,
    nearest: Nearest[_T],
    *,
    exclude_self: bool,
) -> Iterator[_Answer[_T]]:
    """Embeds images batch by batch, and yields the answer to each, with the classifier's prediction."""
    images = iter(images)
    while batch := list(islice(images, _EMBED_BATCH)):
        yield from _answers_of_batch(model, batch, asked, nearest, exclude_self=exclude_self)


def _answers_of_batch(
    model: ActiveModel,
    images: Sequence[pixels.ImageSource],
    asked: Question,
    nearest: Nearest[_T],
    *,
    exclude_self: bool,
) -> list[_Answer[_T]]:
    for _ in range(_ATTEMPTS):
        generation = model.current()
        with asked.explanation.timed("load"):
            preprocessing, embedder = model.bundle.preprocessing, model.loaded()[1]
        with asked.explanation.timed("read"):
            squares = np.stack([pixels.read(image, **preprocessing.stated()) for image in images])
        with asked.explanation.timed("embed"):
            embedded = embedder.embed(squares)
        exclude = _ids_of_same_bytes(model.vault, images) if exclude_self else None
        with suppress(ModelMismatch):
            found = nearest(embedded.vectors, exclude, generation.id)
            return list(map(partial(_with_prediction, model.bundle.labels), found, embedded.probabilities))
    raise GalleryDamaged(f"The model of {model.vault.folder} changes faster than it can be asked; try again.")


def _with_prediction(
    labels: Sequence[str], found: Found[_T], probabilities: NDArray[np.float32]
) -> _Answer[_T]:
    """The answer with the classifier's prediction; the decision states whether the two agree."""
    prediction, decision = _prediction(labels, probabilities), found.decision
    if decision is not None and prediction is not None:
        decision = decision.beside(prediction.identity, labels)
    return tuple(found), prediction, decision


def _ids_of_same_bytes(vault: Vault, images: Sequence[pixels.ImageSource]) -> list[int | None]:
    """The ids of the stored faces with exactly the bytes of each image, or None."""
    digests = [
        pixels.content_sha256(pixels.read_bytes(image) if isinstance(image, str | os.PathLike) else image)
        for image in images
    ]
    with vault.store.read() as reader:
        known = reader.faces_by_sha256(set(digests))
    return [known[digest].id if digest in known else None for digest in digests]


def _prediction(labels: Sequence[str], probabilities: NDArray[np.float32]) -> Prediction | None:
    """The label with the greatest probability; outputs of forgotten identities do not count.

    None for a model without a classifier.
    """
    if not labels:
        return None
    known = np.array([label != FORGOTTEN for label in labels])
    best = int(np.where(known, probabilities, -1).argmax())
    return Prediction(labels[best], float(probabilities[best]))
