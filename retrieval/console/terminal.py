"""Terminal helpers that commands share: tables, text without control characters, sizes and rates."""

import os
import sys
from typing import Any

from retrieval.system import paths
from retrieval.system.paths import is_url


def console() -> Any:
    """Returns the rich console on standard output for results."""
    from rich.console import Console

    # In a pipe or a file each row is one line, even with a long path.
    width = None if sys.stdout.isatty() else 1000
    # Without emoji: loading their names would take a tenth of a search's time.
    return Console(highlight=False, soft_wrap=True, width=width, emoji=False)


def text(words: str, style: str = "") -> Any:
    """Returns text for the terminal, with control characters replaced, so that names cannot control it."""
    from rich.text import Text

    return Text(paths.shown(words), style)


def progress(verb: str, *, rejects: bool = True) -> Any:
    """Returns a progress line on standard error; its tasks have the fields pace and rejected.

    With `rejects` false, the number of rejected photos is not shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    shown = Console(stderr=True, emoji=False)
    return Progress(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        *([TextColumn("{task.fields[rejected]:,} rejected")] if rejects else []),
        console=shown,
        transient=True,
        # In a pipe or a file it would leave an empty line.
        disable=not shown.is_terminal,
    )


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """Prints a heading, and a line with name and value for each fact."""
    from rich.table import Table

    printed = console()
    printed.print(text(title, "bold"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        table.add_row(name, text(shown))
    printed.print(table, soft_wrap=False)
    printed.print()


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless it is 1."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def size(number: float) -> str:
    """Returns a number of bytes as text, in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable: GiB returns")


def relative_path(path: str | None) -> str:
    """Returns a path relative to the current folder where it lies below that; `-` for None."""
    if path is None:
        return "-"
    below = path if is_url(path) else os.path.relpath(path)
    return path if below.startswith("..") else below


def pace(done: float, total: int | None, seconds: float) -> str:
    """Returns the mean rate since the start, and the time left at that rate, as text.

    A mean, since photos are done in batches, not one by one.
    """
    if not seconds:
        return ""
    if total is None:
        return f"{done / seconds:,.0f} photos/s"
    minutes, rest = divmod(round((total - done) * seconds / done), 60)
    return f"{done / seconds:,.0f} photos/s, {minutes}:{rest:02d} left"
