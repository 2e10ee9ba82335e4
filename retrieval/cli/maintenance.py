"""The commands that maintain a gallery: verify, repair, forget, backup, restore, relocate, reembed."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.console import terminal
from retrieval.console.terminal import DeviceOption, GalleryArgument, JsonOption
from retrieval.errors import DataError, InputError, Interrupted, RunError

if TYPE_CHECKING:
    from retrieval.database.records import Face, Receipt
    from retrieval.gallery.gallery import Gallery
    from retrieval.gallery.integrity import Finding, Verification
    from retrieval.gallery.reembed import Reembedded
    from retrieval.quality.audit_report import Audited

app = typer.Typer()

_PANEL = "Looking after a gallery"

_Receipts = Annotated[list[Path] | None, typer.Option("--receipt", metavar="FILE.json", help="A receipt of `forget` that neither backup nor gallery knows; may be repeated.", show_default=False)]  # fmt: skip

_Fetch = Annotated[bool, typer.Option("--fetch", help="Read photos at addresses too, from hosts that `ingest` enrolled photos from.")]  # fmt: skip


def open_gallery(
    folder: Path, command: str, *, device: str = "auto", precision: str = "float32"
) -> "Gallery":
    """A gallery, for reading only where nothing can be written."""
    from retrieval.gallery.gallery import Gallery

    read_only = folder.is_dir() and not os.access(folder, os.W_OK)
    via = f"faceprint {command}"
    return Gallery.open(folder, device=device, precision=precision, read_only=read_only, via=via)


@app.command(rich_help_panel=_PANEL)
def verify(gallery: GalleryArgument, as_json: JsonOption = False) -> None:
    """Read every byte of a gallery, or of a backup, and compare with what was written.

    Exit status: 0 when everything is as it was written, 1 when something is not.
    """
    from retrieval.gallery.integrity import verify as verify_gallery

    if os.path.lexists(gallery / "backup.json") and not (gallery / "gallery.db").exists():
        _verify_backup(gallery, as_json)
        return
    found = verify_gallery(gallery)
    if as_json:
        _print_json(asdict(found))
    else:
        _print_verification(found)
    if not found.whole:
        raise RunError(
            f"{gallery} is not what was written ({terminal.counted(len(found.findings), 'finding')}); "
            f"see what `faceprint repair {gallery}` can mend."
        )


@app.command(rich_help_panel=_PANEL)
def repair(
    gallery: GalleryArgument,
    backup: Annotated[Path | None, typer.Option(metavar="BACKUP", help="A backup, for files that have the SHA-256 which was written down.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="Another copy of the gallery's model.", show_default=False)] = None,
    give_up: Annotated[bool, typer.Option("--give-up", help="Remove faces whose vectors nothing can bring back.")] = False,
    fetch: _Fetch = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:  # fmt: skip
    """Mend what can be mended without a guess; list what cannot.

    Leftovers are removed, an interrupted erasure is finished, damaged files come back from a backup,
    lost vectors are embedded again from photos that still have the same SHA-256.

    Exit status: 0 when everything is whole, 1 when something is left.
    """
    from retrieval.gallery.repair import repair as repair_gallery
    from retrieval.models.bundle import ModelBundle

    bundle = ModelBundle.load(model) if model is not None else None
    done = repair_gallery(gallery, backup=backup, model=bundle, give_up=give_up, fetch=fetch, device=device)
    if as_json:
        _print_json(asdict(done))
    else:
        printed = terminal.console()
        mended = len(done.before.findings) - len(done.after.findings)
        printed.print(
            f"{terminal.counted(len(done.before.findings), 'finding')}, {max(mended, 0):,} mended: {done.embedded:,} vectors embedded "
            f"again, {done.copied:,} files copied, {done.given_up:,} faces given up"
        )
        if done.suspects:
            printed.print(
                f"{done.compared:,} of {terminal.counted(done.suspects, 'face')} that a damaged model may have embedded compared "
                f"with their photos, {done.replaced:,} vectors replaced"
            )
        _print_verification(done.after)
        for face in done.lost:
            shown = (
                f"  face {face.id}, {face.identity or 'no identity'}: {', '.join(face.paths) or 'no path'}: "
                f"{done.reasons[face.id]}"
            )
            printed.print(terminal.text(shown))
    if done.unfetched:
        raise RunError(_ask_to_fetch(len(done.unfetched)))
    if done.lost:
        raise RunError(
            f"The photos of {terminal.counted(len(done.lost), 'face')} are gone or have changed; put them back, name a backup with "
            "--backup, or let these faces go with --give-up."
        )
    if not done.after.whole:
        suspect = any(one.trouble == "suspect-vector" for one in done.after.findings)
        advice = (
            "do what is said about the faces that a damaged model may have embedded, or " if suspect else ""
        )
        raise RunError(f"Not everything could be mended; {advice}restore {gallery} from a backup.")


@app.command(rich_help_panel=_PANEL)
def forget(
    gallery: GalleryArgument,
    identity: Annotated[str | None, typer.Option(metavar="NAME", help="Everything of a person.", show_default=False)] = None,
    face: Annotated[int | None, typer.Option(metavar="ID", help="One face.", show_default=False)] = None,
    path: Annotated[Path | None, typer.Option(metavar="FILE", help="The face of one file.", show_default=False)] = None,
    receipt: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the receipt, to be kept with the backups.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Erase a person or a face: rows, vectors, logs, free pages. It cannot be undone.

    Prints a receipt, which holds nothing about the person. Restoring an older backup forgets again.
    Your photos, your backups and what the model's weights have learned are not touched.
    """
    if receipt is not None and (receipt.exists() or not receipt.absolute().parent.is_dir()):
        raise InputError(f"The receipt {receipt} exists already, or its folder does not; name another file.")
    with open_gallery(gallery, "forget") as opened:
        done = opened.forget(identity, face_id=face, path=path)
    if receipt is not None:
        _write(receipt, (json.dumps(asdict(done)) + "\n").encode())
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    terminal.console().print(
        f"forgot {terminal.counted(done.faces, 'face')}; receipt {done.id}, {done.at}, by {done.who}"
    )


