"""Rows of searches and the list of mistakes, shared by the closed-set and open-set protocols."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training.evaluation.measurements import Mistake
from training.evaluation.observe import Observed

# The highest rank of CMC curves, and the largest number of mistakes that are kept.
PLACES: Final = 20
MISTAKES: Final = 50

# One row for each probe: the answers of the model and of each baseline.
Rows = list[dict[str, Any]]


def mistakes(rows: Rows) -> tuple[Mistake, ...]:
    """Returns the searches in which the nearest photo shows another identity, nearest first, at most 50."""
    wrong = sorted((row for row in rows if not row["closest_right"]), key=lambda row: row["distance"])
    return tuple(
        Mistake(
            path=row["path"],
            identity=row["identity"],
            nearest_path=row["nearest"],
            nearest_identity=row["nearest_identity"],
            distance=row["distance"],
            predicted=row.get("said"),
            probability=row.get("probability"),
            stranger=not row.get("mated", 1),
        )
        for row in wrong[:MISTAKES]
    )


def with_right(
    found: Sequence[Mistake], observed: Observed, gallery: NDArray[np.int64]
) -> tuple[Mistake, ...]:
    """Adds to each mistake the right person's nearest photo among the enrolled rows `gallery`, (g,)."""
    rows = {path: row for row, path in enumerate(observed.paths)}
    return tuple(_with_right(one, rows[one.path], observed, gallery) for one in found)


def _with_right(one: Mistake, probe: int, observed: Observed, gallery: NDArray[np.int64]) -> Mistake:
    enrolled = gallery[observed.identities[gallery] == one.identity]
    if not len(enrolled):
        return one
    steps = observed.vectors[enrolled].astype(np.float64) - observed.vectors[probe]
    distances = np.linalg.norm(steps, axis=1)
    nearest = int(distances.argmin())
    return replace(
        one, right_path=observed.paths[enrolled[nearest]], right_distance=float(distances[nearest])
    )
