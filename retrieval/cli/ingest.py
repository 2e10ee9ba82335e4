"""The command `ingest`: enrolls photos, or vectors, and sets metadata."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.cli import options
from retrieval.cli.opening import open_gallery, open_or_create
from retrieval.cli.photo_runs import (
    fail_for_rejected,
    found_photos,
    print_reasons_and_pace,
    run_progress,
    tell_summary,
)
from retrieval.cli.report_file import ReportFile
from retrieval.cli.show import TWINS_SHOWN, in_one_line
from retrieval.cli.sync_output import print_missing, print_relabelled
from retrieval.console import terminal
from retrieval.errors import InputError, Interrupted, Reason

if TYPE_CHECKING:
    from retrieval.bulk.ingest import IngestReport
    from retrieval.embedding.outcome import Outcome
    from retrieval.gallery.gallery import Gallery
    from retrieval.sources.metadata_tables import Annotations
    from retrieval.sources.photos import Photo


def ingest(
    gallery: options.Gallery,
    sources: options.OptionalSources = None,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The model of a new gallery.", show_default=False)] = None,
    retry: Annotated[Path | None, typer.Option(metavar="REPORT.jsonl", help="Try the rejected files of a report again.", show_default=False)] = None,
    embeddings: Annotated[Path | None, typer.Option(metavar="FILE.parquet", help="Enroll vectors that exist already; --model says whose, where the file does not.", show_default=False)] = None,
    metadata: Annotated[Path | None, typer.Option(metavar="FILE.csv|FILE.parquet", help="Then set what a table says: column path for faces, or identity for people; the others are keys.", show_default=False)] = None,
    identity_from: options.IdentityFrom = None,
    exclude: options.Exclude = None,
    sync: Annotated[bool, typer.Option("--sync", help="First follow files that were moved or whose folder was renamed, and remove faces whose every file is gone from the sources.")] = False,
    gone: Annotated[list[str] | None, typer.Option(metavar="FOLDER", help="With --sync: a folder or archive that is gone as a whole; may be repeated.", show_default=False)] = None,
    relabel: Annotated[bool, typer.Option("--relabel", help="First give photos that are enrolled under another name the name that the sources say now.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --sync or --relabel: list what would change, and do nothing.")] = False,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    decoders: options.Decoders = None,
    photo_seconds: options.PhotoSeconds = 60.0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line for each file that was not enrolled.", show_default=False)] = None,
    strict: options.StrictFiles = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every file, also one that looks unchanged by size, time and inode.")] = False,
    summary: options.Summary = None,
    log_json: options.LogJson = False,
    share: Annotated[str | None, typer.Option(metavar="group", help="Let the group read a new gallery, too.", show_default="only you can read it")] = None,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Enroll photos. The first ingest makes the gallery and needs --model.

    No face is looked for: the middle square of each photo is what the network sees; crop photos to faces
    beforehand.

    A file that cannot be read is a line in the report and never the end of the run. A photo is known by its
    bytes: a renamed file is enrolled already, a changed one takes the place of what it was. With
    --metadata and no source, nothing is enrolled.

    Exit status: 0 when every file is in the gallery, or was rejected for what it is; 1 when the run
    failed, or a file was rejected for a reason that may pass (permissions, a disk error), or with
    --strict for any; 2 when not one file could be enrolled; 130 after Ctrl-C (what was enrolled stays).
    """
    sources = sources or []
    given = sum([bool(sources), retry is not None, embeddings is not None])
    options.require(
        given == 1 or (given == 0 and metadata is not None),
        "Name sources, or --retry REPORT, or --embeddings FILE; one of the three, or only --metadata FILE",
    )
    options.require(
        bool(sources) or not sync, "--sync needs the sources, to see which files are gone from them"
    )
    options.require(share in (None, "group"), "--share knows one word, group")
    options.require(sync or not gone, "--gone goes with --sync")
    options.require(embeddings is None or not relabel, "--relabel is about photos, not about --embeddings")
    options.require(given == 1 or not relabel, "--relabel needs the sources that say who is on the photos")
    options.require(sync or relabel or not dry_run, "--dry-run goes with --sync or --relabel")
    options.require(embeddings is None or not rehash, "--rehash is about files, not about --embeddings")
    options.require(identity_from is None or bool(sources), "--identity-from is about sources; name some")
    options.require(not exclude or bool(sources), "--exclude is about sources; name some")
    from retrieval.sources import photos
    from retrieval.sources.exclusion import PassedOver

    if sync:
        photos.check_comparable([*sources, *(gone or [])])
    if relabel:
        _check_repeatable(sources)

    def follow(opened: "Gallery") -> None:
        if relabel:
            _, offered = found_photos(sources, retry, identity_from, exclude or [], PassedOver())
            found = _until_stopped(offered)
            print_relabelled(opened.relabel(found, dry_run=dry_run), dry_run=dry_run, log_json=log_json)
        if sync:
            act = opened.missing_files if dry_run else opened.remove_missing
            passed_over = PassedOver()
            scanned = photos.scan(
                sources, identity_from=identity_from, exclude=exclude or [], passed_over=passed_over
            )
            missing = act(sources, photos=_until_stopped(scanned), passed_over=passed_over, gone=gone or ())
            print_missing(missing, "would go" if dry_run else "went", log_json=log_json)

    if dry_run:
        with open_gallery(gallery, "ingest") as opened:
            follow(opened)
        return
    # All of the table is read before anything is enrolled.
    table = _metadata_of(metadata) if metadata is not None else None
    if table is not None and not given:
        with ReportFile(report) as lines, open_gallery(gallery, "ingest") as opened:
            _annotate(opened, table, lines, log_json=log_json)
        return
    work = (
        _embeddings_of(embeddings, model)
        if embeddings
        else _photos_of(sources, retry, identity_from, exclude or [], rehash=rehash)
    )
    with (
        ReportFile(report) as lines,
        open_or_create(gallery, model, "ingest", device=device, precision=precision, share=share) as opened,
    ):
        follow(opened)
        done = _ingest_with_progress(
            opened,
            work,
            lines,
            log_json=log_json,
            batch_size=batch_size,
            workers=workers,
            decoders=decoders,
            photo_seconds=photo_seconds,
        )
        tell_summary(done, summary, log_json=log_json)
        if not log_json:
            _print_ingest(done, report)
        if table is not None and not done.interrupted:
            _annotate(opened, table, lines, log_json=log_json)
    if done.interrupted:
        raise Interrupted("Stopped; what was enrolled stays, and the same command goes on from here.")
    again = f"ingest {gallery} --retry {report}" if report else "the same command"
    fail_for_rejected(done, "enrolled", report, again, strict=strict)


