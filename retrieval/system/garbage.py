"""Python's garbage collector, which looks at all objects again whenever many new ones were made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses the collector inside the with statement, for work that makes many objects and no cycles.

    It is on again at the end if it was on before, at the latest when the last of several threads leaves.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()
