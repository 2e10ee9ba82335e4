"""The command `ingest`: enrolls photos, or vectors, and sets metadata."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval.cli import options
from retrieval.cli.command import in_current_options
from retrieval.cli.opening import open_gallery, open_or_create
from retrieval.cli.photo_runs import (
    fail_for_rejected,
    found_photos,
    print_reasons_and_pace,
    tell_summary,
    watched,
)
from retrieval.cli.report_file import ReportFile
from retrieval.cli.show import TWINS_SHOWN, in_one_line
from retrieval.cli.sync_output import print_missing, print_relabelled
from retrieval.console import terminal
from retrieval.errors import InputError, Interrupted, Reason
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.bulk.reports import IngestReport
    from retrieval.gallery.gallery import Gallery
    from retrieval.images.photo_reader import FaceSelection
    from retrieval.sources.exclusion import PassedOver
    from retrieval.sources.metadata_tables import Annotations
    from retrieval.sources.photos import Photo


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """The arguments and options of one `faceprint ingest`."""

    gallery: Place
    vectors: str | None
    sources: Sequence[str]
    model: Path | None
    retry: Path | None
    embeddings: Sequence[str]
    metadata: Path | None
    identity_from: str | None
    exclude: Sequence[str]
    sync: bool
    gone: Sequence[str]
    relabel: bool
    dry_run: bool
    batch_size: int | None
    workers: int | None
    decoders: int | None
    photo_seconds: float
    selection: "FaceSelection"
    report: Path | None
    strict: bool
    rehash: bool
    summary: Path | None
    log_json: bool
    share: str | None
    device: str
    precision: str

    @property
    def enrolls(self) -> bool:
        """Whether anything is enrolled, and not only metadata set."""
        return bool(self.sources) or self.retry is not None or bool(self.embeddings)

    @property
    def mode(self) -> "Callable[[IngestOptions], None]":
        """The function that runs the command with these options."""
        if self.dry_run:
            return _show_changes
        if self.embeddings:
            return _enroll_vectors
        return _enroll_photos if self.enrolls else _set_metadata


def ingest(
    gallery: options.Gallery,
    sources: options.OptionalSources = None,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The model of a new gallery.", show_default=False)] = None,
    retry: Annotated[Path | None, typer.Option(metavar="REPORT.jsonl", help="Try the rejected files of a report again.", show_default=False)] = None,
    embeddings: Annotated[list[str] | None, typer.Option(metavar="FILE.parquet|FOLDER", help="Enroll vectors that exist already: a file, a folder of `embed --on ray`, a pattern in quotes, or addresses of them; may be repeated. --model names their model if the files do not.", show_default=False)] = None,
    metadata: Annotated[Path | None, typer.Option(metavar="FILE.csv|FILE.parquet", help="Then set what a table says: column path for faces, or identity for people; the others are keys.", show_default=False)] = None,
    identity_from: options.IdentityFrom = None,
    exclude: options.Exclude = None,
    sync: Annotated[bool, typer.Option("--sync", help="First follow moved files and renamed folders, and remove faces without any remaining file in the sources.")] = False,
    gone: Annotated[list[str] | None, typer.Option(metavar="FOLDER", help="With --sync: a folder or archive that is gone as a whole; may be repeated.", show_default=False)] = None,
    relabel: Annotated[bool, typer.Option("--relabel", help="First give photos that are enrolled under another name the name that the sources say now.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --sync or --relabel: list what would change, and do nothing.")] = False,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    decoders: options.Decoders = None,
    photo_seconds: options.PhotoSeconds = 60.0,
    faces: options.Faces = None,
    min_face: options.MinFace = None,
    min_sharpness: options.MinSharpness = None,
    max_yaw: options.MaxYaw = None,
    report: Annotated[Path | None, options.report("file that was not enrolled")] = None,
    strict: options.StrictFiles = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every file, also one that looks unchanged by size, time and inode.")] = False,
    summary: options.Summary = None,
    log_json: options.LogJson = False,
    vectors: options.Vectors = None,
    share: Annotated[str | None, typer.Option(metavar="group", help="Let the group read a new gallery, too.", show_default="only you can read it")] = None,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Enroll photos. The first ingest makes the gallery and needs --model.

    A model with a face detector embeds the main face of a photo with a name, and all faces of one without;
    any other model the middle square of it, so that photos must be cropped to faces beforehand.

    A file that cannot be read is a line in the report and never the end of the run. A photo is known by its
    bytes: a renamed file is enrolled already, a changed one takes the place of what it was. With
    --metadata and no source, nothing is enrolled.

    Exit status: 0 when every file is in the gallery, or was rejected for what it is; 1 when the run
    failed, or a file was rejected for a reason that may pass (permissions, a disk error), or with
    --strict for any; 2 when not one file could be enrolled; 130 after Ctrl-C (what was enrolled stays).
    """
    wanted = IngestOptions(
        gallery=gallery,
        vectors=vectors,
        sources=sources or (),
        model=model,
        retry=retry,
        embeddings=embeddings or (),
        metadata=metadata,
        identity_from=identity_from,
        exclude=exclude or (),
        sync=sync,
        gone=gone or (),
        relabel=relabel,
        dry_run=dry_run,
        batch_size=batch_size,
        workers=workers,
        decoders=decoders,
        photo_seconds=photo_seconds,
        selection=options.face_selection(faces, min_face, min_sharpness, max_yaw),
        report=report,
        strict=strict,
        rehash=rehash,
        summary=summary,
        log_json=log_json,
        share=share,
        device=device,
        precision=precision,
    )
    _check(wanted)
    wanted.mode(wanted)


