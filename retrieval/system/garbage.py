"""Python's garbage collector, which looks at all objects again whenever many new ones were made."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# One for each thread that turns the collector on again when it leaves.
_PAUSES: Final[set[object]] = set()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses the collector inside the with statement, for work that makes many objects and no cycles.

    It is on again at the end if it was on before, at the latest when the last of several threads leaves. A
    child that is forked meanwhile has it on: the threads that would turn it on are not in the child.
    """
    pause = object() if gc.isenabled() else None
    try:
        if pause is not None:
            _PAUSES.add(pause)
        gc.disable()
        yield
    finally:
        if pause is not None:
            _PAUSES.discard(pause)
            gc.enable()


@contextmanager
def lasting() -> Iterator[None]:
    """Takes what is there at the end of the with statement out of the collector's looks, for imports.

    Modules live as long as the process, so it would look at them in vain, at the process's end once more:
    a sixth of the time of a search from the shell. In a library this is up to the program that uses it.
    """
    with collection_paused():
        yield
    gc.freeze()
    atexit.register(gc.freeze)


def _resume() -> None:
    """Turns the collector on in a forked child if a thread of its parent paused it."""
    if _PAUSES:
        _PAUSES.clear()
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_resume)
