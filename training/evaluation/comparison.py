"""Comparison of two evaluations of the same photos, with paired tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from retrieval.errors import InputError
from training.evaluation import intervals
from training.evaluation.measurements import Comparison, Figure, Paired
from training.evaluation.result_files import REPORT, Results, check_free, in_json, write_files

COMPARISON: Final = "comparison.json"

# The columns of each protocol that hold 1 for right and 0 for wrong, and their names in a comparison.
_OUTCOMES: Final[Mapping[str, Mapping[str, str]]] = {
    "closed": {
        "classifier_right": "classifier accuracy",
        "top5_right": "classifier top-5",
        "closest_right": "closest-image agreement",
    },
    "open": {
        "closest_right": "closest-image agreement of the enrolled",
        "right_at_0.1": "found at FPIR 0.1",
        "right_at_0.01": "found at FPIR 0.01",
        "right_at_0.003": "found at FPIR 0.003",
    },
    "lfw-pairs": {"right": "pairs told rightly"},
}
_PRECISION: Final = "average_precision"


def compare(a: Results, b: Results, *, seed: int = 0) -> Comparison:
    """Compares two evaluations on the photos that both have.

    Raises:
        InputError: the protocols differ, or the evaluations have no photo in common.
    """
    protocol = str(a.metrics["protocol"])
    if protocol != b.metrics["protocol"]:
        raise InputError(
            f"{a.name} was evaluated as {protocol} and {b.name} as {b.metrics['protocol']}; "
            "evaluate both with the same `protocol`."
        )
    first, second = _by_key(a), _by_key(b)
    common = [key for key in first if key in second and _same_trial(first[key], second[key])]
    if not common:
        raise InputError(f"{a.name} and {b.name} have no photo in common; evaluate both on the same photos.")
    rows = [(first[key], second[key]) for key in common]
    return Comparison(
        a=a.name,
        b=b.name,
        protocol=protocol,
        common=len(common),
        only_in_a=len(first) - len(common),
        only_in_b=len(second) - len(common),
        tests=tuple(_tests(rows, protocol, seed)),
        notes=tuple(_notes(a, b, protocol)),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided; 1 if there are no discordant photos.

    The test is binomial with probability 0.5 on the discordant photos, those that only one side has right.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def _by_key(results: Results) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    names = ("first", "second") if results.metrics["protocol"] == "lfw-pairs" else ("path",)
    return {tuple(row[name] for name in names): row for row in results.rows}


def _same_trial(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows are of the same trial: same identity, mated or not, and same fold of pairs."""
    return all(
        _text(one.get(name)) == _text(other.get(name)) for name in ("identity", "mated", "same", "fold")
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def check_target(folder: Path) -> None:
    """Checks that a comparison can be written to a folder; called before anything is measured.

    Raises:
        InputError: it is a file, or a folder with other content.
    """
    check_free(folder, COMPARISON, "comparison")


def write(folder: Path, found: Comparison, *, report: bytes | None = None) -> None:
    """Writes a comparison into a folder, as JSON and as an HTML page; the JSON last.

    Raises:
        StorageError: the files cannot be written.
    """
    write_files(folder, {REPORT: report, COMPARISON: in_json(found)}, what="comparison")


_Pairs = list[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _tests(rows: _Pairs, protocol: str, seed: int) -> list[Paired]:
    if protocol == "open":
        # Non-mated searches only set the thresholds, at the same FPIR on both sides.
        rows = [(one, other) for one, other in rows if int(one["mated"])]
    tests = [
        _paired(name, column, rows, seed, exact=True)
        for column, name in _OUTCOMES[protocol].items()
        if rows and column in rows[0][0]
    ]
    if rows and _PRECISION in rows[0][0]:
        tests.append(_paired("mean average precision", _PRECISION, rows, seed, exact=False))
    return [test for test in tests if test is not None]


def _paired(name: str, column: str, rows: _Pairs, seed: int, *, exact: bool) -> Paired | None:
    both = [(one, other) for one, other in rows if _is_number(one, column) and _is_number(other, column)]
    if not both:
        return None
    first, second = _values(both, 0, column), _values(both, 1, column)
    people = np.array([str(one["identity"]) for one, _ in both], np.str_)
    difference = intervals.difference(first, second, people, seed=seed)

    def share(values: NDArray[np.float64]) -> Figure:
        return intervals.share(values, people, seed=seed)

    if not exact:
        return Paired(name, share(first), share(second), difference, None, None, None)
    only = int((first > second).sum()), int((second > first).sum())
    return Paired(name, share(first), share(second), difference, *only, mcnemar(*only))


def _is_number(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return value is not None and float(value) == float(value)


def _values(rows: _Pairs, side: int, column: str) -> NDArray[np.float64]:
    return np.array([float(row[side][column]) for row in rows])


def _notes(a: Results, b: Results, protocol: str) -> list[str]:
    notes = []
    one, other = a.metrics["data"]["split"], b.metrics["data"]["split"]
    if one != other:
        notes.append(f"The photos were divided differently: {one}; {other}.")
    if protocol != "lfw-pairs" and a.metrics[protocol]["enrolled"] != b.metrics[protocol]["enrolled"]:
        notes.append("The galleries differ in size, and the larger one is the harder.")
    if protocol == "open":
        notes.append("Each has its own thresholds, found at the same FPIR.")
    return notes
