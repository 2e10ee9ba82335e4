"""The command `demo`: trains, enrolls, searches and reports in one folder, and serves it as a page."""

from pathlib import Path
from typing import Annotated

import typer

from retrieval.cli import serve
from retrieval.cli.opening import training_module


def demo(
    data: Annotated[Path | None, typer.Option(metavar="DATA", help="Your own identity folders.", show_default="drawn faces")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path("demo"),
    open_page: Annotated[bool, typer.Option("--serve", help="Then open the page of its gallery in a browser, until Ctrl-C; a demo that is there is served as it is.")] = False,
) -> None:  # fmt: skip
    """Train, enroll, search and report, from nothing, in a few minutes and without a network.

    Without --data the faces are drawn by a program: they show how it works, not how good it is.
    """
    from retrieval.cli import walkthrough

    if open_page:
        serve.require_packages()
    if not (open_page and data is None and walkthrough.is_complete(out)):
        training_module("run")  # raises an error that names what to install when torch is missing
        walkthrough.run(data, out)
    if open_page:
        from retrieval.service.settings import Settings

        # Any free port: the usual one may be in use, and the demo took minutes.
        serve.run(Settings(out / "gallery", port=0), open_page=True)