def _check(wanted: IngestOptions) -> None:
    """Checks the options before anything is read or made.

    Raises:
        InputError: they do not select one thing to enroll, --share has another value, or the sources do not
            allow --sync or --relabel.
    """
    from retrieval.sources import photos

    given = sum([bool(wanted.sources), wanted.retry is not None, bool(wanted.embeddings)])
    options.require(
        given == 1 or (given == 0 and wanted.metadata is not None),
        "Name sources, or --retry REPORT, or --embeddings FILE; one of the three, or only --metadata FILE",
    )
    options.require(wanted.share in (None, "group"), "--share knows one word, group")
    if wanted.sync:
        photos.check_comparable([*wanted.sources, *wanted.gone])
    if wanted.relabel:
        _check_repeatable(wanted.sources)


def _check_repeatable(sources: Sequence[str]) -> None:
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


def _show_changes(wanted: IngestOptions) -> None:
    """Runs --dry-run: lists what --relabel and --sync would change."""
    with open_gallery(wanted.gallery, "ingest") as opened:
        _follow_sources(opened, wanted)


def _set_metadata(wanted: IngestOptions) -> None:
    """Runs --metadata alone: sets metadata and enrolls nothing."""
    table = _table(wanted)
    with ReportFile(wanted.report) as lines, open_gallery(wanted.gallery, "ingest") as opened:
        _annotate(opened, table, lines, wanted)


def _enroll_vectors(wanted: IngestOptions) -> None:
    """Runs --embeddings: enrolls vectors of files."""
    from retrieval.bulk.ingest import count_vectors, ingest_embeddings

    table = _table(wanted)
    total = count_vectors(wanted.embeddings)
    with (
        ReportFile(wanted.report) as lines,
        # Nothing is embedded: the model of a new gallery is loaded only to check that it runs.
        open_or_create(
            wanted.gallery,
            wanted.model,
            "ingest",
            vectors=wanted.vectors,
            device="cpu",
            share=wanted.share,
        ) as opened,
    ):
        with watched("enrolling", total, lines, log_json=wanted.log_json) as (on_outcome, should_stop):
            done = ingest_embeddings(
                opened,
                wanted.embeddings,
                trusted=wanted.model is not None,
                on_outcome=on_outcome,
                should_stop=should_stop,
            )
        _report(done, wanted)
        _annotate(opened, None if done.interrupted else table, lines, wanted)
    _raise_for_outcome(done, wanted)


def _enroll_photos(wanted: IngestOptions) -> None:
    """Enrolls the photos of sources, or with --retry the rejected photos of a report."""
    from retrieval.bulk.ingest import ingest_photos
    from retrieval.bulk.source_layout import Layout
    from retrieval.models.bundle import ModelBundle
    from retrieval.sources.exclusion import PassedOver

    # The table is read and checked completely before anything is enrolled.
    table, passed_over = _table(wanted), PassedOver()
    if wanted.model is not None:
        options.require_detector(ModelBundle.load(wanted.model), wanted.selection)
    total, found = _photos(wanted, passed_over)
    with (
        ReportFile(wanted.report) as lines,
        open_or_create(
            wanted.gallery,
            wanted.model,
            "ingest",
            vectors=wanted.vectors,
            device=wanted.device,
            precision=wanted.precision,
            share=wanted.share,
        ) as opened,
    ):
        options.require_detector(opened.bundle, wanted.selection)
        _follow_sources(opened, wanted)
        with watched("enrolling", total, lines, log_json=wanted.log_json) as (on_outcome, should_stop):
            done = ingest_photos(
                opened,
                found,
                layout=Layout(wanted.sources, wanted.identity_from),
                passed_over=passed_over,
                batch_size=wanted.batch_size,
                workers=wanted.workers,
                decoders=wanted.decoders,
                photo_seconds=wanted.photo_seconds,
                selection=wanted.selection,
                rehash=wanted.rehash,
                on_outcome=on_outcome,
                should_stop=should_stop,
            )
        _report(done, wanted)
        _annotate(opened, None if done.interrupted else table, lines, wanted)
    _raise_for_outcome(done, wanted)


