"""The commands that maintain a gallery: verify, repair, compact, optimize, relocate, reembed."""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.cli import options
from retrieval.cli.command import in_current_options
from retrieval.cli.opening import open_gallery, require_folder
from retrieval.cli.output import print_json, write_lines
from retrieval.console import terminal
from retrieval.errors import InputError, Interrupted, RunError
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.database.records import Face
    from retrieval.gallery.integrity import Finding, Verification
    from retrieval.gallery.reembed import Reembedded
    from retrieval.gallery.repair import Repaired


def verify(gallery: options.Gallery, as_json: options.Json = False) -> None:
    """Read every byte of a gallery, or of a backup, and compare with what was written.

    Exit status: 0 when everything is as it was written, 1 when something is not.
    """
    from retrieval.gallery.upkeep import verify_at
    from retrieval.storage.layout import BACKUP_CARD, DATABASE

    folder = gallery.folder
    if folder is not None and os.path.lexists(folder / BACKUP_CARD) and not (folder / DATABASE).exists():
        _verify_backup(folder, as_json)
        return
    found = verify_at(gallery)
    if as_json:
        print_json(asdict(found))
    else:
        _print_verification(found)
    if not found.whole:
        raise RunError(
            f"{gallery} is not what was written ({terminal.counted(len(found.findings), 'finding')}); "
            f"{_advice(gallery, found)}."
        )


def _advice(gallery: Place, found: "Verification") -> str:
    """Returns what to do about findings, as the end of a sentence."""
    from retrieval.gallery.integrity import Trouble

    if gallery.folder is not None:
        return f"see what `faceprint repair {shlex.quote(str(gallery))}` can mend"
    kinds = {finding.trouble for finding in found.findings}
    if kinds == {Trouble.LEFTOVER}:
        return "that is in no answer, and the next write removes it"
    if kinds <= {Trouble.LEFTOVER, Trouble.FACE_WITHOUT_VECTOR}:
        return (
            "restore Milvus from a backup, or `faceprint forget --face` the faces without a vector, which --json "
            "lists, and enroll their photos again"
        )
    return "restore its databases from backups"


def _verify_backup(folder: Path, as_json: bool) -> None:
    from retrieval.storage.backup_integrity import check_backup
    from retrieval.system.files import who_else_reads

    wrong = check_backup(folder)
    if not as_json and (others := who_else_reads(folder)) is not None:
        terminal.console().print(terminal.text(f"  note: {others}", "dim"))
    if as_json:
        print_json({"findings": wrong})
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
    """Returns a finding of the integrity check as text: its kind, its file if it is about one, the detail."""
    return f"{finding.trouble}: " + (f"{finding.file}: " if finding.file else "") + finding.detail


