"""The command line: parse, call, print. Heavy imports stand inside the commands, so that help is instant."""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from retrieval.cli import calibrate, maintenance, search
from retrieval.cli import check as judge
from retrieval.console import terminal
from retrieval.console.terminal import (
    DeviceOption,
    ExcludeOption,
    GalleryArgument,
    JsonOption,
    PrecisionOption,
)
from retrieval.errors import (
    FaceprintError,
    InputError,
    Interrupted,
    MissingDependency,
    Reason,
    RunError,
)
from retrieval.system import streams

if TYPE_CHECKING:
    from retrieval.bulk.embed import EmbedReport
    from retrieval.bulk.ingest import IngestReport, Run
    from retrieval.console.progress import Progress
    from retrieval.database.store import Face
    from retrieval.embedding.outcome import Outcome
    from retrieval.gallery.gallery import Gallery
    from retrieval.gallery.info import GalleryInfo
    from retrieval.gallery.moves import Relabelled
    from retrieval.gallery.sync import Kept, Missing, Renamed
    from retrieval.models.bundle import Embedding, ModelBundle
    from retrieval.sources.exclusion import PassedOver
    from retrieval.sources.metadata_tables import Annotations
    from retrieval.sources.photos import Photo

app = typer.Typer(
    name="faceprint",
    help="Who is this, and which stored photos are closest?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE...]",
        help="Folders with one subfolder per identity, flat folders, files, archives (.tar, .tar.gz, .zip), lists (.txt, .csv, .parquet), addresses; - for paths on standard input.",
        show_default=False,
    ),
]
_NeededSources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Folders with one subfolder per identity, flat folders, files, archives (.tar, .tar.gz, .zip), lists (.txt, .csv, .parquet), addresses; - for paths on standard input.",
        show_default=False,
    ),
]
_IdentityFrom = Annotated[
    str | None,
    typer.Option(
        metavar="first|parent|none|COLUMN|REGEX",
        help="What names the person: the first folder below the source, the folder of the file, nothing, a column of a list, or a regular expression (with a group in parentheses) on the path below the source.",
        show_default="first; in lists the column identity, else parent",
    ),
]
_Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder.", show_default=False)]

_LENGTH = "raw, or unit: embeddings divided by their Euclidean length."
_LAYERS = "Layers to embed, with commas: layer1 to layer4."
_POOLING = "avg, the mean over the picture, or gem, its generalized mean."
_DIMENSIONS = "Project to so many principal components of the training photos."
_WHITEN = "Divide each component by its standard deviation."

app.add_typer(search.app)
app.add_typer(calibrate.app)
app.add_typer(maintenance.app)
app.add_typer(judge.app)


def main() -> None:
    """The console script: every error a user can cause is one sentence and an exit status."""
    streams.restart_in_utf8()
    streams.prepare()
    # Pillow warns of odd files as it reads them; what matters of that stands in the report.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        _run()
    except SystemExit as end:
        lost = streams.lost()
        if lost is not None and not end.code:
            _fail(
                f"The output is not complete: {(lost.strerror or str(lost)).lower()}.", RunError.exit_status
            )
        raise


def _run() -> None:
    try:
        app(prog_name="faceprint")
    except FaceprintError as error:
        _fail(str(error), error.exit_status)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"The operating system refused{where}: {error.strerror or error}.", RunError.exit_status)


def _fail(sentence: str, status: int) -> NoReturn:
    from retrieval.system.paths import printable

    # It may contain a path, which may be any bytes and must not control the terminal.
    typer.echo("\n".join(map(printable, f"faceprint: {sentence}".split("\n"))), err=True)
    raise SystemExit(status)


