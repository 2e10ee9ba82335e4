"""Closed-set identification: searches for held-out photos of enrolled people."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training.evaluation import intervals
from training.evaluation.baselines import Space, spaces
from training.evaluation.measurements import (
    Bin,
    Calibration,
    Classifier,
    Closed,
    ClosedBaseline,
    Confusion,
    Figure,
    Person,
    Ranking,
)
from training.evaluation.observe import Observed
from training.evaluation.searches import PLACES, Rows, mistakes, with_right
from training.metrics import identification, reliability
from training.metrics.identification import Ranks

_TOP: Final = 5


def measure(
    observed: Observed,
    enrolled: NDArray[np.bool_],
    labels: Sequence[str],
    *,
    before: Observed | None,
    seed: int,
) -> tuple[Closed, Rows]:
    """Measures a model and the baselines in closed-set identification.

    Args:
        observed: n photos, with probabilities and grey images.
        enrolled: (n,) True for enrolled photos; the others are probes.
        labels: of the classifier's outputs.
        before: the same photos, embedded by the network before fine-tuning.
        seed: of the halves (for the temperature) and of resampling.

    Returns:
        The figures, and a row for each probe with the answers of the model and of each baseline.
    """
    gallery = np.flatnonzero(enrolled)
    _, numbers = np.unique(observed.identities, return_inverse=True)
    answerable = np.isin(numbers, numbers[gallery])
    probes = np.flatnonzero(~enrolled & answerable)
    found = _ranks(observed.vectors, numbers, gallery, probes)
    identities = observed.identities[probes]
    rows = _rows(observed, gallery, probes, found)
    classifier = _classifier(observed, probes, labels, rows, seed)
    baselines = []
    for space in spaces(observed, gallery, before):
        other = _ranks(space.features, numbers, gallery, probes)
        baselines.append(_baseline(space, other, identities, seed))
        for row, place in zip(rows, _closest(other, numbers, gallery, probes), strict=True):
            row[f"{space.name}_right"] = int(place)
    people = _people(rows, observed.identities[gallery])
    return Closed(
        enrolled=len(gallery),
        probes=len(probes),
        identities=len(np.unique(numbers[gallery])),
        unanswerable=int((~enrolled & ~answerable).sum()),
        ranking=_ranking(found, identities, seed),
        classifier=classifier,
        confusions=_confusions(rows, "nearest_identity"),
        people=people,
        mistakes=with_right(mistakes(rows), observed, gallery),
        baselines=tuple(baselines),
    ), rows


def _ranks(
    features: NDArray[np.float32],
    numbers: NDArray[np.int64],
    gallery: NDArray[np.int64],
    probes: NDArray[np.int64],
) -> Ranks:
    return identification.ranks(features[probes], numbers[probes], features[gallery], numbers[gallery])


def _closest(
    found: Ranks, numbers: NDArray[np.int64], gallery: NDArray[np.int64], probes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    return np.asarray(numbers[gallery[found.row]] == numbers[probes])


def _ranking(found: Ranks, identities: NDArray[np.str_], seed: int) -> Ranking:
    """Returns the figures of searches, all of which are mated."""
    cmc = tuple(intervals.share(found.place <= k, identities, seed=seed) for k in range(1, PLACES + 1))
    precision = intervals.share(found.precision, identities, seed=seed)
    return Ranking(cmc[0], cmc, precision)


def _baseline(space: Space, found: Ranks, identities: NDArray[np.str_], seed: int) -> ClosedBaseline:
    return ClosedBaseline(space.name, space.says, _ranking(found, identities, seed))


def _rows(observed: Observed, gallery: NDArray[np.int64], probes: NDArray[np.int64], found: Ranks) -> Rows:
    nearest = gallery[found.row]
    return [
        {
            "path": observed.paths[probe],
            "identity": str(observed.identities[probe]),
            "nearest": observed.paths[photo],
            "nearest_identity": str(observed.identities[photo]),
            "distance": float(found.distance[index]),
            "closest_right": int(observed.identities[photo] == observed.identities[probe]),
            "place": int(found.place[index]),
            "average_precision": float(found.precision[index]),
            "said": None,
            "probability": None,
            "classifier_right": None,
            "top5_right": None,
        }
        for index, (probe, photo) in enumerate(zip(probes.tolist(), nearest.tolist(), strict=True))
    ]


def _classifier(
    observed: Observed, probes: NDArray[np.int64], labels: Sequence[str], rows: Rows, seed: int
) -> Classifier | None:
    """Returns the classifier's figures over probes of people that it has a label for; None if there are none.

    Writes the classifier's answer into every row. An imported model has no labels and no classifier.
    """
    if observed.probabilities is None:
        raise ValueError("the photos were observed without probabilities")
    if not labels:
        return None
    probabilities = observed.probabilities[probes]
    index = {label: number for number, label in enumerate(labels)}
    actual = np.array([index.get(row["identity"], -1) for row in rows], np.int64)
    said = probabilities.argmax(1)
    for row, best, values in zip(rows, said.tolist(), probabilities, strict=True):
        row["said"], row["probability"] = labels[best], float(values[best])
    known = np.flatnonzero(actual >= 0)
    if not len(known):
        return None
    right, top = said == actual, identification.top_k(probabilities[known], actual[known], _TOP)
    for place, among in zip(known.tolist(), top.tolist(), strict=True):
        rows[place]["classifier_right"], rows[place]["top5_right"] = int(right[place]), int(among)
    identities = observed.identities[probes][known]
    return Classifier(
        accuracy=intervals.share(right[known], identities, seed=seed),
        top5=intervals.share(top, identities, seed=seed),
        confusions=_confusions([rows[place] for place in known.tolist()], "said"),
        calibration=_calibration(probabilities[known], actual[known], identities, seed),
    )


def _calibration(
    probabilities: NDArray[np.float32], actual: NDArray[np.int64], identities: NDArray[np.str_], seed: int
) -> Calibration:
    confidence, right = _confidence(probabilities, actual)
    diagram = reliability.reliability(confidence, right)
    bins = tuple(
        Bin(float(low), float(high), int(n), float(mean) if n else None, float(share) if n else None)
        for low, high, n, mean, share in zip(
            diagram.edges[:-1],
            diagram.edges[1:],
            diagram.counts,
            diagram.confidence,
            diagram.accuracy,
            strict=True,
        )
    )
    whole = intervals.calibration_error(confidence, right, identities, seed=seed)
    order = np.random.default_rng(seed).permutation(len(actual))
    fitted_on, measured_on = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = (
        reliability.fitted_temperature(probabilities[fitted_on], actual[fitted_on])
        if len(fitted_on) >= intervals.TRIALS
        else None
    )
    scaled = reliability.at_temperature(probabilities[measured_on], temperature or 1.0)
    identities = identities[measured_on]

    def error(values: NDArray[Any]) -> Figure:
        return intervals.calibration_error(*_confidence(values, actual[measured_on]), identities, seed=seed)

    def loss(values: NDArray[Any]) -> Figure:
        return intervals.mean(reliability.losses(values, actual[measured_on]), identities, seed=seed)

    plain = probabilities[measured_on].astype(np.float64)
    return Calibration(whole, temperature, error(plain), error(scaled), loss(plain), loss(scaled), bins)


def _confidence(
    probabilities: NDArray[Any], actual: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the highest probability (n,), and whether its label is the true one (n,)."""
    return probabilities.max(1).astype(np.float64), probabilities.argmax(1) == actual


def _confusions(rows: Rows, column: str) -> tuple[Confusion, ...]:
    """Counts the confusions between the true identity and the one in a column of the rows."""
    found = identification.confusions([row[column] for row in rows], [row["identity"] for row in rows])
    return tuple(Confusion(*one) for one in found)


def _people(rows: Rows, enrolled: NDArray[np.str_]) -> tuple[Person, ...]:
    photos = Counter(enrolled.tolist())
    by_identity: dict[str, Rows] = {}
    for row in rows:
        by_identity.setdefault(row["identity"], []).append(row)
    people = [_person(name, photos[name], own_rows) for name, own_rows in by_identity.items()]
    return tuple(sorted(people, key=lambda one: (one.closest - one.probes, one.identity)))


def _person(name: str, enrolled: int, rows: Rows) -> Person:
    classified = [row["classifier_right"] for row in rows if row["classifier_right"] is not None]
    wrong = Counter(row["nearest_identity"] for row in rows if not row["closest_right"])
    return Person(
        identity=name,
        enrolled=enrolled,
        probes=len(rows),
        right=sum(classified) if classified else None,
        closest=sum(row["closest_right"] for row in rows),
        taken_for=min(wrong, key=lambda who: (-wrong[who], who)) if wrong else None,
    )
