"""The threads of a search, one a core, and the memory that each of them keeps."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.system.cpu import usable_cores

_T = TypeVar("_T")

_NAME: Final = "faceprint-search"

# A thread keeps a buffer of up to this many elements, however little of it is asked for.
_KEPT_ELEMENTS: Final = 2**24

_LOCAL: Final = threading.local()
_pool: ThreadPoolExecutor | None = None


def spread(work: Callable[[Any], _T], items: Iterable[Any]) -> Iterator[_T]:
    """The results of `work` for each item, in order; the pool computes some ahead of what is taken."""
    items = list(items)
    if len(items) < 2 or threading.current_thread().name.startswith(_NAME):
        yield from map(work, items)
        return
    threads, pending = _threads(), deque[Future[_T]]()
    try:
        for item in items:
            pending.append(threads.submit(work, item))
            if len(pending) > 2 * usable_cores():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # After an error nothing of it goes on behind the caller's back.
        for future in pending:
            future.cancel()


def buffer(name: str, shape: tuple[int, int], dtype: Any = np.dtype(np.float32)) -> NDArray[Any]:
    """Uninitialized memory of the calling thread, the same for the same name until it asks again.

    New memory would cost more than what is done with it.
    """
    size = shape[0] * shape[1]
    kept = getattr(_LOCAL, name, None)
    if kept is None or kept.size < size or kept.size > max(2 * size, _KEPT_ELEMENTS):
        kept = np.empty(size, dtype)
        setattr(_LOCAL, name, kept)
    return kept[:size].reshape(shape)


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        # FAISS would start threads of its own in each of these.
        one = partial(faiss.omp_set_num_threads, 1)
        _pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix=_NAME, initializer=one)
    return _pool


def _drop_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_threads)
