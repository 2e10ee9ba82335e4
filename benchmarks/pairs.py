"""Verification on LFW's ten folds, with models that were not trained on the people of their test pairs.

    python -m benchmarks.pairs DATA PAIRS --weights FILE --keep FOLDER [--recipes modern] [--min-images 5]
                               [--image-size 128] [--crop 0.6] [--precision auto]

Almost all people with two photos are in a pair, so the folds are halved: one model is trained on the people
of the first half's pairs (those with at least `--min-images` photos) and tested on the second half, another
the other way round. LFW's folds have no identity in common. The threshold of a fold comes from the other
folds of its half, and the model was not trained on their people either. Prints for each model and baseline
the mean accuracy over all folds with its standard error, in %, also for a model trained on the few people who
are in no pair; then one JSON line. Models that FOLDER has are not trained again. Docs: docs/recipes.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks import trained
from training.evaluation.measure import EvaluationOptions, measure
from training.evaluation.measurements import Pairs
from training.evaluation.pairs import Pair, read_pairs
from training.evaluation.protocols import photos_of
from training.fitting.recipes import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["modern"])
    parser.add_argument("--min-images", type=int, default=5)
    trained.add_arguments(parser)
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    files = cut(options.pairs, options.keep)
    rows: dict[str, NDArray[np.float64]] = {}
    for recipe in options.recipes:
        rows |= halves(recipe, files, options)
    rows |= outside_pairs(options.recipes[-1], options)
    for name, accuracies in rows.items():
        print(f"{name:64}{100 * accuracies.mean():6.2f}, standard error {100 * stats.sem(accuracies):.2f}")
    print(json.dumps({name: accuracies.tolist() for name, accuracies in rows.items()}))


def cut(pairs: Path, into: Path) -> tuple[Path, Path]:
    """Writes a file of pairs for each half of the folds.

    Args:
        pairs: a file of pairs with an even number of folds, at least four.
        into: the folder for the two files.
    """
    lines = pairs.read_text("utf-8").splitlines()
    folds, each = map(int, lines[0].split())
    if folds % 2 or folds < 4:
        raise SystemExit(f"{pairs} has {folds} folds; two halves of two folds or more take an even number.")
    middle = 1 + folds * each
    files = into / "pairs-a.txt", into / "pairs-b.txt"
    for file, half in zip(files, (lines[1:middle], lines[middle : 1 + 2 * folds * each]), strict=True):
        file.write_text("\n".join([f"{folds // 2}\t{each}", *half, ""]), "utf-8")
    return files


def halves(
    recipe: str, files: tuple[Path, Path], options: argparse.Namespace
) -> Mapping[str, NDArray[np.float64]]:
    """Returns all folds' accuracies, by models of the other half's people and by the baselines."""
    parts = []
    for half, learned, asked in (("a", *files), ("b", *files[::-1])):
        listed = options.keep / f"half-{half}.csv"
        people = _people(read_pairs(learned))
        trained.write_list(listed, options.data, people)
        name = f"half-{half}-{recipe}"
        folder = trained.model(name, listed, recipe, options, min_images=options.min_images)
        found = _measured(folder, asked, options, before=trained.beside(options.weights))
        if found.trained_people:
            raise SystemExit(f"{found.trained_people} of the people whom {folder} learned are in {asked}.")
        parts.append(_accuracies(f"{recipe}, learned from the other half's people", found))
    # The second model is tested on the folds of the first half.
    second, first = parts
    return {name: np.concatenate([first[name], second[name]]) for name in first}


def outside_pairs(recipe: str, options: argparse.Namespace) -> Mapping[str, NDArray[np.float64]]:
    """Returns the accuracies by a model of the people who are in no pair and have at least two photos."""
    inside = _people(read_pairs(options.pairs))
    all_people = {photo.identity for photo in photos_of(options.data) if photo.identity is not None}
    listed = options.keep / "outside.csv"
    trained.write_list(listed, options.data, all_people - inside)
    folder = trained.model(f"outside-{recipe}", listed, recipe, options, min_images=2)
    name = f"{recipe}, learned from people who are in no pair"
    # `halves` has measured the network before fine-tuning.
    return {name: _accuracies(name, _measured(folder, options.pairs, options, before=None))[name]}


def _people(pairs: Sequence[Pair]) -> set[str]:
    return {name for pair in pairs for name in pair.people}


def _measured(folder: Path, pairs: Path, options: argparse.Namespace, *, before: str | None) -> Pairs:
    evaluation = EvaluationOptions(protocol="lfw-pairs", pairs=pairs, weights=before)
    found = measure(folder, options.data, options=evaluation)[0].pairs
    assert found is not None  # the protocol is lfw-pairs
    return found


def _accuracies(name: str, found: Pairs) -> dict[str, NDArray[np.float64]]:
    others = {one.name: one.verification for one in found.baselines}
    return {way: np.array(one.folds) for way, one in {name: found.verification, **others}.items()}


if __name__ == "__main__":
    main()
