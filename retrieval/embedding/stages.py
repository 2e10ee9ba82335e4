"""The stages that all runs over photos share: chunks of photos, reading and decoding them in threads."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

from retrieval.embedding.batches import CHUNK
from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import Meters
from retrieval.errors import InputError
from retrieval.images.decoders import SLOT, Decode, Decoders, decode_here
from retrieval.images.pixels import MAX_SECONDS
from retrieval.sources.photos import Photo
from retrieval.system.cpu import usable_cores
from retrieval.system.pipeline import Meter, Stage

# A chunk of a slow source, such as a pipe, is flushed after so many seconds.
_FLUSH_SECONDS: Final = 0.25

# A chunk has at most so many bytes of photos that come with their content, and one photo more.
_CHUNK_BYTES: Final = 16 * 2**20

# Photos that one thread reads, looks up and decodes at a time.
_PIECE: Final = SLOT

Entry: TypeAlias = Photo | Outcome


def in_chunks(found: Iterable[Photo], scan: Meter) -> Iterator[list[Photo]]:
    """Photos in chunks of at most CHUNK photos or 16 MiB of content; `scan` gets the time of finding them.

    Chunks double from 2 to CHUNK photos; a slow source is flushed every 0.25 s, so that what a pipe gives is
    enrolled while its writer still looks for more.
    """
    iterator, size = iter(found), 1
    while True:
        some: list[Photo] = []
        held, started = 0, time.monotonic()
        size = min(2 * size, CHUNK)
        with scan.working(0):
            for photo in islice(iterator, size):
                some.append(photo)
                held += photo.held
                if held > _CHUNK_BYTES or time.monotonic() - started > _FLUSH_SECONDS:
                    break
        if not some:
            return
        scan.add(items=len(some))
        yield some


def in_pieces(chunks: Iterator[list[Entry]]) -> Iterator[list[Entry]]:
    """The same entries in pieces of at most _PIECE photos that are to be read."""
    for chunk in chunks:
        piece: list[Entry] = []
        offered = 0
        for entry in chunk:
            piece.append(entry)
            offered += isinstance(entry, Photo)
            if offered == _PIECE:
                yield piece
                piece, offered = [], 0
        if piece:
            yield piece


def stages_in_order(scan: Meter, stages: dict[str, Meter], steps: Meters, last: Meter) -> tuple[Meter, ...]:
    """The stages as a reader of the report thinks of them: the steps of preparing one by one."""
    prepare = stages["prepare"]
    taken = [
        step for step in (steps.read, steps.look_up, steps.decode) if step.items or step is not steps.look_up
    ]
    for step in taken:
        step.workers = prepare.workers
    taken[0].add(starved=prepare.starved_seconds)
    taken[-1].add(blocked=prepare.blocked_seconds)
    before = [stages[name] for name in stages if name == "recognize"]
    return (scan, *before, *taken, stages["embed"], last)


def prepare_stage(work: Callable[[list[Entry]], Any], *, workers: int, batch_size: int) -> Stage:
    """The stage that reads and decodes photos, about two batches ahead of the one that is embedded."""
    room = _pieces(workers, batch_size)
    return Stage("prepare", work, workers=workers, room=room, gather=in_pieces)


def _pieces(workers: int, batch_size: int) -> int:
    """How many pieces may be underway in the stage that prepares them."""
    return max(workers, 2 * -(-batch_size // _PIECE)) + 1


def decoding(
    decoders: int, *, size: int, workers: int, batch_size: int, seconds: float = MAX_SECONDS
) -> AbstractContextManager[Decode]:
    """What decodes photos of a run: so many processes, or the threads themselves."""
    if not decoders:
        return nullcontext(partial(decode_here, seconds=seconds))
    return Decoders(decoders, size=size, ahead=_pieces(workers, batch_size), seconds=seconds)


def checked_workers(workers: int | None, decoders: int = 0) -> int:
    """How many threads read photos: one per processor unless it is said, and one for each decoder.

    Raises:
        InputError: a number of workers below 1.
    """
    workers = max(usable_cores(), decoders) if workers is None else workers
    if workers < 1:
        raise InputError("The number of workers must be at least 1.")
    return workers


def peak_memory() -> int:
    """The most that this process has had in memory so far, in bytes."""
    # What getrusage says on Linux may be what the process that started this one had.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # In KiB, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