@dataclass(frozen=True)
class _Work:
    """What an ingest is to do: how many rows, or how to count them, and the call that does it."""

    total: "int | Callable[[], int | None]"
    run: "Callable[..., IngestReport]"


def _photos_of(
    sources: list[str], retry: Path | None, identity_from: str | None, exclude: list[str], *, rehash: bool
) -> _Work:
    from retrieval.bulk.ingest import ingest_photos
    from retrieval.bulk.source_layout import Layout
    from retrieval.sources.exclusion import PassedOver

    passed_over = PassedOver()
    total, found = found_photos(sources, retry, identity_from, exclude, passed_over)
    layout = Layout(sources, identity_from)

    def run(gallery: "Gallery", **options: Any) -> "IngestReport":
        return ingest_photos(gallery, found, layout=layout, passed_over=passed_over, rehash=rehash, **options)

    return _Work(total, run)


def _embeddings_of(path: Path, model: Path | None) -> _Work:
    from retrieval.bulk.ingest import ingest_embeddings
    from retrieval.transfer.exchange import count_embeddings

    def run(gallery: "Gallery", *, on_outcome: Any, should_stop: Any, **about_photos: Any) -> "IngestReport":
        return ingest_embeddings(
            gallery, path, trusted=model is not None, on_outcome=on_outcome, should_stop=should_stop
        )

    return _Work(count_embeddings(path), run)


