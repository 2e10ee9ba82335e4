"""The commands that copy galleries: `backup` and `restore`, `export` and `import`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval.cli import options
from retrieval.cli.opening import open_gallery, open_or_create, require_folder
from retrieval.cli.output import print_json
from retrieval.console import terminal
from retrieval.errors import DataError, Interrupted
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.database.records import Receipt


_Receipts = Annotated[list[Path] | None, typer.Option("--receipt", metavar="FILE.json", help="A receipt of `forget` that neither backup nor gallery knows; may be repeated.", show_default=False)]  # fmt: skip


def backup(
    gallery: options.Gallery,
    target: Annotated[Path, typer.Argument(metavar="DEST", help="The backup's folder; the same one every time.", show_default=False)],
    verify: Annotated[bool, typer.Option(help="Read each copied file back and compare.")] = True,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Copy one consistent snapshot while others write. A second backup copies only what is new.

    Files of an earlier backup are read and compared; a damaged one is copied again.
    """
    with open_gallery(gallery, "backup") as opened:
        done = opened.backup(target, verify=verify)
    if as_json:
        print_json(asdict(done))
        return
    terminal.console().print(
        f"backed up {terminal.counted(done.faces, 'face')} to {target}: {terminal.counted(done.segments_copied, 'vector file')} copied "
        f"({terminal.size(done.bytes_copied)}), {done.segments_kept:,} were there",
        markup=False,
    )


def restore(
    backup: Annotated[
        Path, typer.Argument(metavar="BACKUP", help="The backup's folder.", show_default=False)
    ],
    gallery: options.Gallery,
    receipt: _Receipts = None,
    as_json: options.Json = False,
) -> None:
    """Make a gallery what its backup says: a new one, or one that is there, in one transaction.

    What was forgotten since the backup stays forgotten.
    """
    from retrieval.gallery.gallery import Gallery

    folder = require_folder(gallery, "restore it to one, and copy that with `faceprint copy`")
    receipts = [_read_receipt(path) for path in receipt or ()]
    done = Gallery.restore(backup, folder, receipts=receipts, via="faceprint restore")
    if as_json:
        print_json(asdict(done))
        return
    again = f"; {done.forgotten_again:,} that were forgotten since stay so" if done.forgotten_again else ""
    terminal.console().print(
        f"restored {terminal.counted(done.faces, 'face')} to {gallery}, as of {done.taken_at}{again}",
        markup=False,
    )


def _read_receipt(path: Path) -> "Receipt":
    from retrieval.database.records import Receipt
    from retrieval.system.manifests import read_manifest

    advice = "pass a file that `faceprint forget --receipt` wrote"
    return read_manifest(path, Receipt, error=DataError, advice=advice)


def copy(
    source: Annotated[Place, typer.Argument(metavar="FROM", help="The gallery: its folder, or the address of its database.", show_default=False, parser=Place.of)],
    target: Annotated[Place, typer.Argument(metavar="TO", help="A new folder, or the address of an empty schema in PostgreSQL.", show_default=False, parser=Place.of)],
    vectors: Annotated[str | None, typer.Option("--vectors-at", metavar="milvus://HOST:PORT/COLLECTION", help="With an address as TO: where it has its vectors.", show_default=False)] = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Copy a gallery to a folder or to databases, with all rows and vectors, and compare the two at the end.

    An interrupted copy goes on with what is missing. The copy is the same gallery, with the same UUID: write to one
    of the two only.
    """
    from retrieval.system.signals import graceful

    with (
        open_gallery(source, "copy") as opened,
        graceful() as should_stop,
        terminal.progress("copying") as progress,
    ):
        task = progress.add_task("", total=None, pace="", rejected=0)

        def note(done: int, total: int) -> None:
            pace = terminal.pace(done, total, progress.tasks[0].elapsed or 0.0)
            progress.update(task, completed=done, total=total, pace=pace)

        done = opened.copy(target, vectors=vectors, on_progress=note, should_stop=should_stop)
    if as_json:
        print_json(asdict(done))
        return
    there = done.faces - done.vectors
    terminal.console().print(
        f"copied {terminal.counted(done.faces, 'face')} to {done.target}"
        + (f", {there:,} of them in an earlier run" if there else "")
        + f"; rows and vectors are those of {opened.name}, SHA-256 {done.sha256[:16]}",
        markup=False,
    )


def export(
    gallery: options.Gallery,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Write vectors and metadata as Parquet, with the model's contract and checksums.

    Needs pyarrow: pip install 'faceprint[parquet]'.
    """
    with open_gallery(gallery, "export") as opened:
        done = opened.export(out)
    if as_json:
        print_json(asdict(done))
        return
    size = terminal.size(sum(file.bytes for file in done.files))
    terminal.console().print(
        f"exported {terminal.counted(done.faces, 'face')} to {out} ({size} of Parquet)", markup=False
    )


def import_(
    source: Annotated[Path, typer.Argument(metavar="EXPORT", help="A folder that `faceprint export` wrote.", show_default=False)],
    gallery: options.Gallery,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The model of a new gallery: the one that made the vectors.", show_default=False)] = None,
    vectors: options.Vectors = None,
) -> None:  # fmt: skip
    """Enroll what another gallery exported. A new gallery needs --model."""
    from retrieval.system.signals import graceful
    from retrieval.transfer.export_reader import read_export

    exported = read_export(source)
    # Nothing is embedded: the model is loaded only to check that it runs.
    with (
        open_or_create(gallery, model, "import", vectors=vectors, device="cpu") as opened,
        graceful() as should_stop,
    ):
        done = opened.import_export(exported, should_stop=should_stop)
    terminal.console().print(
        f"found [b]{done.found:,}[/b] = enrolled [b]{done.enrolled:,}[/b] + already known {done.known:,}"
        f" + duplicate {done.duplicate:,} + rejected {done.rejected:,}"
    )
    if done.interrupted:
        raise Interrupted("Stopped; what was enrolled stays, and the same command goes on from here.")
