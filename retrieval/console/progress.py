"""Progress of a long run: a bar for people, JSON lines for machines."""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Protocol

from retrieval.console import terminal
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import FaceprintError

# How often a terminal, and a log, hear of progress, in seconds.
_BAR_PERIOD: Final = 0.1
_LOG_PERIOD: Final = 1.0

# From how many seconds on it is worth counting what there is to do.
_MIN_SECONDS_TO_COUNT: Final = 1.0


class Progress(Protocol):
    """Hears of a run, as a context manager around it."""

    def __enter__(self) -> "Progress": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, outcome: Outcome) -> None:
        """A photo is done with."""
        ...


class Total:
    """How many photos there will be, counted in a thread of its own beside a run that takes long.

    Attributes:
        number: None until it is known.
    """

    def __init__(self, count: int | Callable[[], int | None] | None) -> None:
        self.number = None if callable(count) else count
        self._how = count if callable(count) else None
        self._timer = threading.Timer(_MIN_SECONDS_TO_COUNT, self._count)
        # Counting may take as long as it wants; nobody waits for it.
        self._timer.daemon = True

    def _count(self) -> None:
        # What cannot be looked at is said by whoever reads it.
        with suppress(FaceprintError, OSError):
            self.number = self._how() if self._how is not None else None

    def start(self) -> None:
        """Counts, if the run takes long enough."""
        if self._how is not None:
            self._timer.start()

    def stop(self) -> None:
        """Does not begin to count any more."""
        self._timer.cancel()


class _Tally:
    """What was heard so far."""

    def __init__(self, every: float) -> None:
        self.done = self.rejected = 0
        self.started = self._told = time.monotonic()
        self._every = every

    def add(self, outcome: Outcome) -> bool:
        """Counts a photo; says whether it is time to tell."""
        self.done += 1
        self.rejected += outcome.status is Status.REJECTED
        now = time.monotonic()
        due = now - self._told >= self._every
        if due:
            self._told = now
        return due

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Bar:
    """A line on the standard error: how far, how fast, how long still, how many rejected."""

    def __init__(self, verb: str, total: Total) -> None:
        self._total = total
        self._tally = _Tally(_BAR_PERIOD)
        self._bar = terminal.progress(verb)

    def __enter__(self) -> "Bar":
        self._total.start()
        self._bar.__enter__()
        self._task = self._bar.add_task("", total=self._total.number, pace="", rejected=0)
        return self

    def __exit__(self, *error: Any) -> None:
        self._total.stop()
        self._tell()
        self._bar.__exit__(*error)

    def note(self, outcome: Outcome) -> None:
        """Shows a photo, some at a time."""
        if self._tally.add(outcome):
            self._tell()

    def _tell(self) -> None:
        tally, total = self._tally, self._total.number
        pace = terminal.pace(tally.done, total, tally.seconds) if tally.done else ""
        self._bar.update(self._task, completed=tally.done, total=total, rejected=tally.rejected, pace=pace)


class JsonLog:
    """A JSON object a line on the standard output: the start, each second, each rejected file, the end."""

    def __init__(self, verb: str, total: Total) -> None:
        self._verb = verb
        self._total = total
        self._tally = _Tally(_LOG_PERIOD)

    def __enter__(self) -> "JsonLog":
        self._total.start()
        self.event("start", doing=self._verb, total=self._total.number)
        return self

    def __exit__(self, *error: Any) -> None:
        self._total.stop()

    def note(self, outcome: Outcome) -> None:
        """Writes a rejected photo, and how far the run is once a second."""
        if outcome.status is Status.REJECTED:
            self.event(
                "rejected",
                path=outcome.path,
                identity=outcome.identity,
                reason=outcome.reason,
                detail=outcome.detail,
            )
        if self._tally.add(outcome):
            tally, total = self._tally, self._total.number
            rate = tally.done / tally.seconds
            self.event(
                "progress",
                done=tally.done,
                total=total,
                rejected=tally.rejected,
                seconds=round(tally.seconds, 3),
                photos_per_second=round(rate, 2),
                seconds_left=None if total is None else round(max(0, total - tally.done) / rate, 1),
            )

    @staticmethod
    def event(name: str, **fields: Any) -> None:
        """Writes one line."""
        sys.stdout.write(json.dumps({"event": name, **fields}, ensure_ascii=False) + "\n")
        sys.stdout.flush()