@app.command(rich_help_panel=_PANEL)
def compact(gallery: GalleryArgument) -> None:
    """Merge vector files into as few as there can be, and close the database's gaps."""
    with open_gallery(gallery, "compact") as opened:
        done = opened.compact()
    terminal.console().print(
        f"{terminal.counted(done.segments_before, 'vector file')} became {done.segments_after:,}, "
        f"{terminal.size(done.bytes_before)} became {terminal.size(done.bytes_after)}"
    )


@app.command(rich_help_panel=_PANEL)
def optimize(
    gallery: GalleryArgument,
    anew: Annotated[bool, typer.Option("--anew", help="Learn again, whether that is due or not.")] = False,
) -> None:
    """Make searches quick: learn from the gallery's vectors which bytes of them to read first.

    `ingest` and `compact` do this when it is due: from 4,096 faces on, and again when there are four times as
    many. Answers stay what they are.
    """
    with open_gallery(gallery, "optimize") as opened:
        done, facts = opened.optimize(anew=anew), opened.info()
    if done.coordinates is None:
        shown = "nothing to do: below 4,096 faces reading every vector is quick"
    elif not done.coordinates:
        shown = "searches read every vector: codes of these would not rule enough out"
    else:
        shown = (
            f"{facts.coded_faces:,} of {facts.faces:,} faces have codes of {done.coordinates} bytes "
            f"({terminal.size(facts.codes_bytes)}); {terminal.counted(done.encoded, 'vector file')} done now"
        )
    terminal.console().print(f"{'learned; ' if done.learned else ''}{shown}")


@app.command("rename-identity", rich_help_panel=_PANEL)
def rename_identity(
    gallery: GalleryArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Today's name.", show_default=False)],
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="A name that nobody has.", show_default=False)],
    no_alias: Annotated[bool, typer.Option("--no-alias", help="Keep no trace of the old name; a folder of that name is then somebody else.")] = False,
) -> None:  # fmt: skip
    """Give a person another name. The old one goes on to mean them, unless --no-alias."""
    with open_gallery(gallery, "rename-identity") as opened:
        faces = opened.rename_identity(name, new_name, keep_alias=not no_alias)
    terminal.console().print(terminal.text(f"{name} is {new_name} now ({terminal.counted(faces, 'face')})"))


