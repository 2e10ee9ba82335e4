"""The file of `--report`: a line of JSON for each photo that was not enrolled or embedded."""

import io
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from retrieval.cli.command import in_current_options
from retrieval.cli.output import writing
from retrieval.console import terminal

_LINE: Final = ("path", "identity", "status", "reason", "detail", "face_id", "replaced")


class ReportFile:
    """A file with a line of JSON for each photo that was not enrolled or embedded.

    The file is complete or absent, and never ends within a line. A context manager.

    Attributes:
        path: the file; None where no report is wanted.
        lines: how many lines it has so far.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines = 0

    def __enter__(self) -> "ReportFile":
        if self.path is not None:
            from retrieval.system.files import replacing

            self.replacing = replacing(self.path)
            with self._translated():
                self.file = io.TextIOWrapper(self.replacing.__enter__(), encoding="utf-8")
        return self

    def _translated(self) -> AbstractContextManager[None]:
        return writing(f"The report {self.path}")

    def write(self, outcome: Any) -> None:
        """Writes a line for an outcome, unless the photo was enrolled or embedded."""
        if outcome.status not in ("enrolled", "embedded"):
            line = {name: getattr(outcome, name) for name in _LINE}
            self._write(line | {"detail": outcome.detail and in_current_options(outcome.detail)})

    def write_unknown(self, *, path: str | None = None, identity: str | None = None) -> None:
        """Writes a line for a row of metadata with a path or identity that the gallery does not have."""
        line = {
            "path": path,
            "identity": identity,
            "status": "unknown",
            "detail": "metadata of nothing enrolled",
        }
        self._write({**dict.fromkeys(_LINE), **line})

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self._translated():
                self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.lines += 1

    def print_count(self) -> None:
        """Prints how many lines the report has, if it has any."""
        if self.lines:
            counted = terminal.counted(self.lines, "line")
            terminal.console().print(f"{counted} in {self.path}", markup=False)

    def __exit__(self, *_: object) -> None:
        # A run that failed has a report too, of the photos until then.
        if self.path is not None:
            with self._translated():
                self.file.detach()  # flushes it, and leaves the file open
                self.replacing.__exit__(None, None, None)
