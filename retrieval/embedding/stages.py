"""The stages that all runs over photos share: find, read, decode and embed, each in threads of its own."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final, Generic, Protocol, Self, TypeAlias, TypeVar

from retrieval.embedding.batches import CHUNK, Batch, Batches
from retrieval.embedding.outcome import Outcome, in_their_places
from retrieval.embedding.reading import Meters, Prepared, ReadPhoto, decode_photos, read_some
from retrieval.errors import InputError
from retrieval.images.decoders import SLOT, Decode, Decoders, decode_here, processes_for
from retrieval.images.pixels import MAX_SECONDS
from retrieval.models.bundle import Preprocessing
from retrieval.models.embedder import Embedder
from retrieval.sources.photos import Photo
from retrieval.system.cpu import usable_cores
from retrieval.system.pipeline import Meter, Pipeline, Stage

# A chunk of a slow source, such as a pipe, is flushed after so many seconds.
_FLUSH_SECONDS: Final = 0.25

# A chunk has at most so many bytes of photos that come with their content, and one photo more.
_CHUNK_BYTES: Final = 16 * 2**20

# Photos that one thread reads, looks up and decodes at a time.
_PIECE_PHOTOS: Final = SLOT

Entry: TypeAlias = Photo | Outcome

Result = TypeVar("Result")


class Prepare(Protocol):
    """Reads and decodes photos, each to pixels or to why there are none, in order."""

    def __call__(
        self, photos: Sequence[Photo], /, *, meters: Meters, decode: Decode
    ) -> list[Prepared | Outcome]: ...


def in_chunks(found: Iterable[Photo], scan: Meter) -> Iterator[list[Entry]]:
    """Photos in chunks of at most CHUNK photos or 16 MiB of content; `scan` gets the time of finding them.

    Chunks double from 2 to CHUNK photos; a slow source is flushed every 0.25 s, so that what a pipe gives is
    enrolled while its writer still looks for more.
    """
    iterator, size = iter(found), 1
    while True:
        some: list[Entry] = []
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
    """The same entries in pieces of at most _PIECE_PHOTOS photos that are to be read."""
    for chunk in chunks:
        piece: list[Entry] = []
        offered = 0
        for entry in chunk:
            piece.append(entry)
            offered += isinstance(entry, Photo)
            if offered == _PIECE_PHOTOS:
                yield piece
                piece, offered = [], 0
        if piece:
            yield piece


def prepare_stage(
    work: Callable[[list[Entry]], Result], *, workers: int, batch_size: int
) -> Stage[list[Entry], list[Entry], Result]:
    """The stage that reads and decodes photos, about two batches ahead of the one that is embedded."""
    room = _pieces(workers, batch_size)
    return Stage("prepare", work, workers=workers, room=room, gather=in_pieces)


def _pieces(workers: int, batch_size: int) -> int:
    """How many pieces may be underway in the stage that prepares them."""
    return max(workers, 2 * -(-batch_size // _PIECE_PHOTOS)) + 1


def checked_workers(workers: int | None, decoders: int = 0) -> int:
    """How many threads read photos: one per processor unless it is said, and one for each decoder.

    Raises:
        InputError: a number of workers below 1.
    """
    workers = max(usable_cores(), decoders) if workers is None else workers
    if workers < 1:
        raise InputError("The number of workers must be at least 1.")
    return workers


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run over photos may use; None leaves a number to the run.

    Attributes:
        batch_size: photos that are embedded together.
        workers: threads that read photos.
        decoders: processes that decode what the threads read; 0 is none, the threads do.
        photo_seconds: how long one photo may take whose header does not bound its time.
    """

    batch_size: int | None = None
    workers: int | None = None
    decoders: int | None = None
    photo_seconds: float = MAX_SECONDS


