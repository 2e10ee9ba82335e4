"""The `Collector`: turns single items into batches without making any of them wait for others."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Collector(Generic[_T]):
    """One thread that works on all items that wait, up to a number, and then on those that came meanwhile.

    An item that finds the thread idle is worked on at once, alone: batches grow with the load by themselves.
    Items of bulk work are taken only where others leave room in a batch.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[_T]], None],
        *,
        most: int,
        failed: Callable[[list[_T], BaseException], None],
    ) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            work: is called with one item or more.
            most: the greatest number of items in a batch.
            failed: is called with a batch and the error that `work` raised on it.
        """
        self._work = work
        self._most = most
        self._failed = failed
        self._waiting: deque[_T] = deque()
        self._bulk: deque[_T] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: _T, *, bulk: bool = False) -> None:
        """Adds an item, of bulk work or not; returns at once."""
        with self._changed:
            (self._bulk if bulk else self._waiting).append(item)
            self._changed.notify()

    def close(self) -> None:
        """Works on what waits, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._work(batch)
            except BaseException as error:  # the thread must go on, and the batch must get an answer
                self._failed(batch, error)

    def _next(self) -> list[_T]:
        """Returns the items that wait, as soon as there are any; none when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._bulk or self._closing)
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            room = self._most - len(batch)
            return batch + [self._bulk.popleft() for _ in range(min(room, len(self._bulk)))]


def resolve(future: "Future[Any]", result: Any) -> None:
    """Sets a result, unless the one who waited for it has gone."""
    with suppress(InvalidStateError):
        future.set_result(result)


def reject(future: "Future[Any]", error: BaseException) -> None:
    """Sets an error, unless the one who waited for the result has gone."""
    with suppress(InvalidStateError):
        future.set_exception(error)
