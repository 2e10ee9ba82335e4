"""Cancellation: how work in any thread learns that Ctrl-C was pressed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from retrieval.errors import Interrupted

_lock = threading.Lock()
_asked: list[Callable[[], bool]] = []


@contextmanager
def stoppable(asked: Callable[[], bool]) -> Iterator[None]:
    """Work inside the with statement ends early once `asked` says so; it is called from any thread."""
    with _lock:
        _asked.append(asked)
    try:
        yield
    finally:
        with _lock:
            _asked.remove(asked)


def is_asked() -> bool:
    """Whether an end is asked for."""
    return any(asked() for asked in tuple(_asked))


def check_cancelled() -> None:
    """Raises where an end is asked for.

    Raises:
        Interrupted: it is.
    """
    if is_asked():
        raise Interrupted("Stopped.")