class PhotoPipeline(Generic[Result]):
    """Photos on their way to vectors: scan -> [recognize] -> read, look up, decode -> batches -> embed.

    The one assembly of these stages, as a context manager; iterating gives what `embed` returns for each
    batch, in the order of the photos. The stages run at the same time, each in threads of its own, and
    nothing is started before the with statement.

    Attributes:
        meters: what the steps of preparing took.
    """

    def __init__(
        self,
        found: Iterable[Photo],
        *,
        prepare: Prepare,
        embed: Callable[[Batch], Result],
        embedder: Callable[[], Embedder],
        size: int,
        on_gpu: bool,
        resources: Resources = Resources(),
        recognize: Callable[[Sequence[Photo]], list[Outcome | None]] | None = None,
    ) -> None:
        """Checks what is asked for.

        Args:
            found: the photos.
            prepare: reads and decodes some of them, each to pixels or to why there are none, in order.
            embed: takes a batch of what came of them.
            embedder: gives the model, loaded; called only to find the batch size of a GPU.
            size: side of the squares that photos are decoded to, in pixels.
            on_gpu: whether photos may be embedded on a GPU.
            resources: what may be used.
            recognize: photos that are known unread, each as an outcome; None for those that are to be read.

        Raises:
            InputError: a batch size or a number of workers below 1, or of decoders below 0.
        """
        decoders = processes_for(resources.decoders, beside_gpu=on_gpu)
        workers = checked_workers(resources.workers, decoders)
        self._batches = Batches(resources.batch_size, embedder, beside_gpu=on_gpu)
        self.meters = Meters()
        self._prepare, self._scan = prepare, Meter("scan")
        self._decoders: AbstractContextManager[Decode] = nullcontext(
            partial(decode_here, seconds=resources.photo_seconds)
        )
        if decoders:
            ahead = _pieces(workers, self._batches.largest)
            self._decoders = Decoders(decoders, size=size, ahead=ahead, seconds=resources.photo_seconds)
        chunks: Pipeline[list[Entry]] = Pipeline(in_chunks(found, self._scan))
        if recognize is not None:
            chunks = chunks.then(Stage("recognize", partial(_recognized, recognize), room=1))
        prepared = chunks.then(
            prepare_stage(self._prepared, workers=workers, batch_size=self._batches.largest)
        )
        self._pipeline = prepared.then(self._batches.stage(embed))
        self._decode: Decode = decode_here

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._decode = stack.enter_context(self._decoders)
            stack.enter_context(self._pipeline)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Result]:
        return iter(self._pipeline)

    def _prepared(self, entries: list[Entry]) -> Batch:
        """What came of each entry; outcomes among them pass through."""
        offered = [entry for entry in entries if isinstance(entry, Photo)]
        return in_their_places(entries, self._prepare(offered, meters=self.meters, decode=self._decode))

    @property
    def batch_size(self) -> int:
        """How many photos are embedded together, as of now."""
        return self._batches.size

    def stages(self, last: Meter) -> tuple[Meter, ...]:
        """The figures of the stages, as a reader of the report thinks of them: each step of preparing is one.

        Args:
            last: what the caller does with the results.
        """
        prepare, steps = self._pipeline.meters["prepare"], self.meters
        taken = [
            step
            for step in (steps.read, steps.look_up, steps.decode)
            if step.items or step is not steps.look_up
        ]
        for step in taken:
            step.workers = prepare.workers
        taken[0].add(starved=prepare.starved_seconds)
        taken[-1].add(blocked=prepare.blocked_seconds)
        before = [meter for name, meter in self._pipeline.meters.items() if name == "recognize"]
        return (self._scan, *before, *taken, self._pipeline.meters["embed"], last)


def _recognized(
    recognize: Callable[[Sequence[Photo]], list[Outcome | None]], chunk: Sequence[Entry]
) -> list[Entry]:
    """What is left to look at; photos that are known are outcomes."""
    offered = [entry for entry in chunk if isinstance(entry, Photo)]
    return [known or photo for known, photo in zip(recognize(offered), offered, strict=True)]


def prepare_without_gallery(
    preprocessing: Preprocessing, photos: Sequence[Photo], *, meters: Meters, decode: Decode
) -> list[Prepared | Outcome]:
    """Reads and decodes photos; each comes out in its place, with pixels or with why it has none.

    Raises:
        RunError: a process that decodes was killed.
    """
    return [
        one for some in read_some(photos, meters) for one in _decode_some(some, meters, preprocessing, decode)
    ]


def _decode_some(
    photos: Sequence[ReadPhoto | Outcome], meters: Meters, preprocessing: Preprocessing, decode: Decode
) -> list[Prepared | Outcome]:
    read = [photo for photo in photos if isinstance(photo, ReadPhoto)]
    with meters.decode.working(len(read)):
        decoded = decode_photos(read, 0, preprocessing, decode)
    return in_their_places(photos, decoded)


def peak_memory() -> int:
    """The most that this process has had in memory so far, in bytes."""
    # What getrusage says on Linux may be what the process that started this one had.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # In KiB, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
