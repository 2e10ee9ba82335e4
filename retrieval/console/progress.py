"""Progress of a long run, for commands: a bar for people, JSON lines for machines."""

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

# Seconds between two updates of a terminal, and between two lines of a log.
_BAR_SECONDS: Final = 0.1
_LOG_SECONDS: Final = 1.0

# Seconds of a run after which its photos are counted: a shorter run needs no total.
_MIN_SECONDS_TO_COUNT: Final = 1.0


class Progress(Protocol):
    """Shows the progress of a run, as a context manager around it."""

    def __enter__(self) -> "Progress": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, outcome: Outcome) -> None:
        """Takes the outcome of one photo."""
        ...


class Total:
    """The total number of photos, counted in a separate thread during a run that takes longer than 1 s.

    Attributes:
        number: of photos; None until it is known.
    """

    def __init__(self, count: int | Callable[[], int | None] | None) -> None:
        """Takes the number itself, or the function that counts; None is a number that stays unknown."""
        self.number = None if callable(count) else count
        self._count_photos = count if callable(count) else None
        self._timer = threading.Timer(_MIN_SECONDS_TO_COUNT, self._count)
        # A daemon: the end of the process does not wait for the count.
        self._timer.daemon = True

    def _count(self) -> None:
        # The run itself reports a source that cannot be read.
        with suppress(FaceprintError, OSError):
            self.number = self._count_photos() if self._count_photos is not None else None

    def start(self) -> None:
        """Starts the timer after which the photos are counted."""
        if self._count_photos is not None:
            self._timer.start()

    def stop(self) -> None:
        """Cancels the timer; a count in progress goes on."""
        self._timer.cancel()


class _Tally:
    """Counts of a run so far, and when the next update is due: every so many seconds."""

    def __init__(self, every: float) -> None:
        self.done = self.rejected = 0
        self.started = self._updated = time.monotonic()
        self._every = every

    def add(self, outcome: Outcome) -> bool:
        """Counts a photo; returns whether an update is due."""
        self.done += 1
        self.rejected += outcome.status is Status.REJECTED
        now = time.monotonic()
        due = now - self._updated >= self._every
        if due:
            self._updated = now
        return due

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Bar:
    """A progress line on standard error: photos done, rate, time left, rejected photos."""

    def __init__(self, verb: str, total: Total) -> None:
        self._total = total
        self._tally = _Tally(_BAR_SECONDS)
        self._bar = terminal.progress(verb)

    def __enter__(self) -> "Bar":
        self._total.start()
        self._bar.__enter__()
        self._task = self._bar.add_task("", total=self._total.number, pace="", rejected=0)
        return self

    def __exit__(self, *error: Any) -> None:
        self._total.stop()
        self._update()
        self._bar.__exit__(*error)

    def note(self, outcome: Outcome) -> None:
        """Counts a photo; updates the line at most every 0.1 s."""
        if self._tally.add(outcome):
            self._update()

    def _update(self) -> None:
        tally, total = self._tally, self._total.number
        pace = terminal.pace(tally.done, total, tally.seconds) if tally.done else ""
        self._bar.update(self._task, completed=tally.done, total=total, rejected=tally.rejected, pace=pace)


class JsonLog:
    """One JSON object per line on standard output: the start, the progress each second, each rejected photo.

    Commands write the end of a run, and other events, with `event`.
    """

    def __init__(self, verb: str, total: Total) -> None:
        self._verb = verb
        self._total = total
        self._tally = _Tally(_LOG_SECONDS)

    def __enter__(self) -> "JsonLog":
        self._total.start()
        self.event("start", doing=self._verb, total=self._total.number)
        return self

    def __exit__(self, *error: Any) -> None:
        self._total.stop()

    def note(self, outcome: Outcome) -> None:
        """Writes a line for a rejected photo, and the progress of the run at most once a second."""
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