def _version(wanted: bool) -> None:
    if wanted:
        from retrieval import __version__

        typer.echo(f"faceprint {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Who is this, and which stored photos are closest?"""


@app.command()
def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder with one subfolder of photos per identity, or a list of photos (.csv, .txt, .parquet).", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="MODEL", help="The new model's folder.", show_default=False)],
    weights: Annotated[str, typer.Option(help="Where to start from: imagenet (downloaded), none, or a FILE of ResNet50 weights.")] = "imagenet",
    recipe: Annotated[str, typer.Option(metavar="paper|modern", help="How to train: as the paper says, or as measured best on the same epochs.")] = "paper",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training photos.", show_default="6")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Photos per step.", show_default="10")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the recipe's; 0.01 is the paper's")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD, from 0 to below 1.", show_default="0.9")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of each identity's photos to hold out.")] = 0.3,
    min_images: Annotated[int | None, typer.Option(min=2, help="Leave out identities with fewer photos than this.", show_default=False)] = None,
    exclude: ExcludeOption = None,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Side of the network's input in pixels.")] = 224,
    crop: Annotated[float, typer.Option(help="Share of the shorter side to keep, centred.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the split, the order and the augmentation.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read photos.", show_default="0 on a CPU, one per core up to 8 beside a GPU")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16", help="Of the training steps; auto is bf16 on a GPU that has it, else fp32.")] = "auto",
    length: Annotated[str | None, typer.Option(metavar="raw|unit", help=_LENGTH, show_default="the recipe's; raw is the paper's")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYER,...", help=_LAYERS, show_default="layer4")] = None,
    pooling: Annotated[str | None, typer.Option(metavar="avg|gem", help=_POOLING, show_default="avg")] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help=_DIMENSIONS, show_default=False)] = None,
    whiten: Annotated[bool, typer.Option("--whiten", help=_WHITEN)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from MODEL's checkpoint.")] = False,
) -> None:  # fmt: skip
    """Fine-tune ResNet50 on identity folders; write a model, its report and its figures.

    No face is looked for: the middle square of each photo is what the network sees; crop photos to faces
    beforehand. The defaults are the paper's recipe. Ctrl-C ends cleanly with a checkpoint; --resume goes on
    from it.
    """
    _check(lr is None or lr > 0, "--lr must be above 0")
    _check(momentum is None or 0 <= momentum < 1, "--momentum must be at least 0 and below 1")
    _check(precision in ("auto", "fp32", "bf16"), "--precision must be auto, fp32 or bf16")
    _check(0 < val_fraction < 1, "--val-fraction must lie between 0 and 1")
    _check(0 < crop <= 1, "--crop must be above 0 and at most 1")
    cli = _training("commands.train")
    _check(recipe in cli.RECIPES, f"--recipe must be {' or '.join(cli.RECIPES)}")
    from retrieval.models.bundle import Preprocessing

    start = cli.RECIPES[recipe]
    embedding = _embedding(
        start.embedding,
        length=length,
        layers=layers,
        pooling=pooling,
        dimensions=dimensions,
        whiten=whiten or None,
    )
    wishes = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "momentum": momentum}
    chosen = {name: wish for name, wish in wishes.items() if wish is not None}
    cli.train(
        data,
        out,
        config=replace(start.config, seed=seed, **chosen),
        options=cli.TrainingOptions(
            weights=weights,
            validation_fraction=val_fraction,
            min_images=min_images,
            preprocessing=Preprocessing(size=image_size, crop=crop, colour="srgb"),
            workers=workers,
            device=device,
            precision=precision,
            resume=resume,
            embedding=embedding,
            exclude=tuple(exclude or ()),
        ),
    )


@app.command()
def derive(
    model: _Model,
    out: Annotated[Path, typer.Option(metavar="NEW", help="The new model's folder.", show_default=False)],
    length: Annotated[str | None, typer.Option(metavar="raw|unit", help=_LENGTH, show_default="MODEL's")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYER,...", help=_LAYERS, show_default="MODEL's")] = None,
    pooling: Annotated[str | None, typer.Option(metavar="avg|gem", help=_POOLING, show_default="MODEL's")] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help=_DIMENSIONS, show_default="MODEL's")] = None,
    whiten: Annotated[bool | None, typer.Option("--whiten/--no-whiten", help=_WHITEN, show_default="MODEL's")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DATA", help="The photos MODEL was trained on; figures are measured on them, a projection is learned from its training photos.", show_default=False)] = None,
    device: DeviceOption = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read photos.")] = 0,
) -> None:  # fmt: skip
    """Make a model that embeds in another way from a trained one, without training again."""
    from retrieval.models.bundle import ModelBundle

    opened = ModelBundle.load(model)
    embedding = _embedding(
        opened.embedding, length=length, layers=layers, pooling=pooling, dimensions=dimensions, whiten=whiten
    )
    cli = _training("commands.train")
    cli.derive(opened, out, embedding, data=data, device=device, workers=workers)


