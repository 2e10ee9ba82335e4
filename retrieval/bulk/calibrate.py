"""Calibration from photos of strangers: reads and embeds them, and finds the threshold of a gallery.

They are read, decoded and embedded by `retrieval.embedding.stages`, and nothing of them is kept.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from retrieval.search.calibration import SAMPLE
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo
from retrieval.system.paths import is_utf8


@dataclass
class StrangerReport:
    """What came of photos of strangers: `found` is always `used + enrolled + repeated + rejected`.

    Attributes:
        used: photos that were searched for.
        enrolled: of people who are enrolled by that name, or of photos that are: no strangers.
        repeated: bytes that came before.
        reasons: rejected photos by reason.
        passed_over: files and folders that were not looked at.
    """

    used: int = 0
    enrolled: int = 0
    repeated: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def rejected(self) -> int:
        """Photos that could not be read."""
        return sum(self.reasons.values())

    @property
    def found(self) -> int:
        """All photos."""
        return self.used + self.enrolled + self.repeated + self.rejected


@dataclass(frozen=True)
class Calibrated:
    """A calibration, and what came of the photos of strangers; None where none were given."""

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
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Calibrated:
    """Finds out beyond which distance searches of a gallery name nobody, and lets them go by it from then on.

    Args:
        gallery: at least two people are enrolled.
        fpir: the share of strangers' searches that may name somebody. Thresholds for 0.1, 0.03, 0.01, 0.003
            and 0.001 are kept beside it, as far as there are searches enough.
        strangers: sources, as of `ingest`, of photos of people who are not enrolled. Whoever is enrolled by
            the same name is left out, and so are photos that are. None lets the gallery answer for itself.
        exclude: patterns of files and folders of the sources that are passed over, as of `ingest`.
        sample: how many enrolled faces are searched for at most, to see what a threshold costs.
        seed: of that sample and of the intervals.
        batch_size, workers, decoders: as of `ingest`.
        on_outcome: called for every photo of a stranger, in order: embedded, known or rejected.
        on_progress: called with the enrolled faces that were searched for and all that will be.
        should_stop: asked between batches.

    Raises:
        DataError: a source does not exist.
        InputError: fewer than 1 / fpir searches of strangers, or fewer than two people enrolled.
        Interrupted: it was stopped; the gallery's thresholds are what they were.
        StorageError, GalleryBusy: nothing was stored.
    """
    ask = partial(
        gallery.calibrate, fpir, sample=sample, seed=seed, on_progress=on_progress, should_stop=should_stop
    )
    if strangers is None:
        return Calibrated(ask(), None)
    report = StrangerReport()
    found = _found(list(strangers), exclude, report.passed_over)
    with PhotoPipeline(
        found,
        prepare=partial(_prepare, gallery),
        embed=gallery.enrollment.embed_prepared,
        embedder=lambda: gallery.embedder,
        size=gallery.bundle.preprocessing.size,
        on_gpu=gallery.may_use_gpu,
        resources=Resources(batch_size, workers, decoders),
    ) as pipeline:
        searches = _searches(gallery, pipeline, report, on_outcome, should_stop)
        return Calibrated(ask(strangers=searches), report)


def _found(
    sources: Sequence[str | os.PathLike[str]], exclude: Iterable[str], passed_over: PassedOver
) -> Iterator[Photo]:
    """The photos of some sources, of which there is at least one."""
    found = photos.scan(sources, exclude=exclude, passed_over=passed_over)
    first = next(found, None)
    if first is None:
        where = f"{', '.join(map(str, sources))}{passed_over.aside()}"
        raise InputError(f"There are no photos in {where}; check the path.")
    yield first
    yield from found


def _prepare(
    gallery: Gallery, photos: Sequence[Photo], *, meters: Meters, decode: Decode
) -> list[Prepared | Outcome]:
    """Reads and decodes the photos of those who are not enrolled."""
    with gallery.vault.store.read() as reader:
        named = {photo.identity for photo in photos if photo.identity is not None}
        enrolled = reader.identities_named(filter(is_utf8, named))
    strange = [photo for photo in photos if photo.identity not in enrolled]
    prepared = iter(gallery.enrollment.prepare_many(strange, meters=meters, decode=decode))
    return [_known(p.path, p.identity) if p.identity in enrolled else next(prepared) for p in photos]


def _known(path: str | None, identity: str | None) -> Outcome:
    return Outcome(path, identity, Status.KNOWN)


def _searches(
    gallery: Gallery,
    batches: Iterable[Ready],
    report: StrangerReport,
    on_outcome: Callable[[Outcome], None],
    should_stop: Callable[[], bool],
) -> Iterator[tuple[NDArray[Any], list[str | None]]]:
    """The vectors of strangers, and who they are; every photo is counted."""
    seen: set[str] = set()
    for batch in batches:
        if should_stop():
            raise Interrupted("Stopped; the gallery's thresholds are what they were.")
        rows, whose = _count(gallery, batch, report, seen, on_outcome)
        yield batch.vectors[rows], whose


def _count(
    gallery: Gallery,
    batch: Ready,
    report: StrangerReport,
    seen: set[str],
    on_outcome: Callable[[Outcome], None],
) -> tuple[NDArray[np.int64], list[str | None]]:
    """Counts a batch; which of its vectors are to be searched for, and whose they are."""
    ready = [photo for photo in batch.photos if isinstance(photo, Prepared)]
    with gallery.vault.store.read() as reader:
        enrolled = reader.faces_by_sha256({photo.face.sha256 for photo in ready})
    has_vector = iter(zip(batch.has_vector, np.cumsum(batch.has_vector) - 1, strict=True))
    rows: list[int] = []
    whose: list[str | None] = []
    for photo in batch.photos:
        if isinstance(photo, Outcome):
            _count_outcome(photo, report, on_outcome)
            continue
        has, row = next(has_vector)
        face, status = photo.face, Status.KNOWN
        if not has or face.sha256 in enrolled:
            report.enrolled += 1
        elif face.sha256 in seen:
            report.repeated += 1
        else:
            report.used += 1
            status = Status.EMBEDDED
            rows.append(int(row))
            whose.append(face.identity)
        seen.add(face.sha256)
        on_outcome(Outcome(face.path, face.identity, status))
    return np.array(rows, np.int64), whose


def _count_outcome(outcome: Outcome, report: StrangerReport, on_outcome: Callable[[Outcome], None]) -> None:
    """Counts a photo that was not embedded: one that is enrolled, or that cannot be read."""
    conflict = outcome.reason is Reason.IDENTITY_CONFLICT
    if outcome.status is not Status.REJECTED or conflict:
        report.enrolled += 1
        on_outcome(_known(outcome.path, outcome.identity))
        return
    report.reasons[outcome.reason or Reason.IO_ERROR] += 1
    on_outcome(outcome)
