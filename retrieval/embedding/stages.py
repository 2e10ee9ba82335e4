"""The pipeline stages that all runs over photos share: scan, read, decode, embed, each in its own threads.

What is handed from stage to stage are lists of entries: photos that are still to be read, in their order, and
among them the outcomes of photos that need no more work. They have three sizes:

- A chunk, up to 512 photos, is what a source is scanned for and what the gallery recognizes at once.
- A piece, 32 photos of a chunk, is what one thread reads, looks up and decodes.
- A batch, as many photos as the model embeds at once, is collected from pieces (`batches`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Final, Generic, Protocol, Self, TypeAlias, TypeVar

from retrieval.embedding.batches import CHUNK, Batch, Batches
from retrieval.embedding.outcome import Outcome, in_their_places
from retrieval.embedding.reading import Meters, Prepared, ReadPhoto, decode_photos, read_in_groups
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

# Photos in a piece: as many as fit in a slot of the memory that is shared with decoding processes.
_PIECE_PHOTOS: Final = SLOT

# Stands for the id of a model generation where there is no gallery.
_NO_GENERATION: Final = 0

# A photo that is to be read, or the outcome of one that needs no more work.
Entry: TypeAlias = Photo | Outcome

Result = TypeVar("Result")


class Prepare(Protocol):
    """A function that reads and decodes photos, in order.

    It returns a `Prepared` for each photo with pixels or known bytes, and an Outcome for each without.
    """

    def __call__(
        self, photos: Sequence[Photo], /, *, meters: Meters, decode: Decode
    ) -> list[Prepared | Outcome]: ...


def in_chunks(photos: Iterable[Photo], scan: Meter) -> Iterator[list[Entry]]:
    """Yields photos in chunks of at most CHUNK photos or 16 MiB of content; adds the scan time to `scan`.

    Chunks double from 2 to CHUNK photos. A slow source is flushed every 0.25 s, so that the photos of a pipe
    are enrolled while its writer searches for more.
    """
    iterator, limit = iter(photos), 1
    while True:
        chunk: list[Entry] = []
        content_bytes, started = 0, time.monotonic()
        limit = min(2 * limit, CHUNK)
        with scan.working(0):
            for photo in islice(iterator, limit):
                chunk.append(photo)
                content_bytes += photo.held
                if content_bytes > _MAX_CHUNK_BYTES or time.monotonic() - started > _FLUSH_SECONDS:
                    break
        if not chunk:
            return
        scan.add(items=len(chunk))
        yield chunk


def in_pieces(chunks: Iterator[list[Entry]]) -> Iterator[list[Entry]]:
    """Yields the same entries in pieces of at most 32 photos to be read, beside any number of outcomes."""
    for chunk in chunks:
        piece: list[Entry] = []
        to_read = 0
        for entry in chunk:
            piece.append(entry)
            to_read += isinstance(entry, Photo)
            if to_read == _PIECE_PHOTOS:
                yield piece
                piece, to_read = [], 0
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
        photos: Iterable[Photo],
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
            photos: of the source; they are scanned as the pipeline asks for them.
            prepare: reads and decodes some of them.
            embed: embeds a batch of prepared photos and outcomes.
            embedder: returns the loaded model; called only to tune the batch size of a GPU.
            reader: the model's reader of photos, for processes that decode.
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
        chunks: Pipeline[list[Entry]] = Pipeline(in_chunks(photos, self._scan))
        if recognize is not None:
            chunks = chunks.then(Stage("recognize", partial(_with_known_outcomes, recognize), room=1))
        prepared = chunks.then(
            prepare_stage(self._prepare_entries, workers=workers, batch_size=self._batches.largest)
        )
        self._pipeline = prepared.then(self._batches.stage(embed))

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

    def _prepare_entries(self, entries: list[Entry]) -> Batch:
        """Prepares the photos among some entries; outcomes pass through."""
        to_read = photos_among(entries)
        return in_their_places(entries, self._prepare(to_read, meters=self.meters, decode=self._decode))

    @property
    def batch_size(self) -> int:
        """The current batch size in photos."""
        return self._batches.size

    def stages(self, last: Meter) -> tuple[Meter, ...]:
        """Returns the meters of the stages for a report, in which each step of preparing is a stage.

        Args:
            last: the meter of what the caller does with the results.
        """
        prepare, meters = self._pipeline.meters["prepare"], self.meters
        # A run without a gallery looks nothing up, and a model without a detector finds no faces.
        optional = (meters.look_up, meters.faces)
        every = (meters.read, meters.look_up, meters.decode, meters.faces)
        steps = [step for step in every if step.items or step not in optional]
        for step in steps:
            step.workers = prepare.workers
        # The steps run one after the other in the same thread: it waits for photos before the first of them,
        # and for room in the next stage after the last.
        steps[0].add(starved=prepare.starved_seconds)
        steps[-1].add(blocked=prepare.blocked_seconds)
        recognize = [meter for name, meter in self._pipeline.meters.items() if name == "recognize"]
        return (self._scan, *recognize, *steps, self._pipeline.meters["embed"], last)


def _with_known_outcomes(
    recognize: Callable[[Sequence[Photo]], list[Outcome | None]], chunk: Sequence[Entry]
) -> list[Entry]:
    """Returns a chunk with known photos replaced by their outcomes; the remaining photos are to be read."""
    photos = photos_among(chunk)
    return [known or photo for known, photo in zip(recognize(photos), photos, strict=True)]


def photos_among(entries: Sequence[Entry]) -> list[Photo]:
    """Returns the photos among entries: those that are still to be read."""
    return [entry for entry in entries if isinstance(entry, Photo)]


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
        for group in read_in_groups(photos, meters)
        for one in _decode_group(group, meters, reader, decode, selection)
    ]


def _decode_group(
    group: Sequence[ReadPhoto | Outcome],
    meters: Meters,
    reader: PhotoReader,
    decode: Decode,
    selection: FaceSelection,
) -> list[Prepared | Outcome]:
    photos = [photo for photo in group if isinstance(photo, ReadPhoto)]
    decoded = decode_photos(photos, _NO_GENERATION, reader, decode, meters, selection=selection)
    return in_their_places(group, decoded)
