"""Isolation: work in processes that are killed after a time limit, or on Ctrl-C, for the image decoders.

A decoder written in C cannot be interrupted in a thread. A worker process is a separate program. It receives
one question at a time through a pipe, answers, and waits for the next. It ends with the process that started
it, even in the middle of its work.
"""

import atexit
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Final

from retrieval.errors import RunError
from retrieval.system import cancellation
from retrieval.system.cpu import usable_cores
from retrieval.system.files import why

# The interval at which a wait for an answer checks for cancellation, in seconds.
_POLL_SECONDS: Final = 0.1
# The time limit for the start of a process, in seconds.
_START_SECONDS: Final = 120.0
# Signals that end a process that crashes over its data.
_CRASH_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)


class TooSlow(Exception):
    """The process did not answer in time; it is killed."""


class Crashed(Exception):
    """The process crashed over its question."""


class Ended(RunError):
    """The process was killed from outside: by the system, or by a user."""


def start(
    program: str,
    *arguments: object,
    descriptors: Sequence[int],
    stdout: int = subprocess.DEVNULL,
    stderr: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> "subprocess.Popen[bytes]":
    """Starts a Python program in its own session, where Ctrl-C in a terminal does not reach it.

    Args:
        program: Python code.
        arguments: its `sys.argv[1:]`.
        descriptors: file descriptors that it inherits.
        stdout, stderr: as in `subprocess.Popen`; None is that of this process.
        environment: variables that it gets besides those of this process.

    Raises:
        OSError: the system refused.
    """
    return subprocess.Popen(
        # -P: import no module from the current folder, which may hold untrusted files.
        [sys.executable, "-P", "-c", program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=tuple(descriptors),
        # It finds the same modules, including those on paths that the caller's program added.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        start_new_session=True,
    )


def end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Waits for a process with closed pipes to end, and kills it after `seconds`."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def nameless_file(size: int) -> int:
    """Returns the descriptor of an unnamed file to share; on Linux in memory, whatever the size of /dev/shm.

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
    """A worker process, and the caller's end of its pipe."""

    def __init__(self, program: str) -> None:
        """Starts the process and waits until it is ready.

        Args:
            program: Python code that calls `serve`, with `sys.argv[1]` for its pipe.

        Raises:
            RunError: the system refused, or the process ended at once.
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
        """Sends a question.

        Raises:
            Crashed, Ended: the process has ended.
        """
        try:
            self._pipe.send(question)
        except OSError as error:
            raise self._end() from error

    def receive(self, seconds: float) -> Any:
        """Waits for the answer and returns it.

        Raises:
            TooSlow: there is no answer after `seconds`.
            Crashed: the process crashed.
            Ended: the process was killed.
            Interrupted: the run was cancelled.
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
        """Kills the process."""
        self._pipe.close()
        self._popen.kill()
        self._popen.wait()

    def _end(self) -> Exception:
        """Returns the error that says why the process has ended."""
        status = self._popen.wait(_START_SECONDS)
        # A positive status is an exit by an unexpected error of its own.
        if status > 0 or -status in _CRASH_SIGNALS:
            return Crashed()
        return Ended(
            f"A process that decodes photos was ended from outside (signal {-status}); run the command "
            "again, with less memory in use or fewer workers."
        )


class _Pool:
    """Idle processes by their program; as many work at once as there are usable cores."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Process]] = {}
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(usable_cores())

    @contextmanager
    def process(self, program: str) -> Iterator[Process]:
        while not self._slots.acquire(timeout=_POLL_SECONDS):
            cancellation.check_cancelled()
        try:
            with self._lock:
                idle = self._idle.get(program)
                process = idle.pop() if idle else None
            process = process or Process(program)
            try:
                yield process
            except BaseException:
                # It may be in the middle of a question.
                process.kill()
                raise
            with self._lock:
                self._idle.setdefault(program, []).append(process)
        finally:
            self._slots.release()

    def close(self) -> None:
        with self._lock:
            idle = [process for processes in self._idle.values() for process in processes]
            self._idle.clear()
        for process in idle:
            process.kill()


_pool = _Pool()


def _reset_after_fork() -> None:
    """Gives a forked child an empty pool: two processes must not use the parent's pipes."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_reset_after_fork)
atexit.register(lambda: _pool.close())


@contextmanager
def process(program: str) -> Iterator[Process]:
    """Yields an idle process of a program, or a new one; as many work at once as there are usable cores.

    An error in the with statement kills the process.

    Raises:
        RunError: it cannot be started.
        Interrupted: the run was cancelled.
    """
    with _pool.process(program) as found:
        yield found


def serve(pipe: int, answer: Callable[["Caller"], None]) -> None:
    """Runs the loop of a worker process: answers questions until the caller has ended.

    Args:
        pipe: the file descriptor of the pipe.
        answer: receives one question and sends its answer.
    """
    # Ctrl-C and a service manager's stop are for the caller; this process ends with it.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    caller = Caller(pipe)
    with suppress(EOFError, OSError):
        caller.send(None)
        while True:
            answer(caller)


class Caller:
    """The worker's end of the pipe to its caller."""

    def __init__(self, pipe: int) -> None:
        self._number = pipe
        self._pipe: Connection[Any, Any] = Connection(pipe)

    def receive(self) -> Any:
        """Returns the next question. Until `send`, the end of the caller kills this process."""
        self._end_with_caller(False)
        question = self._pipe.recv()
        self._end_with_caller(True)
        if self._pipe.poll(0):
            raise EOFError("the caller has gone since")
        return question

    def send(self, answer: object) -> None:
        """Sends the answer."""
        self._end_with_caller(False)
        self._pipe.send(answer)

    def _end_with_caller(self, asked: bool) -> None:
        _kill_on_event(self._number, asked)


def end_with_caller(pipe: int) -> None:
    """Kills this process, also in the middle of C code, as soon as the caller closes its end of a socket.

    Args:
        pipe: the descriptor of this process' end. The caller sends nothing through it.
    """
    _kill_on_event(pipe, True)
    if select.select([pipe], [], [], 0)[0]:
        raise SystemExit("the caller has gone")


def _kill_on_event(pipe: int, asked: bool) -> None:
    # Any event on the pipe, such as its end, then raises SIGIO, which kills the process even in C code.
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC if asked else flags & ~os.O_ASYNC)
