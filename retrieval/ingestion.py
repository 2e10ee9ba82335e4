"""Bulk enrollment: folders -> a gallery, and a report of what happened to each file."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from retrieval import exchange, photos
from retrieval.annotations import Annotations
from retrieval.errors import InputError, Reason
from retrieval.gallery import Gallery, Prepared
from retrieval.photos import Photo
from retrieval.verdicts import Outcome, Status

DEFAULT_BATCH_SIZE = 64


@dataclass
class IngestReport:
    """What an ingest did. `found` is always `enrolled + known + duplicate + rejected`.

    Attributes:
        enrolled: photos that became faces.
        known: photos whose bytes and path were in the gallery already.
        duplicate: photos whose bytes were in the gallery under another path.
        reasons: why photos were rejected, and how many each.
        seconds: of wall-clock time.
        waiting_seconds: of them, waiting for photos to be read and decoded.
        storing_seconds: of them, embedding and writing.
        optimizing_seconds: of them, making searches of a gallery that has grown quick.
        interrupted: whether it was stopped before the last photo.
    """

    enrolled: int = 0
    known: int = 0
    duplicate: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    storing_seconds: float = 0.0
    optimizing_seconds: float = 0.0
    interrupted: bool = False

    @property
    def rejected(self) -> int:
        """Photos that could not be enrolled."""
        return self.reasons.total()

    @property
    def found(self) -> int:
        """Photos that were looked at."""
        return self.enrolled + self.known + self.duplicate + self.rejected

    @property
    def worth_retrying(self) -> int:
        """Rejected photos whose reason lies in the machine and not in the file."""
        return sum(number for reason, number in self.reasons.items() if reason.may_pass_when_retried)

    def count(self, outcome: Outcome) -> None:
        """Adds one photo's fate."""
        if outcome.status is Status.ENROLLED:
            self.enrolled += 1
        elif outcome.status is Status.KNOWN:
            self.known += 1
        elif outcome.status is Status.DUPLICATE:
            self.duplicate += 1
        else:
            self.reasons[outcome.reason or Reason.IO_ERROR] += 1


def ingest(
    gallery: Gallery,
    sources: Iterable[str | os.PathLike[str]],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    workers: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls every photo of some sources.

    Photos are read, hashed and decoded by threads while the batch before is embedded. Face ids follow
    the order of the photos, not the timing of the threads. Each batch is durable before the next.

    Args:
        gallery: where to.
        sources: folders, lists, archives, files, addresses (see `photos.scan`). Pictures that a program
            has are `ingest_photos(gallery, photos.of(pairs))`.
        batch_size: photos that are embedded and committed together.
        workers: threads that read photos; None is one per processor.
        on_outcome: called once for every photo, in order, after its batch is durable.
        should_stop: asked between batches; True ends the run, with everything so far enrolled.

    Raises:
        DataError: a source does not exist; nothing was enrolled.
        InputError: a batch size or a number of workers below 1.
        StorageError, GalleryBusy: the run failed; the batches before are enrolled.
    """
    return ingest_photos(
        gallery,
        photos.scan(sources),
        batch_size=batch_size,
        workers=workers,
        on_outcome=on_outcome,
        should_stop=should_stop,
    )


def ingest_photos(
    gallery: Gallery,
    found: Iterable[Photo],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    workers: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """As `ingest`, for any photos: of a report (`photos.from_report`), or of a program (`photos.of`)."""
    workers = (os.cpu_count() or 1) if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise InputError("The batch size and the number of workers must be at least 1.")
    report = IngestReport()
    started = time.monotonic()
    with ThreadPoolExecutor(workers, thread_name_prefix="faceprint-read") as threads:
        prepared = _prepared_in_order(gallery, iter(found), threads, ahead=2 * batch_size)
        while not report.interrupted:
            before = time.monotonic()
            batch = list(islice(prepared, batch_size))
            between = time.monotonic()
            report.waiting_seconds += between - before
            if not batch:
                break
            for outcome in gallery.enroll_prepared(batch):
                report.count(outcome)
                on_outcome(outcome)
            report.storing_seconds += time.monotonic() - between
            report.interrupted = should_stop()
        threads.shutdown(cancel_futures=True)
    _optimize(gallery, report)
    report.seconds = time.monotonic() - started
    return report


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
    report = IngestReport()
    started = time.monotonic()
    fingerprint, dimension = gallery.bundle.fingerprint, gallery.bundle.dimension
    rows = exchange.read_embeddings(Path(path), fingerprint=fingerprint, dimension=dimension, trusted=trusted)
    for faces, vectors in rows:
        between = time.monotonic()
        for outcome in gallery.enroll_vectors(faces, vectors, fingerprint=fingerprint):
            report.count(outcome)
            on_outcome(outcome)
        report.storing_seconds += time.monotonic() - between
        report.interrupted = should_stop()
        if report.interrupted:
            break
    _optimize(gallery, report)
    report.seconds = time.monotonic() - started
    report.waiting_seconds = report.seconds - report.storing_seconds - report.optimizing_seconds
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
    """Sets the metadata of a table (see `annotations.read_annotations`), some thousand rows at a time.

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


def _prepared_in_order(
    gallery: Gallery, found: Iterator[Photo], threads: ThreadPoolExecutor, *, ahead: int
) -> Iterator[Prepared | Outcome]:
    """What threads make of photos, in the photos' order, never more than `ahead` of what was taken."""
    waiting: deque[Future[Prepared | Outcome]] = deque()
    for photo in found:
        waiting.append(threads.submit(gallery.prepare_photo, photo))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
