"""The `Collector`: turns single items into batches, which grow with the load by themselves."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

_T = TypeVar("_T")

# The longest that a batch waits for items on their way, in seconds.
_MAX_WAIT_SECONDS: Final = 1.0


class Collector(Generic[_T]):
    """One thread that works on all items that wait, up to a number, and then on those that came meanwhile.

    An item that finds the thread idle, and no other one on its way, is worked on at once, alone. With
    `patience` a batch waits for items that are on their way, as long as that pays: where a batch costs as
    much with one item as with many, small ones would take the time that the items on their way need. Items
    of bulk work are taken only where others leave room in a batch, and others do not wait for them.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[_T]], None],
        *,
        most: int,
        failed: Callable[[list[_T], BaseException], None],
        patience: float = 0.0,
    ) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            work: is called with one item or more.
            most: the greatest number of items in a batch.
            failed: is called with a batch and the error that `work` raised on it.
            patience: how many times as long as the work on the batch before it a batch waits at most for
                items that are on their way.
        """
        self._work = work
        self._most = most
        self._failed = failed
        self._patience = patience
        self._last_seconds = 0.0
        self._waiting: deque[_T] = deque()
        self._bulk: deque[_T] = deque()
        self._hurry = False
        self._expected: set[_T] = set()
        self._expected_bulk: set[_T] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def expect(self, item: _T, *, bulk: bool = False) -> None:
        """Says that an item is on its way: `put` follows, or `expect_no_longer`."""
        with self._changed:
            (self._expected_bulk if bulk else self._expected).add(item)

    def expect_no_longer(self, item: _T) -> None:
        """Says that an item does not come; of no effect for one that came, or was not expected."""
        with self._changed:
            self._discard(item)
            self._changed.notify()

    def put(self, item: _T, *, bulk: bool = False) -> None:
        """Adds an item, of bulk work or not; returns at once.

        One that was not expected, and is no bulk work, waits for no others.
        """
        with self._changed:
            self._hurry |= not bulk and item not in self._expected
            self._discard(item)
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
            began = time.monotonic()
            try:
                self._work(batch)
            except BaseException as error:  # the thread must go on, and the batch must get an answer
                self._failed(batch, error)
            self._last_seconds = time.monotonic() - began

    def _discard(self, item: _T) -> None:
        self._expected.discard(item)
        self._expected_bulk.discard(item)

    def _next(self) -> list[_T]:
        """Returns the items that wait, as soon as it pays to work on them; none when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._bulk or self._closing)
            if self._patience:
                self._changed.wait_for(
                    self._is_complete, min(_MAX_WAIT_SECONDS, self._patience * self._last_seconds)
                )
                self._hurry = False
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            room = self._most - len(batch)
            return batch + [self._bulk.popleft() for _ in range(min(room, len(self._bulk)))]

    def _is_complete(self) -> bool:
        """Returns whether the items that wait have no reason to wait for more."""
        if self._closing or self._hurry or len(self._waiting) + len(self._bulk) >= self._most:
            return True
        return not self._expected and (bool(self._waiting) or not self._expected_bulk)


def resolve(future: "Future[Any]", result: Any) -> None:
    """Sets a result, unless the one who waited for it has gone."""
    with suppress(InvalidStateError):
        future.set_result(result)


def reject(future: "Future[Any]", error: BaseException) -> None:
    """Sets an error, unless the one who waited for the result has gone."""
    with suppress(InvalidStateError):
        future.set_exception(error)
