"""A training run from a folder of photos to a model folder with its report."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from retrieval.errors import InputError, Interrupted, StorageError
from retrieval.models.bundle import Embedding, ModelBundle, Preprocessing
from retrieval.models.network import Start, architecture_of, build
from retrieval.system.files import make_output_folder, why
from training.data import dataset
from training.fitting import projection
from training.fitting.export import export
from training.fitting.fit import Epoch, History, Step, fit, pick_device, pick_precision
from training.fitting.recipes import FitConfig
from training.fitting.validation import Evaluation, evaluate
from training.reports import model_card
from training.reports.training_report import write_report

_CHECKPOINT: Final = "checkpoint.safetensors"
# How many held-out photos the exported graph is tried on.
_CHECKED: Final = 16


@dataclass(frozen=True)
class TrainingOptions:
    """What `train` is asked for, beside the recipe.

    Attributes:
        weights: "imagenet", "none" or a file.
        validation_fraction: share of each identity's photos that is held out.
        min_images: identities with fewer photos are left out.
        preprocessing: how photos become pixels.
        workers: processes that read photos; None is none on a CPU, whose cores all train, and one per core
            up to 8 beside a GPU.
        device: "auto", "cpu", "cuda", ...
        precision: of the steps: "auto" (bf16 on a GPU that has it, else fp32), "fp32" or "bf16".
        resume: go on from the folder's checkpoint.
        architecture: a key of `models.network.ARCHITECTURES`; the recipe says with which classifier.
        embedding: how activations become an embedding; a projection is learned when training is over, from
            the training photos.
        exclude: patterns of files and folders that are passed over (see `retrieval.sources.photos.scan`).
    """

    weights: str = "imagenet"
    validation_fraction: float = 0.3
    min_images: int | None = None
    preprocessing: Preprocessing = field(default=Preprocessing(size=224, crop=1.0, colour="srgb"))
    workers: int | None = None
    device: str = "auto"
    precision: str = "auto"
    resume: bool = False
    architecture: str = "resnet50"
    embedding: Embedding = field(default=Embedding())
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observer:
    """Who is told of a run's progress; the defaults tell nobody."""

    on_data: Callable[[dataset.Split], None] = lambda split: None
    on_start: Callable[[Start, torch.device], None] = lambda start, device: None
    on_step: Callable[[Step], None] = lambda step: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_stage: Callable[[str], None] = lambda stage: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: the bundle, the data it saw, how the training went, what was measured."""

    bundle: ModelBundle
    split: dataset.Split
    history: History
    evaluation: Evaluation


def train(
    folder: Path,
    out: Path,
    *,
    config: FitConfig = FitConfig(),
    options: TrainingOptions = TrainingOptions(),
    observer: Observer = Observer(),
) -> TrainingResult:
    """Trains on the identity folder `folder` and writes a model, its report and its figures to `out`.

    Raises:
        InputError: `out` is in use, or the data, the weights or the device are not usable.
        Interrupted: `observer.should_stop` said so; `out` holds a checkpoint to resume from.
        RunError: training diverged, or the disk refused.
    """
    started = time.monotonic()
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"The model {out} would lie among the photos of {folder}; choose another --out.")
    checkpoint = _claim(out, resume=options.resume)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    workers = _workers(options.workers, device)
    split = dataset.load(
        folder,
        validation_fraction=options.validation_fraction,
        min_images=options.min_images,
        seed=config.seed,
        exclude=options.exclude,
    )
    observer.on_data(split)
    if observer.should_stop():
        raise Interrupted("Stopped before the first step.")
    torch.manual_seed(config.seed)
    architecture = architecture_of(options.architecture, config.classifier)
    network, start = build(len(split.labels), weights=options.weights, architecture=architecture)
    projection.check(options.embedding, network, photos=len(split.train))
    network.embed_as(options.embedding.unprojected)
    config = config.starting(start.fresh)
    observer.on_start(start, device)
    _make(out)
    history = fit(
        network,
        split,
        options.preprocessing,
        config,
        device=device,
        precision=precision,
        workers=workers,
        weights=start.source,
        checkpoint=checkpoint,
        resume=options.resume,
        on_step=observer.on_step,
        on_epoch=observer.on_epoch,
        should_stop=observer.should_stop,
    )
    if options.embedding.dimensions is not None:
        observer.on_stage("learning the projection")
        projection.embed_as(network, options.embedding, split.train, options.preprocessing, workers=workers)
    observer.on_stage("measuring on the held-out photos")
    evaluation = evaluate(network, split, options.preprocessing, workers=workers)
    figures = _figures(split, history, evaluation, device, time.monotonic() - started)
    recipe = {
        **config.plain(),
        "weights": start.source,
        "started_fresh": [*start.fresh, "fc"],
        "optimizer": "SGD with momentum",
        "precision": precision,
    }
    observer.on_stage("writing the report")
    write_report(out, split=split, history=history, evaluation=evaluation, figures=figures, recipe=recipe)
    observer.on_stage("exporting the model")
    bundle = export(
        network,
        out,
        labels=split.labels,
        preprocessing=options.preprocessing,
        recipe=recipe,
        split=_split_card(split, folder, options),
        figures={name: value for name, value in figures.items() if name != "epochs"},
        sample=_sample(split, options.preprocessing),
        describe=model_card.describe,
    )
    checkpoint.unlink(missing_ok=True)
    return TrainingResult(bundle, split, history, evaluation)


def _workers(asked: int | None, device: torch.device) -> int:
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _claim(out: Path, *, resume: bool) -> Path:
    """The checkpoint's path, when `out` is free to train into."""
    checkpoint = out / _CHECKPOINT
    if (out / "bundle.json").exists():
        raise InputError(f"{out} holds a finished model already; choose another folder with --out.")
    if checkpoint.exists() and not resume:
        raise InputError(
            f"{out} holds an unfinished run; go on with --resume, or choose another folder with --out."
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out.")
    # A hidden file may be the half of a first checkpoint, left behind by a machine that was lost.
    taken = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if taken and not checkpoint.exists():
        raise InputError(f"{out} is not empty and holds no model; choose another folder with --out.")
    return checkpoint


def _make(out: Path) -> None:
    try:
        make_output_folder(out)
        # A folder that cannot be written to is better known now than after the first epoch.
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise StorageError(
            f"{out} cannot be made or written to: {why(error)}; choose another --out."
        ) from error


def _figures(
    split: dataset.Split, history: History, evaluation: Evaluation, device: torch.device, seconds: float
) -> dict[str, Any]:
    """What metrics.json says; `seconds` is this sitting's wall-clock time, the epochs have their own."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "images": len(split.train) + len(split.validation),
        "classes": len(split.labels),
        "train_images": len(split.train),
        "validation_images": len(split.validation),
        "left_out": len(split.left_out),
        "validation_accuracy": evaluation.validation_accuracy,
        "closest_image_agreement": evaluation.closest_image_agreement,
        "epochs": [asdict(epoch) for epoch in history.epochs],
        "seconds": round(max(seconds, sum(epoch.seconds for epoch in history.epochs)), 1),
    }


def _processor() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _split_card(split: dataset.Split, folder: Path, options: TrainingOptions) -> dict[str, Any]:
    # As `walk` makes its paths absolute: Path.absolute would keep a "..".
    root = Path(os.path.abspath(folder if folder.is_dir() else folder.parent))

    def names(samples: tuple[dataset.Sample, ...]) -> list[str]:
        # What a list names may lie anywhere.
        return [Path(os.path.relpath(sample.path, root)).as_posix() for sample in samples]

    return {
        "data": root.name,
        "validation_fraction": options.validation_fraction,
        "min_images": options.min_images,
        "train": names(split.train),
        "validation": names(split.validation),
    }


def _sample(split: dataset.Split, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    photographs = dataset.Photographs(split.validation[:_CHECKED], preprocessing)
    return np.stack([photographs[index][0].numpy() for index in range(len(photographs))])
