"""Reports of bulk runs: counts of photos by outcome, times of stages, rates and memory."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from retrieval.bulk.source_layout import Layout
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.stages import PhotoPipeline
from retrieval.errors import Reason
from retrieval.gallery.gallery import Gallery
from retrieval.sources.exclusion import PassedOver
from retrieval.system.memory import peak_memory
from retrieval.system.pipeline import Meter


@dataclass
class Run:
    """The figures that all runs over photos report.

    Attributes:
        reasons: the number of rejected photos by reason.
        seconds: wall-clock time.
        optimizing_seconds: the part of it that optimizing the searches of a grown gallery took.
        stages: the meter of each stage, in the order of the stages, which run at the same time.
        bytes_read: bytes of files.
        batch_size: how many photos were embedded together; None where the vectors were given.
        peak_memory: the peak memory of this process until the last photo was durable, in bytes; without that
            of optimizing, which comes afterwards.
        interrupted: whether the run was stopped before the last photo.
        passed_over: files and folders of the sources that were passed over, and do not count as *found*.
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
        """The number of rejected photos."""
        return self.reasons.total()

    @property
    def found(self) -> int:
        """The number of photos with an outcome."""
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        """Returns the number of photos by outcome; each photo counts once."""
        return {"rejected": self.rejected}

    @property
    def worth_retrying(self) -> int:
        """The number of rejected photos with a reason that is in the machine and not in the file."""
        return sum(number for reason, number in self.reasons.items() if reason.may_pass_when_retried)

    @property
    def bottleneck(self) -> Meter | None:
        """The stage with the most busy time per worker, for which others waited; None where nothing ran."""
        return max(self.stages, key=lambda one: one.busy_seconds / one.workers, default=None)

    @property
    def working_seconds(self) -> float:
        """Seconds until the last photo was durable; all rates and shares of a report refer to them."""
        return max(0.0, self.seconds - self.optimizing_seconds)

    @property
    def photos_per_second(self) -> float:
        """`found` per second of `working_seconds`."""
        return self.found / self.working_seconds if self.working_seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        """Millions of bytes read per second of `working_seconds`."""
        return self.bytes_read / 1e6 / self.working_seconds if self.working_seconds else 0.0

    @property
    def busy_share(self) -> float:
        """The share of `working_seconds` in which the bottleneck's workers were busy; 0 where nothing ran."""
        limit = self.bottleneck
        if limit is None or not self.working_seconds:
            return 0.0
        return min(1.0, limit.busy_seconds / limit.workers / self.working_seconds)

    def measure(self, pipeline: PhotoPipeline[Any], last: Meter) -> None:
        """Takes over the figures of a pipeline; `last` is the meter of what was done with its results."""
        self.stages = pipeline.stages(last)
        self.bytes_read = pipeline.meters.bytes.items
        self.batch_size = pipeline.batch_size
        self.peak_memory = peak_memory()

    def summary(self) -> dict[str, Any]:
        """Returns the report as JSON values; see docs/cli.md."""
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
    """The report of an ingest. `found` is always `enrolled + known + duplicate + rejected`.

    Attributes:
        enrolled: photos that became faces.
        faces: the number of these faces; more than photos where several people are on one.
        known: photos with bytes and a path that were in the gallery already.
        duplicate: photos with bytes that were in the gallery under another path.
        identities: the number of different identities that the sources give.
        identities_from: where the sources give them, in words; empty where the photos are of no sources.
        notes: sentences about sources with a layout that may not be the intended one.
        twins: groups of identities that may be one person, each with one under which a photo was enrolled:
            their names differ only in case, width, spaces or the composition of accents.
    """

    enrolled: int = 0
    faces: int = 0
    known: int = 0
    duplicate: int = 0
    identities: int = 0
    identities_from: str = ""
    notes: tuple[str, ...] = ()
    twins: tuple[tuple[str, ...], ...] = ()
    _names: set[str] = field(default_factory=set, repr=False)

    def counts(self) -> dict[str, int]:
        """Returns the number of photos by outcome; each photo counts once."""
        mine = {"enrolled": self.enrolled, "known": self.known, "duplicate": self.duplicate}
        return mine | super().counts()

    def summary(self) -> dict[str, Any]:
        """Returns the report as JSON values; see docs/cli.md."""
        named = {"faces": self.faces, "identities": self.identities, "identities_from": self.identities_from}
        twins = [list(names) for names in self.twins]
        return super().summary() | named | {"notes": list(self.notes), "twins": twins}

    def describe(self, layout: Layout) -> None:
        """Takes over the identities and notes of a layout."""
        self.identities, self.identities_from = len(layout.identities), layout.origin
        self.notes = tuple(layout.notes())

    def count(self, outcome: Outcome) -> None:
        """Counts one photo by its outcome."""
        if outcome.status is Status.ENROLLED:
            self.enrolled += 1
            self.faces += len(outcome.face_ids)
            if outcome.identity is not None:
                self._names.add(outcome.identity)
        elif outcome.status is Status.KNOWN:
            self.known += 1
        elif outcome.status is Status.DUPLICATE:
            self.duplicate += 1
        else:
            self.reasons[outcome.reason or Reason.IO_ERROR] += 1

    def find_twins(self, gallery: Gallery) -> None:
        """Finds the gallery's identities with names like those that this run enrolled photos under."""
        self.twins = gallery.identity_twins(self._names) if self._names else ()


@dataclass
class MetadataReport:
    """The report of setting metadata from a table.

    Attributes:
        set: the number of faces, or identities, with metadata that changed.
        unchanged: the number of those that had the same metadata already.
        unknown: the number of paths, or names, that the gallery does not have.
        interrupted: whether the run was stopped before the last row.
    """

    set: int = 0
    unchanged: int = 0
    unknown: int = 0
    interrupted: bool = False
