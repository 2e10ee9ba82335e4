"""The training run: from a folder of photos to a model folder with its report."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from retrieval.errors import InputError, Interrupted, StorageError
from retrieval.images.face_detector import FaceDetector
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.network import Network, architecture_of
from retrieval.system.cpu import usable_cores
from retrieval.system.files import make_output_folder, why
from training.data import dataset
from training.fitting import projection
from training.fitting.devices import pick_precision
from training.fitting.export import export
from training.fitting.fit import Epoch, History, Step, fit
from training.fitting.processes import Processes
from training.fitting.recipes import FitConfig
from training.fitting.validation import Evaluation, evaluate
from training.networks.initialize import Start, build
from training.reports import model_card
from training.reports.training_report import write_report

CHECKPOINT: Final = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `train` beside the recipe.

    Attributes:
        weights: initial weights: "imagenet", "none" or a file.
        weights_layout: the layout of a file of weights: "torchvision", "vggface2", or "auto" to recognize it.
            With VGGFace2's the network becomes Caffe's variant of `architecture`.
        validation_fraction: share of each identity's photos that is held out.
        min_images: identities with fewer photos are left out.
        preprocessing: how photos become pixels.
        detector: the face detector that `preprocessing` states; None if it states none.
        workers: number of processes that read photos. None means 0 on a CPU, where all cores train, and one
            per core up to 8 for a GPU.
        device: "auto", "cpu", "cuda", ...
        precision: of the steps: "auto" (bf16 on a GPU that supports it, else fp32), "fp32" or "bf16".
        resume: continue from the folder's checkpoint.
        architecture: a key of `models.network.ARCHITECTURES`; the recipe selects the classifier.
        embedding: how activations become an embedding. A projection is learned after training, from the
            training photos.
        exclude: patterns of files and folders that are passed over (see `retrieval.sources.photos.scan`).
    """

    weights: str = "imagenet"
    weights_layout: str = "auto"
    validation_fraction: float = 0.3
    min_images: int | None = None
    preprocessing: Preprocessing = field(default=Preprocessing(size=224, crop=1.0, colour="srgb"))
    detector: FaceDetector | None = None
    workers: int | None = None
    device: str = "auto"
    precision: str = "auto"
    resume: bool = False
    architecture: str = "resnet50"
    embedding: Embedding = field(default=Embedding())
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observer:
    """Callbacks of a training run, for progress and for stopping; the defaults do nothing."""

    on_data: Callable[[dataset.Split], None] = lambda split: None
    on_start: Callable[[Start, torch.device], None] = lambda start, device: None
    on_step: Callable[[Step], None] = lambda step: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_stage: Callable[[str], None] = lambda stage: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: the bundle, the data set, the history of training, and the evaluation."""

    bundle: ModelBundle
    split: dataset.Split
    history: History
    evaluation: Evaluation


@dataclass(frozen=True)
class _Run:
    """A run with checked inputs.

    Attributes:
        config: the recipe, with warm-up if the network needs it.
        checkpoint: file with the state of the fit, until the model is written.
        network: changed by fitting; all other fields stay unchanged.
        start: the source of its weights.
    """

    folder: Path
    out: Path
    options: TrainingOptions
    observer: Observer
    config: FitConfig
    checkpoint: Path
    device: torch.device
    precision: str
    workers: int
    reader: PhotoReader
    split: dataset.Split
    network: Network
    start: Start
    processes: Processes


def train(
    folder: Path,
    out: Path,
    *,
    config: FitConfig = FitConfig(),
    options: TrainingOptions = TrainingOptions(),
    observer: Observer = Observer(),
) -> TrainingResult:
    """Trains on the identity folder `folder` and writes a model, its report and its figures to `out`.

    Of several processes that torchrun started, the leader calls this, and the others `take_part`.

    Raises:
        InputError: `out` is in use, or the data, the weights or the device are not usable.
        Interrupted: `observer.should_stop` returned True; after the first step, `out` holds a checkpoint to
            resume from.
        RunError: training diverged.
        StorageError: files cannot be written to `out`.
    """
    started = time.monotonic()
    run, history = _fitted(folder, out, config, options, observer)
    evaluation = _measure(run)
    return _write(run, history, evaluation, seconds=time.monotonic() - started)


def take_part(
    folder: Path,
    out: Path,
    *,
    config: FitConfig = FitConfig(),
    options: TrainingOptions = TrainingOptions(),
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Fits the network with the leader, in another process of the same run; writes nothing.

    Raises:
        FaceprintError: as `train` in the leader; ProcessLost where another process ended.
    """
    _fitted(folder, out, config, options, Observer(should_stop=should_stop))


