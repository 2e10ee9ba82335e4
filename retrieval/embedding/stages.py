"""The pipeline stages that all runs over photos share: scan, read, decode, embed, each in its own threads."""

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
from retrieval.images.photo_reader import FaceSelection, PhotoReader
from retrieval.images.pixels import MAX_SECONDS
from retrieval.models.embedder import Embedder
from retrieval.sources.photos import Photo
from retrieval.system.cpu import usable_cores
from retrieval.system.pipeline import Meter, Pipeline, Stage

# Seconds after which a chunk of a slow source, such as a pipe, is flushed.
_FLUSH_SECONDS: Final = 0.25

# Bytes of photos with content in a chunk; a chunk ends with the photo that exceeds it.
_MAX_CHUNK_BYTES: Final = 16 * 2**20

# Photos in a piece, which one thread reads, looks up and decodes.
_PIECE_PHOTOS: Final = SLOT

Entry: TypeAlias = Photo | Outcome

Result = TypeVar("Result")


class Prepare(Protocol):
    """A function that reads and decodes photos, in order: each to a `Prepared` or to an Outcome."""

    def __call__(
        self, photos: Sequence[Photo], /, *, meters: Meters, decode: Decode
    ) -> list[Prepared | Outcome]: ...


def in_chunks(found: Iterable[Photo], scan: Meter) -> Iterator[list[Entry]]:
    """Yields photos in chunks of at most CHUNK photos or 16 MiB of content; adds the scan time to `scan`.

    Chunks double from 2 to CHUNK photos. A slow source is flushed every 0.25 s, so that the photos of a pipe
    are enrolled while its writer searches for more.
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
                if held > _MAX_CHUNK_BYTES or time.monotonic() - started > _FLUSH_SECONDS:
                    break
        if not some:
            return
        scan.add(items=len(some))
        yield some


def in_pieces(chunks: Iterator[list[Entry]]) -> Iterator[list[Entry]]:
    """Yields the same entries in pieces of at most 32 photos to be read (`_PIECE_PHOTOS`)."""
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
    """Returns the stage that reads and decodes photos, about two batches ahead of the stage that embeds."""
    room = _max_pieces(workers, batch_size)
    return Stage("prepare", work, workers=workers, room=room, gather=in_pieces)


def _max_pieces(workers: int, batch_size: int) -> int:
    """Returns how many pieces may be in progress in the stage that prepares them."""
    return max(workers, 2 * -(-batch_size // _PIECE_PHOTOS)) + 1


def checked_workers(workers: int | None, decoders: int = 0) -> int:
    """Returns how many threads read photos; by default one per processor, and no fewer than decoders.

    Raises:
        InputError: `workers` is below 1.
    """
    workers = max(usable_cores(), decoders) if workers is None else workers
    if workers < 1:
        raise InputError("The number of workers must be at least 1.")
    return workers


@dataclass(frozen=True, slots=True)
class Resources:
    """The batch size, threads, processes and time limit of a run over photos; None is the run's default.

    Attributes:
        batch_size: photos that are embedded together.
        workers: threads that read photos.
        decoders: processes that decode what the threads read; with 0 the threads decode.
        photo_seconds: seconds that decoding one photo may take, where its header does not bound the time.
    """

    batch_size: int | None = None
    workers: int | None = None
    decoders: int | None = None
    photo_seconds: float = MAX_SECONDS


class PhotoPipeline(Generic[Result]):
    """The pipeline from photos to vectors: scan -> [recognize] -> read, look up, decode -> batches -> embed.

    A context manager; iterating yields what `embed` returns for each batch, in the order of the photos. The
    stages run at the same time, each in its own threads, and start with the `with` statement.

    Attributes:
        meters: times and counts of the steps of preparing.
    """

    def __init__(
        self,
        found: Iterable[Photo],
        *,
        prepare: Prepare,
        embed: Callable[[Batch], Result],
        embedder: Callable[[], Embedder],
        reader: PhotoReader,
        on_gpu: bool,
        resources: Resources = Resources(),
        recognize: Callable[[Sequence[Photo]], list[Outcome | None]] | None = None,
    ) -> None:
        """Assembles the stages, without starting them.

        Args:
            found: the photos.
            prepare: reads and decodes some of them, in order, each to a `Prepared` or to an Outcome.
            embed: embeds a batch of prepared photos and outcomes.
            embedder: returns the loaded model; called only to tune the batch size of a GPU.
            reader: of the model, for processes that decode.
            on_gpu: whether photos may be embedded on a GPU.
            resources: batch size, threads, processes and time limit.
            recognize: returns an outcome for each photo that is known without reading it, and None for each
                that is to be read.

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
            ahead = _max_pieces(workers, self._batches.largest)
            self._decoders = Decoders(decoders, reader=reader, ahead=ahead, seconds=resources.photo_seconds)
        chunks: Pipeline[list[Entry]] = Pipeline(in_chunks(found, self._scan))
        if recognize is not None:
            chunks = chunks.then(Stage("recognize", partial(_with_known_outcomes, recognize), room=1))
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
        """Prepares the photos among some entries; outcomes pass through."""
        offered = [entry for entry in entries if isinstance(entry, Photo)]
        return in_their_places(entries, self._prepare(offered, meters=self.meters, decode=self._decode))

    @property
    def batch_size(self) -> int:
        """The current batch size in photos."""
        return self._batches.size

    def stages(self, last: Meter) -> tuple[Meter, ...]:
        """Returns the meters of the stages for a report, in which each step of preparing is a stage.

        Args:
            last: the meter of what the caller does with the results.
        """
        prepare, steps = self._pipeline.meters["prepare"], self.meters
        taken = [
            step
            for step in (steps.read, steps.look_up, steps.decode, steps.faces)
            if step.items or step not in (steps.look_up, steps.faces)
        ]
        for step in taken:
            step.workers = prepare.workers
        taken[0].add(starved=prepare.starved_seconds)
        taken[-1].add(blocked=prepare.blocked_seconds)
        before = [meter for name, meter in self._pipeline.meters.items() if name == "recognize"]
        return (self._scan, *before, *taken, self._pipeline.meters["embed"], last)


