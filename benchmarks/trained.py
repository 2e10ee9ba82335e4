"""Models for the benchmarks that train: each is trained once and kept in a folder."""

import argparse
import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.detectors import open_detector
from training.evaluation.protocols import photos_of
from training.fitting.recipes import RECIPES, FitConfig
from training.run import TrainingOptions, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for how models are trained and where they are kept."""
    parser.add_argument("--keep", type=Path, required=True, help="models that are here are not trained again")
    parser.add_argument("--weights", required=True, help="what training starts from, a FILE or imagenet")
    parser.add_argument("--epochs", type=int, default=FitConfig().epochs)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--crop", type=float, default=0.6)
    parser.add_argument("--detector", help="align faces that this detector finds: yunet, or a file")
    parser.add_argument("--margin", type=float, default=0.0, help="around aligned faces")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--architecture", default="resnet50")


def model(
    name: str, data: Path, recipe: str, options: argparse.Namespace, *, min_images: int, seed: int = 0
) -> Path:
    """Returns the folder of a model, which is trained first if it does not exist.

    Args:
        name: of the folder below `--keep`, without its suffix.
        data: the photos to train on.
        recipe: a key of RECIPES.
        options: the parsed options of `add_arguments`.
        min_images: identities with fewer photos are left out.
        seed: of the split, the order and the augmentation.
    """
    folder: Path = options.keep / f"{name}.model"
    if (folder / "bundle.json").exists():
        return folder
    print(f"training {folder.name}", flush=True)
    chosen = RECIPES[recipe]
    detector = None if options.detector is None else open_detector(options.detector)
    alignment = None if detector is None else FaceAlignment(detector.sha256, margin=options.margin)
    crop = options.crop if detector is None else 1.0
    train(
        data,
        folder,
        config=replace(chosen.config, epochs=options.epochs, seed=seed),
        options=TrainingOptions(
            weights=options.weights,
            min_images=min_images,
            preprocessing=Preprocessing(options.image_size, crop, "srgb", alignment),
            detector=detector,
            precision=options.precision,
            resume=folder.exists(),
            architecture=options.architecture,
            embedding=chosen.embedding,
        ),
    )
    return folder


def write_list(path: Path, data: Path, people: Iterable[str]) -> None:
    """Writes a list of the photos of some people, in the format that `train` accepts."""
    wanted = set(people)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "identity"])
        writer.writerows((p.path, p.identity) for p in photos_of(data.absolute()) if p.identity in wanted)


def beside(weights: str) -> str | None:
    """Returns the weights of the network before fine-tuning, as a baseline; None if training used none."""
    return None if weights == "none" else weights


def percent(values: Iterable[float]) -> str:
    """Formats shares in percent, with one decimal."""
    return "  ".join(f"{100 * value:5.1f}" for value in values)
