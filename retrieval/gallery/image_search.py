"""Search by an image: one pass through the network gives the embedding and the classifier's prediction."""

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

# Images that are embedded together.
_BATCH: Final = 32

# How often a search starts over when the gallery switches models meanwhile.
_ATTEMPTS: Final = 5

# Embeddings (n, d).
Vectors: TypeAlias = NDArray[np.float32]

# For each embedding, a face that is no answer to it, or None; None as a whole where all may be.
Exclude: TypeAlias = Sequence[int | None] | None

# Finds what is nearest to each embedding, in a snapshot of the model of that number.
Nearest: TypeAlias = Callable[[Vectors, Exclude, int], list[Found[_T]]]

# What was found for an image, the classifier's prediction, and the decision that knows of both.
_Answered: TypeAlias = tuple[tuple[_T, ...], Prediction, Decision | None]


def faces_near_images(
    model: ActiveModel, images: Iterable[pixels.ImageSource], asked: PhotoQuestion, *, exclude_self: bool
) -> list[SearchResult]:
    """The nearest stored photos to each image, in their order; see `Gallery.search_many`."""

    def nearest(vectors: Vectors, exclude: Exclude, generation: int) -> list[Found[Match]]:
        return faces_near_vectors(model.vault, vectors, exclude, asked=asked, generation=generation)

    found = _answers(model, images, asked, nearest, exclude_self=exclude_self)
    return [SearchResult(matches, prediction, decision) for matches, prediction, decision in found]


def people_near_images(
    model: ActiveModel, images: Iterable[pixels.ImageSource], asked: PeopleQuestion, *, exclude_self: bool
) -> list[PeopleResult]:
    """The nearest people to each image, in their order; see `Gallery.search_people`."""

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
) -> Iterator[_Answered[_T]]:
    """Embeds images, some at a time, and searches for each; with the classifier's predictions."""
    images = iter(images)
    while batch := list(islice(images, _BATCH)):
        yield from _answers_of_batch(model, batch, asked, nearest, exclude_self=exclude_self)


def _answers_of_batch(
    model: ActiveModel,
    images: Sequence[pixels.ImageSource],
    asked: Question,
    nearest: Nearest[_T],
    *,
    exclude_self: bool,
) -> list[_Answered[_T]]:
    for _ in range(_ATTEMPTS):
        generation = model.current()
        with asked.explanation.timed("load"):
            preprocessing, embedder = model.bundle.preprocessing, model.loaded()[1]
        with asked.explanation.timed("read"):
            squares = np.stack([pixels.read(image, **preprocessing.stated()) for image in images])
        with asked.explanation.timed("embed"):
            embedded = embedder.embed(squares)
        exclude = _stored(model.vault, images) if exclude_self else None
        with suppress(ModelMismatch):
            found = nearest(embedded.vectors, exclude, generation.id)
            return list(map(partial(_with_prediction, model.bundle.labels), found, embedded.probabilities))
    raise GalleryDamaged(f"The model of {model.vault.folder} changes faster than it can be asked; try again.")


def _with_prediction(
    labels: Sequence[str], found: Found[_T], probabilities: NDArray[np.float32]
) -> _Answered[_T]:
    """What was found, beside what the classifier says, and a decision that knows of both."""
    prediction, decision = _prediction(labels, probabilities), found.decision
    if decision is not None:
        decision = decision.beside(prediction.identity, labels)
    return tuple(found), prediction, decision


def _stored(vault: Vault, images: Sequence[pixels.ImageSource]) -> list[int | None]:
    """The faces that have the very bytes of some pictures."""
    digests = [
        pixels.content_sha256(pixels.read_bytes(image) if isinstance(image, str | os.PathLike) else image)
        for image in images
    ]
    with vault.store.read() as reader:
        known = reader.faces_by_sha256(set(digests))
    return [known[digest].id if digest in known else None for digest in digests]


def _prediction(labels: Sequence[str], probabilities: NDArray[np.float32]) -> Prediction:
    """The likeliest name; the outputs of the forgotten have none."""
    known = np.array([label != FORGOTTEN for label in labels])
    best = int(np.where(known, probabilities, -1).argmax())
    return Prediction(labels[best], float(probabilities[best]))
