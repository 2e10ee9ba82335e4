"""The command line: parse, call, print. Heavy imports stand inside the commands, so that help is instant."""

import io
import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from retrieval.errors import (
    FaceprintError,
    GalleryError,
    InputError,
    Interrupted,
    MissingDependency,
    RunError,
)

if TYPE_CHECKING:
    from retrieval.bundle import ModelBundle
    from retrieval.gallery import Gallery, SearchResult
    from retrieval.ingestion import IngestReport

app = typer.Typer(
    name="faceprint",
    help="Who is this, and which stored photos are closest?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Gallery = Annotated[
    Path, typer.Argument(metavar="GALLERY", help="The gallery's folder.", show_default=False)
]
_Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder.", show_default=False)]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """The console script: every error a user can cause is one sentence and an exit status."""
    # Pillow warns of odd files as it reads them; what matters of that stands in the report.
    warnings.filterwarnings("ignore", module="PIL")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter of somebody's name gets its code instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="faceprint")
    except FaceprintError as error:
        _fail(str(error), error.exit_status)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"The operating system refused{where}: {error.strerror or error}.", RunError.exit_status)


def _fail(sentence: str, status: int) -> NoReturn:
    typer.echo(f"faceprint: {sentence}", err=True)
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
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder with one subfolder of photos per identity.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="MODEL", help="The new model's folder.", show_default=False)],
    weights: Annotated[str, typer.Option(help="Where to start from: imagenet (downloaded), none, or a FILE of ResNet50 weights.")] = "imagenet",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training photos.")] = 6,
    batch_size: Annotated[int, typer.Option(min=2, help="Photos per step.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD, from 0 to below 1.")] = 0.9,
    val_fraction: Annotated[float, typer.Option(help="Share of each identity's photos to hold out.")] = 0.3,
    min_images: Annotated[int | None, typer.Option(min=2, help="Leave out identities with fewer photos than this.", show_default=False)] = None,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Side of the network's input in pixels.")] = 224,
    crop: Annotated[float, typer.Option(help="Share of the shorter side to keep, centred.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the split, the order and the augmentation.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read photos.", show_default="0 on a CPU, one per core up to 8 beside a GPU")] = None,
    device: _Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from MODEL's checkpoint.")] = False,
) -> None:  # fmt: skip
    """Fine-tune ResNet50 on identity folders; write a model, its report and its figures.

    The defaults are the paper's recipe. Ctrl-C ends cleanly with a checkpoint; --resume goes on from it.
    """
    _check(lr > 0, "--lr must be above 0")
    _check(0 <= momentum < 1, "--momentum must be at least 0 and below 1")
    _check(0 < val_fraction < 1, "--val-fraction must lie between 0 and 1")
    _check(0 < crop <= 1, "--crop must be above 0 and at most 1")
    cli = _training("cli")
    from retrieval.bundle import Preprocessing

    cli.train(
        data,
        out,
        config=cli.FitConfig(
            epochs=epochs, batch_size=batch_size, learning_rate=lr, momentum=momentum, seed=seed
        ),
        options=cli.TrainingOptions(
            weights=weights,
            validation_fraction=val_fraction,
            min_images=min_images,
            preprocessing=Preprocessing(size=image_size, crop=crop),
            workers=workers,
            device=device,
            resume=resume,
        ),
    )


@app.command()
def model(
    model: _Model,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print the layer table too (needs torch).")
    ] = False,
) -> None:
    """Show a model's card: labels, preprocessing, recipe, figures, fingerprint."""
    from retrieval.bundle import ModelBundle

    bundle = ModelBundle.load(model)
    _print_card(bundle)
    if layers:
        _training("cli").print_layers(bundle)


