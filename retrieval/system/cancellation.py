"""Cancellation: tells work in any thread that Ctrl-C was pressed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from retrieval.errors import Interrupted
from retrieval.system.forks import shared_lock

_lock = shared_lock()
_asked: list[Callable[[], bool]] = []


@contextmanager
def stoppable(asked: Callable[[], bool]) -> Iterator[None]:
    """Cancels work inside the with statement once `asked` returns True; any thread may call `asked`."""
    with _lock:
        _asked.append(asked)
    try:
        yield
    finally:
        with _lock:
            _asked.remove(asked)


def is_asked() -> bool:
    """Returns whether cancellation was requested."""
    return any(asked() for asked in tuple(_asked))


def check_cancelled() -> None:
    """Raises if cancellation was requested.

    Raises:
        Interrupted: cancellation was requested.
    """
    if is_asked():
        raise Interrupted("Stopped.")
