"""The thread pool of searches, one thread a core, and the buffers that each thread keeps."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.system.cpu import usable_cores

_T = TypeVar("_T")

_NAME: Final = "faceprint-search"

# A thread keeps a buffer of up to this many elements, even when it needs fewer.
_KEPT_ELEMENTS: Final = 2**24

_LOCAL: Final = threading.local()
_pool: ThreadPoolExecutor | None = None


def spread(work: Callable[[Any], _T], items: Iterable[Any]) -> Iterator[_T]:
    """Yields the results of `work` for each item, in order; the pool computes some items ahead."""
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
        # After an error no pending item starts.
        for future in pending:
            future.cancel()


@contextmanager
def in_this_thread() -> Iterator[None]:
    """Keeps FAISS from starting threads of its own inside the with statement, for work of microseconds."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # only for the calling thread
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def buffer(name: str, shape: tuple[int, int], dtype: Any = np.dtype(np.float32)) -> NDArray[Any]:
    """Returns uninitialized memory of the calling thread; the next call with the same name reuses it.

    Allocating new memory would cost more than the computation in it.
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
        # Otherwise FAISS would start its own threads in each of these.
        one = partial(faiss.omp_set_num_threads, 1)
        _pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix=_NAME, initializer=one)
    return _pool


def _drop_threads() -> None:
    """Drops the pool in a forked child, which has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_threads)
