"""Observation of photos for an evaluation: embeddings and small grey images, in memory, in one pass."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.reading import Prepared, squares
from retrieval.embedding.stages import PhotoPipeline, Resources, prepare_without_gallery
from retrieval.errors import Interrupted
from retrieval.models.embedder import Embedder
from retrieval.sources.photos import Photo
from training.evaluation.measurements import LeftOut, Speed

# Side, in pixels, of the grey images that the baselines "pixels" and "eigenfaces" use.
GREY: Final = 32


@dataclass(frozen=True)
class Observed:
    """The n photos that could be read, in the order in which the caller listed them.

    Attributes:
        paths: of the photos.
        identities: (n,) names; "" for an anonymous photo.
        digests: SHA-256 of the bytes.
        vectors: (n, d) float32, embeddings.
        probabilities: (n, c) float32; None if they were not requested.
        grey: (n, 1024) uint8, the model's crop in grey at 32 x 32; None if it was not requested.
        left_out: photos that could not be read.
        speed: of reading, decoding and embedding together.
    """

    paths: tuple[str, ...]
    identities: NDArray[np.str_]
    digests: tuple[str, ...]
    vectors: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None
    grey: NDArray[np.uint8] | None
    left_out: tuple[LeftOut, ...]
    speed: Speed


@dataclass(frozen=True)
class Wanted:
    """Which data are kept for each photo in addition to its embedding."""

    probabilities: bool = False
    grey: bool = False


@dataclass(frozen=True)
class Watch:
    """Callbacks of an evaluation, for progress and for stopping; the defaults do nothing.

    Attributes:
        on_stage: called when a stage begins, with its description and its number of photos.
        on_outcome: called for every photo.
        should_stop: called after each batch; True stops the evaluation.
    """

    on_stage: Callable[[str, int], None] = lambda stage, total: None
    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class _Batch:
    outcomes: list[Outcome]
    faces: list[NewFace]
    vectors: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None
    grey: NDArray[np.uint8] | None


def observe(
    embedder: Embedder,
    found: Sequence[Photo],
    *,
    wanted: Wanted = Wanted(),
    watch: Watch = Watch(),
    workers: int | None = None,
) -> Observed:
    """Reads, decodes and embeds photos with the stages of bulk embedding; leaves out unreadable photos.

    Memory per photo: 4 x d bytes for the embedding, 4 x c bytes for probabilities, 1 KiB for grey.

    Raises:
        Interrupted: `watch.should_stop` returned True.
        RunError: the device, or a decoding process, failed.
    """
    reader, started = embedder.photo_reader, time.monotonic()
    parts: list[_Batch] = []
    with PhotoPipeline(
        found,
        prepare=partial(prepare_without_gallery, reader),
        embed=partial(_embed, embedder, wanted),
        embedder=lambda: embedder,
        reader=reader,
        on_gpu=embedder.on_gpu,
        resources=Resources(workers=workers),
    ) as pipeline:
        for batch in pipeline:
            for outcome in batch.outcomes:
                watch.on_outcome(outcome)
            parts.append(batch)
            if watch.should_stop():
                raise Interrupted("Stopped; nothing was written.")
    return _joined(parts, embedder, time.monotonic() - started)


def _embed(embedder: Embedder, wanted: Wanted, batch: Sequence[Prepared | Outcome]) -> _Batch:
    ready = [photo for photo in batch if isinstance(photo, Prepared)]
    size = embedder.bundle.input_size
    pixels = np.stack(squares(ready)) if ready else np.empty((0, size, size, 3), np.uint8)
    embedded = embedder.embed(pixels)
    outcomes = [
        photo
        if isinstance(photo, Outcome)
        else Outcome(photo.face.path, photo.face.identity, Status.EMBEDDED)
        for photo in batch
    ]
    return _Batch(
        outcomes,
        [photo.face for photo in ready],
        embedded.vectors,
        embedded.probabilities if wanted.probabilities else None,
        grey(pixels) if wanted.grey else None,
    )


def grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts images (n, H, W, 3) to grey (ITU-R 601), averaged down to 32 x 32, as rows (n, 1024)."""
    rows = np.empty((len(pixels), GREY * GREY), np.uint8)
    for row, picture in zip(rows, pixels, strict=True):
        small = Image.fromarray(picture).convert("L").resize((GREY, GREY), Image.Resampling.BOX)
        row[:] = np.asarray(small).ravel()
    return rows


def _joined(parts: Sequence[_Batch], embedder: Embedder, seconds: float) -> Observed:
    faces = [face for part in parts for face in part.faces]
    rejected = [one for part in parts for one in part.outcomes if one.status is Status.REJECTED]
    bundle = embedder.bundle
    return Observed(
        tuple(face.path or "" for face in faces),
        np.array([face.identity or "" for face in faces], np.str_),
        tuple(face.sha256 for face in faces),
        _stacked([part.vectors for part in parts], bundle.dimension, np.float32),
        _stacked_or_none([part.probabilities for part in parts], len(bundle.labels), np.float32),
        _stacked_or_none([part.grey for part in parts], GREY * GREY, np.uint8),
        tuple(LeftOut(one.path or "", one.identity, str(one.reason), one.detail) for one in rejected),
        Speed(len(faces), seconds, len(faces) / seconds, embedder.device, embedder.engine),
    )


def _stacked(parts: Iterable[NDArray[Any]], width: int, dtype: type) -> NDArray[Any]:
    return np.concatenate([np.empty((0, width), dtype), *parts])


def _stacked_or_none(parts: Iterable[NDArray[Any] | None], width: int, dtype: type) -> NDArray[Any] | None:
    kept = [part for part in parts if part is not None]
    return _stacked(kept, width, dtype) if kept else None


def shown(path: str, root: str) -> str:
    """Returns a photo's path relative to the data folder, with "/"; unchanged if outside that folder."""
    inside = os.path.abspath(root) + os.sep
    return path.removeprefix(inside).replace(os.sep, "/") if path.startswith(inside) else path
