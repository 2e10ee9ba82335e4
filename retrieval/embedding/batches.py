"""Batches: how many photos are embedded at once, and how prepared photos are collected into batches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Final, TypeAlias, TypeVar

import numpy as np

from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import Prepared, squares
from retrieval.errors import InputError
from retrieval.models.embedder import Embedder
from retrieval.system.pipeline import Stage

DEFAULT_BATCH_SIZE: Final = 64

# Photos in a chunk of a source, and in a batch of which few or none are to be embedded.
CHUNK: Final = 512

# New photos from which on tuning a GPU's batch size, which takes some seconds, is worth its time.
_MIN_PHOTOS_TO_TUNE: Final = 256

# Photos of which copies are used for tuning.
_TUNING_SAMPLE: Final = 64

# The largest forward pass that tuning tries, and the largest batch that results, for the two lanes of a GPU.
_MAX_PASS_SIZE: Final = 512
_MAX_BATCH_SIZE: Final = 2 * _MAX_PASS_SIZE

# On a GPU one batch is computed while the next is copied; as many results wait while others become durable.
_GPU_BATCHES_IN_FLIGHT: Final = 2

Batch: TypeAlias = list[Prepared | Outcome]

Result = TypeVar("Result")


class Batches:
    """The batch size of one run, and the collection of photos into batches.

    Attributes:
        largest: the largest batch size that is possible, in photos to be embedded.
    """

    def __init__(self, asked: int | None, embedder: Callable[[], Embedder], *, beside_gpu: bool) -> None:
        """Fixes the size where it does not need tuning.

        Args:
            asked: how many photos are embedded together; None is 64 on a CPU, and on a GPU the size that
                `Embedder.tune` finds, once per embedder, at the first batch of 256 photos.
            embedder: returns the loaded model; called only for tuning.
            beside_gpu: whether photos may be embedded on a GPU.

        Raises:
            InputError: `asked` is below 1.
        """
        if asked is not None and asked < 1:
            raise InputError("The batch size must be at least 1.")
        self._size = asked or DEFAULT_BATCH_SIZE
        self._embedder = embedder
        self._needs_tuning = asked is None and beside_gpu
        self._beside_gpu = beside_gpu
        self._tuned: Embedder | None = None
        self.largest = _MAX_BATCH_SIZE if self._needs_tuning else self._size

    @property
    def size(self) -> int:
        """The current batch size in photos; it decreases when a GPU runs out of memory."""
        return self._size if self._tuned is None else self._tuned.batch_size

    def stage(self, work: Callable[[Batch], Result]) -> Stage[Batch, Batch, Result]:
        """Returns the stage that embeds; on a GPU it has two batches in flight, and keeps their order."""
        workers = _GPU_BATCHES_IN_FLIGHT if self._beside_gpu else 1
        room = 2 * _GPU_BATCHES_IN_FLIGHT if self._beside_gpu else 1
        return Stage("embed", work, workers=workers, room=room, gather=self.gather)

    def gather(self, pieces: Iterator[Batch]) -> Iterator[Batch]:
        """Yields batches of `size` faces to be embedded, or of max(512, 2 x `size`) photos with fewer."""
        batch: Batch = []
        new = 0
        for entry in chain.from_iterable(pieces):
            batch.append(entry)
            new += len(entry.pixels) if isinstance(entry, Prepared) else 0
            if self._needs_tuning and new >= self._size:
                self._tune(batch)
            if new >= self.size or len(batch) >= max(2 * self.size, CHUNK):
                yield batch
                batch, new = [], 0
        if batch:
            yield batch

    def _tune(self, batch: Sequence[Prepared | Outcome]) -> None:
        """Loads the model; on a GPU, tunes the batch size with copies of a batch once that has 256 photos."""
        embedder = self._embedder()
        if not embedder.on_gpu:
            self._needs_tuning = False
            return
        if not embedder.tuned and self._size < _MIN_PHOTOS_TO_TUNE:
            self._size = _MIN_PHOTOS_TO_TUNE
            return
        if not embedder.tuned:
            sample = squares(batch)[:_TUNING_SAMPLE]
            if not sample:
                return
            embedder.tune(np.stack(sample), limit=_MAX_PASS_SIZE)
        self._tuned, self._needs_tuning = embedder, False