def _with_known_outcomes(
    recognize: Callable[[Sequence[Photo]], list[Outcome | None]], chunk: Sequence[Entry]
) -> list[Entry]:
    """Returns a chunk with known photos replaced by their outcomes; the remaining photos are to be read."""
    offered = [entry for entry in chunk if isinstance(entry, Photo)]
    return [known or photo for known, photo in zip(recognize(offered), offered, strict=True)]


def prepare_without_gallery(
    reader: PhotoReader,
    photos: Sequence[Photo],
    *,
    meters: Meters,
    decode: Decode,
    selection: FaceSelection = FaceSelection(),
) -> list[Prepared | Outcome]:
    """Reads and decodes photos, in order: each to a `Prepared` with pixels, or to an Outcome with a reason.

    Raises:
        RunError: a process that decodes was killed.
    """
    return [
        one
        for some in read_some(photos, meters)
        for one in _decode_some(some, meters, reader, decode, selection)
    ]


def _decode_some(
    photos: Sequence[ReadPhoto | Outcome],
    meters: Meters,
    reader: PhotoReader,
    decode: Decode,
    selection: FaceSelection,
) -> list[Prepared | Outcome]:
    read = [photo for photo in photos if isinstance(photo, ReadPhoto)]
    return in_their_places(photos, decode_photos(read, 0, reader, decode, meters, selection=selection))


def peak_memory() -> int:
    """Returns the peak memory (resident set) of this process so far, in bytes."""
    # On Linux, getrusage may return the peak of the process that started this one.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # ru_maxrss is in KiB, except on macOS, where it is in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
