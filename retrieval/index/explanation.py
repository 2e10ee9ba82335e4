"""Explanation: the cost of a search for its caller, in rows, bytes and seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from retrieval.system.forks import shared_lock

_COUNTING: Final = shared_lock()


@dataclass
class Explanation:
    """The cost of a search.

    Attributes:
        queries: the number of queries.
        rows: the number of stored vectors that were allowed in the result; the same for each query.
        coded_rows: rows tested by their codes, summed over queries.
        scanned_rows: rows compared by their whole vectors in float32, summed over queries.
        candidates: rows that codes did not exclude, compared by their whole vectors, summed over queries.
        bytes_read: bytes of codes and vectors.
        seconds: by stage: "filter" and "refine" here; callers add their own.
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
        """How rows were found: "bound" (by bounds on distances), "scan" (by whole vectors), or both."""
        if not self.scanned_rows:
            return "bound" if self.coded_rows else "nothing to search"
        return "bound and scan" if self.coded_rows else "scan"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of a with statement to a stage, without that of nested stages; for one thread."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            nested = sum(self.seconds.values()) - before
            spent = time.perf_counter() - began - nested
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def count(explanation: Explanation, **numbers: int) -> None:
    """Adds to the counters of an explanation; thread-safe."""
    with _COUNTING:
        for name, number in numbers.items():
            setattr(explanation, name, getattr(explanation, name) + number)
