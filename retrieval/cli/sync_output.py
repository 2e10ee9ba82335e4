"""Output of `ingest` for `--sync` and `--relabel`: what they changed, or would change with `--dry-run`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from retrieval.console import terminal

if TYPE_CHECKING:
    from retrieval.database.records import Face
    from retrieval.gallery.moves import Relabelled
    from retrieval.gallery.sync import Kept, Missing, Renamed

# Unreadable or excluded places that a sentence names.
_MAX_UNSEEN_SHOWN: Final = 3


def print_missing(missing: "Missing", verb: str, *, log_json: bool) -> None:
    """Prints the changes of --sync; `verb` is "went", or "would go" with --dry-run."""
    if log_json:
        from retrieval.console.progress import JsonLog

        JsonLog.event(
            "sync",
            done=verb == "went",
            files=len(missing.paths),
            faces=[_shown_face(face) for face in missing.faces],
            moved=[_shown_face(face) for face in missing.moved],
            renamed=[dataclasses.asdict(one) for one in missing.renamed],
            kept=[_shown_kept(one) for one in missing.kept],
            held=[_shown_face(face) for face in missing.held],
            unseen={one.path: one.why for one in missing.unseen},
        )
        return
    console = terminal.console()
    would = "would be " if verb == "would go" else ""
    _print_renamed(missing.renamed, would)
    for face in missing.faces:
        console.print(
            terminal.text(
                f"  {verb}: face {face.id}, {face.identity or '-'}, {terminal.relative_path(face.path)}"
            )
        )
    _print_kept(missing.kept, would)
    console.print(
        f"{terminal.counted(len(missing.paths), 'file')} gone from the sources; "
        f"{terminal.counted(len(missing.faces), 'face')} {verb} with them"
        + (f", {len(missing.moved):,} {would}found at another path" if missing.moved else "")
        + (f", {len(missing.kept):,} {would}kept" if missing.kept else "")
    )
    _print_held(missing, would)


def _print_held(missing: "Missing", would: str) -> None:
    if not missing.held:
        return
    console = terminal.console()
    for face in missing.held:
        shown = (
            f"  {would}held back: face {face.id}, {face.identity or '-'}, {terminal.relative_path(face.path)}"
        )
        console.print(terminal.text(shown))
    places = [f"{terminal.relative_path(one.path)} ({one.why})" for one in missing.unseen[:_MAX_UNSEEN_SHOWN]]
    more = len(missing.unseen) - len(places)
    where = "; ".join([*places, *([f"and {more:,} more"] if more else [])])
    advice = []
    if any(one.rule is None for one in missing.unseen):
        advice.append("make that readable, or leave it out with --exclude, and run this again")
    if any(one.rule is not None for one in missing.unseen):
        advice.append("run this without that rule, or name what is gone for good with --gone")
    console.print(
        terminal.text(
            f"{terminal.counted(len(missing.held), 'face')} {would}held back, because the photos may be where "
            f"nothing could be looked at: {where}; {'; '.join(advice)}; or remove them with `faceprint forget`"
        )
    )


def print_relabelled(done: "Relabelled", *, dry_run: bool, log_json: bool) -> None:
    """Prints the changes of --relabel."""
    changes = list(zip(done.faces, done.identities, strict=True))
    if log_json:
        from retrieval.console.progress import JsonLog

        JsonLog.event(
            "relabel",
            done=not dry_run,
            faces=[{**_shown_face(face), "new_identity": name} for face, name in changes],
            renamed=[dataclasses.asdict(one) for one in done.renamed],
            kept=[_shown_kept(one) for one in done.kept],
        )
        return
    console = terminal.console()
    would = "would be " if dry_run else ""
    _print_renamed(done.renamed, would)
    whole = {one.name for one in done.renamed}
    for face, name in changes:
        if face.identity not in whole:
            shown = f"  {would}relabelled: face {face.id}, {face.identity} -> {name}, {terminal.relative_path(face.path)}"
            console.print(terminal.text(shown))
    _print_kept(done.kept, would)
    console.print(
        f"{terminal.counted(len(changes), 'face')} {would}relabelled"
        + (
            f", {len(done.kept):,} {would}kept: the sources have them under several names"
            if done.kept
            else ""
        )
    )


def _print_renamed(renamed: "Sequence[Renamed]", would: str) -> None:
    for one in renamed:
        verb = "merged into" if one.merged else "renamed to"
        faces = terminal.counted(one.faces, "face")
        terminal.console().print(terminal.text(f"  {one.name}: {would}{verb} {one.new_name} ({faces})"))


def _print_kept(kept: "Sequence[Kept]", would: str) -> None:
    for one in kept:
        places = ", ".join(
            f"{terminal.relative_path(path)} ({name or 'no name'})"
            for path, name in zip(one.paths, one.identities, strict=True)
        )
        shown = (
            f"  {would}kept: face {one.face.id}, {one.face.identity or 'no name'}; its bytes are at {places}"
        )
        terminal.console().print(terminal.text(shown))


def _shown_face(face: "Face") -> dict[str, Any]:
    return {"id": face.id, "identity": face.identity, "path": face.path}


def _shown_kept(one: "Kept") -> dict[str, Any]:
    return {**_shown_face(one.face), "found": dict(zip(one.paths, one.identities, strict=True))}
