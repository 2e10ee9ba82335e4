"""Ctrl-C in long runs: the first asks the run to stop, the second ends it at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from retrieval.system.cancellation import stoppable

# What comes within so many seconds of a signal is that signal: `timeout`, for one, sends every one twice.
_REPEAT_SECONDS: Final = 0.25


@contextmanager
def graceful() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGINT or SIGTERM has asked for an end.

    Until the with statement ends, threads that decode photos learn of it as well (`system.cancellation`).
    Signals can be taken over in the main thread only; elsewhere the function always says False.
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