def _embedding(base: "Embedding", *, layers: str | None, **choices: Any) -> "Embedding":
    """An embedding with some other choices; those that are None stay."""
    if layers is not None:
        # Their order is the network's, however they are named.
        choices["layers"] = tuple(sorted({layer.strip() for layer in layers.split(",")}))
    return replace(base, **{name: choice for name, choice in choices.items() if choice is not None})


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder; with --compare, A.", show_default=False)],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder with one subfolder of photos per identity; with --compare, B.", show_default=False)],
    compared_on: Annotated[Path | None, typer.Argument(metavar="DATA", help="With --compare of two models: the photos to evaluate both on.", show_default=False)] = None,
    protocol: Annotated[str | None, typer.Option(metavar="closed|open|lfw-pairs", help="Who is it, who is it if anybody, or are these two the same.", show_default="closed; open with --gallery")] = None,
    gallery: Annotated[Path | None, typer.Option(metavar="GALLERY", help="Search DATA's photos in this gallery.", show_default=False)] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="FILE", help="For lfw-pairs: pairs and folds, as LFW's pairs.txt.", show_default=False)] = None,
    weights: Annotated[str | None, typer.Option(metavar="imagenet|FILE", help="What training started from: measures the network before fine-tuning too.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Lay two folders of --out, or two models, side by side, with paired tests.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write report.html, metrics.json and photos.csv; with --compare, report.html and comparison.json.", show_default=False)] = None,
    check: Annotated[Path | None, typer.Option(metavar="FILE.json", help="With --out: show what `faceprint check --json` found in the report.", show_default=False)] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of each identity's photos to search for, where the model's own split does not say.")] = 0.3,
    min_images: Annotated[int, typer.Option(min=2, help="For open: identities with so many photos are enrolled, the others are strangers.")] = 10,
    exclude: ExcludeOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 2, help="Of the split and of the intervals.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read photos.", show_default="one per processor")] = None,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
) -> None:  # fmt: skip
    """Measure how good a model is, each figure with its 95% interval, beside baselines on the same photos."""
    _check(0 < val_fraction < 1, "--val-fraction must lie between 0 and 1")
    _check(compare or compared_on is None, "A third folder goes with --compare; name MODEL and DATA")
    _check(check is None or (out is not None and not compare), "--check goes with --out, without --compare")
    printing = _training("commands.evaluate")
    options = printing.Options(
        protocol=protocol,
        gallery=gallery,
        pairs=pairs,
        weights=weights,
        fraction=val_fraction,
        min_images=min_images,
        seed=seed,
        workers=workers,
        device=device,
        precision=precision,
        exclude=tuple(exclude or ()),
    )
    if compare:
        printing.compare(model, data, compared_on, options=options, out=out, as_json=as_json)
    else:
        printing.evaluate(model, data, options=options, out=out, as_json=as_json, check=check)


@app.command()
def model(
    model: _Model,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print the layer table too (needs torch).")
    ] = False,
) -> None:
    """Show a model's card: labels, preprocessing, recipe, figures, fingerprint."""
    from retrieval.models.bundle import ModelBundle

    bundle = ModelBundle.load(model)
    _print_card(bundle)
    if layers:
        _training("commands.train").print_layers(bundle)


