"""The effect of each part of the modern recipe, on people that are not in the reported results.

    python -m benchmarks.recipes DATA --weights FILE [--least 10] [--most 19] [--seeds 0 1 2]
                                 [--only NAME ...] [--image-size 128] [--crop 0.6] [--precision bf16]

DATA's identities with `--least` to `--most` photos are used (LFW with 10 to 19: 96 people), split 70/30, and
each variant is trained on the same photos with the same seeds. Prints a line after each variant,
with the errors of classifier and of closest image, raw and at unit length, and Wilson's 95% intervals over
the held-out photos of all seeds; then one JSON line. Docs: docs/recipes.md.
"""

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch

from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import Embedding
from retrieval.models.network import architecture_of
from retrieval.rates import Rate, wilson
from retrieval.sources.folders import walk
from training.data import dataset
from training.data.augmentation import Augmentation
from training.fitting.devices import pick_device
from training.fitting.fit import fit
from training.fitting.recipes import RECIPES, FitConfig
from training.fitting.validation import evaluate
from training.networks.initialize import build

_COSINE: Final = FitConfig(schedule="cosine")
_MODERN: Final = RECIPES["modern"].config
VARIANTS: Final[Mapping[str, FitConfig]] = {
    "paper": FitConfig(),
    "cosine rate": _COSINE,
    "cosine rate, label smoothing": replace(_COSINE, label_smoothing=0.1),
    "cosine rate, augmentation": replace(_COSINE, augmentation=Augmentation(zoom=0.1, turn=8, colour=0.2)),
    "modern": _MODERN,
    "modern, augmentation": replace(_MODERN, augmentation=Augmentation(zoom=0.1, turn=8, colour=0.2)),
}


@dataclass(frozen=True)
class Row:
    """The results of a variant over all seeds: classifier and closest-image errors, and seconds per seed."""

    variant: str
    classifier: Rate
    closest_raw: Rate
    closest_unit: Rate
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--least", type=int, default=10)
    parser.add_argument("--most", type=int, default=19)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=FitConfig().epochs)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--crop", type=float, default=0.6)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--architecture", default="resnet50")
    options = parser.parse_args()
    splits = {seed: chosen(options.data, options.least, options.most, seed) for seed in options.seeds}
    first = splits[options.seeds[0]]
    facts = {
        "identities": len(first.labels),
        "train": len(first.train),
        "validation": len(first.validation),
        "seeds": options.seeds,
        "epochs": options.epochs,
        "precision": options.precision,
    }
    print(f"{len(first.labels)} people, {len(first.train)} photos learned, {len(first.validation)} held out")
    print(f"{'errors in %':32}{'classifier':>19}{'closest, raw':>19}{'closest, unit':>19}{'s':>7}")
    rows = []
    for name in options.only:
        rows.append(measured(name, splits, options))
        print(in_words(rows[-1]), flush=True)
    print(json.dumps({**facts, "rows": [asdict(row) for row in rows]}))


def chosen(folder: Path, least: int, most: int, seed: int) -> dataset.Split:
    """Returns the split of the identities with `least` to `most` photos."""
    groups: dict[str, list[Path]] = {}
    for file in walk(folder):
        if file.identity is not None:
            groups.setdefault(file.identity, []).append(file.path.absolute())
    wanted = {name: photos for name, photos in groups.items() if least <= len(photos) <= most}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "chosen.csv"
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["path", "identity"])
            writer.writerows([photo, name] for name, photos in wanted.items() for photo in photos)
        return dataset.load(path, validation_fraction=0.3, min_images=2, seed=seed)


def measured(name: str, splits: Mapping[int, dataset.Split], options: argparse.Namespace) -> Row:
    """Trains a variant with every seed; returns the errors over all seeds."""
    started = time.monotonic()
    errors = [list(_errors(VARIANTS[name], seed, split, options)) for seed, split in splits.items()]
    n = sum(len(split.validation) for split in splits.values())
    classifier, raw, unit = (wilson(sum(column), n) for column in zip(*errors, strict=True))
    return Row(name, classifier, raw, unit, round((time.monotonic() - started) / len(splits), 1))


def _errors(config: FitConfig, seed: int, split: dataset.Split, options: argparse.Namespace) -> Iterator[int]:
    """Yields the numbers of errors of the classifier, the closest image, and that at unit length."""
    reader = PhotoReader(Preprocessing(size=options.image_size, crop=options.crop))
    torch.manual_seed(seed)
    architecture = architecture_of(options.architecture, config.classifier)
    network, start = build(len(split.labels), weights=options.weights, architecture=architecture)
    config = replace(config, seed=seed, epochs=options.epochs).starting(start.fresh)
    device = pick_device("auto")
    fit(network, split, reader, config, device=device, precision=options.precision)
    n = len(split.validation)
    found = evaluate(network, split, reader, workers=0)
    yield round(n * (1 - found.validation_accuracy))
    yield round(n * (1 - found.closest_image_agreement))
    network.embed_as(Embedding(length="unit"))
    yield round(n * (1 - evaluate(network, split, reader, workers=0).closest_image_agreement))


def in_words(row: Row) -> str:
    """Formats a row of the table."""
    return (
        f"{row.variant:32}{_percents([row.classifier, row.closest_raw, row.closest_unit])}{row.seconds:7.0f}"
    )


def _percents(rates: Sequence[Rate]) -> str:
    return "".join(f"{100 * r.value:6.1f} ({100 * r.low:4.1f}, {100 * r.high:4.1f})" for r in rates)


if __name__ == "__main__":
    main()
