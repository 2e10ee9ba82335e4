"""What the protocols of identification share: a row for each search, and the worst of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training.evaluation.measurements import Mistake
from training.evaluation.observe import Observed

# How far CMC curves go, and how many mistakes are kept.
PLACES: Final = 20
MISTAKES: Final = 50

# Of each photo that was searched for, what was said of it by whom.
Rows = list[dict[str, Any]]


def mistakes(rows: Rows) -> tuple[Mistake, ...]:
    """The searches whose nearest photo shows somebody else, the nearest first."""
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
    """Mistakes, each with the nearest of the photos (g,) that show the right person."""
    rows = {path: row for row, path in enumerate(observed.paths)}
    return tuple(_with_right(one, rows[one.path], observed, gallery) for one in found)


def _with_right(one: Mistake, probe: int, observed: Observed, gallery: NDArray[np.int64]) -> Mistake:
    theirs = gallery[observed.identities[gallery] == one.identity]
    if not len(theirs):
        return one
    steps = observed.vectors[theirs].astype(np.float64) - observed.vectors[probe]
    distances = np.linalg.norm(steps, axis=1)
    nearest = int(distances.argmin())
    return replace(one, right_path=observed.paths[theirs[nearest]], right_distance=float(distances[nearest]))