def _metadata_of(path: Path) -> "Annotations":
    from retrieval.sources.metadata_tables import read_annotations

    return read_annotations(path)


def _annotate(gallery: "Gallery", table: "Annotations", lines: "ReportFile", *, log_json: bool) -> None:
    from retrieval.bulk.ingest import ingest_metadata
    from retrieval.system.signals import graceful

    noun, kind = ("face", "path") if table.about == "path" else ("identity", "identity")
    with graceful() as should_stop:
        done = ingest_metadata(
            gallery,
            table,
            on_unknown=lambda name: lines.write_unknown(**{kind: name}),
            should_stop=should_stop,
        )
    if log_json:
        from retrieval.console.progress import JsonLog

        JsonLog.event("metadata", set=done.set, unchanged=done.unchanged, unknown=done.unknown)
    else:
        terminal.console().print(
            f"metadata: {terminal.counted(done.set, noun)} set, {done.unchanged:,} unchanged, "
            f"{terminal.counted(done.unknown, kind)} unknown"
        )
    if done.interrupted:
        raise Interrupted("Stopped; what was set stays, and the same command goes on from here.")


def _ingest_with_progress(
    gallery: "Gallery",
    work: _Work,
    lines: "ReportFile",
    *,
    log_json: bool,
    **options: Any,
) -> "IngestReport":
    from retrieval.system.signals import graceful

    with graceful() as should_stop, run_progress("enrolling", work.total, log_json=log_json) as bar:

        def note(outcome: "Outcome") -> None:
            lines.write(outcome)
            bar.note(outcome)

        return work.run(gallery, on_outcome=note, should_stop=should_stop, **options)


def _until_stopped(found: "Iterator[Photo]") -> "Iterator[Photo]":
    """Photos that are looked at before anything is changed.

    Raises:
        Interrupted: Ctrl-C, between two of them.
    """
    from retrieval.system.signals import graceful

    with graceful() as should_stop:
        for photo in found:
            if should_stop():
                raise Interrupted("Stopped; nothing was changed.")
            yield photo


def _check_repeatable(sources: list[str]) -> None:
    """Checks that sources can be read a second time.

    Raises:
        InputError: standard input, or a pipe.
    """
    for source in sources:
        if source == "-" or (
            os.path.exists(source) and not (os.path.isfile(source) or os.path.isdir(source))
        ):
            raise InputError(
                f"--relabel reads sources twice, and {source} can be read once; write its paths into a .txt, "
                "and name that."
            )


def _print_ingest(done: "IngestReport", report: Path | None) -> None:
    console = terminal.console()
    console.print(
        f"found [b]{done.found:,}[/b] = enrolled [b]{done.enrolled:,}[/b] + already known {done.known:,}"
        f" + duplicate {done.duplicate:,} + rejected {done.rejected:,}"
    )
    if done.identities_from:
        named = terminal.counted(done.identities, "identity")
        console.print(terminal.text(f"{named}, from {done.identities_from}"))
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    print_reasons_and_pace(done)
    if done.reasons[Reason.IDENTITY_CONFLICT]:
        console.print(
            "Photos that are enrolled under another name get the one that is said now by --relabel."
        )
    if not done.enrolled and not done.rejected and not done.interrupted:
        console.print("Nothing new: every photo was in the gallery already.")
    for names in done.twins[:TWINS_SHOWN]:
        console.print(terminal.text(f"note: {in_one_line(names)}; `faceprint merge-identities` joins two."))
    if len(done.twins) > TWINS_SHOWN:
        console.print(f"note: {len(done.twins) - TWINS_SHOWN:,} more names have such twins")
    if report is not None and done.enrolled < done.found:
        console.print(f"{terminal.counted(done.found - done.enrolled, 'line')} in {report}", markup=False)