@app.command()
def ingest(
    gallery: GalleryArgument,
    sources: _Sources = None,
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The model of a new gallery.", show_default=False)] = None,
    retry: Annotated[Path | None, typer.Option(metavar="REPORT.jsonl", help="Try the rejected files of a report again.", show_default=False)] = None,
    embeddings: Annotated[Path | None, typer.Option(metavar="FILE.parquet", help="Enroll vectors that exist already; --model says whose, where the file does not.", show_default=False)] = None,
    metadata: Annotated[Path | None, typer.Option(metavar="FILE.csv|FILE.parquet", help="Then set what a table says: column path for faces, or identity for people; the others are keys.", show_default=False)] = None,
    identity_from: _IdentityFrom = None,
    exclude: ExcludeOption = None,
    sync: Annotated[bool, typer.Option("--sync", help="First follow files that were moved or whose folder was renamed, and remove faces whose every file is gone from the sources.")] = False,
    gone: Annotated[list[str] | None, typer.Option(metavar="FOLDER", help="With --sync: a folder or archive that is gone as a whole; may be repeated.", show_default=False)] = None,
    relabel: Annotated[bool, typer.Option("--relabel", help="First give photos that are enrolled under another name the name that the sources say now.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --sync or --relabel: list what would change, and do nothing.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Photos that are embedded together.", show_default="64 on a CPU, what a GPU is fastest with")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read photos.", show_default="one per processor")] = None,
    decoders: Annotated[int | None, typer.Option(min=0, help="Processes that decode what the threads read; 0: the threads do.", show_default="0 on a CPU, one per core beside a GPU")] = None,
    photo_seconds: Annotated[float, typer.Option(min=0.001, help="Seconds that decoding one photo may take.")] = 60.0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line for each file that was not enrolled.", show_default=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when any file was rejected.")] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every file, also one that looks unchanged by size, time and inode.")] = False,
    summary: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write counts, stage times, rates and peak memory.", show_default=False)] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Print progress, rejected files and the summary as lines of JSON instead of text.")] = False,
    share: Annotated[str | None, typer.Option(metavar="group", help="Let the group read a new gallery, too.", show_default="only you can read it")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
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
    _check(
        given == 1 or (given == 0 and metadata is not None),
        "Name sources, or --retry REPORT, or --embeddings FILE; one of the three, or only --metadata FILE",
    )
    _check(bool(sources) or not sync, "--sync needs the sources, to see which files are gone from them")
    _check(share in (None, "group"), "--share knows one word, group")
    _check(sync or not gone, "--gone goes with --sync")
    _check(embeddings is None or not relabel, "--relabel is about photos, not about --embeddings")
    _check(given == 1 or not relabel, "--relabel needs the sources that say who is on the photos")
    _check(sync or relabel or not dry_run, "--dry-run goes with --sync or --relabel")
    _check(embeddings is None or not rehash, "--rehash is about files, not about --embeddings")
    _check(identity_from is None or bool(sources), "--identity-from is about sources; name some")
    _check(not exclude or bool(sources), "--exclude is about sources; name some")
    from retrieval.sources import photos
    from retrieval.sources.exclusion import PassedOver

    if sync:
        photos.check_comparable([*sources, *(gone or [])])
    if relabel:
        _check_repeatable(sources)

    def follow(opened: "Gallery") -> None:
        if relabel:
            _, offered = _found(sources, retry, identity_from, exclude or [], PassedOver())
            found = _until_stopped(offered)
            _print_relabelled(opened.relabel(found, dry_run=dry_run), dry_run=dry_run, log_json=log_json)
        if sync:
            act = opened.missing_files if dry_run else opened.remove_missing
            passed_over = PassedOver()
            scanned = photos.scan(
                sources, identity_from=identity_from, exclude=exclude or [], passed_over=passed_over
            )
            missing = act(sources, photos=_until_stopped(scanned), passed_over=passed_over, gone=gone or ())
            _print_missing(missing, "would go" if dry_run else "went", log_json=log_json)

    if dry_run:
        with maintenance.open_gallery(gallery, "ingest") as opened:
            follow(opened)
        return
    # All of the table is read before anything is enrolled.
    table = _metadata_of(metadata) if metadata is not None else None
    if table is not None and not given:
        with _ReportFile(report) as lines, maintenance.open_gallery(gallery, "ingest") as opened:
            _annotate(opened, table, lines, log_json=log_json)
        return
    work = (
        _embeddings_of(embeddings, model)
        if embeddings
        else _photos_of(sources, retry, identity_from, exclude or [], rehash=rehash)
    )
    with (
        _ReportFile(report) as lines,
        maintenance.open_or_create(
            gallery, model, "ingest", device=device, precision=precision, share=share
        ) as opened,
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
        _tell_summary(done, summary, log_json=log_json)
        if not log_json:
            _print_ingest(done, report)
        if table is not None and not done.interrupted:
            _annotate(opened, table, lines, log_json=log_json)
    if done.interrupted:
        raise Interrupted("Stopped; what was enrolled stays, and the same command goes on from here.")
    again = f"ingest {gallery} --retry {report}" if report else "the same command"
    _fail_for_rejected(done, "enrolled", report, again, strict=strict)


@app.command()
def embed(
    model: _Model,
    sources: _NeededSources,
    out: Annotated[Path, typer.Option(metavar="FILE.parquet|FILE.npy", help="Where the vectors go; FILE.npy has FILE.csv beside it.", show_default=False)],
    identity_from: _IdentityFrom = None,
    exclude: ExcludeOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Photos that are embedded together.", show_default="64 on a CPU, what a GPU is fastest with")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read photos.", show_default="one per processor")] = None,
    decoders: Annotated[int | None, typer.Option(min=0, help="Processes that decode what the threads read; 0: the threads do.", show_default="0 on a CPU, one per core beside a GPU")] = None,
    photo_seconds: Annotated[float, typer.Option(min=0.001, help="Seconds that decoding one photo may take.")] = 60.0,
    report: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line for each file that was not embedded.", show_default=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when any file was rejected.")] = False,
    summary: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write counts, stage times, rates and peak memory.", show_default=False)] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Print progress, rejected files and the summary as lines of JSON instead of text.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
) -> None:  # fmt: skip
    """Embed photos without a gallery, into one file that is written whole or not at all.

    No face is looked for: the middle square of each photo is what the network sees.

    `ingest --embeddings` takes a Parquet file as it is. After Ctrl-C there is no new file.
    """
    from retrieval.bulk.embed import check_target, embed_photos
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.embedder import Embedder
    from retrieval.sources.exclusion import PassedOver
    from retrieval.system.signals import graceful

    check_target(out)
    bundle = ModelBundle.load(model)
    passed_over = PassedOver()
    total, found = _found(sources, None, identity_from, exclude or [], passed_over)
    embedder = Embedder.open(bundle, device=device, precision=precision)
    with (
        _ReportFile(report) as lines,
        graceful() as should_stop,
        _progress("embedding", total, log_json=log_json) as progress,
    ):

        def note(outcome: "Outcome") -> None:
            lines.write(outcome)
            progress.note(outcome)

        options: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "decoders": decoders,
            "photo_seconds": photo_seconds,
            "passed_over": passed_over,
        }
        done = embed_photos(embedder, found, out, on_outcome=note, should_stop=should_stop, **options)
    _tell_summary(done, summary, log_json=log_json)
    if not log_json:
        _print_embedded(done, out, report)
    if done.interrupted:
        raise Interrupted("Stopped; no file was written.")
    _fail_for_rejected(done, "embedded", report, "the same command", strict=strict)


