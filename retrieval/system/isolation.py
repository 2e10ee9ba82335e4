"""Isolation: work in processes that are killed after a time limit, or on Ctrl-C.

A decoder written in C cannot be interrupted in a thread. Such a process is a program of its own that is asked
and answers through a pipe, one thing at a time; it waits for the next when it has answered, and ends with the
process that started it, also in the middle of its work.
"""

import atexit
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Final

from retrieval.errors import RunError
from retrieval.system import cancellation
from retrieval.system.cpu import usable_cores
from retrieval.system.files import why

# How often a process that works is left for a look at whether the run is to stop, in seconds.
_POLL_SECONDS: Final = 0.1
# How long a new process may take until it can be asked, in seconds.
_START_SECONDS: Final = 120.0
# Signals by which a process ends that has stumbled over its data.
_CRASH_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)


class TooSlow(Exception):
    """There was no answer in time; the process is gone."""


class Crashed(Exception):
    """The process crashed over what it was asked."""


class Ended(RunError):
    """The process was ended from outside: by the system, or by a person."""


def start(
    program: str, *numbers: int, descriptors: Sequence[int], stderr: int | None = None
) -> "subprocess.Popen[bytes]":
    """Starts a program of Python's in a session of its own, where Ctrl-C in a terminal does not reach it.

    Args:
        program: Python code.
        numbers: its `sys.argv[1:]`.
        descriptors: file descriptors that it gets.
        stderr: as of `subprocess.Popen`; None for this process's own.

    Raises:
        OSError: the system refused.
    """
    return subprocess.Popen(
        # -P: never a module of the current folder, which may hold files of strangers.
        [sys.executable, "-P", "-c", program, *map(str, numbers)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=tuple(descriptors),
        # It finds the same modules, also those that only the caller's program knows the way to.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )


def end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Waits for a process whose pipes were closed; one that has not ended after so many seconds is killed."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def nameless_file(size: int) -> int:
    """A file without a name, to be shared; on Linux in memory, whatever the size of /dev/shm.

    Args:
        size: in bytes.

    Returns:
        Its descriptor.

    Raises:
        OSError: the system refused.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("faceprint")
    else:
        with tempfile.TemporaryFile() as opened:
            file = os.dup(opened.fileno())
    os.ftruncate(file, size)
    return file


class Process:
    """A process at work, and this side of its pipe."""

    def __init__(self, program: str) -> None:
        """Starts it and waits until it can be asked.

        Args:
            program: Python code that calls `serve`, with `sys.argv[1]` for its pipe.

        Raises:
            RunError: the system refused, or it ended at once.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                pipe = theirs.fileno()
                self._popen = start(program, pipe, descriptors=(pipe,), stderr=subprocess.DEVNULL)
            except OSError as error:
                raise RunError(
                    f"A process that decodes photos cannot be started ({why(error)}); try again."
                ) from error
            self._pipe: Connection[Any, Any] = Connection(ours.detach())
        try:
            self.receive(_START_SECONDS)
        except BaseException as error:
            self.kill()
            if isinstance(error, TooSlow | Crashed | Ended):
                raise RunError("A process that decodes photos cannot be started; try again.") from error
            raise

    def send(self, question: object) -> None:
        """Asks.

        Raises:
            Crashed, Ended: it has ended.
        """
        try:
            self._pipe.send(question)
        except OSError as error:
            raise self._end() from error

    def receive(self, seconds: float) -> Any:
        """The answer.

        Raises:
            TooSlow: there is none after so many seconds.
            Crashed: the process crashed.
            Ended: it was killed.
            Interrupted: the run is to stop.
        """
        deadline = time.monotonic() + seconds
        try:
            while not self._pipe.poll(max(0.0, min(_POLL_SECONDS, deadline - time.monotonic()))):
                cancellation.check_cancelled()
                if time.monotonic() >= deadline:
                    raise TooSlow
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._end() from error

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._pipe.close()
        self._popen.kill()
        self._popen.wait()

    def _end(self) -> Exception:
        """Why there is no process any more."""
        status = self._popen.wait(_START_SECONDS)
        # Above 0 it ended itself, by an error that nothing in it had expected.
        if status > 0 or -status in _CRASH_SIGNALS:
            return Crashed()
        return Ended(
            f"A process that decodes photos was ended from outside (signal {-status}); run the command "
            "again, with less memory in use or fewer workers."
        )


class _Pool:
    """Processes by their program, those that wait, and room for as many at work as there are cores."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Process]] = {}
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(usable_cores())

    @contextmanager
    def process(self, program: str) -> Iterator[Process]:
        while not self._room.acquire(timeout=_POLL_SECONDS):
            cancellation.check_cancelled()
        try:
            with self._lock:
                idle = self._idle.get(program)
                process = idle.pop() if idle else None
            process = process or Process(program)
            try:
                yield process
            except BaseException:
                # It may be in the middle of something.
                process.kill()
                raise
            with self._lock:
                self._idle.setdefault(program, []).append(process)
        finally:
            self._room.release()

    def close(self) -> None:
        with self._lock:
            idle = [process for processes in self._idle.values() for process in processes]
            self._idle.clear()
        for process in idle:
            process.kill()


_pool = _Pool()


def _leave_to_the_parent() -> None:
    """A fork has the parent's pipes, on which two must not talk."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_leave_to_the_parent)
atexit.register(lambda: _pool.close())


@contextmanager
def process(program: str) -> Iterator[Process]:
    """A process of a program, of which as many work at once as there are cores; started where none waits.

    After an error in the with statement it is killed.

    Raises:
        RunError: it cannot be started.
        Interrupted: the run is to stop.
    """
    with _pool.process(program) as found:
        yield found


def serve(pipe: int, answer: Callable[["Caller"], None]) -> None:
    """What the program of a process does: answers until the other side has gone.

    Args:
        pipe: file descriptor.
        answer: takes one question and sends its answer.
    """
    # Ctrl-C and a service manager's stop are for the process that asks; this one ends with it.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    caller = Caller(pipe)
    with suppress(EOFError, OSError):
        caller.send(None)
        while True:
            answer(caller)


class Caller:
    """The other side of a process's pipe."""

    def __init__(self, pipe: int) -> None:
        self._number = pipe
        self._pipe: Connection[Any, Any] = Connection(pipe)

    def receive(self) -> Any:
        """The next question. While it is worked on, the caller's end is this process's end."""
        self._end_with_caller(False)
        question = self._pipe.recv()
        self._end_with_caller(True)
        if self._pipe.poll(0):
            raise EOFError("the caller has gone since")
        return question

    def send(self, answer: object) -> None:
        """Answers."""
        self._end_with_caller(False)
        self._pipe.send(answer)

    def _end_with_caller(self, asked: bool) -> None:
        # Anything that happens on the pipe meanwhile, such as its end, is SIGIO, which kills, even in C.
        flags = fcntl.fcntl(self._number, fcntl.F_GETFL)
        fcntl.fcntl(self._number, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._number, fcntl.F_SETFL, flags | os.O_ASYNC if asked else flags & ~os.O_ASYNC)