@app.command()
def ingest(
    gallery: _Gallery,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Folders with one subfolder per identity, flat folders, or files.", show_default=False)],
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="The model of a new gallery.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos that are embedded and committed together.")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read photos.", show_default="one per processor")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line for each file that was not enrolled.", show_default=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when any file was rejected.")] = False,
    device: _Device = "auto",
) -> None:  # fmt: skip
    """Enroll photos. The first ingest makes the gallery and needs --model.

    A file that cannot be read is a line in the report and never the end of the run.

    Exit status: 0 when every file is in the gallery, or was rejected for what it is; 1 when the run
    failed, or a file was rejected for a reason that may pass (permissions, a disk error), or with
    --strict for any; 2 when not one file could be enrolled; 130 after Ctrl-C (what was enrolled stays).
    """
    from retrieval import photos

    total = photos.count(sources)
    if not total:
        raise InputError(f"There are no photos in {', '.join(map(str, sources))}; check the path.")
    with _ReportFile(report) as lines, _open_or_create(gallery, model, device) as opened:
        done = _ingest_with_progress(opened, sources, total, batch_size, workers, lines)
    _print_ingest(done, report)
    if done.interrupted:
        raise Interrupted("Stopped; what was enrolled stays, and the same command goes on from here.")
    where = report or "--report FILE"
    if done.rejected == done.found:
        raise InputError(f"Not one of the {done.found:,} files could be enrolled; {where} says why.")
    if done.worth_retrying:
        raise RunError(
            f"{done.worth_retrying:,} of the {done.rejected:,} rejected files could not be read this time; "
            f"{where} says which and why. Mend that and run the same command again."
        )
    if strict and done.rejected:
        raise RunError(f"{done.rejected:,} files were rejected; {where} says which and why.")


@app.command()
def search(
    gallery: _Gallery,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to ask about.", show_default=False)],
    k: Annotated[int, typer.Option("-k", min=1, help="How many closest photos.")] = 5,
    as_json: _Json = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw each picture beside its closest photos.", show_default=False)] = None,
    device: _Device = "auto",
) -> None:  # fmt: skip
    """Find the closest stored photos to each picture, and the classifier's prediction.

    Distances are Euclidean between avg_pool embeddings; smaller is closer.
    """
    from retrieval.errors import UnreadableImage
    from retrieval.gallery import Gallery

    with Gallery.open(gallery, device=device) as opened:
        answers: list[tuple[Path, SearchResult | UnreadableImage]] = []
        for image in images:
            try:
                answers.append((image, opened.search(image, k)))
            except UnreadableImage as error:
                answers.append((image, error))
    if as_json:
        typer.echo(json.dumps([_answer_json(*answer) for answer in answers], ensure_ascii=False, indent=1))
    else:
        for image, answer in answers:
            if not isinstance(answer, UnreadableImage):
                _print_answer(image, answer)
    if plot is not None:
        _draw(answers, plot)
    unreadable = [answer for _, answer in answers if isinstance(answer, UnreadableImage)]
    if unreadable:
        raise InputError("\nfaceprint: ".join(map(str, unreadable)))


