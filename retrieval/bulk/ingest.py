"""Bulk enrollment: folders -> a gallery, and a report of what happened to each file."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from retrieval.bulk.reports import IngestReport, MetadataReport
from retrieval.bulk.source_layout import Layout
from retrieval.embedding.batches import DEFAULT_BATCH_SIZE
from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import Ready
from retrieval.embedding.stages import PhotoPipeline, Resources, peak_memory
from retrieval.errors import Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.images.pixels import MAX_SECONDS
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.metadata_tables import Annotations
from retrieval.sources.photos import Photo
from retrieval.system.pipeline import Meter
from retrieval.transfer import vector_files

# Batches of the usual size that become durable together, if they are embedded within so many seconds.
_BATCHES_PER_COMMIT: Final = 4
_COMMIT_SECONDS: Final = 2.0


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
    report, commit = IngestReport(), Meter("commit")
    report.passed_over = PassedOver() if passed_over is None else passed_over
    contested: set[int] = set()
    started = time.monotonic()
    with PhotoPipeline(
        found,
        prepare=gallery.enrollment.prepare_many,
        embed=gallery.enrollment.embed_prepared,
        embedder=lambda: gallery.embedder,
        size=gallery.bundle.preprocessing.size,
        on_gpu=gallery.may_use_gpu,
        resources=Resources(batch_size, workers, decoders, photo_seconds),
        recognize=None if rehash else gallery.enrollment.recognize,
    ) as pipeline:
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
    report.describe(layout)
    report.measure(pipeline, commit)
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
    most = 1 if asked is not None and asked < DEFAULT_BATCH_SIZE else _BATCHES_PER_COMMIT
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


def ingest_embeddings(
    gallery: Gallery,
    path: str | os.PathLike[str],
    *,
    trusted: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls the vectors of a Parquet file (see `vector_files.read_embeddings`), block by block.

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
    rows = vector_files.read_embeddings(
        Path(path), fingerprint=fingerprint, dimension=dimension, trusted=trusted
    )
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
