"""The command `embed`: embeds photos into a file of vectors, without a gallery."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from retrieval.cli import options
from retrieval.cli.photo_runs import (
    fail_for_rejected,
    found_photos,
    print_reasons_and_pace,
    tell_summary,
    watched,
)
from retrieval.cli.report_file import ReportFile
from retrieval.console import terminal
from retrieval.errors import Interrupted

if TYPE_CHECKING:
    from retrieval.bulk.embed import EmbedReport


def embed(
    model: options.Model,
    sources: options.Sources,
    out: Annotated[Path, options.output("FILE.parquet|FILE.npy", "Where the vectors go; FILE.npy has FILE.csv beside it.")],
    identity_from: options.IdentityFrom = None,
    exclude: options.Exclude = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    decoders: options.Decoders = None,
    photo_seconds: options.PhotoSeconds = 60.0,
    faces: options.Faces = None,
    min_face: options.MinFace = None,
    min_sharpness: options.MinSharpness = None,
    max_yaw: options.MaxYaw = None,
    report: Annotated[Path | None, options.report("file that was not embedded")] = None,
    strict: options.StrictFiles = False,
    summary: options.Summary = None,
    log_json: options.LogJson = False,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Embed photos without a gallery, into one file that is written whole or not at all.

    A model with a face detector embeds one face of each photo; any other model the middle square of it.

    `ingest --embeddings` takes a Parquet file as it is. After Ctrl-C there is no new file.
    """
    from retrieval.bulk.embed import check_target, embed_photos
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.embedder import Embedder
    from retrieval.sources.exclusion import PassedOver

    check_target(out)
    bundle = ModelBundle.load(model)
    selection = options.face_selection(faces, min_face, min_sharpness, max_yaw)
    options.require_detector(bundle, selection)
    passed_over = PassedOver()
    total, found = found_photos(
        sources, identity_from=identity_from, exclude=exclude or (), passed_over=passed_over
    )
    embedder = Embedder.open(bundle, device=device, precision=precision)
    with (
        ReportFile(report) as lines,
        watched("embedding", total, lines, log_json=log_json) as (on_outcome, should_stop),
    ):
        done = embed_photos(
            embedder,
            found,
            out,
            batch_size=batch_size,
            workers=workers,
            decoders=decoders,
            photo_seconds=photo_seconds,
            selection=selection,
            passed_over=passed_over,
            on_outcome=on_outcome,
            should_stop=should_stop,
        )
    tell_summary(done, summary, log_json=log_json)
    if not log_json:
        _print_embedded(done, out, lines)
    if done.interrupted:
        raise Interrupted("Stopped; no file was written.")
    fail_for_rejected(done, "embedded", report, "the same command", strict=strict)


def _print_embedded(done: "EmbedReport", out: Path, report: ReportFile) -> None:
    console = terminal.console()
    console.print(
        f"found [b]{done.found:,}[/b] = embedded [b]{done.embedded:,}[/b] + rejected {done.rejected:,}"
    )
    print_reasons_and_pace(done)
    report.print_count()
    if done.embedded and not done.interrupted:
        console.print(f"{terminal.counted(done.faces, 'row')} in {out}", markup=False)