@app.command()
def info(gallery: GalleryArgument, as_json: JsonOption = False) -> None:
    """Show what a gallery holds."""
    import dataclasses

    with maintenance.open_gallery(gallery, "info") as opened:
        facts = opened.info()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(facts), ensure_ascii=False, indent=1))
        return
    terminal.print_facts(
        f"Gallery {facts.folder}",
        {
            "faces": f"{facts.faces:,} of {facts.identities:,} identities"
            + (f", {facts.faces_without_identity:,} without one" if facts.faces_without_identity else ""),
            "most photos": ", ".join(f"{name} {number:,}" for name, number in facts.largest[:5])
            or "none yet",
            "on disk": f"{terminal.size(facts.vector_bytes)} of vectors in "
            f"{terminal.counted(facts.segments, 'file')}, "
            f"{terminal.size(facts.database_bytes)} of metadata",
            "search": _how_searched(facts),
            "decisions": _how_decided(facts),
            "embedding": f"{facts.dimension} float32 numbers, exact Euclidean distance",
            "classifier": f"{facts.classifier_labels:,} identities, {facts.input_size} x {facts.input_size} pixels",
            "model": facts.fingerprint,
            "created": facts.created_at,
            **({"twins": [_twins(names) for names in facts.twins[:_TWINS_SHOWN]]} if facts.twins else {}),
        },
    )


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(metavar="DATA", help="Your own identity folders.", show_default="drawn faces")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path("demo"),
) -> None:  # fmt: skip
    """Train, enroll, search and report, from nothing, in a few minutes and without a network.

    Without --data the faces are drawn by a program: they show how it works, not how good it is.
    """
    _training("run")  # says what to install when torch is missing
    from retrieval.cli import walkthrough

    walkthrough.run(data, out)


