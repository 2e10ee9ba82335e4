"""Processes that read, hash and decode photos, each straight into its place in a batch in shared memory.

For machines whose GPU is quicker than threads decode: a thread holds the interpreter's lock for 0.4 of the
time that a small JPEG takes (`benchmarks/decoding.py`), so that more than three only wait for each other.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Final, TypeAlias

import numpy as np

from retrieval import pixels
from retrieval.errors import InputError, Reason, RunError, UnreadableImage
from retrieval.pixels import Pixels

# A file, or the bytes of one, such as a member of an archive.
Job: TypeAlias = str | os.PathLike[str] | bytes

# How many photos a process takes at a time: a message costs about as much as a tenth of one.
_CHUNK: Final = 8


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a photo.

    Attributes:
        sha256: of its bytes, in hex; None where they could not be read.
        reason: why it has no pixels; None where it has.
        detail: what is known beyond the reason, for a person.
    """

    sha256: str | None
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True)
class DecodedBatch:
    """Some photos in the order in which they were asked for.

    Attributes:
        photos: what became of each.
        pixels: uint8 (n, size, size, 3), in shared memory: good until `held` more batches have been taken.
            A row whose photo has a reason holds anything.
    """

    photos: tuple[Decoded, ...]
    pixels: Pixels


class DecodingPool:
    """Decodes batches ahead of whoever takes them. A context manager; for one caller at a time."""

    def __init__(
        self,
        *,
        size: int,
        crop: float,
        batch_size: int,
        workers: int | None = None,
        ahead: int = 2,
        held: int = 1,
    ) -> None:
        """Starts processes, with `spawn`: the program keeps what it does under `if __name__ == "__main__":`.

        Args:
            size, crop: see `pixels.read`.
            batch_size: photos in a batch.
            workers: processes; None is one for each core that this process may run on.
            ahead: batches that are decoded before they are asked for.
            held: batches whose pixels stay good at the same time, the one that was taken last included.

        Raises:
            InputError: a number below 1.
        """
        workers = _usable_cores() if workers is None else workers
        if min(workers, batch_size, ahead, held) < 1:
            raise InputError("Workers, the batch size and the batches ahead and held must be at least 1.")
        self._shape = (batch_size, size, size, 3)
        self._ahead = ahead
        self._blocks = [
            SharedMemory(create=True, size=batch_size * size * size * 3) for _ in range(ahead + held)
        ]
        given = ([block.name for block in self._blocks], self._shape, crop)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, initializer=_attach, initargs=given)

    def decode_many(self, jobs: Iterable[Job]) -> Iterator[DecodedBatch]:
        """Batches of photos in order; the last one may be smaller.

        Raises:
            RunError: a process was killed, or its decoder crashed.
        """
        taken = iter(jobs)
        waiting: deque[_Waiting] = deque()
        number = 0
        while True:
            while len(waiting) < self._ahead and (batch := list(islice(taken, self._shape[0]))):
                waiting.append(self._submit(batch, number % len(self._blocks)))
                number += 1
            if not waiting:
                return
            yield self._finished(waiting.popleft())

    def close(self) -> None:
        """Ends the processes. Pixels that are still held are gone then."""
        self._pool.shutdown(cancel_futures=True)
        for block in self._blocks:
            block.unlink()
            try:
                block.close()
            except BufferError:
                # Somebody has an array over it. Without a name it goes when that does.
                continue

    def __enter__(self) -> "DecodingPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, batch: Sequence[Job], block: int) -> "_Waiting":
        chunks = [(start, batch[start : start + _CHUNK]) for start in range(0, len(batch), _CHUNK)]
        try:
            return _Waiting(
                block, [self._pool.submit(_decode_chunk, block, start, chunk) for start, chunk in chunks]
            )
        except BrokenProcessPool as error:
            raise _broken() from error

    def _finished(self, waiting: "_Waiting") -> DecodedBatch:
        try:
            photos = tuple(photo for chunk in waiting.chunks for photo in chunk.result())
        except BrokenProcessPool as error:
            raise _broken() from error
        whole: Pixels = np.ndarray(self._shape, np.uint8, self._blocks[waiting.block].buf)
        return DecodedBatch(photos, whole[: len(photos)])


@dataclass(frozen=True)
class _Waiting:
    """A batch that processes are at work on."""

    block: int
    chunks: "list[Future[list[Decoded]]]"


def _broken() -> RunError:
    return RunError(
        "A process that decodes photos has ended; what was enrolled is kept, run the command again, or with "
        "--workers 1 if it happens again."
    )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# In a process: its view of each block, and what to crop to.
_places: list[Pixels] = []
_memory: list[SharedMemory] = []
_crop: list[float] = []


def _attach(names: list[str], shape: tuple[int, int, int, int], crop: float) -> None:
    # Ctrl-C reaches the whole group of processes; the batches in flight are to be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    for name in names:
        _memory.append(SharedMemory(name=name))
        _places.append(np.ndarray(shape, np.uint8, _memory[-1].buf))
    _crop.append(crop)


def _end_with_the_parent() -> None:
    """A pool's processes wait for work for ever when whoever gave it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _decode_chunk(block: int, start: int, jobs: Sequence[Job]) -> list[Decoded]:
    return [_decode(job, _places[block][row]) for row, job in enumerate(jobs, start)]


def _decode(job: Job, place: Pixels) -> Decoded:
    sha256 = None
    try:
        content = job if isinstance(job, bytes) else pixels.read_bytes(job)
        sha256 = pixels.content_sha256(content)
        place[:] = pixels.read(content, size=len(place), crop=_crop[0])
    except UnreadableImage as error:
        return Decoded(sha256, error.reason, error.detail)
    return Decoded(sha256)
