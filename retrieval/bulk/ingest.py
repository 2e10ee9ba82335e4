"""Bulk enrollment: folders -> a gallery, and a report of what happened to each file."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from retrieval.bulk.source_layout import Layout
from retrieval.embedding.batches import DEFAULT_BATCH_SIZE, Batches
from retrieval.embedding.outcome import Outcome, Status, in_their_places
from retrieval.embedding.reading import Meters, Prepared, Ready
from retrieval.embedding.stages import (
    Entry,
    checked_workers,
    decoding,
    in_chunks,
    peak_memory,
    prepare_stage,
    stages_in_order,
)
from retrieval.errors import Interrupted, Reason
from retrieval.gallery.gallery import Gallery
from retrieval.images.decoders import Decode, processes_for
from retrieval.images.pixels import MAX_SECONDS
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.metadata_tables import Annotations
from retrieval.sources.photos import Photo
from retrieval.system.pipeline import Meter, Pipeline, Stage
from retrieval.transfer import exchange

# Batches of the usual size that become durable together, if they are embedded within so many seconds.
_TOGETHER: Final = 4
_COMMIT_SECONDS: Final = 2.0


@dataclass
class Run:
    """What a run over photos took.

    Attributes:
        reasons: why photos were rejected, and how many each.
        seconds: of wall-clock time.
        optimizing_seconds: of them, making searches of a gallery that has grown quick.
        stages: what each stage did, in the order of the stages, which run at the same time.
        bytes_read: of files.
        batch_size: how many photos were embedded together; None where vectors came from elsewhere.
        peak_memory: the most that this process has had in memory until the last photo was durable, in bytes;
            what making searches quick takes comes afterwards.
        interrupted: whether it was stopped before the last photo.
        passed_over: files and folders of the sources that were not looked at, and are not *found*.
    """

    reasons: Counter[Reason] = field(default_factory=Counter)
    seconds: float = 0.0
    optimizing_seconds: float = 0.0
    stages: tuple[Meter, ...] = ()
    bytes_read: int = 0
    batch_size: int | None = None
    peak_memory: int = 0
    interrupted: bool = False
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def rejected(self) -> int:
        """Photos that came to nothing."""
        return self.reasons.total()

    @property
    def found(self) -> int:
        """Photos that were looked at."""
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        """How many photos came to what: each is counted once."""
        return {"rejected": self.rejected}

    @property
    def worth_retrying(self) -> int:
        """Rejected photos whose reason lies in the machine and not in the file."""
        return sum(number for reason, number in self.reasons.items() if reason.may_pass_when_retried)

    @property
    def bottleneck(self) -> Meter | None:
        """The stage whose workers had the most to do: the others waited for it. None where nothing ran."""
        return max(self.stages, key=lambda one: one.busy_seconds / one.workers, default=None)

    @property
    def working_seconds(self) -> float:
        """Seconds until the last photo was durable: what all rates and shares of a report are of."""
        return max(0.0, self.seconds - self.optimizing_seconds)

    @property
    def photos_per_second(self) -> float:
        """Photos that were looked at, by the seconds until the last was durable."""
        return self.found / self.working_seconds if self.working_seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        """Millions of bytes that were read, by the same seconds."""
        return self.bytes_read / 1e6 / self.working_seconds if self.working_seconds else 0.0

    @property
    def busy_share(self) -> float:
        """The share of these seconds in which a worker of the bottleneck was busy; 0 where nothing ran."""
        limit = self.bottleneck
        if limit is None or not self.working_seconds:
            return 0.0
        return min(1.0, limit.busy_seconds / limit.workers / self.working_seconds)

    def summary(self) -> dict[str, Any]:
        """The report as JSON can say it; see docs/cli.md."""
        limit = self.bottleneck
        return {
            "found": self.found,
            **self.counts(),
            "reasons": {str(reason): number for reason, number in sorted(self.reasons.items())},
            "passed_over": self.passed_over.as_json(),
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "optimizing_seconds": round(self.optimizing_seconds, 3),
            "photos_per_second": round(self.photos_per_second, 2),
            "bytes_read": self.bytes_read,
            "megabytes_per_second": round(self.megabytes_per_second, 3),
            "batch_size": self.batch_size,
            "peak_memory_bytes": self.peak_memory,
            "bottleneck": None if limit is None else limit.name,
            "stages": [
                {
                    "name": one.name,
                    "workers": one.workers,
                    "items": one.items,
                    "busy_seconds": round(one.busy_seconds, 3),
                    "starved_seconds": round(one.starved_seconds, 3),
                    "blocked_seconds": round(one.blocked_seconds, 3),
                }
                for one in self.stages
            ],
        }


@dataclass
class IngestReport(Run):
    """What an ingest did. `found` is always `enrolled + known + duplicate + rejected`.

    Attributes:
        enrolled: photos that became faces.
        known: photos whose bytes and path were in the gallery already.
        duplicate: photos whose bytes were in the gallery under another path.
        identities: how many different people the sources name.
        identities_from: what names them, in words; empty where the photos are of no sources.
        notes: sentences about sources whose layout may not be what was meant.
        twins: identities of enrolled photos, in groups with others whose names differ in no more than case,
            width, spaces or how accents are composed: they may be one person.
    """

    enrolled: int = 0
    known: int = 0
    duplicate: int = 0
    identities: int = 0
    identities_from: str = ""
    notes: tuple[str, ...] = ()
    twins: tuple[tuple[str, ...], ...] = ()
    _names: set[str] = field(default_factory=set, repr=False)

    def counts(self) -> dict[str, int]:
        """How many photos came to what: each is counted once."""
        mine = {"enrolled": self.enrolled, "known": self.known, "duplicate": self.duplicate}
        return mine | super().counts()

    def summary(self) -> dict[str, Any]:
        """The report as JSON can say it; see docs/cli.md."""
        named = {"identities": self.identities, "identities_from": self.identities_from}
        twins = [list(names) for names in self.twins]
        return super().summary() | named | {"notes": list(self.notes), "twins": twins}

    def describe(self, layout: Layout) -> None:
        """Takes over what a layout shows."""
        self.identities, self.identities_from = len(layout.identities), layout.origin
        self.notes = tuple(layout.notes())

    def count(self, outcome: Outcome) -> None:
        """Adds one photo's fate."""
        if outcome.status is Status.ENROLLED:
            self.enrolled += 1
            if outcome.identity is not None:
                self._names.add(outcome.identity)
        elif outcome.status is Status.KNOWN:
            self.known += 1
        elif outcome.status is Status.DUPLICATE:
            self.duplicate += 1
        else:
            self.reasons[outcome.reason or Reason.IO_ERROR] += 1

    def find_twins(self, gallery: Gallery) -> None:
        """Looks for names like those that photos were enrolled under."""
        self.twins = gallery.identity_twins(self._names) if self._names else ()


