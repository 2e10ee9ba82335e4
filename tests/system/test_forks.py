"""Locks of a module: a forked child can take them, whatever other threads of its parent do."""

import os
import re
import signal
import threading
from pathlib import Path

import retrieval
from retrieval.system.forks import shared_lock


def test_a_child_can_take_a_lock_that_other_threads_of_its_parent_take_and_release() -> None:
    lock, stop = shared_lock(), threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            with lock:
                sum(range(10_000))

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(50):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends a child that waits for ever
                with lock:
                    os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_a_thread_can_fork_while_it_holds_the_lock() -> None:
    lock = shared_lock()
    with lock:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            with lock:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def test_no_module_has_a_lock_of_another_kind() -> None:
    """An object's own lock is another matter: what has connections or threads is not used across a fork."""
    lock = re.compile(r"^\w+.* = (threading\.)?R?Lock\(\)", re.MULTILINE)
    sources = Path(retrieval.__file__).parent.rglob("*.py")
    assert [path for path in sources if lock.search(path.read_text("utf-8"))] == []
