"""Verification (1:1) on pairs of photos, which come from a file in the format of LFW's pairs.txt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.sources.photos import Photo
from retrieval.system.files import open_file_or_pipe, why
from training.evaluation import intervals
from training.evaluation.baselines import spaces
from training.evaluation.measurements import Curve, Pairs, PairsBaseline, Verification
from training.evaluation.observe import Observed, shown
from training.evaluation.searches import Rows
from training.metrics.verification import across_folds, roc

# The false accept rates at which TAR is measured.
FAR: Final = (0.1, 0.01, 0.001)
_CURVE_POINTS: Final = 200
_PAIRS_PER_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class Pair:
    """Two photos, named by paths without suffix, such as "Ada/Ada_0001", and the number of their fold."""

    first: str
    second: str
    fold: int

    @property
    def same(self) -> bool:
        """Whether they show the same person."""
        return self.people[0] == self.people[1]

    @property
    def people(self) -> tuple[str, str]:
        """The identities of the first and of the second photo."""
        return self.first.split("/")[0], self.second.split("/")[0]


def read_pairs(path: Path) -> list[Pair]:
    """Reads a file of pairs in LFW's format.

    The first line has the number of folds and the number of pairs of each kind in a fold. A fold starts with
    lines `name n m` (the n-th and m-th photo of one person), followed by lines `name n other m` (two people).

    Raises:
        InputError: the file cannot be read, or a line has another format.
    """
    try:
        with open_file_or_pipe(path) as file:
            lines = [line.split() for line in file.read().decode().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(
            f"The pairs {path} cannot be read: {why(error)}; name a file like LFW's pairs.txt."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text of pairs; name a file like LFW's pairs.txt.") from error
    if not lines or not all(word.isdigit() for word in lines[0]) or len(lines[0]) > 2:
        raise InputError(
            f"The first line of {path} must say how many folds and pairs there are, as LFW's pairs.txt does."
        )
    folds, each = map(int, lines[0]) if len(lines[0]) == 2 else (1, int(lines[0][0]))
    if folds < 2:
        raise InputError(
            f"{path} has one fold; a threshold from other folds takes two at least, as pairs.txt has."
        )
    if len(lines) - 1 != 2 * folds * each:
        raise InputError(
            f"{path} has {len(lines) - 1:,} pairs, but its first line says {2 * folds * each:,}; mend it."
        )
    return [_pair(path, number, line, number // (2 * each)) for number, line in enumerate(lines[1:])]


def _pair(path: Path, number: int, line: Sequence[str], fold: int) -> Pair:
    words = [line[0], *line[1:2], line[0], *line[2:]] if len(line) == 3 else line
    if len(words) != 4 or not words[1].isdigit() or not words[3].isdigit():
        raise InputError(f"Line {number + 2} of {path} is neither `name n m` nor `name n other m`.")
    return Pair(_name(words[0], words[1]), _name(words[2], words[3]), fold)


def _name(person: str, number: str) -> str:
    return f"{person}/{person}_{int(number):04d}"


def photos_in(pairs: Iterable[Pair], found: Iterable[Photo], data: Path) -> list[Photo]:
    """Returns the photos of a data folder that occur in a pair, in the order of the files.

    Raises:
        InputError: there are none.
    """
    wanted = {name for pair in pairs for name in (pair.first, pair.second)}
    photos = [photo for photo in found if named(photo.path or "", data) in wanted]
    if not photos:
        raise InputError(
            f"No photo of the pairs is in {data}; give the folder that has Ada/Ada_0001.jpg and so on."
        )
    return photos


def named(path: str, data: Path) -> str:
    """Returns the name of a photo as pairs have it: its path relative to `data`, without the suffix."""
    return str(PurePosixPath(shown(path, str(data))).with_suffix("")) if path else ""


def measure(
    observed: Observed,
    pairs: Sequence[Pair],
    data: Path,
    *,
    trained: frozenset[str],
    before: Observed | None,
    seed: int,
) -> tuple[Pairs, Rows]:
    """Measures a model and the baselines in verification of pairs.

    Args:
        observed: those photos of the pairs that could be read, with grey images.
        pairs: all pairs.
        data: the data folder.
        trained: people that the model was trained on.
        before: the same photos, embedded by the network before fine-tuning.
        seed: of resampling.

    Returns:
        The figures, and a row for each pair with two readable photos.

    Raises:
        InputError: the readable pairs are too few: it takes two folds with pairs of each kind.
    """
    index = {named(path, data): row for row, path in enumerate(observed.paths)}
    usable = [pair for pair in pairs if pair.first in index and pair.second in index]
    if not _can_be_measured(usable):
        raise InputError(
            f"Only {len(usable):,} of the pairs can be read; two folds need pairs of both kinds each."
        )
    sides = np.array([[index[pair.first], index[pair.second]] for pair in usable], np.int64)
    distances = _distances(observed.vectors, sides)
    verification, right = _verified(usable, distances, seed)
    rows: Rows = [
        {
            "first": pair.first,
            "second": pair.second,
            "identity": pair.people[0],
            "same": int(pair.same),
            "fold": pair.fold,
            "distance": float(distance),
            "right": int(told),
        }
        for pair, distance, told in zip(usable, distances.tolist(), right.tolist(), strict=True)
    ]
    baselines = []
    for space in spaces(observed, np.arange(len(observed.paths)), before):
        other, told = _verified(usable, _distances(space.features, sides), seed)
        baselines.append(PairsBaseline(space.name, space.says, other))
        for row, one in zip(rows, told.tolist(), strict=True):
            row[f"{space.name}_right"] = int(one)
    people = {name for pair in pairs for name in pair.people}
    fresh = np.array([not trained.intersection(pair.people) for pair in usable])
    unseen = [pair for pair, new in zip(usable, fresh, strict=True) if new]
    fair = not fresh.all() and _can_be_measured(unseen)
    return Pairs(
        same=sum(pair.same for pair in usable),
        different=sum(not pair.same for pair in usable),
        left_out=len(pairs) - len(usable),
        people=len(people),
        trained_people=len(people & trained),
        verification=verification,
        unseen=_verified(unseen, distances[fresh], seed)[0] if fair else None,
        unseen_pairs=len(unseen),
        baselines=tuple(baselines),
    ), rows


def _can_be_measured(pairs: Sequence[Pair]) -> bool:
    """Whether the remaining folds have pairs of both kinds, for every choice of the fold that is left out."""
    folds = {kind: {pair.fold for pair in pairs if pair.same is kind} for kind in (True, False)}
    return all(len(some) > 1 for some in folds.values())


def _distances(features: NDArray[np.float32], sides: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the Euclidean distance (n,), in float64, of each pair of rows (n, 2)."""
    found = np.empty(len(sides))
    for start in range(0, len(sides), _PAIRS_PER_BLOCK):
        block = slice(start, start + _PAIRS_PER_BLOCK)
        first, second = sides[block].T
        found[block] = np.linalg.norm(
            features[first].astype(np.float64) - features[second].astype(np.float64), axis=1
        )
    return found


def _verified(
    pairs: Sequence[Pair], distances: NDArray[np.float64], seed: int
) -> tuple[Verification, NDArray[np.bool_]]:
    same = np.array([pair.same for pair in pairs])
    people = np.array([pair.people[0] for pair in pairs], np.str_)
    folds, right = across_folds(distances, same, np.array([pair.fold for pair in pairs]))
    sides = (distances[~same], people[~same], distances[same], people[same])
    accuracy = intervals.fold_mean(folds.accuracies, len(pairs))
    return Verification(
        accuracy=accuracy,
        standard_error=folds.standard_error if accuracy.known else None,
        folds=tuple(folds.accuracies.tolist()),
        thresholds=tuple(folds.thresholds.tolist()),
        area=intervals.area(*sides, seed=seed),
        points=intervals.operating_points(*sides, FAR, seed=seed),
        curve=_curve(distances, same),
    ), right


def _curve(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> Curve:
    false, true, limits = roc(distances, same)
    kept = np.unique(np.linspace(0, len(limits) - 1, _CURVE_POINTS).round().astype(int))
    return Curve(tuple(false[kept].tolist()), tuple((1 - true[kept]).tolist()), tuple(limits[kept].tolist()))
