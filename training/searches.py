"""What the protocols of identification share: a row for each search, and the worst of them."""

from typing import Any, Final

from training.figures import Mistake

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
        )
        for row in wrong[:MISTAKES]
    )
