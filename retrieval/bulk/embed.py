"""Bulk embedding without a gallery: from photos to a file of vectors, by `retrieval.embedding.stages`."""

import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.bulk.reports import Run
from retrieval.database.records import NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.reading import AUTO, Prepared, embedded
from retrieval.embedding.stages import PhotoPipeline, Resources, prepare_without_gallery
from retrieval.errors import InputError, Interrupted, StorageError
from retrieval.images.photo_reader import FaceSelection
from retrieval.images.pixels import MAX_SECONDS
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo
from retrieval.system.files import replacing, why
from retrieval.system.pipeline import Meter
from retrieval.transfer.vector_files import write_embeddings

# Rows that are written together: 8 MiB for vectors of 2,048 float32 numbers.
_ROWS_PER_WRITE: Final = 1024

_Rows: TypeAlias = tuple[list[NewFace], NDArray[np.float32]]


@dataclass
class EmbedReport(Run):
    """The report of `embed`. `found` is always `embedded + rejected`.

    Attributes:
        embedded: photos that are rows of the file.
        faces: the number of rows; more than photos where several people are on one.
    """

    embedded: int = 0
    faces: int = 0

    def summary(self) -> dict[str, Any]:
        """Returns the report as JSON values; see docs/cli.md."""
        return super().summary() | {"faces": self.faces}

    def counts(self) -> dict[str, int]:
        """Returns the number of photos by outcome; each photo counts once."""
        return {"embedded": self.embedded} | super().counts()

    def count(self, outcome: Outcome) -> None:
        """Counts one photo by its outcome."""
        if outcome.reason is None:
            self.embedded += 1
        else:
            self.reasons[outcome.reason] += 1


class _NoFile(Exception):
    """No file is to be written: there are no rows, or the run was stopped."""