def _photos(
    wanted: IngestOptions, passed_over: "PassedOver"
) -> "tuple[int | Callable[[], int | None], Iterator[Photo]]":
    return found_photos(
        wanted.sources,
        retry=wanted.retry,
        identity_from=wanted.identity_from,
        exclude=wanted.exclude,
        passed_over=passed_over,
    )


def _follow_sources(gallery: "Gallery", wanted: IngestOptions) -> None:
    """Carries out --relabel and --sync; with --dry-run, only lists the changes."""
    if wanted.relabel:
        _relabel(gallery, wanted)
    if wanted.sync:
        _sync(gallery, wanted)


def _relabel(gallery: "Gallery", wanted: IngestOptions) -> None:
    done = gallery.relabel(_renamed_photos(wanted), dry_run=wanted.dry_run)
    print_relabelled(done, dry_run=wanted.dry_run, log_json=wanted.log_json)


def _renamed_photos(wanted: IngestOptions) -> "Iterator[Photo]":
    """Returns the photos by whose identities --relabel changes those of stored faces."""
    from retrieval.sources.exclusion import PassedOver

    _, found = _photos(wanted, PassedOver())
    return _until_stopped(found)


def _sync(gallery: "Gallery", wanted: IngestOptions) -> None:
    from retrieval.sources import photos
    from retrieval.sources.exclusion import PassedOver

    act = gallery.remove_missing
    if wanted.dry_run:
        # A run with --relabel removes what is missing after it has relabelled.
        act = partial(
            gallery.missing_files, relabelled_by=_renamed_photos(wanted) if wanted.relabel else None
        )
    passed_over = PassedOver()
    scanned = photos.scan(
        wanted.sources, identity_from=wanted.identity_from, exclude=wanted.exclude, passed_over=passed_over
    )
    missing = act(wanted.sources, photos=_until_stopped(scanned), passed_over=passed_over, gone=wanted.gone)
    print_missing(missing, "would go" if wanted.dry_run else "went", log_json=wanted.log_json)


def _until_stopped(found: "Iterator[Photo]") -> "Iterator[Photo]":
    """Returns the same photos, which are read before anything is changed, and stops at Ctrl-C.

    Raises:
        Interrupted: Ctrl-C, between two photos.
    """
    from retrieval.system.signals import graceful

    with graceful() as should_stop:
        for photo in found:
            if should_stop():
                raise Interrupted("Stopped; nothing was changed.")
            yield photo


def _table(wanted: IngestOptions) -> "Annotations | None":
    """Returns the table of --metadata; None without that option."""
    from retrieval.sources.metadata_tables import read_annotations

    return None if wanted.metadata is None else read_annotations(wanted.metadata)


def _annotate(
    gallery: "Gallery", table: "Annotations | None", lines: ReportFile, wanted: IngestOptions
) -> None:
    """Sets the metadata of a table, if there is one; then says how many lines the report has.

    Raises:
        Interrupted: Ctrl-C while metadata were set.
    """
    stopped = table is not None and _set_rows(gallery, table, lines, log_json=wanted.log_json)
    if not wanted.log_json:
        lines.print_count()
    if stopped:
        raise Interrupted("Stopped; what was set stays, and the same command goes on from here.")


def _set_rows(gallery: "Gallery", table: "Annotations", lines: ReportFile, *, log_json: bool) -> bool:
    """Sets the metadata of a table, and prints the counts; returns whether Ctrl-C stopped it."""
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
    return done.interrupted


def _report(done: "IngestReport", wanted: IngestOptions) -> None:
    done.notes = tuple(map(in_current_options, done.notes))
    tell_summary(done, wanted.summary, log_json=wanted.log_json)
    if not wanted.log_json:
        _print_ingest(done)


def _raise_for_outcome(done: "IngestReport", wanted: IngestOptions) -> None:
    """Raises the error of a run that was stopped, or that rejected photos for which the command must fail."""
    if done.interrupted:
        raise Interrupted("Stopped; what was enrolled stays, and the same command goes on from here.")
    again = (
        f"`faceprint ingest {wanted.gallery} --retry {wanted.report}`"
        if wanted.report
        else "the same command"
    )
    fail_for_rejected(done, "enrolled", wanted.report, again, strict=wanted.strict)


def _print_ingest(done: "IngestReport") -> None:
    console = terminal.console()
    console.print(
        f"found [b]{done.found:,}[/b] = enrolled [b]{done.enrolled:,}[/b] + already known {done.known:,}"
        f" + duplicate {done.duplicate:,} + rejected {done.rejected:,}"
    )
    if done.faces > done.enrolled:
        enrolled = terminal.counted(done.enrolled, "enrolled photo")
        console.print(f"{terminal.counted(done.faces, 'face')} in {enrolled}")
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
