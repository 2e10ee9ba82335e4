"""Ordered stages: whatever the timing, everything comes out once, in order; nothing goes on afterwards."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.system.pipeline import Pipeline, Stage


@dataclass
class Counted:
    """Work that takes some time for each item, and counts how many items are at it, and how many were."""

    delays: list[float]
    fails_at: int | None = None
    began: int = 0
    at_once: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, item: int) -> int:
        with self.lock:
            self.began += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.delays[item % len(self.delays)])
        with self.lock:
            self.at_once -= 1
        if item == self.fails_at:
            raise ValueError(f"item {item}")
        return item


DELAYS = st.lists(st.sampled_from([0.0, 0.0, 0.0005, 0.002]), min_size=1, max_size=7)
WORKERS = st.integers(1, 4)
ROOMS = st.integers(1, 5)


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[list[float], int, int]]:
    """Delays, workers and room of one to three stages."""
    return draw(st.lists(st.tuples(DELAYS, WORKERS, ROOMS), min_size=1, max_size=3))


def piped(source: Iterable[Any], *stages: Stage[Any, Any, Any]) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = Pipeline(source)
    for stage in stages:
        pipeline = pipeline.then(stage)
    return pipeline


def made(
    plan: list[tuple[list[float], int, int]], fails: dict[int, int]
) -> tuple[list[Counted], list[Stage[Any, Any, Any]]]:
    works = [Counted(delays, fails.get(number)) for number, (delays, _, _) in enumerate(plan)]
    stages = [
        Stage(f"stage {number}", work, workers=workers, room=room)
        for number, (work, (_, workers, room)) in enumerate(zip(works, plan, strict=True))
    ]
    return works, stages


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("faceprint-stage")]


@settings(deadline=None, max_examples=60)
@given(plan=plans(), number=st.integers(0, 40))
def test_everything_comes_out_once_and_in_order(plan: list[Any], number: int) -> None:
    works, stages = made(plan, {})
    with piped(range(number), *stages) as pipeline:
        assert list(pipeline) == list(range(number))
    assert [work.began for work in works] == [number] * len(plan)
    assert [meter.items for meter in pipeline.meters.values()] == [number] * len(plan)
    assert all(work.most <= stage.workers for work, stage in zip(works, stages, strict=True))
    assert ours() == []


@settings(deadline=None, max_examples=60)
@given(plan=plans(), number=st.integers(1, 40), data=st.data())
def test_an_error_comes_where_its_result_would_have_come(plan: list[Any], number: int, data: Any) -> None:
    stage, bad = data.draw(st.integers(0, len(plan) - 1)), data.draw(st.integers(0, number - 1))
    _, stages = made(plan, {stage: bad})
    seen: list[int] = []
    with pytest.raises(ValueError, match=f"^item {bad}$"), piped(range(number), *stages) as pipeline:
        seen.extend(pipeline)  # what came before the error is kept
    assert ours() == []
    with piped(range(number), *stages) as pipeline:
        results = iter(pipeline)
        assert list(islice(results, bad)) == list(range(bad))
        with pytest.raises(ValueError, match=f"^item {bad}$"):
            next(results)
    assert ours() == []


@settings(deadline=None, max_examples=60)
@given(plan=plans(), number=st.integers(0, 40), taken=st.integers(0, 10))
def test_who_stops_taking_leaves_nothing_at_work_and_never_had_more_than_the_room_ahead(
    plan: list[Any], number: int, taken: int
) -> None:
    given_out: list[int] = []

    def source() -> Iterator[int]:
        for item in range(number):
            given_out.append(item)
            yield item

    works, stages = made(plan, {})
    with piped(source(), *stages) as pipeline:
        results = list(islice(pipeline, taken))
    assert results == list(range(min(taken, number)))
    assert ours() == []
    began = [work.began for work in works]
    time.sleep(0.002)
    assert [work.began for work in works] == began
    ahead = sum(stage.room + 1 for stage in stages)
    # One more, where closing gave a stage no room for what it had just taken.
    assert len(given_out) <= len(results) + ahead + 1


def test_room_bounds_what_is_underway_while_nobody_takes() -> None:
    given_out: list[int] = []
    stages = [
        Stage("stage a", lambda item: item, workers=3, room=4),
        Stage("stage b", lambda item: item, room=2),
    ]
    with piped((given_out.append(n) or n for n in range(1000)), *stages):
        room = (4 + 1) + (2 + 1)
        while len(given_out) < room:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(given_out) == room


def test_an_error_of_the_source_comes_after_what_it_gave() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError("unplugged")

    seen: list[int] = []
    with (
        pytest.raises(OSError, match="unplugged"),
        piped(source(), Stage("stage", lambda n: n, workers=3)) as pipeline,
    ):
        seen.extend(pipeline)
    assert seen == list(range(5))
    assert ours() == []


def test_a_stage_may_gather_other_items() -> None:
    def pairs(items: Iterator[int]) -> Iterator[list[int]]:
        while some := list(islice(items, 2)):
            yield some

    stages = [Stage("stage a", lambda n: n * n, workers=3, room=3), Stage("stage b", sum, gather=pairs)]
    with piped(range(5), *stages) as pipeline:
        assert list(pipeline) == [0 + 1, 4 + 9, 16]


def test_workers_work_at_the_same_time_and_stages_too() -> None:
    """Three workers and the stage behind meet at a barrier, which none of them passes alone."""
    meeting = threading.Barrier(4, timeout=600)
    stages = [
        Stage("stage a", lambda n: n if n == 0 else (meeting.wait(), n)[1], workers=3, room=4),
        Stage("stage b", lambda n: (meeting.wait(), n)[1] if n == 0 else n),
    ]
    with piped(range(4), *stages) as pipeline:
        assert list(pipeline) == [0, 1, 2, 3]


def test_the_meters_tell_who_worked_and_who_waited() -> None:
    """The stage behind a slow one starves, however long its thread takes to begin."""
    stages = [Stage("stage slow", lambda n: (time.sleep(0.02), n)[1]), Stage("stage quick", lambda n: n)]
    with piped(itertools.count(), *stages) as pipeline:
        slow, quick = pipeline.meters.values()
        results = iter(pipeline)
        while slow.items < 10 or quick.starved_seconds < 0.15:
            next(results)
    assert slow.busy_seconds >= 0.02 * slow.items


def test_a_caller_who_takes_slowly_blocks_the_stages() -> None:
    with piped(itertools.count(), Stage("stage", lambda n: n, room=1)) as pipeline:
        for _ in pipeline:
            time.sleep(0.02)
            if pipeline.meters["stage"].blocked_seconds >= 0.05:
                break


def test_a_source_that_gives_nothing_does_not_keep_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """As standard input may do; its thread ends when it gives something after all, which is dropped."""
    monkeypatch.setattr("retrieval.system.pipeline._SOURCE_CLOSE_SECONDS", 0.1)
    unplugged, worked = threading.Event(), []

    def source() -> Iterator[int]:
        yield 1
        unplugged.wait()
        yield 2

    with piped(source(), Stage("stage", worked.append)) as pipeline:
        next(iter(pipeline))
    left = ours()
    assert len(left) == 1
    unplugged.set()
    left[0].join()
    assert worked == [1]


def test_what_was_taken_is_not_kept_in_memory() -> None:
    import gc
    import weakref

    class Item:
        pass

    def source() -> Iterator[Item]:
        for _ in range(3):
            yield Item()

    with piped(source(), Stage("stage", lambda item: item, room=1)) as pipeline:
        results = iter(pipeline)
        first = weakref.ref(next(results))
        next(results)
        while first() is not None:
            time.sleep(0.01)
            gc.collect()