def _how_searched(facts: "GalleryInfo") -> str:
    """How the nearest are found, in words."""
    if facts.coordinates is None:
        return "reads every vector; `faceprint compact` learns codes from 4,096 faces on"
    if not facts.coordinates:
        return "reads every vector: codes of these would not rule enough out"
    share = facts.coded_faces / facts.faces if facts.faces else 0.0
    return (
        f"by codes of {facts.coordinates} bytes, learned from the gallery, for {share:.1%} of the faces "
        f"({terminal.size(facts.codes_bytes)}); exact, as reading every vector is"
    )


def _how_decided(facts: "GalleryInfo") -> str:
    """By which threshold searches decide, and what that makes one expect, in words."""
    from retrieval.database.store import Calibration
    from retrieval.search.calibration import foretold

    if facts.calibration is None:
        return "none: there is no threshold yet; find one with `faceprint calibrate`"
    found = Calibration.of(facts.calibration)
    point = found.point()
    if point is None:
        return "none"
    return f"UNKNOWN beyond {point.threshold:.3f}, for an FPIR of {point.fpir:g}; {foretold(point)}"


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise InputError(f"{sentence}.")


def _training(module: str) -> Any:
    """A module of `training`, which needs torch and what the report is made with."""
    from importlib import import_module

    try:
        return import_module(f"training.{module}")
    except ImportError as error:
        raise MissingDependency(
            f"This command needs {error.name or 'torch'}; install it with pip install 'faceprint[train]'."
        ) from error


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
    total, found = _found(sources, retry, identity_from, exclude, passed_over)
    layout = Layout(sources, identity_from)

    def run(gallery: "Gallery", **options: Any) -> "IngestReport":
        return ingest_photos(gallery, found, layout=layout, passed_over=passed_over, rehash=rehash, **options)

    return _Work(total, run)


def _found(
    sources: list[str],
    retry: Path | None,
    identity_from: str | None,
    exclude: list[str],
    passed_over: "PassedOver",
) -> "tuple[int | Callable[[], int | None], Iterator[Photo]]":
    """Photos, at least one of them, and how many they are or how to count them.

    Raises:
        InputError: there is not one.
    """
    from functools import partial
    from itertools import chain

    from retrieval.sources import photos

    reported = photos.from_report(retry) if retry is not None else None
    scan = partial(
        photos.scan, sources, identity_from=identity_from, exclude=exclude, passed_over=passed_over
    )
    found = scan() if reported is None else iter(reported)
    # Before a gallery is made: sources that give nothing are a mistake.
    first = next(found, None)
    if first is None:
        named = f"{', '.join(sources)}{passed_over.aside()}"
        where = f"rejected photos in {retry}" if retry else f"photos in {named}"
        raise InputError(f"There are no {where}; check the path.")
    counted = partial(photos.count, sources, exclude=exclude)
    return counted if reported is None else len(reported), chain([first], found)


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


def _annotate(gallery: "Gallery", table: "Annotations", lines: "_ReportFile", *, log_json: bool) -> None:
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
    lines: "_ReportFile",
    *,
    log_json: bool,
    **options: Any,
) -> "IngestReport":
    from retrieval.system.signals import graceful

    with graceful() as should_stop, _progress("enrolling", work.total, log_json=log_json) as progress:

        def note(outcome: "Outcome") -> None:
            lines.write(outcome)
            progress.note(outcome)

        return work.run(gallery, on_outcome=note, should_stop=should_stop, **options)


def _progress(verb: str, total: "int | Callable[[], int | None]", *, log_json: bool) -> "Progress":
    from retrieval.console.progress import Bar, JsonLog, Total

    return JsonLog(verb, Total(total)) if log_json else Bar(verb, Total(total))


def _tell_summary(done: "Run", path: Path | None, *, log_json: bool) -> None:
    """Writes the summary where it is wanted."""
    from retrieval.console.progress import JsonLog
    from retrieval.system.files import why, write_durably

    if log_json:
        JsonLog.event("done", summary=done.summary())
    if path is not None:
        try:
            write_durably(path, (json.dumps(done.summary(), ensure_ascii=False, indent=1) + "\n").encode())
        except OSError as error:
            raise InputError(f"The summary {path} cannot be written: {why(error)}.") from error


