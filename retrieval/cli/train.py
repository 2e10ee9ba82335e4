"""The commands that make models: `train` and `derive`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from retrieval.cli import options
from retrieval.cli.opening import training_module

if TYPE_CHECKING:
    from retrieval.models.bundle import Embedding


_LENGTH: Final = "raw, or unit: embeddings divided by their Euclidean length."
_LAYERS: Final = "Layers to embed, with commas: layer1 to layer4."
_POOLING: Final = "avg, the mean over the picture, or gem, its generalized mean."
_DIMENSIONS: Final = "Project to so many principal components of the training photos."
_WHITEN: Final = "Divide each component by its standard deviation."

_LAYOUTS: Final = ("auto", "torchvision", "vggface2")

# Values of --precision, and how the recipe of a model records them.
_PRECISIONS: Final = {"auto": "auto", "float32": "fp32", "bf16": "bf16"}


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder with one subfolder of photos per identity, or a list of photos (.csv, .txt, .parquet).", show_default=False)],
    out: Annotated[Path, options.output("MODEL", "The new model's folder.")],
    weights: Annotated[str, typer.Option(metavar="imagenet|none|FILE", help="Where to start from: imagenet (downloaded), none, or a FILE of ResNet50 weights.")] = "imagenet",
    weights_layout: Annotated[str, typer.Option(metavar="auto|torchvision|vggface2", help="What the weights FILE is for: torchvision's ResNet50 or VGGFace2's, which is Caffe's.")] = "auto",
    recipe: Annotated[str, typer.Option(metavar="paper|modern", help="How to train: as the paper says, or as measured best on the same epochs.")] = "paper",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training photos.", show_default="6")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Photos per step.", show_default="10")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the recipe's; 0.01 is the paper's")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of SGD, from 0 to below 1.", show_default="0.9")] = None,
    val_fraction: Annotated[float, options.val_fraction("Share of each identity's photos to hold out.")] = 0.3,
    min_images: Annotated[int | None, typer.Option(min=2, help="Leave out identities with fewer photos than this.", show_default=False)] = None,
    exclude: options.Exclude = None,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Side of the network's input in pixels.")] = 224,
    crop: Annotated[float, typer.Option(help="Share of the shorter side to keep, centred.")] = 1.0,
    detector: options.Detector = None,
    margin: options.Margin = 0.0,
    seed: Annotated[int, options.seed("Of the split, the order and the augmentation.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="How many read photos side by side: processes; 0: the command itself does.", show_default="0 on a CPU, one per core up to 8 beside a GPU")] = None,
    device: options.Device = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|float32|bf16", help="Of the training steps; auto is bf16 on a GPU that has it, else float32.")] = "auto",
    length: Annotated[str | None, typer.Option(metavar="raw|unit", help=_LENGTH, show_default="the recipe's; raw is the paper's")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYER,...", help=_LAYERS, show_default="layer4")] = None,
    pooling: Annotated[str | None, typer.Option(metavar="avg|gem", help=_POOLING, show_default="avg")] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help=_DIMENSIONS, show_default=False)] = None,
    whiten: Annotated[bool | None, typer.Option("--whiten/--no-whiten", help=_WHITEN, show_default="the recipe's")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from MODEL's checkpoint.")] = False,
) -> None:  # fmt: skip
    """Fine-tune ResNet50 on identity folders; write a model, its report and its figures.

    With --detector the network sees the largest face of each photo, aligned, and so does everything that uses the
    model. Without, it sees the middle square of each photo: crop photos to faces beforehand. The defaults are the
    paper's recipe. Ctrl-C ends cleanly with a checkpoint; --resume goes on
    from it.
    """
    options.require(lr is None or lr > 0, "--lr must be above 0")
    options.require(momentum is None or 0 <= momentum < 1, "--momentum must be at least 0 and below 1")
    options.require(precision in _PRECISIONS, f"--precision must be {', '.join(_PRECISIONS)}")
    options.require(weights_layout in _LAYOUTS, f"--weights-layout must be {', '.join(_LAYOUTS)}")
    options.require(0 < crop <= 1, "--crop must be above 0 and at most 1")
    training = training_module("commands.train")
    options.require(recipe in training.RECIPES, f"--recipe must be {' or '.join(training.RECIPES)}")
    from retrieval.images.preprocessing import FaceAlignment, Preprocessing
    from retrieval.models.detectors import open_detector

    found = None if detector is None else open_detector(detector)
    alignment = None if found is None else FaceAlignment(found.sha256, margin=margin)
    start = training.RECIPES[recipe]
    embedding = _embedding(
        start.embedding,
        length=length,
        layers=layers,
        pooling=pooling,
        dimensions=dimensions,
        whiten=whiten,
    )
    wishes = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "momentum": momentum}
    chosen = {name: wish for name, wish in wishes.items() if wish is not None}
    # Of several processes that torchrun started, the first one prints and writes.
    run = training.train if training.Processes.of_environment().leads else training.take_part
    run(
        data,
        out,
        config=replace(start.config, seed=seed, **chosen),
        options=training.TrainingOptions(
            weights=weights,
            weights_layout=weights_layout,
            validation_fraction=val_fraction,
            min_images=min_images,
            preprocessing=Preprocessing(size=image_size, crop=crop, colour="srgb", faces=alignment),
            detector=found,
            workers=workers,
            device=device,
            precision=_PRECISIONS[precision],
            resume=resume,
            embedding=embedding,
            exclude=tuple(exclude or ()),
        ),
    )


def derive(
    model: options.Model,
    out: Annotated[Path, options.output("NEW", "The new model's folder.")],
    length: Annotated[str | None, typer.Option(metavar="raw|unit", help=_LENGTH, show_default="MODEL's")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYER,...", help=_LAYERS, show_default="MODEL's")] = None,
    pooling: Annotated[str | None, typer.Option(metavar="avg|gem", help=_POOLING, show_default="MODEL's")] = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help=_DIMENSIONS, show_default="MODEL's")] = None,
    whiten: Annotated[bool | None, typer.Option("--whiten/--no-whiten", help=_WHITEN, show_default="MODEL's")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DATA", help="The photos MODEL was trained on; figures are measured on them, a projection is learned from its training photos.", show_default=False)] = None,
    device: options.Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="How many read photos side by side: processes; 0: the command itself does.")] = 0,
) -> None:  # fmt: skip
    """Make a model that embeds in another way from a trained one, without training again."""
    from retrieval.models.bundle import ModelBundle

    opened = ModelBundle.load(model)
    embedding = _embedding(
        opened.embedding, length=length, layers=layers, pooling=pooling, dimensions=dimensions, whiten=whiten
    )
    training_module("commands.train").derive(
        opened, out, embedding, data=data, device=device, workers=workers
    )


def _embedding(base: "Embedding", *, layers: str | None, **choices: Any) -> "Embedding":
    """Returns an embedding with some fields replaced; a choice that is None keeps the field."""
    if layers is not None:
        # Sorted into the order of the network.
        choices["layers"] = tuple(sorted({layer.strip() for layer in layers.split(",")}))
    return replace(base, **{name: choice for name, choice in choices.items() if choice is not None})
