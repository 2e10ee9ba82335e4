"""The commands `audit` and `dismiss-doubt`, of wrong names and bad photos, and `audit-log`, who did what when."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.cli import options
from retrieval.cli.command import in_current_options
from retrieval.cli.opening import open_gallery
from retrieval.cli.output import print_json, write_file
from retrieval.console import terminal
from retrieval.errors import InputError

if TYPE_CHECKING:
    from retrieval.database.records import Receipt
    from retrieval.gallery.gallery import Gallery
    from retrieval.quality.audit_report import Audited


def audit(
    gallery: options.Gallery,
    sample: Annotated[int | None, typer.Option(min=1, help="Look at about so many faces (whole people), each compared with all.", show_default="everything up to 50,000 faces, 20,000 of more")] = None,
    seed: Annotated[int, options.seed("Of the sample.")] = 0,
    limit: Annotated[float, typer.Option(help="Doubt what is so many robust standard deviations from the usual.")] = 3.0,
    top: Annotated[int, typer.Option(min=0, help="How many doubts are printed, the most serious ones.")] = 20,
    show_all: Annotated[bool, typer.Option("--all", help="Show dismissed doubts too.")] = False,
    as_json: options.Json = False,
    json_file: options.JsonFile = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write one page with the photos side by side.", show_default=False)] = None,
    fetch: options.Fetch = False,
) -> None:  # fmt: skip
    """Doubt a gallery's names and photos: who is where they do not belong? Changes nothing.

    Photos unlike their person's others, two people who look like one, one who looks like two, near
    duplicates, photos that are close to everybody. (Who did what to a gallery is in `audit-log`.)
    """
    if not limit > 0:
        raise InputError("--limit must be above 0.")
    with open_gallery(gallery, "audit") as opened:
        found = _audit_with_progress(opened, sample=sample, seed=seed, limit=limit)
        found = found.with_dismissed() if show_all else found
        fetching = opened.fetching(fetch=fetch)
        reader = opened.photo_reader if page is not None else None
    text = json.dumps(found.summary(), ensure_ascii=False, indent=1, allow_nan=False)
    if json_file is not None:
        write_file(json_file, (text + "\n").encode("utf-8", "backslashreplace"))
    if page is not None:
        from retrieval.quality import audit_report

        write_file(page, in_current_options(audit_report.page(found, fetching, reader).decode()).encode())
    if as_json:
        typer.echo(text)
    else:
        _print_audited(found, top)


def _audit_with_progress(gallery: "Gallery", **options: Any) -> "Audited":
    from retrieval.quality.audit import audit as audit_gallery
    from retrieval.system.signals import graceful

    with graceful() as should_stop, terminal.progress("auditing", rejects=False) as progress:
        task = progress.add_task("", total=None, pace="")

        def note(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return audit_gallery(gallery, on_progress=note, should_stop=should_stop, **options)


def _print_audited(found: "Audited", top: int) -> None:
    from rich.table import Table

    from retrieval.quality.audit_report import HEADINGS, limit_row, scope

    printed = terminal.console()
    printed.print(terminal.text(scope(found)))
    limits = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("doubt", "of", "usual", "doubted from", "found", "what is measured"):
        limits.add_column(name, overflow="fold")
    for limit in found.limits:
        heading, measures, *numbers = limit_row(limit)
        limits.add_row(*map(terminal.text, (heading, *numbers, measures)))
    printed.print(limits, soft_wrap=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("score", justify="right", no_wrap=True)
    for name in ("doubt", "seen", "next", "id"):
        table.add_column(name, overflow="fold")
    for doubt in found.doubts[:top]:
        shown = (HEADINGS[doubt.kind], doubt.says, doubt.next, doubt.id)
        table.add_row(f"{doubt.score:.1f}", *map(terminal.text, shown))
    if top and found.doubts:
        printed.print()
        printed.print(table, soft_wrap=False)
    left = len(found.doubts) - top
    if left > 0:
        printed.print(f"{terminal.counted(left, 'doubt')} more; --top, --json-file and --page have them")
    elif not found.doubts:
        printed.print("Nothing is doubted.")
    if found.dismissed:
        printed.print(
            f"{terminal.counted(len(found.dismissed), 'dismissed doubt')} left out; --all shows them"
        )


def dismiss_doubt(
    gallery: options.Gallery,
    doubts: Annotated[list[str], typer.Argument(metavar="DOUBT...", help="The doubts, by the ids that `audit` shows.", show_default=False)],
    undo: Annotated[bool, typer.Option("--undo", help="Let later audits show these dismissed doubts again.")] = False,
) -> None:  # fmt: skip
    """Dismiss doubts that are not true: later audits leave them out.

    A doubt comes back when it is about other faces or other people. Renaming a person changes nothing.
    """
    from retrieval.quality.doubts import dismiss, undismiss

    with open_gallery(gallery, "dismiss-doubt") as opened:
        changed = (undismiss if undo else dismiss)(opened, doubts)
    what = "no longer dismissed" if undo else "dismissed"
    terminal.console().print(f"{terminal.counted(changed, 'doubt')} {what}", markup=False)


def audit_log(
    gallery: options.Gallery,
    receipts: Annotated[bool, typer.Option("--receipts", help="The receipts of everything that was forgotten, instead.")] = False,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Show who did what when. No name, path or embedding is in it."""
    with open_gallery(gallery, "audit-log") as opened:
        entries: list[Any] = list(opened.receipts() if receipts else opened.audit_log())
        told = opened.vault.told if receipts else asdict
    if as_json:
        print_json([told(entry) for entry in entries])
        return
    (_print_receipts if receipts else _print_audit)(entries)


def _print_receipts(receipts: "list[Receipt]") -> None:
    for receipt in receipts:
        terminal.console().print(
            f"{receipt.at}  {receipt.id}  {receipt.what}, {terminal.counted(receipt.faces, 'face')}, by {receipt.who}",
            markup=False,
        )


def _print_audit(entries: list[Any]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("when", "who", "via", "action"):
        table.add_column(name, no_wrap=True)
    table.add_column("faces", justify="right")
    table.add_column("detail", overflow="fold")
    for entry in entries:
        detail = ", ".join(f"{name} {value}" for name, value in entry.detail.items())
        shown = (entry.began_at, entry.who, entry.via, entry.action, f"{entry.faces:,}", detail)
        table.add_row(*map(terminal.text, shown))
    terminal.console().print(table, soft_wrap=False)
