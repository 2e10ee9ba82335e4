"""Coverage of the prediction intervals of calibration, in simulations and on photographs.

    python -m benchmarks.next_strangers [--calibrations 100] [--data FOLDER] [--splits 40]

The simulation draws people with random effects, with a known distribution. With `--data` (identity folders),
embeddings are principal components of small grey images: some people are enrolled, the others are split into
two halves, one for calibration and one for later searches. Prints how often the number of later false alarms
is within the prediction interval, and how often their share is within the interval of the long-run rate.
Docs: docs/evaluation.md.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval import rates
from retrieval.images import pixels

_RATES = (0.1, 0.03, 0.01, 0.003)
_PEOPLE = ((10, 5), (10, 30), (30, 5), (30, None), (65, 30), (300, None), (300, 1))

# Non-mated searches: (n,) distances to the nearest enrolled face, and (n,) numbers of their identities.
_Searches = tuple[NDArray[np.float64], NDArray[np.int64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrations", type=int, default=100)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--splits", type=int, default=40)
    options = parser.parse_args()
    for people, photos in _PEOPLE:
        for alike in (0.0,) if photos == 1 else (0.0, 0.3, 0.6, 0.9):
            rng = np.random.default_rng(3)
            pairs = (
                (population(rng, people, photos, alike), population(rng, people, photos, alike))
                for _ in range(options.calibrations)
            )
            print_coverage(
                f"{people} people x {photos or '3.3 on average'}, alike {alike:g}", pairs, least=1.5
            )
    if options.data is not None:
        vectors, identities = pictures(options.data)
        names, counts = np.unique(identities, return_counts=True)
        many = names[counts >= 10]
        for label, pool, enrolled, most in (
            ("all people", names, 200, None),
            ("people with 10 photos or more", many, 30, None),
            ("20 of these a half", many, 30, 40),
        ):
            splits = halves(vectors, identities, pool, enrolled, most, options.splits)
            print_coverage(label, splits, least=1.0)


def print_coverage(label: str, pairs: Iterator[tuple[_Searches, _Searches]], *, least: float) -> None:
    """Prints how often the second searches of each pair are within the intervals that the first predict.

    A rate is skipped if fewer than `least` false alarms are expected at it.
    """
    held: dict[float, list[tuple[bool, bool]]] = {}
    for seed, ((distances, identities), (others, _)) in enumerate(pairs):
        wanted = [one for one in _RATES if one * len(distances) >= least]
        limits = np.array([rates.threshold(distances, one) for one in wanted])
        found = rates.upcoming(distances, identities, limits, searches=len(others), seed=seed)
        seen = rates.by_identity(distances[:, None] <= limits, identities, seed=seed)
        for one, limit, upcoming, rate in zip(wanted, limits, found, seen, strict=True):
            named = int((others <= limit).sum())
            inside = upcoming.low <= named <= upcoming.high
            held.setdefault(one, []).append((inside, rate.low <= named / len(others) <= rate.high))
    for one, both in held.items():
        shares = np.mean(both, axis=0)
        print(f"{label}, FPIR {one:g}: {len(both)} calibrations, {shares[0]:.3f} predicted, {shares[1]:.3f} "
              "within the long run", flush=True)  # fmt: skip


def population(rng: np.random.Generator, people: int, photos: int | None, alike: float) -> _Searches:
    """Draws searches of people with random effects; `alike` is their intraclass correlation."""
    sizes = rng.geometric(0.3, people) if photos is None else np.full(people, photos)
    place = np.repeat(np.arange(people), sizes)
    own = math.sqrt(alike) * rng.standard_normal(people)
    return own[place] + math.sqrt(1 - alike) * rng.standard_normal(len(place)), place


def pictures(data: Path) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Returns 60 whitened principal components and the identity of each photo, at most 30 photos a person."""
    found = [
        (path, folder.name) for folder in sorted(data.iterdir()) for path in sorted(folder.glob("*.jpg"))[:30]
    ]
    small = np.stack([pixels.read(path, size=16, crop=0.5).mean(2).ravel() for path, _ in found])
    small = (small - small.mean(1, keepdims=True)) / (small.std(1, keepdims=True) + 1e-6)
    small -= small.mean(0)
    _, sizes, axes = np.linalg.svd(small[:3000], full_matrices=False)
    return small @ axes[:60].T / sizes[:60], np.array([name for _, name in found])


def halves(
    vectors: NDArray[np.float64],
    identities: NDArray[np.str_],
    pool: NDArray[np.str_],
    enrolled: int,
    most: int | None,
    splits: int,
) -> Iterator[tuple[_Searches, _Searches]]:
    """Yields, for each split, searches of two halves of at most `most` people who are not enrolled."""
    rng = np.random.default_rng(0)
    for _ in range(splits):
        people = rng.permutation(pool)
        stored = vectors[np.isin(identities, people[:enrolled])]
        others = people[enrolled:][:most]
        yield (
            search(vectors, identities, stored, others[::2]),
            search(vectors, identities, stored, others[1::2]),
        )


def search(
    vectors: NDArray[np.float64],
    identities: NDArray[np.str_],
    stored: NDArray[np.float64],
    people: NDArray[np.str_],
) -> _Searches:
    """Searches for some people's photos: returns distances to the nearest stored one, and identities."""
    selected = np.isin(identities, people)
    probes = vectors[selected]
    squares = (probes**2).sum(1)[:, None] + (stored**2).sum(1) - 2 * probes @ stored.T
    return np.sqrt(squares.min(1).clip(min=0)), np.unique(identities[selected], return_inverse=True)[1]


if __name__ == "__main__":
    main()