@app.command("merge-identities", rich_help_panel=_PANEL)
def merge_identities(
    gallery: GalleryArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name that goes.", show_default=False)],
    into: Annotated[str, typer.Argument(metavar="INTO", help="The name that stays.", show_default=False)],
) -> None:
    """Make two names one person. The first goes on to mean the second."""
    with open_gallery(gallery, "merge-identities") as opened:
        faces = opened.merge_identities(name, into)
    terminal.console().print(terminal.text(f"{terminal.counted(faces, 'face')} of {name} are {into}'s now"))


@app.command(rich_help_panel=_PANEL)
def relocate(
    gallery: GalleryArgument,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The folder, archive or file that known paths begin with.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Where it lies now.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and do nothing.")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Rewrite the beginning of known paths after a library was moved or copied to another place.

    No file is read. To undo it, swap OLD and NEW; but only where no path was known below NEW before.
    """
    with open_gallery(gallery, "relocate") as opened:
        done = opened.relocate(old, new, dry_run=dry_run)
    if as_json:
        _print_json(asdict(done))
        return
    printed = terminal.console()
    would = "would be " if dry_run else ""
    printed.print(
        f"{terminal.counted(done.paths, 'path')} of {terminal.counted(done.faces, 'face')} {would}relocated; "
        f"{done.present:,} of these files are there"
    )
    for path in done.left:
        shown = f"  {would}left: {path}; other bytes are known at its new place"
        printed.print(terminal.text(shown))


@app.command(rich_help_panel=_PANEL)
def backup(
    gallery: GalleryArgument,
    target: Annotated[Path, typer.Argument(metavar="DEST", help="The backup's folder; the same one every time.", show_default=False)],
    verify: Annotated[bool, typer.Option(help="Read each copied file back and compare.")] = True,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Copy one consistent snapshot while others write. A second backup copies only what is new.

    Files of an earlier backup are read and compared; a damaged one is copied again.
    """
    with open_gallery(gallery, "backup") as opened:
        done = opened.backup(target, verify=verify)
    if as_json:
        _print_json(asdict(done))
        return
    terminal.console().print(
        f"backed up {terminal.counted(done.faces, 'face')} to {target}: {terminal.counted(done.segments_copied, 'vector file')} copied "
        f"({terminal.size(done.bytes_copied)}), {done.segments_kept:,} were there",
        markup=False,
    )


@app.command(rich_help_panel=_PANEL)
def restore(
    backup: Annotated[
        Path, typer.Argument(metavar="BACKUP", help="The backup's folder.", show_default=False)
    ],
    gallery: GalleryArgument,
    receipt: _Receipts = None,
    as_json: JsonOption = False,
) -> None:
    """Make a gallery what its backup says: a new one, or one that is there, in one transaction.

    What was forgotten since the backup stays forgotten.
    """
    from retrieval.gallery.gallery import Gallery

    receipts = [_read_receipt(path) for path in receipt or ()]
    done = Gallery.restore(backup, gallery, receipts=receipts, via="faceprint restore")
    if as_json:
        _print_json(asdict(done))
        return
    again = f"; {done.forgotten_again:,} that were forgotten since stay so" if done.forgotten_again else ""
    terminal.console().print(
        f"restored {terminal.counted(done.faces, 'face')} to {gallery}, as of {done.taken_at}{again}",
        markup=False,
    )


@app.command(rich_help_panel=_PANEL)
def export(
    gallery: GalleryArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Write vectors and metadata as Parquet, with the model's contract and checksums.

    Needs pyarrow: pip install 'faceprint[parquet]'.
    """
    with open_gallery(gallery, "export") as opened:
        done = opened.export(out)
    if as_json:
        _print_json(asdict(done))
        return
    size = terminal.size(sum(file.bytes for file in done.files))
    terminal.console().print(
        f"exported {terminal.counted(done.faces, 'face')} to {out} ({size} of Parquet)", markup=False
    )


@app.command("import", rich_help_panel=_PANEL)
def import_(
    source: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that `faceprint export` wrote.", show_default=False)],
    gallery: GalleryArgument,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The model of a new gallery: the one that made the vectors.", show_default=False)] = None,
) -> None:  # fmt: skip
    """Enroll what another gallery exported. A new gallery needs --model."""
    from retrieval.system.signals import graceful
    from retrieval.transfer.export_reader import read_export

    exported = read_export(source)
    # Nothing is embedded: the model is loaded to know that it runs.
    with open_or_create(gallery, model, "import", device="cpu") as opened, graceful() as should_stop:
        done = opened.import_export(exported, should_stop=should_stop)
    terminal.console().print(
        f"found [b]{done.found:,}[/b] = enrolled [b]{done.enrolled:,}[/b] + already known {done.known:,}"
        f" + duplicate {done.duplicate:,} + rejected {done.rejected:,}"
    )
    if done.interrupted:
        raise Interrupted("Stopped; what was enrolled stays, and the same command goes on from here.")


@app.command(rich_help_panel=_PANEL)
def audit(
    gallery: GalleryArgument,
    sample: Annotated[int | None, typer.Option(min=1, help="Look at about so many faces (whole people), each compared with all.", show_default="everything up to 50,000 faces, 20,000 of more")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    limit: Annotated[float, typer.Option(help="Doubt what is so many robust standard deviations from the usual.")] = 3.0,
    show: Annotated[int, typer.Option(min=0, help="How many doubts are printed, the most serious ones.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE.json", help="Write everything that was found.", show_default=False)] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write one page with the photos side by side.", show_default=False)] = None,
    fetch: _Fetch = False,
) -> None:  # fmt: skip
    """Doubt a gallery's names and photos: who is where they do not belong? Changes nothing.

    Photos unlike their person's others, two people who look like one, one who looks like two, near
    duplicates, photos that are close to everybody. (Who did what to a gallery is in `audit-log`.)
    """
    for path in (json_file, page):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(f"{path} is a folder, or its folder does not exist; name a file.")
    if not limit > 0:
        raise InputError("--limit must be above 0.")
    with open_gallery(gallery, "audit") as opened:
        found = _audit_with_progress(opened, sample=sample, seed=seed, limit=limit)
        fetching = opened.fetching(fetch=fetch)
    if json_file is not None:
        text = json.dumps(found.summary(), ensure_ascii=False, indent=1, allow_nan=False)
        _write(json_file, (text + "\n").encode("utf-8", "backslashreplace"))
    if page is not None:
        from retrieval.quality.audit_report import page as page_of

        _write(page, page_of(found, fetching))
    _print_audited(found, show)


@app.command("audit-log", rich_help_panel=_PANEL)
def audit_log(
    gallery: GalleryArgument,
    receipts: Annotated[bool, typer.Option("--receipts", help="The receipts of everything that was forgotten, instead.")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show who did what when. No name, path or embedding is in it."""
    with open_gallery(gallery, "audit-log") as opened:
        entries: list[Any] = list(opened.receipts() if receipts else opened.audit_log())
    if as_json:
        _print_json([asdict(entry) for entry in entries])
        return
    (_print_receipts if receipts else _print_audit)(entries)


@app.command(rich_help_panel=_PANEL)
def reembed(
    gallery: GalleryArgument,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The new model.", show_default=False)] = None,
    back: Annotated[bool, typer.Option("--back", help="Go back to the former model.")] = False,
    drop_other: Annotated[bool, typer.Option("--drop-other", help="Delete the model that does not serve, with its vectors.")] = False,
    no_switch: Annotated[bool, typer.Option("--no-switch", help="Get the new model ready and show the drift; stay with today's.")] = False,
    give_up: Annotated[bool, typer.Option("--give-up", help="Remove faces whose photos are gone or have changed.")] = False,
    fetch: _Fetch = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line for each face whose photo is gone or has changed.", show_default=False)] = None,
    device: DeviceOption = "auto",
) -> None:  # fmt: skip
    """Embed every photo with another model, beside the serving one, then switch in one transaction.

    Resumes where it stopped. --back returns to the former model, until --drop-other deletes it.
    """
    from retrieval.models.bundle import ModelBundle

    if sum([model is not None, back, drop_other]) != 1:
        raise InputError("Say which: --model MODEL, --back or --drop-other.")
    with open_gallery(gallery, "reembed", device=device) as opened:
        if drop_other:
            rows = opened.drop_other_model()
            terminal.console().print(f"deleted the other model and its {terminal.counted(rows, 'vector')}")
            return
        bundle = opened.other_model() if model is None else ModelBundle.load(model)
        done = _reembed_with_progress(opened, bundle, switch=not no_switch, give_up=give_up, fetch=fetch)
    _print_reembedded(done)
    if report is not None:
        _write_lines(report, [_lost(face, done.reasons[face.id]) for face in done.lost])
    if done.interrupted:
        raise Interrupted("Stopped; what was embedded stays, and the same command goes on from here.")
    if done.unfetched and not no_switch:
        raise RunError(_ask_to_fetch(len(done.unfetched)))
    if done.lost and not (give_up or no_switch):
        raise RunError(
            f"The photos of {terminal.counted(len(done.lost), 'face')} are gone or have changed, so {gallery} stays with its model; "
            "put them back and run the same command, or let these faces go with --give-up."
        )


def _ask_to_fetch(faces: int) -> str:
    return (
        f"The photos of {terminal.counted(faces, 'face')} lie at addresses; pass --fetch to read them from the "
        "hosts that `ingest` enrolled photos from, and give up what is left with --fetch --give-up."
    )


def open_or_create(
    folder: Path,
    model: Path | None,
    command: str,
    *,
    device: str = "auto",
    precision: str = "float32",
    share: str | None = None,
) -> "Gallery":
    """A gallery, made where there is none; `share` opens a new one to its group."""
    from retrieval.errors import GalleryError
    from retrieval.gallery.gallery import Gallery
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.embedder import Embedder
    from retrieval.system.files import is_free

    free = is_free(folder)
    if share is not None and not free:
        raise InputError(
            f"{folder} is there already; open it to its group with `chmod -R g+rX {folder}` and "
            f"`chmod g+s {folder}`."
        )
    if free and model is None:
        raise InputError(f"There is no gallery {folder}; pass --model MODEL to make one.")
    if free and model is not None:
        bundle = ModelBundle.load(model)
        # A model that does not run would leave a gallery that refuses every other one.
        embedder = Embedder.open(bundle, device=device, precision=precision)
        # Another process may make the gallery between our look and our making it: then it is opened.
        try:
            via = f"faceprint {command}"
            return Gallery.create(
                folder,
                bundle,
                device=device,
                precision=precision,
                via=via,
                shared=share is not None,
                embedder=embedder,
            )
        except BaseException as error:
            embedder.close()
            if not isinstance(error, GalleryError):
                raise
    gallery = open_gallery(folder, command, device=device, precision=precision)
    if model is not None:
        gallery.require(ModelBundle.load(model))
    return gallery


def _verify_backup(folder: Path, as_json: bool) -> None:
    from retrieval.storage.backup import check
    from retrieval.system.files import who_else_reads

    wrong = check(folder)
    if not as_json and (others := who_else_reads(folder)) is not None:
        terminal.console().print(terminal.text(f"  note: {others}", "dim"))
    if as_json:
        _print_json({"findings": wrong})
    elif not wrong:
        terminal.console().print(
            f"whole: every file of the backup {folder} is what was written", markup=False
        )
    if wrong:
        raise RunError(
            f"{folder / wrong[0]} is not what was written ({len(wrong):,} such files); back up again."
        )


def _print_verification(found: "Verification") -> None:
    printed = terminal.console()
    for finding in found.findings:
        printed.print(terminal.text(f"  {_line(finding)}"))
    for note in found.notes:
        printed.print(terminal.text(f"  note: {note}", "dim"))
    printed.print(
        f"{'[b]whole[/b]: ' if found.whole else ''}read {terminal.size(found.bytes)}: {terminal.counted(found.faces, 'face')}, "
        f"{terminal.counted(found.segments, 'vector file')}, {terminal.counted(len(found.findings), 'finding')}"
    )


def _line(finding: "Finding") -> str:
    return f"{finding.trouble}: " + (f"{finding.file}: " if finding.file else "") + finding.detail


def _audit_with_progress(gallery: "Gallery", **options: Any) -> "Audited":
    from retrieval.quality.audit import audit as audit_gallery
    from retrieval.system.signals import graceful

    with graceful() as should_stop, terminal.progress("auditing", rejects=False) as progress:
        task = progress.add_task("", total=None, pace="")

        def note(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return audit_gallery(gallery, on_progress=note, should_stop=should_stop, **options)


def _print_audited(found: "Audited", show: int) -> None:
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
    for name in ("doubt", "seen", "next"):
        table.add_column(name, overflow="fold")
    for doubt in found.doubts[:show]:
        shown = (HEADINGS[doubt.kind], doubt.says, doubt.next)
        table.add_row(f"{doubt.score:.1f}", *map(terminal.text, shown))
    if show and found.doubts:
        printed.print()
        printed.print(table, soft_wrap=False)
    left = len(found.doubts) - show
    if left > 0:
        printed.print(f"{terminal.counted(left, 'doubt')} more; --show, --json and --page have them")
    elif not found.doubts:
        printed.print("Nothing is doubted.")


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


def _reembed_with_progress(gallery: "Gallery", bundle: Any, **options: Any) -> "Reembedded":
    from retrieval.system.signals import graceful

    with graceful() as should_stop, terminal.progress("embedding") as progress:
        task = progress.add_task("", total=None, pace="", rejected=0)

        def note(done: int, total: int) -> None:
            pace = terminal.pace(done, total, progress.tasks[0].elapsed or 0.0)
            progress.update(task, completed=done, total=total, pace=pace)

        return gallery.reembed(bundle, on_progress=note, should_stop=should_stop, **options)


def _print_reembedded(done: "Reembedded") -> None:
    printed = terminal.console()
    printed.print(f"embedded {done.embedded:,} of {done.faces:,} faces in this run, {len(done.lost):,} lost")
    if done.drift is not None:
        drift = done.drift
        printed.print(
            f"drift, on {drift.sample:,} faces: of the {drift.neighbours} nearest, {drift.overlap:.1%} are the same"
        )
        if drift.same_person_before is not None and drift.same_person_after is not None:
            printed.print(
                f"  the nearest is the same person's: {drift.same_person_before:.1%} before, "
                f"{drift.same_person_after:.1%} after"
            )
        if drift.distance_ratio is not None:
            printed.print(
                f"  distances to the nearest: {drift.distance_ratio:.3f} times those before (median)"
            )
    printed.print("the new model answers from now on" if done.switched else "the old model goes on to answer")


def _read_receipt(path: Path) -> "Receipt":
    from retrieval.database.records import Receipt
    from retrieval.system.manifests import read_manifest

    advice = "pass a file that `faceprint forget --receipt` wrote"
    return read_manifest(path, Receipt, error=DataError, advice=advice)


def _lost(face: "Face", why: str) -> dict[str, Any]:
    """A line about a face that could not be embedded again: as it is stored, and why."""
    line = asdict(face)
    del line["meant"]  # says something of an answer to a search, not of the face
    return {**line, "detail": why}


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    from retrieval.system.files import write_durably

    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise InputError(f"The report {path} cannot be written: {error.strerror}.") from error


def _write(path: Path, data: bytes) -> None:
    from retrieval.system.files import why, write_durably

    try:
        write_durably(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {why(error)}.") from error


def _print_json(value: Any) -> None:
    convert: Callable[[Any], str] = str
    typer.echo(json.dumps(value, ensure_ascii=False, indent=1, default=convert))
