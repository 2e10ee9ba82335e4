"""A real server process on loopback, for tests."""

import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

from tests import warm

_STARTED = re.compile(r"^serving .* at (https?://\S+); Ctrl-C stops it\n$")
_SECONDS = 120.0


class Server:
    """`faceprint serve GALLERY` on a free port; a context manager.

    Attributes:
        url: its address.
        process: the process.
        client: asks it.
    """

    def __init__(
        self,
        gallery: Path,
        log: Path,
        *options: object,
        verify: ssl.SSLContext | bool = True,
        command: Sequence[object] | None = None,
        cold: bool = False,
    ) -> None:
        """Starts the process; `command` is another one of faceprint that serves the gallery.

        With `cold` it is an interpreter of its own, that imports everything itself, as a user starts one;
        otherwise a child of `tests.warm`.
        """
        self._log = log.open("wb")
        self.log = log
        arguments = ("serve", gallery, "--port", 0, *options) if command is None else command
        environment = {**os.environ, "PYTHONWARNINGS": "error::ResourceWarning"}
        self.process: subprocess.Popen[str] | warm.Child
        if cold or sys.platform != "linux":
            command = [sys.executable, "-m", "retrieval.cli.app", *arguments]
            self.process = subprocess.Popen(
                [*map(str, command)], stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
            )
        else:
            self.process = warm.start(arguments, stderr=self._log.fileno(), environment=environment)
        assert self.process.stdout is not None
        started = _STARTED.match(self.process.stdout.readline())
        if started is None:
            self.process.wait(_SECONDS)
            raise AssertionError(log.read_text())
        self.url = started[1]
        self.client = httpx.Client(base_url=self.url, timeout=_SECONDS, trust_env=False, verify=verify)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, and returns the exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()
        return status
