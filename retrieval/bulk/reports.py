"""Reports: what became of the photos of a run, and what the run took."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from retrieval.bulk.source_layout import Layout
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.stages import PhotoPipeline, peak_memory
from retrieval.errors import Reason
from retrieval.gallery.gallery import Gallery
from retrieval.sources.exclusion import PassedOver
from retrieval.system.pipeline import Meter


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

    def measure(self, pipeline: PhotoPipeline[Any], last: Meter) -> None:
        """Takes over what a pipeline did; `last` is what was done with its results."""
        self.stages = pipeline.stages(last)
        self.bytes_read = pipeline.meters.bytes.items
        self.batch_size = pipeline.batch_size
        self.peak_memory = peak_memory()

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