def _fitted(
    folder: Path, out: Path, config: FitConfig, options: TrainingOptions, observer: Observer
) -> tuple[_Run, History]:
    processes = Processes.of_environment()
    device = processes.device(options.device)
    with processes.joined(device):
        run = _prepare(folder, out, config, options, observer, processes, device)
        return run, _fit(run)


def _prepare(
    folder: Path,
    out: Path,
    config: FitConfig,
    options: TrainingOptions,
    observer: Observer,
    processes: Processes,
    device: torch.device,
) -> _Run:
    """Checks all inputs, before `out` is created, and builds the network."""
    precision = pick_precision(options.precision, device)
    workers = workers_for(device, asked=options.workers, beside=processes.local_count)
    reader = PhotoReader(options.preprocessing, options.detector)

    def checked() -> tuple[Path, dataset.Split]:
        dataset.check_outside(out, folder)
        checkpoint = _claim(out, resume=options.resume)
        split = _load(folder, config, options, reader)
        observer.on_data(split)
        if observer.should_stop():
            raise Interrupted("Stopped before the first step.")
        return checkpoint, split

    checkpoint, split = processes.told(checked)
    network, start = _same_network(split, config, options, processes)
    observer.on_start(start, device)
    return _Run(
        folder=folder,
        out=out,
        options=options,
        observer=observer,
        config=config.starting(start.fresh),
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        workers=workers,
        reader=reader,
        split=split,
        network=network,
        start=start,
        processes=processes,
    )


def _load(folder: Path, config: FitConfig, options: TrainingOptions, reader: PhotoReader) -> dataset.Split:
    return dataset.load(
        folder,
        validation_fraction=options.validation_fraction,
        min_images=options.min_images,
        seed=config.seed,
        exclude=options.exclude,
        reader=reader,
    )


def _same_network(
    split: dataset.Split, config: FitConfig, options: TrainingOptions, processes: Processes
) -> tuple[Network, Start]:
    """Returns the network to fit in each process; only the leader's has the weights, until it is fitted."""
    built: list[Network] = []

    def build_here() -> tuple[str, Start]:
        network, start = _network(split, config, options)
        built.append(network)
        return network.architecture, start

    architecture, start = processes.told(build_here)
    if not built:
        built.append(Network(len(split.labels), architecture=architecture))
        built[0].embed_as(options.embedding.unprojected)
    return built[0], start


def _network(split: dataset.Split, config: FitConfig, options: TrainingOptions) -> tuple[Network, Start]:
    """Builds the network to fit. It embeds without a projection, which is learned after training."""
    torch.manual_seed(config.seed)
    architecture = architecture_of(options.architecture, config.classifier)
    network, start = build(
        len(split.labels),
        weights=options.weights,
        architecture=architecture,
        layout=options.weights_layout,
    )
    projection.check_projection(options.embedding, network, photos=len(split.train))
    network.embed_as(options.embedding.unprojected)
    return network, start


def _fit(run: _Run) -> History:
    run.processes.told(lambda: _make(run.out))
    return fit(
        run.network,
        run.split,
        run.reader,
        run.config,
        device=run.device,
        precision=run.precision,
        workers=run.workers,
        weights=run.start.source,
        checkpoint=run.checkpoint,
        resume=run.options.resume,
        processes=run.processes,
        on_step=run.observer.on_step,
        on_epoch=run.observer.on_epoch,
        should_stop=run.observer.should_stop,
    )


