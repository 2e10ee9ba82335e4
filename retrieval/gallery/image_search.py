"""Search by an image: one pass through the network gives the embedding and the classifier's prediction."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import GalleryDamaged, ModelMismatch
from retrieval.gallery.active_model import ActiveModel
from retrieval.images import pixels
from retrieval.models.bundle import FORGOTTEN
from retrieval.search.decisions import Decision
from retrieval.search.nearest import Found, Prediction, Question
from retrieval.storage.vault import Vault

_T = TypeVar("_T")

# How many pictures are embedded at a time.
_BATCH: Final = 32

# How often a search starts over when the gallery goes over to another model meanwhile.
_ATTEMPTS: Final = 5


def search_pictures(
    model: ActiveModel,
    images: Iterable[pixels.ImageSource],
    exclude_self: bool,
    asked: Question,
    search: Callable[..., list[Found[_T]]],
) -> Iterator[tuple[tuple[_T, ...], Prediction, Decision | None]]:
    """Embeds pictures, some at a time, and asks for each; with the classifier's predictions."""
    images = iter(images)
    while batch := list(islice(images, _BATCH)):
        yield from _search_batch(model, batch, exclude_self, asked, search)


def _search_batch(
    model: ActiveModel,
    images: Sequence[pixels.ImageSource],
    exclude_self: bool,
    asked: Question,
    search: Callable[..., list[Found[_T]]],
) -> list[tuple[tuple[_T, ...], Prediction, Decision | None]]:
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
            found = search(embedded.vectors, exclude, generation=generation.id)
            return list(map(partial(_with_prediction, model.bundle.labels), found, embedded.probabilities))
    raise GalleryDamaged(f"The model of {model.vault.folder} changes faster than it can be asked; try again.")


def _with_prediction(
    labels: Sequence[str], found: Found[_T], probabilities: NDArray[np.float32]
) -> tuple[tuple[_T, ...], Prediction, Decision | None]:
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
