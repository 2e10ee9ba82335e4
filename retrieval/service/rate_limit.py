"""The `RateLimit`: how many requests per second a caller may send."""

import time
from collections.abc import Callable
from typing import Final

# From so many callers on, those that have not asked for a while are left out.
_MAX_CALLERS: Final = 10_000


class RateLimit:
    """A token bucket for each caller: it fills at the rate, and holds the requests of one second.

    Only for the thread of the event loop.
    """

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the buckets.

        Args:
            rate: requests per second; below 1, one request is held.
            clock: the time in seconds.
        """
        self._rate = rate
        self._most = max(1.0, rate)
        self._clock = clock
        # What a caller's bucket held, and when.
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, caller: str) -> float:
        """Counts a request, and returns 0; or returns in how many seconds the caller may send one."""
        now = self._clock()
        held, since = self._buckets.get(caller, (self._most, now))
        held = min(self._most, held + (now - since) * self._rate)
        if held < 1:
            return (1 - held) / self._rate
        self._buckets[caller] = held - 1, now
        if len(self._buckets) > _MAX_CALLERS:
            self._drop_full(now)
        return 0.0

    def _drop_full(self, now: float) -> None:
        """Drops buckets that are full again: a caller without one has a full one."""
        self._buckets = {
            caller: (held, since)
            for caller, (held, since) in self._buckets.items()
            if held + (now - since) * self._rate < self._most
        }
