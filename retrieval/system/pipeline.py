"""A pipeline for bulk work: stages in threads, with bounded queues between them; output is in input order.

Each stage takes the results of the one before, works on them in its threads, and passes its results on in
input order. The caller iterates the results of the last stage in its own thread. When the caller stops, the
queues fill and all stages wait.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, cast

from retrieval.system import cancellation

# The longest wait of `close` for a blocked source, such as standard input, in seconds.
_SOURCE_CLOSE_SECONDS: Final = 1.0

# The interval at which a wait for a result checks for cancellation, in seconds.
_POLL_SECONDS: Final = 0.1


Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


def _as_given(items: Iterator[Any]) -> Iterator[Any]:
    return items


@dataclass(frozen=True)
class Stage(Generic[Given, Item, Result]):
    """One step of a pipeline: gathers the results of the stage before into items, and computes their results.

    Attributes:
        name: the name in reports.
        work: computes the result of an item; called by all workers at once.
        workers: the number of threads.
        room: the most items in work or waiting for the next stage; one more may wait for room.
        gather: turns the results of the stage before into items, such as batches; in one thread at a time.
    """

    name: str
    work: Callable[[Item], Result]
    workers: int = 1
    room: int = 2
    gather: Callable[[Iterator[Given]], Iterable[Item]] = _as_given


@dataclass
class Meter:
    """The figures of a stage.

    Attributes:
        name, workers: of the stage.
        items: the number of finished items.
        busy_seconds: time at work, summed over all workers.
        starved_seconds: time waiting for the stage before, summed over all workers.
        blocked_seconds: time waiting for the stage after, summed over all workers.
    """

    name: str
    workers: int = 1
    items: int = 0
    busy_seconds: float = 0.0
    starved_seconds: float = 0.0
    blocked_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, items: int = 0, busy: float = 0.0, starved: float = 0.0, blocked: float = 0.0) -> None:
        """Adds to the figures; may be called by several threads at once."""
        with self._lock:
            self.items += items
            self.busy_seconds += busy
            self.starved_seconds += starved
            self.blocked_seconds += blocked

    @contextmanager
    def working(self, items: int = 1) -> Iterator[None]:
        """Counts the time of a with statement as busy."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(items=items, busy=time.perf_counter() - started)


class _Stopped(Exception):
    """The pipeline was closed."""


_END: Final = None


class _Channel:
    """The ordered, bounded queue of results between two stages: Futures, then `_END`."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._items: deque[Future[Any] | None] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: "Future[Any] | None") -> None:
        """Appends an item, after waiting for room.

        Raises:
            _Stopped: the channel was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._room)
            if self._closed:
                raise _Stopped
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        """Yields the results in order, each when it is done.

        Raises:
            _Stopped: the channel was closed.
        """
        return self.taken(lambda: None)

    def taken(self, check: Callable[[], None]) -> Iterator[Any]:
        """Yields the results as `__iter__` does; while the queue is empty, calls `check`, which may raise."""
        while True:
            with self._changed:
                while not self._changed.wait_for(lambda: self._closed or len(self._items) > 0, _POLL_SECONDS):
                    check()
                if self._closed:
                    raise _Stopped
                # An item keeps its room until it is done: items in work count like waiting ones.
                item = self._items[0]
            if item is _END:
                return
            # Its worker finishes it, even if the pipeline is closed meanwhile.
            result = item.result()
            with self._changed:
                if self._closed:
                    raise _Stopped
                self._items.popleft()
                self._changed.notify_all()
            del item
            yield result

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


class _Runner:
    """A running stage: its threads, its results and its meter."""

    def __init__(self, stage: Stage[Any, Any, Any], before: Iterable[Any], meter: Meter) -> None:
        self.stage = stage
        self.meter = meter
        self.results = _Channel(stage.room)
        self._before = iter(stage.gather(iter(before)))
        self.asks_source = False
        self._ended = False
        self._taking = threading.Lock()
        self.threads = [
            # A source that blocks forever must not keep the process alive.
            threading.Thread(target=self._run, name=f"faceprint-{stage.name}-{number}", daemon=True)
            for number in range(stage.workers)
        ]

    def _run(self) -> None:
        with suppress(_Stopped):
            while (taken := self._take_item()) is not None:
                item, future = taken
                self._finish(item, future)
                del taken, item, future  # else it would stay in memory until the next item

    def _take_item(self) -> "tuple[Any, Future[Any]] | None":
        """Returns the next item and the future of its result; one worker at a time, to keep the order."""
        with self._taking:
            if self._ended:
                return None
            future: Future[Any] = Future()
            started = time.perf_counter()
            try:
                item = next(self._before)
            except StopIteration:
                self._ended = True
                self.results.put(_END)
                return None
            except _Stopped:
                raise
            except BaseException as error:
                # The error takes its place in the order: earlier results are not lost.
                self._ended = True
                future.set_exception(error)
                self.results.put(future)
                return None
            arrived = time.perf_counter()
            self._put_future(future)
            self.meter.add(starved=arrived - started, blocked=time.perf_counter() - arrived)
            return item, future

    def _put_future(self, future: "Future[Any]") -> None:
        try:
            self.results.put(future)
        except _Stopped:
            self._ended = True  # else the next worker would take one more
            raise

    def _finish(self, item: Any, future: "Future[Any]") -> None:
        try:
            with self.meter.working():
                result = self.stage.work(item)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


class Pipeline(Generic[Result]):
    """Stages that work on a source, as a context manager; iterating yields the results of the last stage.

    `Pipeline(source).then(stage).then(another)`: at least one stage; the with statement starts the threads.

    An error of the source or of a stage is raised in place of its result, after all earlier results. Leaving
    the with statement stops all threads and waits for them: each finishes its current item, and pending
    results are dropped. A thread that is blocked in the source is waited for at most 1 s; it ends when the
    source ends, or with its next item, which is dropped.

    After a cancellation (`system.cancellation`), iterating raises Interrupted once the last stage has no
    pending item.

    At most `room + 1` items of each stage exist at a time, besides those that its `gather` holds and the one
    that the caller has.

    Attributes:
        meters: the figures of each stage, by its name, in order.
    """

    def __init__(self, source: Iterable[Result]) -> None:
        self.meters: dict[str, Meter] = {}
        self._runners: list[_Runner] = []
        self._results: Iterable[Any] = self._track_source(source)

    def then(self, stage: Stage[Result, Any, Other]) -> "Pipeline[Other]":
        """Appends a stage, which takes the results of the one before, and returns this pipeline."""
        self.meters[stage.name] = Meter(stage.name, stage.workers)
        runner = _Runner(stage, self._results, self.meters[stage.name])
        self._runners.append(runner)
        self._results = runner.results
        return cast("Pipeline[Other]", self)

    def _track_source(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yields the items of the source; `asks_source` is True while the first stage waits for one."""
        items = iter(source)
        while True:
            self._runners[0].asks_source = True
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._runners[0].asks_source = False
            yield item

    def __enter__(self) -> Self:
        try:
            for runner in self._runners:
                for thread in runner.threads:
                    thread.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Result]:
        return self._runners[-1].results.taken(cancellation.check_cancelled)

    def close(self) -> None:
        """Stops all threads after their current items, and waits for them."""
        for runner in self._runners:
            runner.results.close()
        deadline = time.monotonic() + _SOURCE_CLOSE_SECONDS
        for runner in self._runners:
            for thread in runner.threads:
                while thread.is_alive() and not (runner.asks_source and time.monotonic() > deadline):
                    thread.join(0.1)
