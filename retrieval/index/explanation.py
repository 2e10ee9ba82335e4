"""Explanation: what answering queries took, in rows, bytes and seconds."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

_COUNTING: Final = threading.Lock()


@dataclass
class Explanation:
    """What answering took.

    Attributes:
        queries: how many were answered.
        rows: stored vectors that were allowed to be the answer.
        coded_rows: of them, ruled out or not by their codes, summed over queries.
        scanned_rows: compared by their whole vectors in float32, summed over queries.
        candidates: rows that codes did not rule out, compared by their whole vectors, summed over queries.
        bytes_read: of codes and vectors.
        seconds: by stage: "filter" and "refine" here; callers add theirs.
    """

    queries: int = 0
    rows: int = 0
    coded_rows: int = 0
    scanned_rows: int = 0
    candidates: int = 0
    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Whether the codes' bound answered, a scan of whole vectors, or some of each."""
        if not self.scanned_rows:
            return "bound" if self.coded_rows else "nothing to search"
        return "bound and scan" if self.coded_rows else "scan"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of a with statement to a stage, less that of stages within it."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within_it = sum(self.seconds.values()) - before
            spent = time.perf_counter() - began - within_it
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def count(explanation: Explanation, **numbers: int) -> None:
    """Adds to the counters of an explanation; threads may do so at once."""
    with _COUNTING:
        for name, number in numbers.items():
            setattr(explanation, name, getattr(explanation, name) + number)
