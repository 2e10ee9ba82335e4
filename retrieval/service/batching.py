"""The `BatchWorker`: a thread that works on single items in batches, for the service's engine and writer.

No item waits for a batch to fill: a batch is what has come while the thread was busy with the one before.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class BatchWorker(Generic[_T]):
    """One thread that takes all items from its queue, up to a number, works on them as a batch, and repeats.

    An item that finds the thread idle is at once a batch of its own: batches grow with the load.
    Items of bulk work have a second queue; they are taken only where other items leave room in a batch.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[_T]], None],
        *,
        max_items: int,
        on_error: Callable[[list[_T], BaseException], None],
    ) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            work: called in the thread with a batch: one item or more, in the order in which they came.
            max_items: the greatest number of items in a batch.
            on_error: called in the thread with a batch and the error that `work` raised on it.
        """
        self._work = work
        self._max_items = max_items
        self._on_error = on_error
        self._queue: deque[_T] = deque()
        self._bulk_queue: deque[_T] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: _T, *, bulk: bool = False) -> None:
        """Adds an item to a queue, that of bulk work with `bulk`; returns at once."""
        with self._changed:
            (self._bulk_queue if bulk else self._queue).append(item)
            self._changed.notify()

    def close(self) -> None:
        """Lets the thread work on what is in the queues, and waits until it has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._work(batch)
            except BaseException as error:  # the thread must go on, and the batch must get an answer
                self._on_error(batch, error)

    def _next_batch(self) -> list[_T]:
        """Waits for items and returns a batch; an empty one when the worker is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._bulk_queue or self._closing)
            batch = _taken(self._queue, self._max_items)
            return batch + _taken(self._bulk_queue, self._max_items - len(batch))


def _taken(queue: deque[_T], limit: int) -> list[_T]:
    """Removes up to `limit` items from the front of a queue and returns them."""
    return [queue.popleft() for _ in range(min(limit, len(queue)))]


def resolve(future: "Future[Any]", result: Any) -> None:
    """Sets the result of a future, unless the caller who waited for it has cancelled it."""
    with suppress(InvalidStateError):
        future.set_result(result)


def reject(future: "Future[Any]", error: BaseException) -> None:
    """Sets the error of a future, unless the caller who waited for it has cancelled it."""
    with suppress(InvalidStateError):
        future.set_exception(error)
