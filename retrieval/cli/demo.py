"""The command `demo`: trains, enrolls, searches and reports in one folder, with drawn faces or own photos."""

from pathlib import Path
from typing import Annotated

import typer

from retrieval.cli.opening import training_module


def demo(
    data: Annotated[Path | None, typer.Option(metavar="DATA", help="Your own identity folders.", show_default="drawn faces")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path("demo"),
) -> None:  # fmt: skip
    """Train, enroll, search and report, from nothing, in a few minutes and without a network.

    Without --data the faces are drawn by a program: they show how it works, not how good it is.
    """
    training_module("run")  # raises an error that names what to install when torch is missing
    from retrieval.cli import walkthrough

    walkthrough.run(data, out)
