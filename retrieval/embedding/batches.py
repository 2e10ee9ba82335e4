"""Batches: how many photos are embedded at once, collected as the decoders deliver them."""

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

# Photos in a batch when few of them or none are to be embedded.
CHUNK: Final = 512

# From how many new photos on it is worth the seconds that finding a GPU's size takes.
_MIN_PHOTOS_TO_TUNE: Final = 256

# How many photos that is tried with, in copies.
_TUNING_SAMPLE: Final = 64

# The largest pass that is tried then, and the batch for the two lanes of a GPU that it comes to.
_MAX_PASS_SIZE: Final = 512
_MAX_BATCH_SIZE: Final = 2 * _MAX_PASS_SIZE

# On a GPU one batch is computed while the next one is copied, and as many wait while others become durable.
_GPU_BATCHES_IN_FLIGHT: Final = 2

Batch: TypeAlias = list[Prepared | Outcome]

Result = TypeVar("Result")


class Batches:
    """The size of the batches of one run, and what gathers them.

    Attributes:
        largest: how many photos a batch may come to have, as far as can be said beforehand.
    """

    def __init__(self, asked: int | None, embedder: Callable[[], Embedder], *, beside_gpu: bool) -> None:
        """Decides what can be decided before there is a photo.

        Args:
            asked: how many photos are embedded together; None is 64 on a CPU, and on a GPU what
                `Embedder.tune` finds, once for an embedder, at the first batch of 256 photos.
            embedder: gives the model, loaded; called only for that.
            beside_gpu: whether photos may be embedded on a GPU.

        Raises:
            InputError: a size below 1.
        """
        if asked is not None and asked < 1:
            raise InputError("The batch size must be at least 1.")
        self._size = asked or DEFAULT_BATCH_SIZE
        self._embedder = embedder
        self._open = asked is None and beside_gpu
        self._beside_gpu = beside_gpu
        self._found: Embedder | None = None
        self.largest = _MAX_BATCH_SIZE if self._open else self._size

    @property
    def size(self) -> int:
        """How many photos are embedded together, as of now: less than before where a GPU's memory ended."""
        return self._size if self._found is None else self._found.batch_size

    def stage(self, work: Callable[[Batch], Result]) -> Stage[Batch, Batch, Result]:
        """The stage that embeds; on a GPU with two batches in flight, in order all the same."""
        workers = _GPU_BATCHES_IN_FLIGHT if self._beside_gpu else 1
        room = 2 * _GPU_BATCHES_IN_FLIGHT if self._beside_gpu else 1
        return Stage("embed", work, workers=workers, room=room, gather=self.gather)

    def gather(self, pieces: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of `size` photos that are to be embedded, or of many that are not."""
        batch: Batch = []
        new = 0
        for entry in chain.from_iterable(pieces):
            batch.append(entry)
            new += isinstance(entry, Prepared) and entry.pixels is not None
            if self._open and new >= self._size:
                self._decide(batch)
            if new >= self.size or len(batch) >= max(2 * self.size, CHUNK):
                yield batch
                batch, new = [], 0
        if batch:
            yield batch

    def _decide(self, batch: Sequence[Prepared | Outcome]) -> None:
        """Loads the model, and finds a GPU's size when there are photos enough, with copies of these."""
        embedder = self._embedder()
        if not embedder.on_gpu:
            self._open = False
            return
        if not embedder.tuned and self._size < _MIN_PHOTOS_TO_TUNE:
            self._size = _MIN_PHOTOS_TO_TUNE
            return
        if not embedder.tuned:
            sample = squares(batch)[:_TUNING_SAMPLE]
            if not sample:
                return
            embedder.tune(np.stack(sample), limit=_MAX_PASS_SIZE)
        self._found, self._open = embedder, False