def _fail_for_rejected(done: "Run", verb: str, report: Path | None, again: str, *, strict: bool) -> None:
    """Ends the command with an error where rejected files are one."""
    where = report or "--report FILE"
    if done.rejected == done.found:
        raise InputError(f"Not one of the {done.found:,} files could be {verb}; {where} says why.")
    if done.worth_retrying:
        raise RunError(
            f"{done.worth_retrying:,} of the {done.rejected:,} rejected files could not be read this time; "
            f"{where} says which and why. Mend that and run {again} again."
        )
    if strict and done.rejected:
        raise RunError(f"{done.rejected:,} files were rejected; {where} says which and why.")


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


def _print_missing(missing: "Missing", verb: str, *, log_json: bool) -> None:
    if log_json:
        import dataclasses

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
            terminal.text(f"  {verb}: face {face.id}, {face.identity or '-'}, {terminal.near(face.path)}")
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
        shown = f"  {would}held back: face {face.id}, {face.identity or '-'}, {terminal.near(face.path)}"
        console.print(terminal.text(shown))
    places = [f"{terminal.near(one.path)} ({one.why})" for one in missing.unseen[:_MAX_UNSEEN_SHOWN]]
    more = len(missing.unseen) - len(places)
    said = "; ".join([*places, *([f"and {more:,} more"] if more else [])])
    advice = []
    if any(one.rule is None for one in missing.unseen):
        advice.append("make that readable, or leave it out with --exclude, and run this again")
    if any(one.rule is not None for one in missing.unseen):
        advice.append("run this without that rule, or name what is gone for good with --gone")
    console.print(
        terminal.text(
            f"{terminal.counted(len(missing.held), 'face')} {would}held back, because the photos may be where "
            f"nothing could be looked at: {said}; {'; '.join(advice)}; or remove them with `faceprint forget`"
        )
    )


def _print_relabelled(done: "Relabelled", *, dry_run: bool, log_json: bool) -> None:
    changes = list(zip(done.faces, done.identities, strict=True))
    if log_json:
        import dataclasses

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
            shown = (
                f"  {would}relabelled: face {face.id}, {face.identity} -> {name}, {terminal.near(face.path)}"
            )
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
            f"{terminal.near(path)} ({name or 'no name'})"
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


# Places that a sentence names.
_MAX_UNSEEN_SHOWN = 3

_LINE = ("path", "identity", "status", "reason", "detail", "face_id", "replaced")


