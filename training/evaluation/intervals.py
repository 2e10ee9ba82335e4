"""95% intervals by resampling identities, and when there are too few for one.

Photos of one person are alike: whoever is hard once is hard again. So it is people who are drawn with
replacement, each with all their photos (the cluster bootstrap; Davison & Hinkley, 1997, 3.8), 2,000 times,
and the interval goes from the 2.5th to the 97.5th percentile of what comes out. It always holds the value.

The rules:
- fewer than 30 trials: no number at all, "too few";
- a rate of false alarms r needs 1/r trials of strangers at least (30 at least), or there is no number;
- fewer than 10 identities, or all trials alike (nothing wrong, nothing right): drawing says nothing, and
  the interval of a share is Wilson's, as if each identity were a single trial, which is the careful side;
  what is no share (a calibration error, a difference) has no interval with fewer than 10.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from retrieval import rates
from training.evaluation.measurements import Figure, OperatingPoint
from training.metrics import reliability

TRIALS: Final = 30
IDENTITIES: Final = 10
RESAMPLES: Final = 2000

Groups = NDArray[Any]


def share(values: NDArray[Any], identities: Groups, *, seed: int) -> Figure:
    """The mean of per-photo values between 0 and 1, such as right or wrong.

    Args:
        values: (n,).
        identities: (n,) of whom each is, anything that can be sorted.
        seed: of the resampling.
    """
    values = np.asarray(values, np.float64)
    if few := _too_few(len(values)):
        return few
    people, number = _numbered(identities)
    sums, counts = np.bincount(people, values), np.bincount(people)
    means = _collected(number, seed, lambda weights: weights @ sums / (weights @ counts))
    return _figure(float(values.mean()), means, len(values), number)


def mean(values: NDArray[np.float64], identities: Groups, *, seed: int) -> Figure:
    """The mean of per-photo values (n,) that are no shares, such as losses."""
    if few := _too_few(len(values)):
        return few
    people, number = _numbered(identities)
    if number < IDENTITIES:
        return _alone(float(values.mean()), len(values), number)
    sums, counts = np.bincount(people, values), np.bincount(people)
    means = _collected(number, seed, lambda weights: weights @ sums / (weights @ counts))
    return _between(float(values.mean()), means, len(values), number)


def difference(first: NDArray[Any], second: NDArray[Any], identities: Groups, *, seed: int) -> Figure:
    """The mean of second - first, both (n,) between 0 and 1 and about the same photos."""
    steps = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if few := _too_few(len(steps)):
        return few
    people, number = _numbered(identities)
    sums, counts = np.bincount(people, steps), np.bincount(people)
    means = _collected(number, seed, lambda weights: weights @ sums / (weights @ counts))
    value = float(steps.mean())
    if number < IDENTITIES:
        return _alone(value, len(steps), number)
    if not np.ptp(means):
        # Nothing differs between people: how often it may yet differ is a share of which none was seen.
        reach = rates.wilson(0, number).high
        return Figure(value, max(-1.0, value - reach), min(1.0, value + reach), len(steps), _as_if(number))
    return _between(value, means, len(steps), number)


def calibration_error(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], identities: Groups, *, seed: int
) -> Figure:
    """Expected calibration error of n predictions: probability (n,), right or wrong (n,), of whom (n,)."""
    if few := _too_few(len(confidence)):
        return few
    people, number = _numbered(identities)
    cells = people * reliability.BINS + reliability.bin_of(confidence)
    gaps = np.bincount(cells, right - confidence, number * reliability.BINS).reshape(number, -1)
    counts = np.bincount(people)
    errors = _collected(number, seed, lambda weights: np.abs(weights @ gaps).sum(1) / (weights @ counts))
    value = reliability.calibration_error(confidence, right)
    if number < IDENTITIES:
        return _alone(value, len(confidence), number)
    return _between(value, errors, len(confidence), number)


def fold_mean(accuracies: NDArray[np.float64], trials: int) -> Figure:
    """The mean over k >= 2 folds (k,) with Student's t interval; `trials` pairs in all."""
    if few := _too_few(trials):
        return few
    middle, k = float(accuracies.mean()), len(accuracies)
    reach = float(stats.t.ppf(0.975, k - 1) * accuracies.std(ddof=1) / math.sqrt(k))
    return Figure(
        middle, max(0.0, middle - reach), min(1.0, middle + reach), trials, f"Student's t over {k} folds"
    )


def operating_points(
    false: NDArray[np.float64],
    false_identities: Groups,
    true: NDArray[np.float64],
    true_identities: Groups,
    allowed: Sequence[float],
    *,
    seed: int,
) -> tuple[OperatingPoint, ...]:
    """What is missed at thresholds that allow so many false alarms.

    Both sides are resampled, and the threshold is found anew each time.

    Args:
        false: (n,) distances at which an alarm would be false: of strangers, of pairs of two people.
        false_identities: (n,).
        true: (m,) distances at which it would be right; infinite where the wrong person is nearest.
        true_identities: (m,).
        allowed: shares of false alarms, each above 0 and below 1.
        seed: of the resampling.
    """
    enough = [len(true) >= TRIALS and len(false) >= max(TRIALS, 1 / rate - 1e-6) for rate in allowed]
    if not any(enough):
        return tuple(OperatingPoint(rate, None, _no_point(rate, len(false), len(true))) for rate in allowed)
    missed, number = _missed(false, false_identities, true, true_identities, allowed, seed)
    points = []
    for column, (rate, known) in enumerate(zip(allowed, enough, strict=True)):
        if not known:
            points.append(OperatingPoint(rate, None, _no_point(rate, len(false), len(true))))
            continue
        limit = rates.threshold(false, rate)
        value = float((true > limit).mean())
        points.append(OperatingPoint(rate, limit, _figure(value, missed[:, column], len(true), number)))
    return tuple(points)


