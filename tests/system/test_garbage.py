"""The pause of the garbage collector: it ends, whatever happens inside, and only where it began."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from retrieval.system.garbage import collection_paused


def test_the_collector_is_off_inside_and_on_again_afterwards() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_inside_turns_it_on_again() -> None:
    with pytest.raises(ValueError, match="inside"), collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_caller_without_a_collector_stays_without_it() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@contextmanager
def another_thread() -> Iterator[Callable[[], None]]:
    """A thread that pauses the collector until the function is called, or the with statement ends."""
    entered, leave = threading.Event(), threading.Event()

    def pause() -> None:
        with collection_paused():
            entered.set()
            leave.wait()

    def end() -> None:
        leave.set()
        thread.join()

    thread = threading.Thread(target=pause)
    thread.start()
    entered.wait()
    try:
        yield end
    finally:
        end()


def test_it_is_on_when_all_threads_have_left_in_whatever_order() -> None:
    with another_thread() as end, collection_paused():
        end()
    assert gc.isenabled()
    with another_thread() as end:
        with collection_paused():
            pass
        end()
        assert gc.isenabled()


@pytest.mark.parametrize("before", [True, False])
def test_a_child_that_is_forked_while_another_thread_pauses_it_has_it_as_before(before: bool) -> None:
    try:
        if not before:
            gc.disable()
        with another_thread():
            child = os.fork()
            if child == 0:
                os._exit(gc.isenabled())
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == before
        assert gc.isenabled() == before
    finally:
        gc.enable()


def test_what_lasts_is_not_looked_at_again_and_the_collector_is_on() -> None:
    code = (
        "import gc, weakref\n"
        "from retrieval.system.garbage import lasting\n"
        "class Node: pass\n"
        "def cycle():\n"
        "    node = Node(); node.itself = node\n"
        "    return weakref.ref(node)\n"
        "with lasting(): before = cycle()\n"
        "after = cycle()\n"
        "gc.collect()\n"
        "print(gc.isenabled(), before() is None, after() is None, gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True", "True"]