def _measure(run: _Run) -> Evaluation:
    """Learns the projection, if there is one, and measures the network with its final embedding."""
    embedding = run.options.embedding
    if embedding.dimensions is not None:
        run.observer.on_stage("learning the projection")
        projection.embed_as(run.network, embedding, run.split.train, run.reader, workers=run.workers)
    run.observer.on_stage("measuring on the held-out photos")
    return evaluate(run.network, run.split, run.reader, workers=run.workers)


def _write(run: _Run, history: History, evaluation: Evaluation, *, seconds: float) -> TrainingResult:
    """Writes the report, then the model; then removes the checkpoint."""
    figures, recipe = _figures(run, history, evaluation, seconds), _recipe(run)
    run.observer.on_stage("writing the report")
    write_report(
        run.out, split=run.split, history=history, evaluation=evaluation, figures=figures, recipe=recipe
    )
    run.observer.on_stage("exporting the model")
    bundle = export(
        run.network,
        run.out,
        labels=run.split.labels,
        reader=run.reader,
        recipe=recipe,
        split=_split_card(run.split, run.folder, run.options),
        figures={name: value for name, value in figures.items() if name != "epochs"},
        sample=dataset.trial_pictures(run.split.validation, run.reader),
        describe=model_card.describe,
    )
    run.checkpoint.unlink(missing_ok=True)
    return TrainingResult(bundle, run.split, history, evaluation)


def workers_for(device: torch.device, *, asked: int | None, beside: int = 1) -> int:
    """Returns the number of processes that read photos: `asked`, or the default for the device.

    `beside` is the number of processes that train on this machine, which share its cores.
    """
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else max(1, min(8, usable_cores() // beside))


def _claim(out: Path, *, resume: bool) -> Path:
    """Checks that `out` is free to train into, and returns the path of its checkpoint."""
    checkpoint = out / CHECKPOINT
    if (out / "bundle.json").exists():
        raise InputError(f"{out} holds a finished model already; choose another folder with `out`.")
    if checkpoint.exists() and not resume:
        raise InputError(
            f"{out} holds an unfinished run; go on with `resume=True`, or choose another folder with `out`."
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with `out`.")
    # Hidden files do not count: one may be an unfinished first checkpoint, left behind by a crash.
    taken = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if taken and not checkpoint.exists():
        raise InputError(f"{out} is not empty and holds no model; choose another folder with `out`.")
    return checkpoint


def _make(out: Path) -> None:
    try:
        make_output_folder(out)
        # Reports a folder that cannot be written to now, not after the first epoch.
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise StorageError(
            f"{out} cannot be made or written to: {why(error)}; choose another `out`."
        ) from error


def _figures(run: _Run, history: History, evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    """Returns the content of metrics.json.

    `seconds` is the wall-clock time of this session; epochs of earlier sessions have their own times.
    """
    split, device = run.split, run.device
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


def _recipe(run: _Run) -> dict[str, Any]:
    layout = {} if run.start.layout is None else {"weights_layout": run.start.layout}
    return {
        **run.config.plain(),
        "weights": run.start.source,
        **layout,
        "started_fresh": [*run.start.fresh, "fc"],
        "optimizer": "SGD with momentum",
        "precision": run.precision,
        **({"processes": run.processes.count} if run.processes.several else {}),
    }


def _processor() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _split_card(split: dataset.Split, folder: Path, options: TrainingOptions) -> dict[str, Any]:
    # abspath, as in `walk`: Path.absolute would keep "..".
    root = Path(os.path.abspath(folder if folder.is_dir() else folder.parent))

    def names(samples: tuple[dataset.Sample, ...]) -> list[str]:
        # Photos of a list may be in any folder.
        return [Path(os.path.relpath(sample.path, root)).as_posix() for sample in samples]

    return {
        "data": root.name,
        "validation_fraction": options.validation_fraction,
        "min_images": options.min_images,
        "train": names(split.train),
        "validation": names(split.validation),
    }
