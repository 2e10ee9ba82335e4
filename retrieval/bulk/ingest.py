"""Bulk enrollment: from photos, vectors or metadata tables of sources to a gallery, with a report."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final, TypeAlias

import numpy as np

from retrieval.bulk.reports import IngestReport, MetadataReport
from retrieval.bulk.source_layout import Layout
from retrieval.database.records import NewFace
from retrieval.embedding.batches import DEFAULT_BATCH_SIZE
from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import AUTO, Ready
from retrieval.embedding.stages import PhotoPipeline, Resources
from retrieval.errors import FaceprintError, Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.images.photo_reader import FaceSelection
from retrieval.images.pixels import MAX_SECONDS
from retrieval.index.segments import Vectors
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.metadata_tables import Annotations
from retrieval.sources.photos import Photo
from retrieval.system.memory import peak_memory
from retrieval.system.pipeline import Meter
from retrieval.transfer import vector_files
from retrieval.transfer.embedding_parts import Part, found_parts
from retrieval.transfer.parquet_blocks import BLOCK

# Batches that one transaction commits, and the seconds after which it commits fewer.
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
    selection: FaceSelection = AUTO,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls every photo of some sources; returns a report.

    A file with the size, time and inode of its enrollment is known without being opened. The others are read,
    hashed and decoded by threads, while another thread embeds the previous batch and the calling thread
    commits the batch before that. Face ids follow the order of the photos, not the timing of the threads;
    beside a GPU two batches are embedded at a time.

    Memory does not grow with the number of photos. At most 4 batches (beside a GPU 6, and of 1,024 photos
    where the size is to be tuned) and 4 pieces of 32 photos are in progress, with size x size x 3 bytes per
    photo. Each thread holds 16 MiB of files, one file more, and one decoded picture; so does each decoder.
    Decoders write into slots of 32 photos, one per decoder and one per piece in progress.

    Args:
        gallery: the gallery to enroll into.
        sources: folders, lists, archives, files, addresses (see `photos.scan`). For pictures in memory, use
            `ingest_photos(gallery, photos.of(pairs))`.
        identity_from: where identities come from (see `photos.scan`).
        exclude: patterns of files and folders that are passed over, as of .gitignore (see `photos.scan`).
        batch_size: photos that are embedded together. None is 64 on a CPU; on a GPU the embedder finds the
            fastest size, once, at the first 256 new photos, which takes some seconds. One transaction commits
            up to four batches of 64 photos or more; a smaller `batch_size` commits each batch by itself.
        workers: threads that read photos; None is one per processor, and no fewer than decoders.
        decoders: processes that decode what the threads read; with 0 the threads decode. None is one per core
            beside a GPU when there are more than 3 cores, else 0. The results are the same.
        photo_seconds: seconds that decoding one photo may take, where its header does not bound the time (see
            `pixels.read`).
        rehash: read every file, even if its size, time and inode are unchanged.
        selection: which faces of a photo, for a model with a face detector; by default the largest of a photo
            with a name, and all of one without.
        on_outcome: called once for every photo, in order, after its batch is durable.
        should_stop: called after each batch; True ends the run, and what was enrolled stays.

    Raises:
        DataError: a source does not exist; nothing was enrolled.
        InputError: a batch size or a number of workers is below 1, or of decoders below 0, or a pattern is
            invalid.
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
        selection=selection,
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
    selection: FaceSelection = AUTO,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls photos as `ingest` does: those of a report (`photos.from_report`) or a program (`photos.of`).

    For photos of sources, `layout` counts the identities and notes signs of a wrong layout; `passed_over` is
    what their scan counts in, and becomes the report's.
    """
    layout = Layout(()) if layout is None else layout
    report, commit = IngestReport(), Meter("commit")
    report.passed_over = PassedOver() if passed_over is None else passed_over
    contested: set[int] = set()
    started = time.monotonic()
    with PhotoPipeline(
        found,
        prepare=partial(gallery.enrollment.prepare_many, selection=selection),
        embed=gallery.enrollment.embed_prepared,
        embedder=lambda: gallery.embedder,
        reader=gallery.photo_reader,
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
    """Yields the batches of one commit, and whether the run is to end with it.

    A commit has at most four batches, and those of at most two seconds, since fewer commits write less. With
    a batch size below the default, each batch is a commit, since the caller wants each of them durable soon.
    The list is empty where the run was stopped before there was a batch.
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
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    trusted: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> IngestReport:
    """Enrolls the vectors of Parquet files in batches (see `vector_files.read_embeddings`).

    Args:
        gallery: the gallery to enroll into.
        sources: a file, a folder of parts that a run on Ray wrote, a pattern such as `run/*.parquet`, each a
            path or an address; or several of these.
        trusted: accept vectors of a file that does not name the model which made them.
        on_outcome: called once for every row, in order, after its batch is durable.
        should_stop: called between batches; True ends the run, and what was enrolled stays.

    Raises:
        ModelMismatch: another model made the vectors of a file; the files before are enrolled.
        InputError: a pattern matches nothing, or a folder has no complete run; or a file or a row is invalid;
            the batches before the first such row are enrolled.
        DataError, MissingDependency: fsspec does not know an address, or lacks a package for it.
        StorageError, GalleryBusy: the run failed; the batches before are enrolled.
    """
    report, commit, layout = IngestReport(), Meter("commit"), Layout(())
    started = time.monotonic()
    fingerprint = gallery.bundle.fingerprint
    named = [sources] if isinstance(sources, str | os.PathLike) else sources
    for faces, vectors in _filled(_rows(gallery, found_parts(named), trusted=trusted)):
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


def count_vectors(sources: Iterable[str | os.PathLike[str]]) -> int | None:
    """Returns the number of rows that `ingest_embeddings` reads; None where a file is at an address.

    Raises:
        InputError, DataError, MissingDependency, StorageError: as `ingest_embeddings`.
    """
    paths = [part.path for part in found_parts(sources)]
    local = [path for path in paths if path is not None]
    return sum(map(vector_files.count_embeddings, local)) if len(local) == len(paths) else None


_Rows: TypeAlias = tuple[list[NewFace], Vectors]


def _rows(gallery: Gallery, parts: Iterable[Part], *, trusted: bool) -> Iterator[_Rows]:
    """Yields faces and their vectors, (n, d) float32, of some files, in their order."""
    fingerprint, dimension = gallery.bundle.fingerprint, gallery.bundle.dimension
    for part in parts:
        with part.opened() as path:
            yield from vector_files.read_embeddings(
                path, fingerprint=fingerprint, dimension=dimension, trusted=trusted
            )


def _filled(batches: Iterable[_Rows]) -> Iterator[_Rows]:
    """Yields the same rows in batches of 8,192 to 16,383, except the last: a small part is no transaction.

    What precedes an error is yielded before the error is raised.
    """
    faces: list[NewFace] = []
    vectors: list[Vectors] = []
    try:
        for some, found in batches:
            faces += some
            vectors.append(found)
            if len(faces) >= BLOCK:
                full, faces, joined, vectors = faces, [], _joined(vectors), []
                yield full, joined
    except FaceprintError:
        if faces:
            yield faces, _joined(vectors)
        raise
    if faces:
        yield faces, _joined(vectors)


def _joined(vectors: list[Vectors]) -> Vectors:
    return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)


def _optimize(gallery: Gallery, report: IngestReport) -> None:
    """Optimizes a gallery that has grown, unless the run was interrupted; records the seconds it took."""
    if report.enrolled and not report.interrupted:
        before = time.monotonic()
        if gallery.vault.in_folder:
            gallery.optimize()
        report.optimizing_seconds = time.monotonic() - before


def ingest_metadata(
    gallery: Gallery,
    table: Annotations,
    *,
    on_unknown: Callable[[str], None] = lambda name: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> MetadataReport:
    """Sets the metadata of a table (see `metadata_tables.read_annotations`), in batches of up to 4,096 rows.

    Args:
        gallery: the gallery with the faces or identities.
        table: of faces, by their paths, or of identities, by their names.
        on_unknown: called for every path or name that the gallery does not have, in order.
        should_stop: called between batches; True ends the run, and what was set stays.

    Returns:
        The number of faces or identities that were set, unchanged or unknown.

    Raises:
        InputError: the file has changed since it was opened, and is not valid any more; the batches before
            are set.
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