def repair(
    gallery: options.Gallery,
    backup: Annotated[Path | None, typer.Option(metavar="BACKUP", help="A backup, for files that have the SHA-256 which was written down.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="Another copy of the gallery's model.", show_default=False)] = None,
    give_up: Annotated[bool, typer.Option("--give-up", help="Remove faces with vectors that cannot be restored.")] = False,
    fetch: options.Fetch = False,
    as_json: options.Json = False,
    device: options.Device = "auto",
) -> None:  # fmt: skip
    """Mend what can be mended without a guess; list what cannot.

    Leftovers are removed, an interrupted erasure is finished, damaged files come back from a backup,
    lost vectors are embedded again from photos that still have the same SHA-256.

    Exit status: 0 when everything is whole, 1 when something is left.
    """
    from retrieval.gallery.repair import repair as repair_gallery
    from retrieval.models.bundle import ModelBundle

    bundle = ModelBundle.load(model) if model is not None else None
    done = repair_gallery(
        require_folder(gallery, "restore the databases from backups of their own"),
        backup=backup,
        model=bundle,
        give_up=give_up,
        fetch=fetch,
        device=device,
    )
    if as_json:
        reasons = {number: in_current_options(why) for number, why in done.reasons.items()}
        print_json(asdict(done) | {"reasons": reasons})
    else:
        _print_repaired(done)
    _fail_for_what_is_left(done, gallery)


def _print_repaired(done: "Repaired") -> None:
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
            f"{in_current_options(done.reasons[face.id])}"
        )
        printed.print(terminal.text(shown))


def _fail_for_what_is_left(done: "Repaired", gallery: Place) -> None:
    """Raises an error where something could not be repaired."""
    from retrieval.gallery.integrity import Trouble

    if done.unfetched:
        raise RunError(_ask_to_fetch(len(done.unfetched)))
    if done.lost:
        raise RunError(
            f"The photos of {terminal.counted(len(done.lost), 'face')} are gone or have changed; put them back, name a backup with "
            "--backup, or let these faces go with --give-up."
        )
    if not done.after.whole:
        suspect = any(one.trouble is Trouble.SUSPECT_VECTOR for one in done.after.findings)
        advice = (
            "do what is said about the faces that a damaged model may have embedded, or " if suspect else ""
        )
        raise RunError(f"Not everything could be mended; {advice}restore {gallery} from a backup.")


def compact(gallery: options.Gallery) -> None:
    """Merge vector files into as few as there can be, and close the database's gaps where they are large."""
    with open_gallery(gallery, "compact") as opened:
        done = opened.compact()
    terminal.console().print(
        f"{terminal.counted(done.segments_before, 'vector file')} became {done.segments_after:,}, "
        f"{terminal.size(done.bytes_before)} became {terminal.size(done.bytes_after)}"
    )


def optimize(
    gallery: options.Gallery,
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


def relocate(
    gallery: options.Gallery,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The folder, archive or file that known paths begin with.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Where it lies now.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and do nothing.")] = False,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Rewrite the beginning of known paths after a library was moved or copied to another place.

    No file is read. To undo it, swap OLD and NEW; but only where no path was known below NEW before.
    """
    with open_gallery(gallery, "relocate") as opened:
        done = opened.relocate(old, new, dry_run=dry_run)
    if as_json:
        print_json(asdict(done))
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


def reembed(
    gallery: options.Gallery,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The new model.", show_default=False)] = None,
    back: Annotated[bool, typer.Option("--back", help="Go back to the former model.")] = False,
    drop_other: Annotated[bool, typer.Option("--drop-other", help="Delete the model that does not serve, with its vectors.")] = False,
    no_switch: Annotated[bool, typer.Option("--no-switch", help="Get the new model ready and show the drift; stay with today's.")] = False,
    give_up: Annotated[bool, typer.Option("--give-up", help="Remove faces with missing or changed photos.")] = False,
    fetch: options.Fetch = False,
    report: Annotated[Path | None, options.report("face with a missing or changed photo")] = None,
    device: options.Device = "auto",
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
        with _embedding_progress() as (on_progress, should_stop):
            done = opened.reembed(
                bundle,
                switch=not no_switch,
                give_up=give_up,
                fetch=fetch,
                on_progress=on_progress,
                should_stop=should_stop,
            )
    _print_reembedded(done)
    if report is not None:
        write_lines(report, [_lost_line(face, done.reasons[face.id]) for face in done.lost])
    if done.interrupted:
        raise Interrupted("Stopped; what was embedded stays, and the same command goes on from here.")
    if done.unfetched and not no_switch:
        raise RunError(_ask_to_fetch(len(done.unfetched)))
    from retrieval.embedding.reread import TOGETHER

    together = sum(reason == TOGETHER for reason in done.reasons.values())
    if done.lost and together and not (give_up or no_switch):
        raise RunError(
            f"{terminal.counted(together, 'face')} of photos of several people cannot be told apart by a model without a face "
            f"detector, so {gallery} stays with its model; take a model with one, or let all {len(done.lost):,} faces that cannot be embedded go with --give-up."
        )
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


@contextmanager
def _embedding_progress() -> "Iterator[tuple[Callable[[int, int], None], Callable[[], bool]]]":
    """Shows a progress bar of faces; yields `on_progress` and `should_stop` of `Gallery.reembed`."""
    from retrieval.system.signals import graceful

    with graceful() as should_stop, terminal.progress("embedding") as progress:
        task = progress.add_task("", total=None, pace="", rejected=0)

        def note(done: int, total: int) -> None:
            pace = terminal.pace(done, total, progress.tasks[0].elapsed or 0.0)
            progress.update(task, completed=done, total=total, pace=pace)

        yield note, should_stop


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


def _lost_line(face: "Face", why: str) -> dict[str, Any]:
    """Returns the report line of a face that could not be embedded again: its stored fields, the reason."""
    line = asdict(face)
    del line["meant"]  # belongs to the answer of a search, not to the face
    return {**line, "detail": in_current_options(why)}
