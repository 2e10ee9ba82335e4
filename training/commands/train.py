"""The training commands' output: progress, epochs, and the paths of results."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from retrieval.errors import Interrupted
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.network import Network, layer_table
from retrieval.system.signals import graceful
from training import derive as derivation
from training import run
from training.data.dataset import Split
from training.fitting.devices import in_software, pick_device
from training.fitting.fit import Epoch, Step
from training.fitting.processes import LeaderFailed, Processes
from training.fitting.recipes import RECIPES, FitConfig
from training.networks.initialize import Start
from training.run import Observer, TrainingOptions, TrainingResult

_LAYOUTS: Final = {
    "torchvision": "ImageNet's mean and deviation, stride in the second convolution of a block",
    "vggface2": "a Caffe network: VGGFace2's mean, stride in the first convolution of a block",
}

__all__ = ["RECIPES", "Processes", "TrainingOptions", "derive", "print_layers", "take_part", "train"]


def train(data: Path, out: Path, *, config: FitConfig, options: TrainingOptions) -> TrainingResult:
    """Trains with a progress bar, prints each epoch and, at the end, the figures.

    Raises:
        FaceprintError: as in `training.run.train`; on Ctrl-C the message says how to resume.
    """
    stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    # If both write to one terminal, only the progress bar's own console prints above the bar and not into it.
    one_terminal = sys.stdout.isatty() and stderr.is_terminal
    console = stderr if one_terminal else Console(highlight=False, soft_wrap=True, emoji=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    )
    with graceful() as should_stop, progress:
        _warn(stderr, out, options)
        observer = _observer(console, progress, config, options, should_stop)
        try:
            result = run.train(data, out, config=config, options=options, observer=observer)
        except Interrupted as error:
            raise Interrupted(f"{error} Go on with the same command and --resume.") from error
    figures = result.bundle.figures
    console.print(
        f"validation accuracy [b]{figures['validation_accuracy']:.3f}[/b], closest-image agreement "
        f"[b]{figures['closest_image_agreement']:.3f}[/b] on {figures['validation_images']:,} held-out photos"
    )
    console.print(Text(f"wrote {out} (report.html, metrics.json, MODELCARD.md)"))
    return result


def take_part(data: Path, out: Path, *, config: FitConfig, options: TrainingOptions) -> None:
    """Trains with the leader, in another of the processes that torchrun started; prints nothing.

    Raises:
        FaceprintError: of this process alone, or another process ended.
        SystemExit: an error that the leader prints, or Ctrl-C.
    """
    try:
        with graceful() as should_stop:
            run.take_part(data, out, config=config, options=options, should_stop=should_stop)
    except (LeaderFailed, Interrupted) as error:
        raise SystemExit(error.exit_status) from error


def _warn(stderr: Console, out: Path, options: TrainingOptions) -> None:
    if options.resume and not (out / run.CHECKPOINT).exists():
        stderr.print(Text(f"note: {out} has no checkpoint; --resume starts from the beginning"))
    if in_software(options.precision, pick_device(options.device)):
        stderr.print("note: this CPU computes bfloat16 in software, much slower; leave --precision bf16 out")


def _observer(
    console: Console,
    progress: Progress,
    config: FitConfig,
    options: TrainingOptions,
    should_stop: Callable[[], bool],
) -> Observer:
    task = progress.add_task("reading photos", total=None, loss="")

    def on_data(split: Split) -> None:
        console.print(
            f"{len(split.train):,} photos to learn from, {len(split.validation):,} held out, of "
            f"{len(split.labels):,} identities" + _left_out(split)
        )
        if split.passed_over:
            console.print(Text(f"passed over: {split.passed_over}"))

    def on_start(start: Start, device: object) -> None:
        fresh = f"; starting fresh: {', '.join((*start.fresh, 'fc'))}" if start.fresh else ""
        console.print(Text(f"weights: {start.source}{fresh}; device: {device}"))
        if start.layout is not None:
            console.print(Text(_layout(start.layout, recognized=options.weights_layout == "auto")))

    def on_step(step: Step) -> None:
        progress.update(
            task,
            description=f"epoch {step.epoch} of {config.epochs}",
            total=step.steps * config.epochs,
            completed=(step.epoch - 1) * step.steps + step.step,
            loss=f"loss {step.loss:.3f}",
        )

    def on_epoch(epoch: Epoch) -> None:
        console.print(
            f"epoch {epoch.epoch}: loss {epoch.loss:.3f}, accuracy {epoch.accuracy:.3f}, validation accuracy "
            f"{epoch.validation_accuracy:.3f}, {epoch.seconds:.0f} s"
        )

    def on_stage(stage: str) -> None:
        progress.update(task, description=stage, loss="")

    return Observer(on_data, on_start, on_step, on_epoch, on_stage, should_stop)


def _layout(name: str, *, recognized: bool) -> str:
    """Returns the layout by which a file of weights was read, and what it means for the network."""
    other = "vggface2" if name == "torchvision" else "torchvision"
    meaning = _LAYOUTS[name]
    advice = f"; recognized by the file's format, --weights-layout {other} overrules it" if recognized else ""
    return f"layout of the weights: {name} ({meaning}){advice}"


def _left_out(split: Split) -> str:
    if not split.left_out:
        return ""
    reasons = Counter(reason for _, reason in split.left_out)
    return "; left out: " + ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))


def derive(
    model: ModelBundle, out: Path, embedding: Embedding, *, data: Path | None, device: str, workers: int
) -> derivation.Derivation:
    """Derives a bundle with other embeddings, and prints both models' sizes and results.

    Raises:
        FaceprintError: as in `training.derive.derive`.
    """
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    with Console(stderr=True, emoji=False).status("") as status:
        done = derivation.derive(
            model,
            out,
            embedding,
            data=data,
            device=pick_device(device),
            workers=workers,
            on_stage=lambda stage: status.update(stage),
        )
    if done.missing:
        console.print(f"left out: {len(done.missing):,} photos of the model's split that cannot be read")
    console.print(_compared(model, done))
    console.print(Text(f"wrote {out}, fingerprint {done.bundle.fingerprint[:12]}"))
    return done


def _compared(model: ModelBundle, done: derivation.Derivation) -> Table:
    table = Table(box=None)
    for heading in ("", "before", "after"):
        table.add_column(heading, overflow="fold")
    table.add_row("embedding", str(model.embedding), str(done.bundle.embedding))
    dimensions = (model.dimension, done.bundle.dimension)
    table.add_row("numbers", *(f"{dimension:,}" for dimension in dimensions))
    table.add_row("bytes a vector", *(f"{4 * dimension:,}" for dimension in dimensions))  # float32
    if done.before is not None and done.after is not None:
        rates = (done.before.agreement, done.after.agreement)
        table.add_row(
            f"closest-image agreement, {rates[0].n:,} held-out photos",
            *(f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f})" for rate in rates),
        )
    return table


def print_layers(bundle: ModelBundle) -> None:
    """Prints the layer table: name, type, activations, learnable sizes, states."""
    network = Network(len(bundle.labels), architecture=bundle.architecture, embedding=bundle.embedding)
    rows = layer_table(network, bundle.input_size)
    table = Table(title=f"{sum(row.total_learnables for row in rows):,} learnable parameters", box=None)
    for heading in ("", "name", "type", "activations", "learnables", "states"):
        table.add_column(heading, overflow="fold")
    for number, row in enumerate(rows, 1):
        table.add_row(
            str(number),
            row.name,
            row.kind,
            " x ".join(map(str, row.activations)),
            ", ".join(row.learnables),
            ", ".join(row.states),
        )
    Console(highlight=False, emoji=False).print(table)