class _ReportFile:
    """A line of JSON for each file that was not enrolled; complete or absent, never half a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> "_ReportFile":
        if self.path is not None:
            if self.path.is_dir():
                raise InputError(f"The report {self.path} is a folder; name a file.")
            from retrieval.system.files import replacing

            self.replacing = replacing(self.path)
            with self._translated():
                self.file = io.TextIOWrapper(self.replacing.__enter__(), encoding="utf-8")
        return self

    @contextmanager
    def _translated(self) -> "Iterator[None]":
        from retrieval.system.files import why

        try:
            yield
        except OSError as error:
            raise InputError(f"The report {self.path} cannot be written: {why(error)}.") from error

    def write(self, outcome: Any) -> None:
        if outcome.status not in ("enrolled", "embedded"):
            self._write({name: getattr(outcome, name) for name in _LINE})

    def write_unknown(self, *, path: str | None = None, identity: str | None = None) -> None:
        """A line for a row of metadata that is about nothing in the gallery."""
        line = {
            "path": path,
            "identity": identity,
            "status": "unknown",
            "detail": "metadata of nothing enrolled",
        }
        self._write({**dict.fromkeys(_LINE), **line})

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self._translated():
                self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(self, *_: object) -> None:
        # A run that failed has a report too: of what it had come to.
        if self.path is not None:
            with self._translated():
                self.file.detach()  # which flushes it, and leaves the file open
                self.replacing.__exit__(None, None, None)


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
    _print_reasons_and_pace(done)
    if done.reasons[Reason.IDENTITY_CONFLICT]:
        console.print(
            "Photos that are enrolled under another name get the one that is said now by --relabel."
        )
    if not done.enrolled and not done.rejected and not done.interrupted:
        console.print("Nothing new: every photo was in the gallery already.")
    for names in done.twins[:_TWINS_SHOWN]:
        console.print(terminal.text(f"note: {_twins(names)}; `faceprint merge-identities` joins two."))
    if len(done.twins) > _TWINS_SHOWN:
        console.print(f"note: {len(done.twins) - _TWINS_SHOWN:,} more names have such twins")
    if report is not None and done.enrolled < done.found:
        console.print(f"{terminal.counted(done.found - done.enrolled, 'line')} in {report}", markup=False)


_TWINS_SHOWN = 5


def _twins(names: Sequence[str]) -> str:
    shown = [repr(name) if name != " ".join(name.split()) else name for name in names]
    return f"{', '.join(shown[:-1])} and {shown[-1]} are {len(names)} identities"


def _print_embedded(done: "EmbedReport", out: Path, report: Path | None) -> None:
    console = terminal.console()
    console.print(
        f"found [b]{done.found:,}[/b] = embedded [b]{done.embedded:,}[/b] + rejected {done.rejected:,}"
    )
    _print_reasons_and_pace(done)
    if report is not None and done.rejected:
        console.print(f"{terminal.counted(done.rejected, 'line')} in {report}", markup=False)
    if done.embedded and not done.interrupted:
        console.print(f"{terminal.counted(done.embedded, 'row')} in {out}", markup=False)


def _print_reasons_and_pace(done: "Run") -> None:
    console = terminal.console()
    for reason, number in done.reasons.most_common():
        console.print(f"  {number:>7,}  {reason}")
    if done.passed_over:
        console.print(terminal.text(f"passed over: {done.passed_over}"))
    console.print(f"in {done.seconds:,.1f} s, {_how_quick(done)}")


def _how_quick(done: "Run") -> str:
    """Rates, what limited them, and what memory it took."""
    words = [f"{done.photos_per_second:,.0f} photos/s"]
    if done.bytes_read:
        words.append(f"{done.bytes_read / 1e6 / done.seconds:,.1f} MB/s read")
    limit = done.bottleneck
    if limit is not None:
        share = min(1.0, limit.busy_seconds / limit.workers / max(done.seconds, 1e-9))
        words.append(f"the busiest stage was {limit.name} ({share:.0%} of the time)")
    if done.batch_size is not None:
        words.append(f"batches of {done.batch_size:,}")
    if done.optimizing_seconds > 0.1:
        words.append(f"making searches quick took {done.optimizing_seconds:,.1f} s")
    return ", ".join([*words, f"at most {terminal.size(done.peak_memory)} of memory"])


def _print_card(bundle: "ModelBundle") -> None:
    names = ", ".join(bundle.labels[:8]) + (
        f", and {len(bundle.labels) - 8} more" if len(bundle.labels) > 8 else ""
    )
    figures = {
        key.replace("_", " "): f"{value:.4f}" if isinstance(value, float) and value <= 1 else value
        for key, value in bundle.figures.items()
    }
    recipe = {key.replace("_", " "): value for key, value in bundle.recipe.items()}
    terminal.print_facts(
        f"Model {bundle.folder}",
        {
            "architecture": bundle.architecture,
            "labels": f"{len(bundle.labels):,}: {names}",
            "preprocessing": f"central square of {bundle.preprocessing.crop:g} x the shorter side, "
            f"resized to {bundle.input_size} x {bundle.input_size}, RGB uint8"
            + (", colours converted to sRGB" if bundle.preprocessing.colour == "srgb" else ""),
            "embedding": f"{bundle.embedding}, {bundle.dimension} float32 numbers",
            "split": f"{len(bundle.split.get('train', [])):,} photos to learn from, "
            f"{len(bundle.split.get('validation', [])):,} held out",
            "created": f"{bundle.created_at} with "
            + ", ".join(f"{k} {v}" for k, v in bundle.versions.items()),
            "fingerprint": bundle.fingerprint,
            **({"model card": bundle.description_path.name} if bundle.description_path.is_file() else {}),
        },
    )
    terminal.print_facts("Figures", figures)
    terminal.print_facts("Recipe", recipe)


if __name__ == "__main__":
    main()
