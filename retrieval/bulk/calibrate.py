"""Calibration of a gallery's threshold, from photos of strangers or from the gallery itself.

The photos of strangers are read, decoded and embedded by `retrieval.embedding.stages`, and not stored.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.database.records import Calibration
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.reading import Meters, Prepared, Ready
from retrieval.embedding.stages import PhotoPipeline, Resources
from retrieval.errors import InputError, Interrupted, Reason
from retrieval.gallery.gallery import Gallery
from retrieval.images.decoders import Decode
from retrieval.images.photo_reader import FaceSelection
from retrieval.search.calibration import SAMPLE
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo
from retrieval.system.paths import is_utf8


@dataclass
class StrangerReport:
    """Counts of photos of strangers: `found` is always `used + enrolled + repeated + rejected`.

    Attributes:
        used: photos that were searched for.
        enrolled: photos that are not of strangers: their identity or their bytes are enrolled.
        repeated: photos with the bytes of an earlier one.
        reasons: rejected photos by reason.
        passed_over: files and folders that were passed over.
    """

    used: int = 0
    enrolled: int = 0
    repeated: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def rejected(self) -> int:
        """The number of photos that could not be read."""
        return sum(self.reasons.values())

    @property
    def found(self) -> int:
        """The number of all photos."""
        return self.used + self.enrolled + self.repeated + self.rejected

    def summary(self) -> dict[str, Any]:
        """Returns the report as values for JSON."""
        return {
            "found": self.found,
            "used": self.used,
            "enrolled": self.enrolled,
            "repeated": self.repeated,
            "rejected": self.rejected,
            "reasons": {str(reason): number for reason, number in sorted(self.reasons.items())},
            "passed_over": self.passed_over.as_json(),
        }


@dataclass(frozen=True)
class Calibrated:
    """A calibration, and the report on the photos of strangers; None where none were given."""

    calibration: Calibration
    report: StrangerReport | None


def calibrate(
    gallery: Gallery,
    fpir: float = 0.01,
    *,
    strangers: Iterable[str | os.PathLike[str]] | None = None,
    exclude: Iterable[str] = (),
    sample: int = SAMPLE,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    selection: FaceSelection = FaceSelection(),
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Calibrated:
    """Finds and stores the distance threshold beyond which searches of a gallery answer UNKNOWN.

    Args:
        gallery: has at least two identities.
        fpir: the allowed share of non-mated searches that return an identity. Thresholds for 0.1, 0.03, 0.01,
            0.003 and 0.001 are stored too, as far as there are enough searches.
        strangers: sources, as of `ingest`, of photos of people who are not enrolled. Photos with an enrolled
            identity or with enrolled bytes are left out. None uses the gallery's own people, each searched
            for without their own faces.
        exclude: patterns of files and folders of the sources that are passed over, as of `ingest`.
        sample: how many enrolled faces are searched for at most, to measure the FNIR of a threshold.
        seed: of that sample and of the intervals.
        batch_size, workers, decoders, selection: as of `ingest`.
        on_outcome: called for every photo of `strangers`, in order: embedded, known or rejected.
        on_progress: called with the number of enrolled faces searched for so far, and the total.
        should_stop: called between batches; True stops the run.

    Returns:
        The calibration, and the report on the photos of `strangers`.

    Raises:
        DataError: a source does not exist.
        InputError: fewer than 1 / fpir searches of strangers, or fewer than two identities enrolled.
        Interrupted: it was stopped; the gallery's thresholds are unchanged.
        StorageError, GalleryBusy: nothing was stored.
    """
    measure = partial(
        gallery.calibrate, fpir, sample=sample, seed=seed, on_progress=on_progress, should_stop=should_stop
    )
    if strangers is None:
        return Calibrated(measure(), None)
    report = StrangerReport()
    found = _nonempty(list(strangers), exclude, report.passed_over)
    with PhotoPipeline(
        found,
        prepare=partial(_prepare, gallery, selection),
        embed=gallery.enrollment.embed_prepared,
        embedder=lambda: gallery.embedder,
        reader=gallery.photo_reader,
        on_gpu=gallery.may_use_gpu,
        resources=Resources(batch_size, workers, decoders),
    ) as pipeline:
        searches = _stranger_vectors(gallery, pipeline, report, on_outcome, should_stop)
        return Calibrated(measure(strangers=searches), report)


def _nonempty(
    sources: Sequence[str | os.PathLike[str]], exclude: Iterable[str], passed_over: PassedOver
) -> Iterator[Photo]:
    """Returns the photos of some sources; raises InputError where there is none."""
    found = photos.scan(sources, exclude=exclude, passed_over=passed_over)
    first = next(found, None)
    if first is None:
        where = f"{', '.join(map(str, sources))}{passed_over.aside()}"
        raise InputError(f"There are no photos in {where}; check the path.")
    yield first
    yield from found


def _prepare(
    gallery: Gallery,
    selection: FaceSelection,
    photos: Sequence[Photo],
    *,
    meters: Meters,
    decode: Decode,
) -> list[Prepared | Outcome]:
    """Reads and decodes the photos with identities that are not enrolled; the others are known."""
    with gallery.vault.store.read() as reader:
        named = {photo.identity for photo in photos if photo.identity is not None}
        enrolled = reader.identities_named(filter(is_utf8, named))
    strange = [photo for photo in photos if photo.identity not in enrolled]
    prepared = iter(
        gallery.enrollment.prepare_many(strange, meters=meters, decode=decode, selection=selection)
    )
    return [_known_outcome(p.path, p.identity) if p.identity in enrolled else next(prepared) for p in photos]


def _known_outcome(path: str | None, identity: str | None) -> Outcome:
    return Outcome(path, identity, Status.KNOWN)


def _stranger_vectors(
    gallery: Gallery,
    batches: Iterable[Ready],
    report: StrangerReport,
    on_outcome: Callable[[Outcome], None],
    should_stop: Callable[[], bool],
) -> Iterator[tuple[NDArray[Any], list[str | None]]]:
    """Yields vectors of strangers with their identities, batch by batch; counts every photo in `report`."""
    seen: set[str] = set()
    for batch in batches:
        if should_stop():
            raise Interrupted("Stopped; the gallery's thresholds are what they were.")
        rows, identities = _count_batch(gallery, batch, report, seen, on_outcome)
        yield batch.vectors[rows], identities


def _count_batch(
    gallery: Gallery,
    batch: Ready,
    report: StrangerReport,
    seen: set[str],
    on_outcome: Callable[[Outcome], None],
) -> tuple[NDArray[np.int64], list[str | None]]:
    """Counts a batch; returns the rows of its vectors that are to be searched for, and their identities."""
    ready = [photo for photo in batch.photos if isinstance(photo, Prepared)]
    with gallery.vault.store.read() as reader:
        enrolled = reader.photos_by_sha256({photo.face.sha256 for photo in ready})
    has_vector, following = iter(batch.has_vector), iter(range(len(batch.vectors)))
    rows: list[int] = []
    identities: list[str | None] = []
    for photo in batch.photos:
        if isinstance(photo, Outcome):
            _count_outcome(photo, report, on_outcome)
            continue
        has = next(has_vector)
        of_photo = list(islice(following, len(photo.faces))) if has else []
        face, status = photo.face, Status.KNOWN
        if not has or face.sha256 in enrolled:
            report.enrolled += 1
        elif face.sha256 in seen:
            report.repeated += 1
        else:
            report.used += 1
            status = Status.EMBEDDED
            rows += of_photo
            identities += [face.identity] * len(of_photo)
        seen.add(face.sha256)
        on_outcome(Outcome(face.path, face.identity, status))
    return np.array(rows, np.int64), identities


def _count_outcome(outcome: Outcome, report: StrangerReport, on_outcome: Callable[[Outcome], None]) -> None:
    """Counts a photo that was not embedded, because it is enrolled or cannot be read."""
    conflict = outcome.reason is Reason.IDENTITY_CONFLICT
    if outcome.status is not Status.REJECTED or conflict:
        report.enrolled += 1
        on_outcome(_known_outcome(outcome.path, outcome.identity))
        return
    report.reasons[outcome.reason or Reason.IO_ERROR] += 1
    on_outcome(outcome)
