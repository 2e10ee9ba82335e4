"""Output of commands: JSON on standard output, and files that are complete or absent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from retrieval.errors import InputError, RunError


def print_json(value: Any) -> None:
    """Prints a value as JSON; values of other types are converted with `str`."""
    convert: Callable[[Any], str] = str
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1, default=convert))


def refusal(error: OSError) -> type[InputError | RunError]:
    """Returns the error to raise for a file that cannot be written: of the path that was given, or of the disk."""
    from retrieval.system.files import is_about_path

    return InputError if is_about_path(error) else RunError


def write_file(path: Path, data: bytes) -> None:
    """Writes a file that is complete or absent.

    Raises:
        InputError: its path does not lead to a file that can be written.
        RunError: the disk refused.
    """
    from retrieval.system.files import why, write_durably

    try:
        write_durably(path, data)
    except OSError as error:
        raise refusal(error)(f"{path} cannot be written: {why(error)}.") from error


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes a report with one JSON object per line, complete or absent.

    Raises:
        InputError: its path does not lead to a file that can be written.
        RunError: the disk refused.
    """
    from retrieval.system.files import write_durably

    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise refusal(error)(f"The report {path} cannot be written: {error.strerror}.") from error