def area(
    false: NDArray[np.float64],
    false_identities: Groups,
    true: NDArray[np.float64],
    true_identities: Groups,
    *,
    seed: int,
) -> Figure:
    """The area under the ROC curve: how often a true pair is nearer than a false one, ties by half."""
    if few := _too_few(min(len(false), len(true))):
        return few
    labels = np.repeat([False, True], [len(false), len(true)])
    value = float(roc_auc_score(labels, -np.concatenate([false, true])))
    order = np.argsort(false)
    left = np.searchsorted(false[order], true, side="left")
    right = np.searchsorted(false[order], true, side="right")
    areas = []
    for weights, of_true in _both(false_identities, true_identities, order, np.arange(len(true)), seed):
        below = np.pad(weights.cumsum(1), ((0, 0), (1, 0)))
        nearer = (below[:, left] + below[:, right]) / 2 / below[:, -1:]
        areas.append(1 - (nearer * of_true).sum(1) / of_true.sum(1))
    number = min(len(np.unique(false_identities)), len(np.unique(true_identities)))
    return _figure(value, np.concatenate(areas), len(false) + len(true), number)


def _missed(
    false: NDArray[np.float64],
    false_identities: Groups,
    true: NDArray[np.float64],
    true_identities: Groups,
    allowed: Sequence[float],
    seed: int,
) -> tuple[NDArray[np.float64], int]:
    """Resampled shares of misses (resamples, rates); and how many people the smaller side has."""
    order, others = np.argsort(false), np.argsort(true)
    distances, sorted_true = false[order], true[others]
    missed = []
    for weights, of_true in _both(false_identities, true_identities, order, others, seed):
        alarms, found = weights.cumsum(1), np.pad(of_true.cumsum(1), ((0, 0), (1, 0)))
        columns = []
        for rate in allowed:
            # As `rates.threshold`: the nearest false alarm that is one too many; below it is the threshold.
            spared = np.floor(rate * alarms[:, -1] + 1e-9)
            first = np.minimum((alarms <= spared[:, None]).sum(1), len(distances) - 1)
            hits = np.searchsorted(sorted_true, distances[first], side="left")
            columns.append(1 - np.take_along_axis(found, hits[:, None], axis=1)[:, 0] / found[:, -1])
        missed.append(np.stack(columns, axis=1))
    number = min(len(np.unique(false_identities)), len(np.unique(true_identities)))
    return np.concatenate(missed), number


def _both(
    first: Groups, second: Groups, order: NDArray[np.int64], other_order: NDArray[np.int64], seed: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Resampled weights of the trials of two sides, (b, n) and (b, m), each in the order that is wanted."""
    (one, n), (two, m) = _numbered(first), _numbered(second)
    columns = max(len(first), len(second))
    draws = rates.resampled(n, RESAMPLES, seed=seed, columns=columns)
    other_draws = rates.resampled(m, RESAMPLES, seed=seed + 1, columns=columns)
    for weights, others in zip(draws, other_draws, strict=True):
        yield weights[:, one[order]], others[:, two[other_order]]


def _collected(
    number: int, seed: int, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    return np.concatenate([statistic(weights) for weights in rates.resampled(number, RESAMPLES, seed=seed)])


def _numbered(identities: Groups) -> tuple[NDArray[np.int64], int]:
    names, numbers = np.unique(identities, return_inverse=True)
    return numbers, len(names)


def _too_few(trials: int) -> Figure | None:
    if trials >= TRIALS:
        return None
    return Figure(None, None, None, trials, f"too few: {trials}, and it takes {TRIALS}")


def _no_point(rate: float, false: int, true: int) -> Figure:
    needed = max(TRIALS, math.ceil(1 / rate - 1e-6))
    why = (
        f"{false:,} false trials, and it takes {needed:,}"
        if false < needed
        else f"{true:,}, and it takes {TRIALS}"
    )
    return Figure(None, None, None, true, f"too few: {why}")


def _figure(value: float, drawn: NDArray[np.float64], trials: int, identities: int) -> Figure:
    if identities < IDENTITIES or not np.ptp(drawn):
        rate = rates.wilson(value * identities, identities)
        return Figure(value, rate.low, rate.high, trials, _as_if(identities))
    return _between(value, drawn, trials, identities)


def _between(value: float, drawn: NDArray[np.float64], trials: int, identities: int) -> Figure:
    low, high = np.percentile(drawn, [2.5, 97.5])
    method = f"bootstrap over {identities:,} identities"
    return Figure(value, min(float(low), value), max(float(high), value), trials, method)


def _alone(value: float, trials: int, identities: int) -> Figure:
    return Figure(
        value, None, None, trials, f"no interval: {identities} identities, and it takes {IDENTITIES}"
    )


def _as_if(identities: int) -> str:
    return f"Wilson, as if each of {identities:,} identities were one trial"
