"""How much context a ResNet50 wants around an aligned face, on people that are not in the reported results.

    python -m benchmarks.margins DATA --weights FILE --detector FILE [--least 5] [--most 9] [--epochs 6]
                                 [--margins 0 0.1 0.2 0.3 0.4] [--image-size 128] [--crop 0.6] [--seed 0]

DATA's identities with `--least` to `--most` photos are used (LFW with 5 to 9: 265 people), split 70/30. For
the central square and each margin the closest training photo of each held-out photo is searched twice: by
layer3 of the network before training, at unit length; and, with `--epochs`, by the modern recipe after so
many epochs. Prints the errors in % with Wilson's 95% intervals, then one JSON line. Docs: docs/benchmarks.md.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.recipes import chosen
from retrieval.images.face_detector import FaceDetector
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.bundle import Embedding
from retrieval.models.detectors import open_detector
from retrieval.models.network import architecture_of
from retrieval.rates import Rate, wilson
from training.data.dataset import Split
from training.fitting.devices import pick_device
from training.fitting.fit import fit
from training.fitting.recipes import RECIPES
from training.fitting.validation import evaluate
from training.networks.initialize import build


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--detector", required=True, help="yunet, or the file of a detector")
    parser.add_argument("--least", type=int, default=5)
    parser.add_argument("--most", type=int, default=9)
    parser.add_argument("--margins", type=float, nargs="*", default=[0.0, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--crop", type=float, nargs="*", default=[0.6])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", default="resnet50")
    options = parser.parse_args()
    split = chosen(options.data, options.least, options.most, options.seed)
    people, photos = len(split.labels), len(split.validation)
    print(
        f"{people} people, {len(split.train)} photos enrolled, {photos} held out; errors in % (95% interval)"
    )
    found = {}
    for name, reader in readers(options):
        found[name] = rows = {way: wilson(wrong, photos) for way, wrong in errors(reader, split, options)}
        print(f"{name:28}{'  '.join(f'{way} {_percent(rate)}' for way, rate in rows.items())}", flush=True)
    told = {name: {way: asdict(rate) for way, rate in rows.items()} for name, rows in found.items()}
    print(json.dumps({"people": people, "enrolled": len(split.train), "held_out": photos, "errors": told}))


def readers(options: argparse.Namespace) -> Iterator[tuple[str, PhotoReader]]:
    """Yields the readers that are compared, each with its name."""
    size, detector = options.image_size, open_detector(options.detector)
    for share in options.crop:
        yield f"central square, {share:g}", PhotoReader(Preprocessing(size, share, "srgb"))
    for margin in options.margins:
        yield f"aligned, margin {margin:g}", _aligned(size, detector, margin)


def _aligned(size: int, detector: FaceDetector, margin: float) -> PhotoReader:
    alignment = FaceAlignment(detector.sha256, margin=margin)
    return PhotoReader(Preprocessing(size, 1.0, "srgb", alignment), detector)


def errors(reader: PhotoReader, split: Split, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yields the numbers of held-out photos that the network takes for another person, by what and when."""
    recipe, photos = RECIPES["modern"], len(split.validation)
    torch.manual_seed(options.seed)
    architecture = architecture_of(options.architecture, recipe.config.classifier)
    network, start = build(len(split.labels), weights=options.weights, architecture=architecture)
    network.embed_as(Embedding(length="unit", layers=("layer3",)))
    found = evaluate(network, split, reader, workers=0)
    yield "closest before training", round(photos * (1 - found.closest_image_agreement))
    if not options.epochs:
        return
    network.embed_as(recipe.embedding)
    config = replace(recipe.config, seed=options.seed, epochs=options.epochs).starting(start.fresh)
    fit(network, split, reader, config, device=pick_device("auto"), precision="fp32")
    found = evaluate(network, split, reader, workers=0)
    yield "closest", round(photos * (1 - found.closest_image_agreement))
    yield "classifier", round(photos * (1 - found.validation_accuracy))


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"


if __name__ == "__main__":
    main()
