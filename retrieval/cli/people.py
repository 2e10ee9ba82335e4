"""The commands that change identities: `forget`, `assign-identity`, `rename-identity`, `merge-identities`, ..."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.cli import options
from retrieval.cli.opening import open_gallery
from retrieval.console import terminal
from retrieval.errors import InputError, RunError
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.database.records import Merge


def forget(
    gallery: options.Gallery,
    identity: Annotated[str | None, typer.Option(metavar="NAME", help="Everything of a person.", show_default=False)] = None,
    face: Annotated[int | None, typer.Option(metavar="ID", help="One face.", show_default=False)] = None,
    path: Annotated[Path | None, typer.Option(metavar="FILE", help="The face of one file.", show_default=False)] = None,
    receipt: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the receipt, to be kept with the backups.", show_default=False)] = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Erase a person or a face: rows, vectors, logs, free pages. It cannot be undone.

    Prints a receipt, which holds nothing about the person. Restoring an older backup forgets again.
    Your photos, your backups and what the model's weights have learned are not touched.
    """
    if receipt is not None and os.path.lexists(receipt):
        raise InputError(f"The receipt {receipt} exists already; name another file.")
    with open_gallery(gallery, "forget") as opened:
        done = opened.forget(identity, face_id=face, path=path)
        remains, told = opened.vault.remains, opened.vault.told(done)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        terminal.console().print(
            f"forgot {terminal.counted(done.faces, 'face')}; receipt {done.id}, {done.at}, by {done.who}"
        )
        if remains is not None:
            terminal.console().print(remains, markup=False)
    if receipt is not None:
        _write_receipt(receipt, told, gallery)


def _write_receipt(path: Path, receipt: Mapping[str, Any], gallery: Place) -> None:
    """Writes the receipt of an erasure that is done already.

    Raises:
        RunError: the file cannot be written; the sentence says that the erasure is done all the same.
    """
    from retrieval.system.files import why, write_durably

    try:
        write_durably(path, (json.dumps(receipt) + "\n").encode())
    except OSError as error:
        raise RunError(
            f"{terminal.counted(receipt['faces'], 'face')} of {gallery} {'is' if receipt['faces'] == 1 else 'are'} erased, "
            f"but receipt {receipt['id']} cannot be written to {path}: {why(error)}; "
            f"`faceprint audit-log {shlex.quote(str(gallery))} --receipts --json` has it."
        ) from error


def assign_identity(
    gallery: options.Gallery,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose they are; a new name is a new identity.", show_default=False)],
    faces: Annotated[list[int], typer.Argument(metavar="FACE...", help="The faces, by the ids that searches show.", show_default=False)],
) -> None:  # fmt: skip
    """Give faces an identity, as those of a photo of several people."""
    with open_gallery(gallery, "assign-identity") as opened:
        changed = opened.assign_identity(faces, name)
    terminal.console().print(terminal.text(f"{terminal.counted(changed, 'face')} changed to {name}"))


def rename_identity(
    gallery: options.Gallery,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Today's name.", show_default=False)],
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="A name that is not in use.", show_default=False)],
    no_alias: Annotated[bool, typer.Option("--no-alias", help="Keep no trace of the old name; a folder of that name is then another identity.")] = False,
) -> None:  # fmt: skip
    """Give a person another name. The old one goes on to mean them, unless --no-alias."""
    with open_gallery(gallery, "rename-identity") as opened:
        faces = opened.rename_identity(name, new_name, keep_alias=not no_alias)
    terminal.console().print(terminal.text(f"{name} is {new_name} now ({terminal.counted(faces, 'face')})"))


def merge_identities(
    gallery: options.Gallery,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name that goes.", show_default=False)],
    into: Annotated[str, typer.Argument(metavar="INTO", help="The name that stays.", show_default=False)],
) -> None:
    """Make two names one person. The first goes on to mean the second. `undo-merge` undoes it."""
    from retrieval.gallery.merges import merge

    with open_gallery(gallery, "merge-identities") as opened:
        done = merge(opened.vault, name, into)
    printed = terminal.console()
    printed.print(terminal.text(f"{terminal.counted(done.faces, 'face')} of {name} are {into}'s now"))
    printed.print(terminal.text(f"to undo it: faceprint undo-merge {shlex.quote(str(gallery))} {done.id}"))


def undo_merge(
    gallery: options.Gallery,
    merge: Annotated[int | None, typer.Argument(metavar="MERGE", help="The number of a merge, as --list shows it.", show_default="the last one")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the merges that can be undone, the newest first; change nothing.")] = False,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Undo a merge of two people: the first is a person again, with the id, names, metadata and faces of before.

    Faces that were given to a third person since stay there. What was forgotten does not come back.
    """
    if show_list and merge is not None:
        raise InputError("--list lists all merges; leave MERGE out.")
    with open_gallery(gallery, "undo-merge") as opened:
        if show_list:
            _print_merges(opened.merges(), as_json=as_json)
            return
        done = opened.undo_merge(merge)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    for sentence in done.sentences():
        terminal.console().print(terminal.text(sentence))


def _print_merges(merges: "list[Merge]", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(merge) for merge in merges]))
        return
    printed = terminal.console()
    for one in merges:
        line = (
            f"{one.id}  {one.merged_at}  {terminal.counted(one.faces, 'face')} of {one.name} into {one.into}"
        )
        printed.print(terminal.text(line))
    if not merges:
        printed.print("No merge can be undone.")