def embed(
    model: ModelBundle | Embedder,
    sources: Iterable[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    exclude: Iterable[str] = (),
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    photo_seconds: float = MAX_SECONDS,
    selection: FaceSelection = AUTO,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EmbedReport:
    """Embeds every photo of some sources into a file that is complete or absent; returns a report.

    The file has a row for each photo that can be read, in the order of the photos, or for each of its faces;
    the same bytes under two paths give two rows. An older file is replaced. A run that is stopped, or in
    which no photo can be read, writes no file.

    Args:
        model: the bundle, or an embedder that is loaded already.
        sources: as of `ingest`.
        target: FILE.parquet, which `ingest --embeddings` takes; or FILE.npy, float32 (n, d), with FILE.csv
            beside it: path, identity and sha256 of each row, and region for a model with a face detector.
        exclude: patterns of files and folders that are passed over, as of `ingest`.
        batch_size: photos that are embedded together, as of `ingest`.
        workers: threads that read photos; None is one per processor, and no fewer than decoders.
        decoders: processes that decode, as of `ingest`.
        photo_seconds: as of `ingest`.
        selection: which faces of a photo, as of `ingest`.
        on_outcome: called once for every photo, in order.
        should_stop: called between batches; True stops the run.

    Raises:
        DataError: a source does not exist.
        InputError: `target` has another suffix, a FILE.csv exists there without FILE.npy, or a batch size or
            a number of workers is below 1, or of decoders below 0.
        RunError: a process that decodes was killed.
        StorageError: the file cannot be written; an older file is still there.
        MissingDependency: `target` is Parquet, and pyarrow is not installed.
    """
    passed_over = PassedOver()
    return embed_photos(
        model,
        photos.scan(sources, exclude=exclude, passed_over=passed_over),
        target,
        passed_over=passed_over,
        batch_size=batch_size,
        workers=workers,
        decoders=decoders,
        photo_seconds=photo_seconds,
        selection=selection,
        on_outcome=on_outcome,
        should_stop=should_stop,
    )


def embed_photos(
    model: ModelBundle | Embedder,
    found: Iterable[Photo],
    target: str | os.PathLike[str],
    *,
    passed_over: PassedOver | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    photo_seconds: float = MAX_SECONDS,
    selection: FaceSelection = AUTO,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EmbedReport:
    """Embeds photos as `embed` does, given as a stream; `passed_over` is what their scan counts in."""
    target = Path(target)
    check_target(target)
    embedder = model if isinstance(model, Embedder) else Embedder.open(model)
    bundle, started = embedder.bundle, time.monotonic()
    report, write = EmbedReport(), Meter("write")
    report.passed_over = PassedOver() if passed_over is None else passed_over
    with (
        suppress(_NoFile),
        PhotoPipeline(
            found,
            prepare=partial(prepare_without_gallery, embedder.photo_reader, selection=selection),
            embed=partial(_embed, embedder),
            embedder=lambda: embedder,
            reader=embedder.photo_reader,
            on_gpu=embedder.on_gpu,
            resources=Resources(batch_size, workers, decoders, photo_seconds),
        ) as pipeline,
    ):
        rows = _rows(pipeline, report, write, on_outcome, should_stop)
        if target.suffix == ".npy":
            _write_npy(target, rows, bundle)
        else:
            write_embeddings(
                target,
                rows,
                fingerprint=bundle.fingerprint,
                dimension=bundle.dimension,
                regions=bundle.preprocessing.faces is not None,
            )
    report.measure(pipeline, write)
    report.seconds = time.monotonic() - started
    return report


def check_target(target: Path) -> None:
    """Checks, before anything is embedded, that vectors can be written to a path.

    Raises:
        InputError: the suffix is another one, the path is a folder, its folder does not exist, or a FILE.csv
            exists there without FILE.npy.
    """
    if target.suffix not in (".parquet", ".npy"):
        raise InputError(f"Embeddings go to FILE.parquet or FILE.npy, not to {target}.")
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file.")
    if not target.absolute().parent.is_dir():
        raise InputError(f"There is no folder {target.parent}; make it, or name another file.")
    beside = target.with_suffix(".csv")
    if target.suffix == ".npy" and beside.exists() and not target.exists():
        raise InputError(f"{beside} would be overwritten, and is not of {target}; name another file.")


_Embedded: TypeAlias = tuple[list[Outcome], list[NewFace], NDArray[np.float32]]


def _embed(embedder: Embedder, batch: Sequence[Prepared | Outcome]) -> _Embedded:
    """Returns a batch's outcomes, and the faces and vectors of its rows."""
    ready = [photo for photo in batch if isinstance(photo, Prepared)]
    outcomes = [
        photo
        if isinstance(photo, Outcome)
        else Outcome(photo.face.path, photo.face.identity, Status.EMBEDDED)
        for photo in batch
    ]
    return outcomes, [face for photo in ready for face in photo.faces], embedded(ready, embedder)


def _rows(
    batches: Iterable[_Embedded],
    report: EmbedReport,
    write: Meter,
    on_outcome: Callable[[Outcome], None],
    should_stop: Callable[[], bool],
) -> Iterator[_Rows]:
    """Yields the embedded rows, at least 1,024 at a time except the last; `write` gets the time of writing.

    Raises:
        _NoFile: the run was stopped, or has no rows.
    """
    faces: list[NewFace] = []
    vectors: list[NDArray[np.float32]] = []
    try:
        for outcomes, some, found in batches:
            for outcome in outcomes:
                report.count(outcome)
                on_outcome(outcome)
            faces += some
            report.faces += len(some)
            vectors.append(found)
            report.interrupted = should_stop()
            if report.interrupted:
                raise _NoFile
            if len(faces) >= _ROWS_PER_WRITE:
                with write.working(len(faces)):
                    yield faces, np.concatenate(vectors)
                faces, vectors = [], []
    except Interrupted as error:
        report.interrupted = True
        raise _NoFile from error
    if not report.embedded:
        raise _NoFile
    if faces:
        with write.working(len(faces)):
            yield faces, np.concatenate(vectors)


def _write_npy(target: Path, rows: Iterable[_Rows], bundle: ModelBundle) -> None:
    """Writes FILE.npy and FILE.csv; a new FILE.npy appears only after its FILE.csv.

    Raises:
        StorageError: a file cannot be written.
    """
    table = target.with_suffix(".csv")
    try:
        # Exited in reverse order: the table is in place before the array is.
        with replacing(target) as array, replacing(table) as lines:
            text = io.TextIOWrapper(lines, encoding="utf-8", newline="")
            _fill_npy(array, text, rows, bundle)
            text.detach()  # flushes it, and leaves the file open
            for file in (array, lines):
                file.flush()
                os.fsync(file.fileno())
            target.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {why(error)}.") from error


def _fill_npy(array: BinaryIO, text: Any, rows: Iterable[_Rows], bundle: ModelBundle) -> None:
    lines, dimension = csv.writer(text), bundle.dimension
    columns = ("path", "identity", "sha256", "region")[: 3 if bundle.preprocessing.faces is None else 4]
    lines.writerow(columns)
    array.write(_npy_header(0, dimension))
    number = 0
    for faces, vectors in rows:
        array.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        lines.writerows(_line(face)[: len(columns)] for face in faces)
        number += len(faces)
    array.seek(0)
    array.write(_npy_header(number, dimension))


def _line(face: NewFace) -> tuple[str, ...]:
    region = "" if face.region is None else face.region.as_json()
    return face.path or "", face.identity or "", face.sha256, region


def _npy_header(rows: int, dimension: int) -> bytes:
    """Returns the header of a .npy file; due to numpy's padding, it has one length for any number of rows."""
    file = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()
