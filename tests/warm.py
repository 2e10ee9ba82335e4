"""A process that has imported what the service needs, and forks a child for each command that a test starts.

Each child is a process of its own, with its own environment, streams and signals, as if `python -m
retrieval.cli.app` had been started; only its imports are those of its parent. They take most of the time of a
server that answers a few requests.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# What `serve` imports at the latest for its first search, but the module that is run.
_PRELOAD = (
    *("retrieval.cli.serve", "retrieval.service.server", "retrieval.service.service"),
    *("retrieval.service.workers", "retrieval.models.onnx_engine", "retrieval.models.self_test"),
    *("uvicorn.loops.asyncio", "uvicorn.protocols.http.h11_impl", "uvicorn.lifespan.on"),
)

# Of a child: its process id, and then its exit status.
_NUMBER = struct.Struct("i")

_PR_SET_PDEATHSIG = 1


class Child:
    """A command that runs; what of `subprocess.Popen` the tests use."""

    def __init__(self, status: int, stdout: io.TextIOWrapper) -> None:
        self._status = status
        self.stdout = stdout
        self.pid = _number(status)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status, or None while the command runs."""
        return (
            self.wait(0) if self.returncode is None and select.select([self._status], [], [], 0)[0] else None
        )

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the command, and returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it did not end within `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("faceprint", timeout or 0.0)
            self.returncode = _number(self._status)
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, if the command still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM, if the command still runs."""
        self.send_signal(signal.SIGTERM)


def start(arguments: Sequence[object], *, stderr: int, environment: Mapping[str, str]) -> Child:
    """Starts `faceprint ARGUMENTS` in the current folder; its standard output comes through a pipe."""
    reader, stdout = os.pipe()
    ended, status = os.pipe()
    request = {"arguments": [*map(str, arguments)], "folder": os.getcwd(), "environment": dict(environment)}
    socket.send_fds(_parent(), [json.dumps(request).encode()], [stdout, stderr, status])
    os.close(stdout)
    os.close(status)
    return Child(ended, open(reader, encoding="utf-8"))


@functools.cache
def _parent() -> socket.socket:
    """Starts the process that forks; it ends with this one."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "error::ResourceWarning",
        # A process with threads must not be forked, and numpy and FAISS would start threads.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", f"from tests.warm import serve; serve({there.fileno()})"],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[there.fileno()],
    )
    there.close()

    def end() -> None:
        here.close()
        process.wait()

    atexit.register(end)
    return here


def _number(descriptor: int) -> int:
    data = os.read(descriptor, _NUMBER.size)
    assert data, "the process that forks has died; what it printed says why"
    (number,) = _NUMBER.unpack(data)
    return int(number)


def serve(descriptor: int) -> None:
    """Forks a child for each request until the client closes the connection; returns in no child."""
    for module in _PRELOAD:
        importlib.import_module(module)
    # `import onnxruntime` starts one: each child does that itself.
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as connection:
        while True:
            data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            _reap()
            if not data or os.fork() == 0:
                break
            for one in descriptors:
                os.close(one)
    if data:
        _watch(json.loads(data), *descriptors)


def _reap() -> None:
    """Waits for the parents of commands that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch(request: dict[str, object], stdout: int, stderr: int, status: int) -> None:
    """Forks the command, and says its process id and its exit status; does not return in the parent."""
    _die_with_parent()
    child = os.fork()
    if child:
        os.write(status, _NUMBER.pack(child))
        os.close(stdout)
        os.close(stderr)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, _NUMBER.pack(code))
        os._exit(0)
    _die_with_parent()
    for number, one in ((1, stdout), (2, stderr)):
        os.dup2(one, number)
        os.close(one)
    os.close(status)
    arguments, folder, environment = request["arguments"], request["folder"], request["environment"]
    assert isinstance(arguments, list)
    assert isinstance(folder, str)
    assert isinstance(environment, dict)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # its parent has looked it up
    sys.argv = ["faceprint", *arguments]
    runpy.run_module("retrieval.cli.app", run_name="__main__", alter_sys=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
