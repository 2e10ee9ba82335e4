"""The command `embed`: embeds photos into a file of vectors, without a gallery."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from retrieval.system.paths import is_url

if TYPE_CHECKING:
    from retrieval.bulk.embed import EmbedReport
    from retrieval.models.bundle import ModelBundle
    from retrieval.sources.photos import Photo


def embed(
    model: options.Model,
    sources: options.Sources,
    out: Annotated[str, options.output("FILE.parquet|FILE.npy|FOLDER", "Where the vectors go; FILE.npy has FILE.csv beside it. With --on ray: a folder, or an address such as s3://bucket/run.")],
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
    on: Annotated[str | None, typer.Option(metavar="ray", help="Embed with the machines of a Ray cluster, into a folder of Parquet parts.", show_default="this machine")] = None,
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="With --on: the cluster.", show_default="that of RAY_ADDRESS, else this machine alone")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="With --on: GPUs of a worker, of which a machine has as many as fit; 0 embeds on cores.", show_default="1 where a machine has a GPU, else 0")] = None,
    cores_per_worker: Annotated[int | None, typer.Option(min=1, help="With --on: cores of a worker without a GPU.", show_default="all of a machine")] = None,
    photos_per_part: Annotated[int, typer.Option(min=1, help="With --on: photos that a worker takes at a time, and that become one part.")] = 1024,
) -> None:  # fmt: skip
    """Embed photos without a gallery, into one file that is written whole or not at all.

    A model with a face detector embeds the main face of a photo with a name, and all faces of
    one without; any other model the middle square of it.

    `ingest --embeddings` takes a Parquet file as it is. After Ctrl-C there is no new file.

    With --on ray the machines of a cluster write parts of such a file into a folder, which `ingest
    --embeddings` takes, too. They read the photos by the same paths or addresses as this machine. The same
    command replaces what an unfinished run left.
    """
    from retrieval.bulk.embed import check_target
    from retrieval.models.bundle import ModelBundle
    from retrieval.sources.exclusion import PassedOver

    options.require(on in (None, "ray"), f"--on is {on!r}; there is ray, or leave it out for this machine")
    target = Path(out)
    if on is None:
        options.require(
            not is_url(out), f"--out {out} is an address; --on ray writes there, else name a file"
        )
        check_target(target)
    bundle = ModelBundle.load(model)
    selection = options.face_selection(faces, min_face, min_sharpness, max_yaw)
    options.require_detector(bundle, selection)
    passed_over = PassedOver()
    total, found = found_photos(
        sources, identity_from=identity_from, exclude=exclude or (), passed_over=passed_over
    )
    run: Callable[..., EmbedReport]
    if on is None:
        run = partial(_on_this_machine, bundle, found, target, device=device, precision=precision)
    else:
        run = partial(
            _on_ray,
            bundle,
            found,
            out,
            sources=sources,
            address=address,
            gpus_per_worker=gpus_per_worker,
            cores_per_worker=cores_per_worker,
            photos_per_part=photos_per_part,
            device=device,
            precision=precision,
        )
    with (
        ReportFile(report) as lines,
        watched("embedding", total, lines, log_json=log_json) as (on_outcome, should_stop),
    ):
        done = run(
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
        raise Interrupted(
            "Stopped; no file was written."
            if on is None
            else f"Stopped; {out} is not complete, and the same command replaces what is there."
        )
    fail_for_rejected(done, "embedded", report, "the same command", strict=strict)


def _on_this_machine(
    bundle: "ModelBundle", found: "Iterator[Photo]", target: Path, *, device: str, precision: str, **run: Any
) -> "EmbedReport":
    from retrieval.bulk.embed import embed_photos
    from retrieval.models.embedder import Embedder

    return embed_photos(Embedder.open(bundle, device=device, precision=precision), found, target, **run)


def _on_ray(bundle: "ModelBundle", found: "Iterator[Photo]", out: str, **run: Any) -> "EmbedReport":
    from retrieval.distributed.on_ray import embed_on_ray

    return embed_on_ray(bundle, found, out, **run)


def _print_embedded(done: "EmbedReport", out: str, report: ReportFile) -> None:
    console = terminal.console()
    console.print(
        f"found [b]{done.found:,}[/b] = embedded [b]{done.embedded:,}[/b] + rejected {done.rejected:,}"
    )
    print_reasons_and_pace(done)
    report.print_count()
    if done.embedded and not done.interrupted:
        console.print(f"{terminal.counted(done.faces, 'row')} in {out}", markup=False)
