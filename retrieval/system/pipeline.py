"""A pipeline: stages in threads, with bounded queues between them; output is in input order.

Each stage takes what the one before gives, works on it in as many threads as it has, and hands it on in the
order in which it came. The last stage's results are taken by the caller, in the caller's own thread, at the
caller's pace: when the caller stops taking, everything behind comes to rest.
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

# How long leaving waits for a source that gives nothing, such as standard input, in seconds.
_SOURCE_CLOSE_SECONDS: Final = 1.0

# How often waiting for a result is left for a look at whether the run is to stop, in seconds.
_POLL_SECONDS: Final = 0.1


Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


def _as_given(items: Iterator[Any]) -> Iterator[Any]:
    return items


@dataclass(frozen=True)
class Stage(Generic[Given, Item, Result]):
    """One step of a pipeline: what the stage before gives is gathered into items, each of which has a result.

    Attributes:
        name: what it is called in reports.
        work: what is done to an item, in several threads at once where there are several workers.
        workers: how many threads.
        room: how many items may be underway or wait for the next stage; one more may wait for room.
        gather: makes other items of those of the stage before, such as batches; in one thread at a time.
    """

    name: str
    work: Callable[[Item], Result]
    workers: int = 1
    room: int = 2
    gather: Callable[[Iterator[Given]], Iterable[Item]] = _as_given


@dataclass
class Meter:
    """What a stage did.

    Attributes:
        name, workers: the stage's.
        items: how many it finished.
        busy_seconds: spent working, of all workers together.
        starved_seconds: spent waiting for the stage before, of all workers together.
        blocked_seconds: spent waiting for the stage behind, of all workers together.
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
    """Results on their way to the next stage, in order: each a Future, or `_END`."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._items: deque[Future[Any] | None] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: "Future[Any] | None") -> None:
        """Waits for room.

        Raises:
            _Stopped: it was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._room)
            if self._closed:
                raise _Stopped
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        """What was put, each when it is done.

        Raises:
            _Stopped: it was closed.
        """
        return self.taken(lambda: None)

    def taken(self, check: Callable[[], None]) -> Iterator[Any]:
        """The same; while nothing is underway, `check` is called now and then, which may raise."""
        while True:
            with self._changed:
                while not self._changed.wait_for(lambda: self._closed or len(self._items) > 0, _POLL_SECONDS):
                    check()
                if self._closed:
                    raise _Stopped
                # It keeps its room until it is done: what is underway counts as much as what waits.
                item = self._items[0]
            if item is _END:
                return
            # Whoever has it finishes it, also when the pipeline is closed meanwhile.
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
    """A stage at work."""

    def __init__(self, stage: Stage[Any, Any, Any], before: Iterable[Any], meter: Meter) -> None:
        self.stage = stage
        self.meter = meter
        self.results = _Channel(stage.room)
        self._before = iter(stage.gather(iter(before)))
        self.asks_source = False
        self._ended = False
        self._taking = threading.Lock()
        self.threads = [
            # A source that never gives anything again must not keep the process alive.
            threading.Thread(target=self._run, name=f"faceprint-{stage.name}-{number}", daemon=True)
            for number in range(stage.workers)
        ]

    def _run(self) -> None:
        with suppress(_Stopped):
            while (taken := self._take()) is not None:
                item, future = taken
                self._finish(item, future)
                del taken, item, future  # or it would be kept until there is another

    def _take(self) -> "tuple[Any, Future[Any]] | None":
        """The next item, and the place of its result; one worker at a time, so places are in order."""
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
                # It takes its place among the results: what came before is not lost.
                self._ended = True
                future.set_exception(error)
                self.results.put(future)
                return None
            arrived = time.perf_counter()
            self._give_place(future)
            self.meter.add(starved=arrived - started, blocked=time.perf_counter() - arrived)
            return item, future

    def _give_place(self, future: "Future[Any]") -> None:
        try:
            self.results.put(future)
        except _Stopped:
            self._ended = True  # or the next worker would take one more
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
    """Stages at work on a source, as a context manager; iterating gives the last stage's results.

    `Pipeline(source).then(stage).then(another)`: at least one stage; the with statement starts the threads.

    An error of the source or of a stage is raised where its result would have come, after everything before.
    Leaving the with statement ends every thread and waits for it: each finishes the item that it is at, and
    what is underway is dropped. Only a thread to which the source gives nothing is not waited for longer than
    a second; it ends when the source does, or with its next item, which is dropped.

    Where Ctrl-C has asked for an end (`system.cancellation`) and the last stage has nothing underway,
    iterating raises Interrupted.

    No more than `room + 1` items of each stage exist at a time, besides what its `gather` holds and the one
    that the caller has.

    Attributes:
        meters: the figures of each stage, by its name, in order.
    """

    def __init__(self, source: Iterable[Result]) -> None:
        self.meters: dict[str, Meter] = {}
        self._runners: list[_Runner] = []
        self._results: Iterable[Any] = self._given(source)

    def then(self, stage: Stage[Result, Any, Other]) -> "Pipeline[Other]":
        """This pipeline with one stage more, which takes the results of the one before."""
        self.meters[stage.name] = Meter(stage.name, stage.workers)
        runner = _Runner(stage, self._results, self.meters[stage.name])
        self._runners.append(runner)
        self._results = runner.results
        return cast("Pipeline[Other]", self)

    def _given(self, source: Iterable[Any]) -> Iterator[Any]:
        """The source's items; while one is waited for, that is written down."""
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
        """Ends every thread, after the item that it is at, and waits for it."""
        for runner in self._runners:
            runner.results.close()
        deadline = time.monotonic() + _SOURCE_CLOSE_SECONDS
        for runner in self._runners:
            for thread in runner.threads:
                while thread.is_alive() and not (runner.asks_source and time.monotonic() > deadline):
                    thread.join(0.1)
