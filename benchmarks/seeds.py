"""Results of the recipes and the baselines, over seeds of split, order and augmentation.

    python -m benchmarks.seeds DATA --weights FILE --keep FOLDER [--seeds 0 1 2] [--recipes paper modern]
                               [--min-images 20] [--image-size 128] [--crop 0.6] [--precision auto]

Trains each recipe with each seed (models that FOLDER has are not trained again) and measures it on the photos
that the seed holds out, by the protocol `closed`. Prints for each figure the seeds' values, their mean and
Student's t interval of the mean over seeds, in %; then one JSON line. Docs: docs/recipes.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks import trained
from training.evaluation.measure import EvaluationOptions, measure
from training.evaluation.measurements import Closed
from training.fitting.recipes import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--min-images", type=int, default=20)
    trained.add_arguments(parser)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for recipe in options.recipes:
        found = [measured(recipe, seed, options) for seed in options.seeds]
        for name in found[0]:
            if name in rows:
                continue  # a baseline: the same for every recipe
            rows[name] = [one[name] for one in found]
            print(in_words(name, rows[name]), flush=True)
    shown = {name: {"values": some, "mean": mean(some), "reach": reach(some)} for name, some in rows.items()}
    print(json.dumps({"seeds": options.seeds, "rows": shown}))


def measured(recipe: str, seed: int, options: argparse.Namespace) -> Mapping[str, float]:
    """Returns the figures of one model, and of the baselines on its split."""
    name = f"{recipe}-{seed}"
    folder = trained.model(name, options.data, recipe, options, min_images=options.min_images, seed=seed)
    asked = EvaluationOptions(protocol="closed", weights=trained.beside(options.weights), seed=seed)
    found = measure(folder, options.data, options=asked)[0].closed
    assert found is not None  # the protocol is closed
    return dict(_figures(recipe, found))


def _figures(recipe: str, found: Closed) -> Sequence[tuple[str, float]]:
    assert found.classifier is not None  # it is measured on the people it was trained on
    own = [
        ("classifier", found.classifier.accuracy),
        ("classifier, top 5", found.classifier.top5),
        ("closest image", found.ranking.closest),
        ("mean average precision", found.ranking.mean_average_precision),
    ]
    others = [(one.name, one.ranking.closest) for one in found.baselines]
    named = [
        *((f"{recipe}: {name}", figure) for name, figure in own),
        *((f"closest image by {name}", figure) for name, figure in others),
    ]
    # With too few photos there is no value.
    return [(name, figure.value) for name, figure in named if figure and figure.value is not None]


def mean(values: Sequence[float]) -> float:
    """Returns the mean of the seeds' values."""
    return float(np.mean(values))


def reach(values: Sequence[float]) -> float | None:
    """Returns half the width of Student's t interval (95%) of the mean; None for a single seed."""
    n = len(values)
    if n < 2:
        return None
    return float(stats.t.ppf(0.975, n - 1) * stats.sem(values))


def in_words(name: str, values: Sequence[float]) -> str:
    """Formats a row of the table."""
    half = reach(values)
    interval = "" if half is None else f" +- {100 * half:4.1f}"
    return f"{name:44}{100 * mean(values):6.1f}{interval}   seeds {trained.percent(values)}"


if __name__ == "__main__":
    main()
