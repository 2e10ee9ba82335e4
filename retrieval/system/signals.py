"""Ctrl-C in long runs: the first asks the run to stop, the second ends it immediately."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from retrieval.system.cancellation import stoppable

# A second signal within this many seconds is the same request: `timeout`, for one, sends each signal twice.
_REPEAT_SECONDS: Final = 0.25


@contextmanager
def graceful() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM was received.

    Until the with statement ends, the signal also cancels threads that decode photos
    (`system.cancellation`). Signals can be handled in the main thread only; in another thread the function
    always returns False.
    """
    asked = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not asked.is_set():
            first = time.monotonic()
            asked.set()
        elif time.monotonic() - first > _REPEAT_SECONDS:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with stoppable(asked.is_set):
            yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
