"""Output of commands: JSON on standard output, and files that are complete or absent."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from retrieval.errors import InputError, RunError


def print_json(value: Any) -> None:
    """Prints a value as JSON; values of other types are converted with `str`."""
    convert: Callable[[Any], str] = str
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1, default=convert))


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Translates errors of the operating system while a file is written.

    Args:
        what: the file, as a sentence begins with it.

    Raises:
        InputError: its path does not lead to a file that can be written: exit status 2.
        RunError: the disk refused: exit status 1.
    """
    from retrieval.system.files import is_about_path, why

    try:
        yield
    except OSError as error:
        sentence = f"{what} cannot be written: {why(error)}"
        if is_about_path(error):
            raise InputError(f"{sentence}; name another file.") from error
        raise RunError(f"{sentence}.") from error


def write_file(path: Path, data: bytes, *, what: str = "") -> None:
    """Writes a file that is complete or absent; `what` and its path name it in errors.

    Raises:
        InputError, RunError: as `writing`.
    """
    from retrieval.system.files import write_durably

    with writing(f"{what} {path}".lstrip()):
        write_durably(path, data)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes a report with one JSON object per line, complete or absent.

    Raises:
        InputError, RunError: as `writing`.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_file(path, text.encode(), what="The report")