@app.command()
def info(gallery: _Gallery, as_json: _Json = False) -> None:
    """Show what a gallery holds."""
    import dataclasses

    from retrieval.gallery import Gallery

    with Gallery.open(gallery) as opened:
        facts = opened.info()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(facts), ensure_ascii=False, indent=1))
        return
    _print_facts(
        f"Gallery {facts.folder}",
        {
            "faces": f"{facts.faces:,} of {facts.identities:,} identities"
            + (f", {facts.faces_without_identity:,} without one" if facts.faces_without_identity else ""),
            "most photos": ", ".join(f"{name} {number:,}" for name, number in facts.largest[:5])
            or "none yet",
            "on disk": f"{_size(facts.vector_bytes)} of vectors in {facts.segments} files, "
            f"{_size(facts.database_bytes)} of metadata",
            "embedding": f"{facts.dimension} float32 numbers, exact Euclidean distance",
            "classifier": f"{facts.classifier_labels:,} identities, {facts.input_size} x {facts.input_size} pixels",
            "model": facts.fingerprint,
            "created": facts.created_at,
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
    from retrieval import demo as scenario

    scenario.run(data, out)


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


def _open_or_create(folder: Path, model: Path | None, device: str) -> "Gallery":
    from retrieval.bundle import ModelBundle
    from retrieval.gallery import Gallery, is_free

    free = is_free(folder)
    if free and model is None:
        raise InputError(f"There is no gallery {folder}; pass --model MODEL to make one.")
    if free and model is not None:
        # Another process may make the gallery between our look and our making it: then it is opened.
        with suppress(GalleryError):
            return Gallery.create(folder, ModelBundle.load(model), device=device)
    gallery = Gallery.open(folder, device=device)
    if model is not None:
        gallery.require(ModelBundle.load(model))
    return gallery


def _ingest_with_progress(
    gallery: "Gallery",
    sources: list[Path],
    total: int,
    batch_size: int,
    workers: int | None,
    lines: "_ReportFile",
) -> "IngestReport":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from retrieval.gallery import Outcome, Status
    from retrieval.ingestion import ingest
    from retrieval.interrupt import graceful

    progress = Progress(
        TextColumn("enrolling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TextColumn("{task.fields[rejected]:,} rejected"),
        console=Console(stderr=True),
        transient=True,
    )
    with graceful() as should_stop, progress:
        progress.add_task("", total=total, pace="", rejected=0)
        (task,) = progress.tasks

        def note(outcome: Outcome) -> None:
            lines.write(outcome)
            rejected = task.fields["rejected"] + (outcome.status is Status.REJECTED)
            pace = _pace(task.completed + 1, total, task.elapsed or 0.0)
            progress.update(task.id, advance=1, rejected=rejected, pace=pace)

        return ingest(
            gallery, sources, batch_size=batch_size, workers=workers, on_outcome=note, should_stop=should_stop
        )


def _pace(done: float, total: int, seconds: float) -> str:
    """Rate since the start and time left at that rate: photos come in batches, not one by one."""
    if not seconds:
        return ""
    minutes, rest = divmod(round((total - done) * seconds / done), 60)
    return f"{done / seconds:,.0f} photos/s, {minutes}:{rest:02d} left"


class _ReportFile:
    """A line of JSON for each file that was not enrolled; complete or absent, never half a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> "_ReportFile":
        if self.path is not None:
            if self.path.is_dir():
                raise InputError(f"The report {self.path} is a folder; name a file.")
            self.part = self.path.with_name(f".{self.path.name}.part")
            try:
                self.file = open(self.part, "w", encoding="utf-8")
            except OSError as error:
                raise InputError(f"The report {self.path} cannot be written: {error.strerror}.") from error
        return self

    def write(self, outcome: Any) -> None:
        if self.path is None or outcome.status == "enrolled":
            return
        line = {
            "path": outcome.path,
            "identity": outcome.identity,
            "status": outcome.status,
            "reason": outcome.reason,
            "detail": outcome.detail,
            "face_id": outcome.face_id,
        }
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(self, *_: object) -> None:
        # A run that failed has a report too: of what it had come to.
        if self.path is not None:
            self.file.close()
            os.replace(self.part, self.path)


def _print_ingest(done: "IngestReport", report: Path | None) -> None:
    console = _console()
    console.print(
        f"found [b]{done.found:,}[/b] = enrolled [b]{done.enrolled:,}[/b] + already known {done.known:,}"
        f" + duplicate {done.duplicate:,} + rejected {done.rejected:,}"
    )
    for reason, number in done.reasons.most_common():
        console.print(f"  {number:>7,}  {reason}")
    rate = done.found / done.seconds if done.seconds else 0
    console.print(
        f"in {done.seconds:,.1f} s, {rate:,.0f} photos/s "
        f"(embedding and storing {done.storing_seconds:,.1f} s, waiting for photos {done.waiting_seconds:,.1f} s)"
    )
    if not done.enrolled and not done.rejected and not done.interrupted:
        console.print("Nothing new: every photo was in the gallery already.")
    if report is not None and done.enrolled < done.found:
        console.print(f"{done.found - done.enrolled:,} lines in {report}", markup=False)


def _answer_json(image: Path, answer: Any) -> dict[str, Any]:
    if isinstance(answer, InputError):
        return {
            "query": str(image),
            "error": {"reason": getattr(answer, "reason", None), "detail": str(answer)},
        }
    return {
        "query": str(image),
        "prediction": {
            "identity": answer.prediction.identity,
            "probability": answer.prediction.probability,
        },
        "matches": [
            {
                "rank": rank,
                "face_id": match.face.id,
                "identity": match.face.identity,
                "path": match.face.path,
                "distance": match.distance,
            }
            for rank, match in enumerate(answer.matches, 1)
        ],
    }


def _print_answer(image: Path, answer: "SearchResult") -> None:
    from rich.table import Table

    console = _console()
    prediction = answer.prediction
    console.print(_text(str(image), "bold"))
    console.print(_text(f"classifier: {prediction.identity} ({prediction.probability:.0%})"))
    if not answer.matches:
        console.print("The gallery is empty.\n")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("identity")
    table.add_column("distance", justify="right")
    table.add_column("face", justify="right")
    table.add_column("photo", overflow="fold")
    for rank, match in enumerate(answer.matches, 1):
        face = match.face
        table.add_row(
            str(rank),
            _text(face.identity or "-"),
            f"{match.distance:.3f}",
            str(face.id),
            _text(_near(face.path)),
        )
    console.print(table, soft_wrap=False)
    console.print()


def _near(path: str | None) -> str:
    """A path as a person in this folder would type it."""
    if path is None:
        return "-"
    below = os.path.relpath(path)
    return path if below.startswith("..") else below


def _draw(answers: list[tuple[Path, Any]], path: Path) -> None:
    from retrieval.plot import Row, Tile, panel

    rows = [
        Row(
            Tile(
                image,
                image.name,
                f"classifier: {answer.prediction.probability:.0%} {answer.prediction.identity}",
            ),
            [
                Tile(
                    match.face.path or b"", match.face.identity or "unknown", f"distance {match.distance:.3f}"
                )
                for match in answer.matches
            ],
        )
        for image, answer in answers
        if not isinstance(answer, InputError)
    ]
    if not rows:
        return
    try:
        panel(rows, heading="Query and closest photos, by Euclidean distance").save(path, format="PNG")
    except OSError as error:
        raise InputError(f"The picture {path} cannot be written: {error.strerror or error}.") from error
    typer.echo(f"drew {path}", err=True)


def _print_card(bundle: "ModelBundle") -> None:
    names = ", ".join(bundle.labels[:8]) + (
        f", and {len(bundle.labels) - 8} more" if len(bundle.labels) > 8 else ""
    )
    figures = {
        key.replace("_", " "): f"{value:.4f}" if isinstance(value, float) and value <= 1 else value
        for key, value in bundle.figures.items()
    }
    recipe = {key.replace("_", " "): value for key, value in bundle.recipe.items()}
    _print_facts(
        f"Model {bundle.folder}",
        {
            "architecture": bundle.architecture,
            "labels": f"{len(bundle.labels):,}: {names}",
            "preprocessing": f"central square of {bundle.preprocessing.crop:g} x the shorter side, "
            f"resized to {bundle.input_size} x {bundle.input_size}, RGB uint8",
            "embedding": f"avg_pool, {bundle.dimension} float32 numbers",
            "split": f"{len(bundle.split.get('train', [])):,} photos to learn from, "
            f"{len(bundle.split.get('validation', [])):,} held out",
            "created": f"{bundle.created_at} with "
            + ", ".join(f"{k} {v}" for k, v in bundle.versions.items()),
            "fingerprint": bundle.fingerprint,
        },
    )
    _print_facts("Figures", figures)
    _print_facts("Recipe", recipe)


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    from rich.table import Table

    console = _console()
    console.print(_text(title, "bold"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        table.add_row(name, _text(shown))
    console.print(table, soft_wrap=False)
    console.print()


def _text(shown: str, style: str = "") -> Any:
    """Text for the terminal; a name that holds control characters does not get to control it."""
    from rich.text import Text

    return Text("".join(letter if letter.isprintable() else "\ufffd" for letter in shown), style)


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable: GiB returns")


def _console() -> Any:
    from rich.console import Console

    # Into a pipe or a file a row is a line, however long its path.
    width = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, soft_wrap=True, width=width)


if __name__ == "__main__":
    main()