def ingest(
    gallery: Gallery,
    sources: Iterable[str | os.PathLike[str]],
    *,
    identity_from: str | None = None,
    exclude: Iterable[str] = (),
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    photo_seconds: float = MAX_SECONDS,
    rehash: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls every photo of some sources.

    Files that are what they were when they were enrolled (size, time and inode) are known without being
    opened. The others are read, hashed and decoded by threads, while another one embeds the batch before and
    this one makes the batch before that durable. Face ids follow the order of the photos, not the timing of
    the threads; beside a GPU two batches are embedded at a time. Memory does not grow with the number of
    photos: at most 4 batches (beside a GPU 6, and where their size is to be found, of 1,024 photos) and 4
    pieces of 32 photos are underway, size x size x 3 bytes each, and each thread holds 16 MiB of files, one
    file more, and one decoded picture. So does each decoder; they write into slots of 32 photos, one per
    decoder and one per piece underway.

    Args:
        gallery: where to.
        sources: folders, lists, archives, files, addresses (see `photos.scan`). Pictures that a program
            has are `ingest_photos(gallery, photos.of(pairs))`.
        identity_from: what names the people (see `photos.scan`).
        exclude: patterns of files and folders that are passed over, as of .gitignore (see `photos.scan`).
        batch_size: photos that are embedded together. None is 64 on a CPU; on a GPU the embedder finds the
            size at which it is fastest, once, at the first 256 new photos, which takes some seconds. Up to
            four batches of 64 photos or more become durable together, smaller ones each by itself.
        workers: threads that read photos; None is one per processor, and no fewer than decoders.
        decoders: processes that decode what the threads read; 0 is none, the threads do. None is one per core
            beside a GPU when there are more than 3 cores, else 0. The results are the same.
        photo_seconds: how long one photo may take whose header does not bound its time (see `pixels.read`).
        rehash: read every file, whether it looks unchanged or not.
        on_outcome: called once for every photo, in order, after its batch is durable.
        should_stop: asked after each batch; True ends the run, with everything so far enrolled.

    Raises:
        DataError: a source does not exist; nothing was enrolled.
        InputError: a batch size or a number of workers below 1, or of decoders below 0, or a pattern that is
            none.
        RunError: a process that decodes was killed; the batches before are enrolled.
        StorageError, GalleryBusy: the run failed; the batches before are enrolled.
    """
    sources, passed_over = list(sources), PassedOver()
    return ingest_photos(
        gallery,
        photos.scan(sources, identity_from=identity_from, exclude=exclude, passed_over=passed_over),
        layout=Layout(sources, identity_from),
        passed_over=passed_over,
        batch_size=batch_size,
        workers=workers,
        decoders=decoders,
        photo_seconds=photo_seconds,
        rehash=rehash,
        on_outcome=on_outcome,
        should_stop=should_stop,
    )


def ingest_photos(
    gallery: Gallery,
    found: Iterable[Photo],
    *,
    layout: Layout | None = None,
    passed_over: PassedOver | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    photo_seconds: float = MAX_SECONDS,
    rehash: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """As `ingest`, for any photos: of a report (`photos.from_report`), or of a program (`photos.of`).

    Of sources, `layout` counts the people, and notes what may not be meant; `passed_over` is what their scan
    counts in, and becomes the report's.
    """
    layout = Layout(()) if layout is None else layout
    decoders = processes_for(decoders, beside_gpu=gallery.may_use_gpu)
    workers = checked_workers(workers, decoders)
    batches = Batches(batch_size, lambda: gallery.embedder, beside_gpu=gallery.may_use_gpu)
    report, meters, commit = IngestReport(), Meters(), Meter("commit")
    report.passed_over = PassedOver() if passed_over is None else passed_over
    scan = Meter("scan")
    contested: set[int] = set()
    started = time.monotonic()
    size = gallery.bundle.preprocessing.size
    with (
        decoding(
            decoders, size=size, workers=workers, batch_size=batches.largest, seconds=photo_seconds
        ) as decode,
        Pipeline(
            in_chunks(found, scan),
            [
                *([] if rehash else [Stage("recognize", partial(_recognize, gallery), room=1)]),
                prepare_stage(
                    partial(_prepare, gallery, meters, decode), workers=workers, batch_size=batches.largest
                ),
                batches.stage(gallery.embed_prepared),
            ],
        ) as pipeline,
    ):
        for together, last in _in_commits(pipeline, batch_size, should_stop):
            report.interrupted = last
            if not together:
                break
            with commit.working(sum(len(batch.photos) for batch in together)):
                outcomes = gallery.enroll_ready(Ready.joined(together), contested=contested)
            for outcome in outcomes:
                report.count(outcome)
                layout.count(outcome)
                on_outcome(outcome)
    report.stages = stages_in_order(scan, pipeline.meters, meters, commit)
    report.describe(layout)
    report.bytes_read = meters.bytes.items
    report.batch_size = batches.size
    report.peak_memory = peak_memory()
    report.find_twins(gallery)
    _optimize(gallery, report)
    report.seconds = time.monotonic() - started
    return report


def _in_commits(
    batches: Iterable[Ready], asked: int | None, should_stop: Callable[[], bool]
) -> Iterator[tuple[list[Ready], bool]]:
    """Batches that become durable together, and whether the run is to end with them.

    Four at most, and for no longer than two seconds: fewer commits write less, and who asks for batches
    smaller than the usual ones wants each of them durable. None, where the run was stopped before there was
    one.
    """
    together: list[Ready] = []
    most = 1 if asked is not None and asked < DEFAULT_BATCH_SIZE else _TOGETHER
    since = 0.0
    stopped = False
    try:
        for batch in batches:
            since = since if together else time.monotonic()
            together.append(batch)
            stop = should_stop()
            if stop or len(together) >= most or time.monotonic() - since >= _COMMIT_SECONDS:
                yield together, stop
                together = []
            if stop:
                return
    except Interrupted:
        stopped = True
    if together or stopped:
        yield together, stopped


def _recognize(gallery: Gallery, offered: Sequence[Photo]) -> list[Entry]:
    """What is left to look at; photos whose files are unchanged are known."""
    return [known or photo for known, photo in zip(gallery.recognize(offered), offered, strict=True)]


def _prepare(
    gallery: Gallery, meters: Meters, decode: Decode, entries: Sequence[Entry]
) -> list[Prepared | Outcome]:
    offered = [entry for entry in entries if isinstance(entry, Photo)]
    return in_their_places(entries, gallery.prepare_many(offered, meters=meters, decode=decode))


def ingest_embeddings(
    gallery: Gallery,
    path: str | os.PathLike[str],
    *,
    trusted: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls the vectors of a Parquet file (see `exchange.read_embeddings`), some thousand rows at a time.

    Args:
        gallery: where to.
        path: of the file.
        trusted: take vectors of a file that does not say which model made them.
        on_outcome: called once for every row, in order, after its batch is durable.
        should_stop: asked between batches; True ends the run, with everything so far enrolled.

    Raises:
        ModelMismatch: another model made the vectors.
        InputError: the file is not what it should be; the batches before the first such row are enrolled.
        StorageError, GalleryBusy: the run failed; the batches before are enrolled.
    """
    report, commit, layout = IngestReport(), Meter("commit"), Layout(())
    started = time.monotonic()
    fingerprint, dimension = gallery.bundle.fingerprint, gallery.bundle.dimension
    rows = exchange.read_embeddings(Path(path), fingerprint=fingerprint, dimension=dimension, trusted=trusted)
    for faces, vectors in rows:
        with commit.working(len(faces)):
            outcomes = gallery.enroll_vectors(faces, vectors, fingerprint=fingerprint)
        for outcome in outcomes:
            report.count(outcome)
            layout.count(outcome)
            on_outcome(outcome)
        report.interrupted = should_stop()
        if report.interrupted:
            break
    report.identities, report.identities_from = len(layout.identities), "the column `identity`"
    report.stages = (commit,)
    report.find_twins(gallery)
    _optimize(gallery, report)
    report.seconds = time.monotonic() - started
    report.peak_memory = peak_memory()
    return report


def _optimize(gallery: Gallery, report: IngestReport) -> None:
    """Lets searches of what has grown be quick; a run that is to end does."""
    if report.enrolled and not report.interrupted:
        before = time.monotonic()
        gallery.optimize()
        report.optimizing_seconds = time.monotonic() - before


@dataclass
class MetadataReport:
    """What setting metadata from a table did.

    Attributes:
        set, unchanged: how many faces, or people, have other metadata now, or had the same already.
        unknown: how many paths, or names, the gallery does not have.
        interrupted: whether it was stopped before the last row.
    """

    set: int = 0
    unchanged: int = 0
    unknown: int = 0
    interrupted: bool = False


def ingest_metadata(
    gallery: Gallery,
    table: Annotations,
    *,
    on_unknown: Callable[[str], None] = lambda name: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> MetadataReport:
    """Sets the metadata of a table (see `metadata_tables.read_annotations`), some thousand rows at a time.

    Args:
        gallery: where to.
        table: of faces, by their paths, or of people, by their names.
        on_unknown: called for every path or name that the gallery does not have, in order.
        should_stop: asked between batches; True ends the run, with everything so far set.

    Raises:
        InputError: the file is not what it was when it was opened; the batches before are set.
        StorageError, GalleryBusy: the run failed; the batches before are set.
    """
    report = MetadataReport()
    for batch in table.batches():
        done = gallery.annotate(paths=batch) if table.about == "path" else gallery.annotate(identities=batch)
        report.set += done.faces + done.identities
        report.unchanged += done.unchanged
        report.unknown += len(done.unknown)
        for name in done.unknown:
            on_unknown(str(name))
        report.interrupted = should_stop()
        if report.interrupted:
            break
    return report
