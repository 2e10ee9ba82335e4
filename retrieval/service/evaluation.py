"""Evaluations: `faceprint evaluate` in a process of its own, since its measurements are in `training`."""

import json
import os
import selectors
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import FaceprintError, InputError, Interrupted, Reason, RunError
from retrieval.system import isolation

# The environment variable with the arguments of the command, as JSON: other users see the arguments of a
# process, but not its environment, and the address of a gallery may have a password.
_ARGUMENTS_VARIABLE: Final = "FACEPRINT_EVALUATION"

_PROGRAM: Final = f"""\
import json, os, sys
from retrieval.system.isolation import end_with_caller
end_with_caller(int(sys.argv.pop(1)))
sys.argv[1:] = json.loads(os.environ["{_ARGUMENTS_VARIABLE}"])
from retrieval.cli.app import main
main()
"""

# How often a stop is looked for, and how long the process may take to stop by itself.
_LOOK_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 5.0

_PIECE: Final = 65_536
_MAX_ERROR: Final = 65_536


def evaluate(
    arguments: Sequence[object],
    *,
    count: Callable[[Outcome], None],
    note: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Runs `faceprint evaluate`, and returns the content of its `metrics.json`.

    The process ends with the one that calls this, however that ends.

    Args:
        arguments: of the command.
        count: called with the outcome of each rejected photo.
        note: called with the number of photos done and in all.
        should_stop: called several times per second; True ends the process.

    Raises:
        Interrupted: `should_stop` returned True.
        InputError: the photos, or the options, cannot be used.
        RunError: the process failed or was ended from outside, or a package of training is not installed.
    """
    progress = _Progress(count, note)
    errors = bytearray()
    with _started(arguments) as process, selectors.DefaultSelector() as selector:
        for stream, take in ((process.stdout, progress.take), (process.stderr, errors.extend)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, take)
        while selector.get_map():
            for key, _ in selector.select(_LOOK_SECONDS):
                piece = os.read(key.fd, _PIECE)
                if piece:
                    key.data(piece)
                else:
                    selector.unregister(key.fileobj)
            del errors[:-_MAX_ERROR]
            if should_stop():
                raise Interrupted("Stopped; nothing was measured.")
        status = process.wait()
    if progress.metrics is None:
        raise _error(status, errors.decode(errors="replace"))
    return progress.metrics


@contextmanager
def _started(arguments: Sequence[object]) -> "Iterator[subprocess.Popen[bytes]]":
    """Yields the process, and ends it with all that it started."""
    ours, theirs = socket.socketpair()
    told = json.dumps(["evaluate", "--log-json", *map(str, arguments)])
    with ours:
        with theirs:
            process = isolation.start(
                _PROGRAM,
                theirs.fileno(),
                "evaluate",  # for those who list processes
                descriptors=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                environment={_ARGUMENTS_VARIABLE: told},
            )
        with process:
            try:
                yield process
            finally:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        # What it still says is read, since a full pipe would keep it from ending.
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        # Its own processes, which decode photos, are in sessions of their own and end with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class _Progress:
    """Reads what the command says with `--log-json`.

    Attributes:
        metrics: its results; None until it has them.
    """

    def __init__(self, count: Callable[[Outcome], None], note: Callable[[int, int], None]) -> None:
        self._count = count
        self._note = note
        self._total = 0
        self._rest = b""
        self.metrics: dict[str, Any] | None = None

    def take(self, piece: bytes) -> None:
        """Takes the next bytes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._event(json.loads(line))

    def _event(self, said: dict[str, Any]) -> None:
        match said["event"]:
            case "start":
                # Stages that do not count photos follow those that do.
                done, self._total = (0, said["total"]) if said["total"] else (self._total, self._total)
                self._note(done, self._total)
            case "progress":
                self._note(said["done"], self._total)
            case "rejected":
                reason = Reason(said["reason"])
                self._count(
                    Outcome(
                        said["path"], said["identity"], Status.REJECTED, reason=reason, detail=said["detail"]
                    )
                )
            case "done":
                self.metrics = said["metrics"]


def _error(status: int, text: str) -> FaceprintError:
    """Returns the error for a process that ended without results; its sentence is the command's."""
    if status < 0:
        return RunError(f"The evaluation was ended from outside (signal {-status}); start it again.")
    lines = [line for line in text.splitlines() if line.strip()]
    sentence = lines[-1].removeprefix("faceprint: ") if lines else "The evaluation failed; start it again."
    return InputError(sentence) if status == InputError.exit_status else RunError(sentence)
