"""Several processes that answer on the same sockets, and the process that starts them again when they end.

A worker gets its settings through a pipe, reports on it when it accepts connections, and stops when the pipe
ends: it never outlives the process that started it.
"""

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final

from retrieval.errors import FaceprintError, RunError
from retrieval.service.metrics import FOLDER_VARIABLE
from retrieval.service.sessions import new_key
from retrieval.service.settings import Settings
from retrieval.system import isolation

_LOG: Final = logging.getLogger("faceprint.service")

_PROGRAM: Final = "import sys; from retrieval.service.workers import answer; answer(*map(int, sys.argv[1:]))"
_READY: Final = b"R"
_POLL_SECONDS: Final = 0.2
_BACKLOG: Final = 1024
# A worker that ends sooner after its start than this is started again only after that time.
_RESTART_SECONDS: Final = 1.0
# How much longer than the requests in flight a worker may take to stop.
_STOP_SECONDS: Final = 5.0


@dataclass
class _Worker:
    """A process: one that answers, or with `writes` the one that changes the gallery."""

    process: "subprocess.Popen[bytes]"
    pipe: socket.socket
    writes: bool
    began: float = field(default_factory=time.monotonic)
    ready: bool = False


def run(
    settings: Settings,
    sockets: Sequence[socket.socket],
    *,
    needs_token: bool,
    started: Callable[[], None],
) -> None:
    """Runs the workers until SIGTERM or Ctrl-C; they finish the requests in flight.

    Args:
        settings: of the service.
        sockets: listening sockets, which the workers share; they are closed once the workers have them.
        needs_token: refuse callers without a token.
        started: is called once all workers accept connections.

    Raises:
        RunError: a worker ended before it accepted a connection; its error is on standard error.
    """
    with _stop_signals() as asked, tempfile.TemporaryDirectory(prefix="faceprint-service-") as folder:
        pool = _Pool(settings, sockets, needs_token=needs_token, folder=Path(folder))
        for one in sockets:
            one.close()
        try:
            pool.start()
            announced = False
            while not asked():
                pool.look(_POLL_SECONDS)
                if not announced and pool.all_ready:
                    announced = True
                    started()
        finally:
            pool.stop()


class _Pool:
    """The processes that answer, and the one that changes the gallery for them."""

    def __init__(
        self, settings: Settings, sockets: Sequence[socket.socket], *, needs_token: bool, folder: Path
    ) -> None:
        """Takes copies of the sockets, for workers that are started again.

        Args:
            settings, sockets, needs_token: as of `run`.
            folder: a folder that only this user can open, for a socket and the metrics.
        """
        self._settings = settings
        self._sockets = [one.dup() for one in sockets]
        self._needs_token = needs_token
        self._session_key = new_key()
        self._metrics = folder / "metrics"
        self._metrics.mkdir()
        self._writer_at = folder / "writer.socket"
        # It stays open here: requests wait in it while the process that writes is started again.
        self._writer_socket = socket.socket(socket.AF_UNIX)
        self._writer_socket.bind(os.fspath(self._writer_at))
        self._writer_socket.listen(_BACKLOG)
        self._workers: list[_Worker] = []

    @property
    def all_ready(self) -> bool:
        return all(worker.ready for worker in self._workers)

    def start(self) -> None:
        self._workers.append(self._started(writes=True))
        for _ in range(self._settings.workers):
            self._workers.append(self._started(writes=False))

    def look(self, seconds: float) -> None:
        """Waits for news, and starts workers that ended again.

        Raises:
            RunError: a worker ended before it was ready.
        """
        waiting = [worker.pipe for worker in self._workers if not worker.ready]
        found = select.select(waiting, [], [], seconds)[0]
        for worker in self._workers:
            if worker.pipe in found and worker.pipe.recv(1) == _READY:
                worker.ready = True
        for place, worker in enumerate(self._workers):
            if worker.process.poll() is not None:
                self._workers[place] = self._after(worker)

    def _after(self, worker: _Worker) -> _Worker:
        """Returns a worker in place of one that ended."""
        worker.pipe.close()
        if not worker.ready:
            raise RunError("A worker of the service ended before it could answer; its error stands above.")
        _LOG.error("worker %d ended with %d; starting another", worker.process.pid, worker.process.returncode)
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.process.pid, str(self._metrics))  # type: ignore[no-untyped-call]
        time.sleep(max(0.0, worker.began + _RESTART_SECONDS - time.monotonic()))
        return self._started(writes=worker.writes)

    def _started(self, *, writes: bool) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = [one.fileno() for one in ([self._writer_socket] if writes else self._sockets)]
            process = isolation.start(
                _PROGRAM,
                theirs.fileno(),
                *numbers,
                descriptors=[theirs.fileno(), *numbers],
                environment={FOLDER_VARIABLE: str(self._metrics)},
            )
        said = {
            "settings": (_for_writer(self._settings) if writes else self._settings).to_json(),
            "needs_token": self._needs_token,
            "writer_at": None if writes else str(self._writer_at),
            "session_key": self._session_key,
        }
        ours.sendall(json.dumps(said).encode() + b"\n")
        return _Worker(process, ours, writes)

    def stop(self) -> None:
        """Stops all workers, those that answer first; those that do not stop in time are killed."""
        # Connections are refused only once no process listens any more.
        for one in self._sockets:
            one.close()
        self._stop([worker for worker in self._workers if not worker.writes])
        self._writer_socket.close()
        self._stop([worker for worker in self._workers if worker.writes])

    def _stop(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.process.terminate()
        deadline = time.monotonic() + self._settings.limits.drain_seconds + _STOP_SECONDS
        for worker in workers:
            isolation.end(worker.process, max(0.0, deadline - time.monotonic()))
            worker.pipe.close()


def _for_writer(settings: Settings) -> Settings:
    """Returns the settings of the process that gets its requests from the others, on this machine."""
    return replace(settings, certfile=None, keyfile=None, limits=replace(settings.limits, rate=None))


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM or SIGINT was received."""
    asked = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer(pipe: int, *sockets: int) -> None:
    """Runs a worker, in its own process.

    Args:
        pipe: the descriptor of its pipe.
        sockets: the descriptors of listening sockets.
    """
    from retrieval.service import server
    from retrieval.service.logs import log_to_standard_error
    from retrieval.service.service import Service

    with socket.socket(fileno=pipe) as ours:
        said = json.loads(_line(ours))
        settings = Settings.from_json(said["settings"])
        log_to_standard_error()
        listening = [socket.socket(fileno=number) for number in sockets]
        try:
            writer_at = said["writer_at"]
            service = Service(
                settings,
                needs_token=said["needs_token"],
                writer_at=None if writer_at is None else Path(writer_at),
                counts=writer_at is not None,
                session_key=said["session_key"],
            )
            server.run(service, listening, started=lambda: ours.sendall(_READY), stop=ours.fileno())
        except FaceprintError as error:
            print(f"faceprint: {error}", file=sys.stderr)
            raise SystemExit(error.exit_status) from error


def _line(pipe: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = pipe.recv(65_536)
        if not more:
            raise SystemExit(0)  # the process that started this one has ended
        data += more
    return data
