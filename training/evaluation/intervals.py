"""95% confidence intervals for the figures of an evaluation, by resampling identities.

Results on photos of one person are correlated. The cluster bootstrap (Davison & Hinkley, 1997, 3.8) therefore
draws identities with replacement, each with all its photos, 2,000 times. The interval extends from the 2.5th
to the 97.5th percentile of the resampled values, and is widened if needed to contain the measured value.

Rules for small samples:
- Fewer than 30 trials: no value, "too few".
- A false alarm rate r needs at least 1/r non-mated trials, and at least 30; otherwise there is no value.
- Fewer than 10 identities, or all trials alike (all wrong or all right): the bootstrap says nothing. The
  interval of a share is Wilson's, with each identity as a single trial, which is conservative. A figure that
  is not a share (a calibration error, a mean loss, a difference) has no interval with fewer than 10.
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
    """Returns the mean of per-photo values between 0 and 1, such as right or wrong, with its interval.

    Args:
        values: (n,).
        identities: (n,) identity of each photo, of any sortable type.
        seed: of the resampling.
    """
    values = np.asarray(values, np.float64)
    if few := _too_few(len(values)):
        return few
    people, number = _numbered(identities)
    sums, counts = np.bincount(people, values), np.bincount(people)
    means = _resampled_statistic(number, seed, lambda weights: weights @ sums / (weights @ counts))
    return _share_figure(float(values.mean()), means, len(values), number)


def mean(values: NDArray[np.float64], identities: Groups, *, seed: int) -> Figure:
    """Returns the mean of per-photo values (n,) that are not between 0 and 1, such as losses."""
    if few := _too_few(len(values)):
        return few
    people, number = _numbered(identities)
    if number < IDENTITIES:
        return _without_interval(float(values.mean()), len(values), number)
    sums, counts = np.bincount(people, values), np.bincount(people)
    means = _resampled_statistic(number, seed, lambda weights: weights @ sums / (weights @ counts))
    return _bootstrap(float(values.mean()), means, len(values), number)


def difference(first: NDArray[Any], second: NDArray[Any], identities: Groups, *, seed: int) -> Figure:
    """Returns the mean of second - first, both (n,) between 0 and 1 and of the same photos."""
    steps = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if few := _too_few(len(steps)):
        return few
    people, number = _numbered(identities)
    sums, counts = np.bincount(people, steps), np.bincount(people)
    means = _resampled_statistic(number, seed, lambda weights: weights @ sums / (weights @ counts))
    value = float(steps.mean())
    if number < IDENTITIES:
        return _without_interval(value, len(steps), number)
    if not np.ptp(means):
        # All identities have the same difference. The share of identities with another one is 0 of `number`
        # here; the upper end of its Wilson interval bounds how much the mean may deviate.
        reach = rates.wilson(0, number).high
        low, high = max(-1.0, value - reach), min(1.0, value + reach)
        return Figure(value, low, high, len(steps), _wilson_method(number))
    return _bootstrap(value, means, len(steps), number)


def calibration_error(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], identities: Groups, *, seed: int
) -> Figure:
    """Returns the expected calibration error of n predictions, 15 bins of equal width, with its interval.

    Args:
        confidence: (n,) probability of the predicted label.
        right: (n,) whether the prediction is right.
        identities: (n,) identity of each photo.
        seed: of the resampling.
    """
    if few := _too_few(len(confidence)):
        return few
    people, number = _numbered(identities)
    cells = people * reliability.BINS + reliability.bin_of(confidence)
    gaps = np.bincount(cells, right - confidence, number * reliability.BINS).reshape(number, -1)
    counts = np.bincount(people)
    errors = _resampled_statistic(
        number, seed, lambda weights: np.abs(weights @ gaps).sum(1) / (weights @ counts)
    )
    value = reliability.calibration_error(confidence, right)
    if number < IDENTITIES:
        return _without_interval(value, len(confidence), number)
    return _bootstrap(value, errors, len(confidence), number)


def fold_mean(accuracies: NDArray[np.float64], trials: int) -> Figure:
    """Returns the mean over k >= 2 folds (k,) with Student's t interval; `trials` is the number of pairs."""
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
    """Returns the miss rate at the thresholds of the allowed false alarm rates.

    Both sides are resampled, and the threshold is computed again for each resample.

    Args:
        false: (n,) distances of non-mated trials: searches for strangers, or pairs of two people.
        false_identities: (n,).
        true: (m,) distances of mated trials; infinite if the nearest photo shows another person.
        true_identities: (m,).
        allowed: false alarm rates, each above 0 and below 1.
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
        points.append(OperatingPoint(rate, limit, _share_figure(value, missed[:, column], len(true), number)))
    return tuple(points)


def area(
    false: NDArray[np.float64],
    false_identities: Groups,
    true: NDArray[np.float64],
    true_identities: Groups,
    *,
    seed: int,
) -> Figure:
    """Returns the area under the ROC curve: the share of (true, false) trials with the true one nearer.

    Ties count one half. Arguments as in `operating_points`.
    """
    if few := _too_few(min(len(false), len(true))):
        return few
    labels = np.repeat([False, True], [len(false), len(true)])
    value = float(roc_auc_score(labels, -np.concatenate([false, true])))
    order = np.argsort(false)
    left = np.searchsorted(false[order], true, side="left")
    right = np.searchsorted(false[order], true, side="right")
    areas = []
    in_order = np.arange(len(true))
    for weights, of_true in _resampled_weights(false_identities, true_identities, order, in_order, seed):
        below = np.pad(weights.cumsum(1), ((0, 0), (1, 0)))
        nearer = (below[:, left] + below[:, right]) / 2 / below[:, -1:]
        areas.append(1 - (nearer * of_true).sum(1) / of_true.sum(1))
    number = min(len(np.unique(false_identities)), len(np.unique(true_identities)))
    return _share_figure(value, np.concatenate(areas), len(false) + len(true), number)


def _missed(
    false: NDArray[np.float64],
    false_identities: Groups,
    true: NDArray[np.float64],
    true_identities: Groups,
    allowed: Sequence[float],
    seed: int,
) -> tuple[NDArray[np.float64], int]:
    """Returns resampled miss rates (resamples, rates), and the number of identities of the smaller side."""
    order, others = np.argsort(false), np.argsort(true)
    distances, sorted_true = false[order], true[others]
    missed = []
    for weights, of_true in _resampled_weights(false_identities, true_identities, order, others, seed):
        alarms, found = weights.cumsum(1), np.pad(of_true.cumsum(1), ((0, 0), (1, 0)))
        columns = []
        for rate in allowed:
            # As in `rates.threshold`: `first` is the nearest false alarm that exceeds the rate, and the
            # threshold is just below its distance.
            spared = np.floor(rate * alarms[:, -1] + 1e-9)
            first = np.minimum((alarms <= spared[:, None]).sum(1), len(distances) - 1)
            hits = np.searchsorted(sorted_true, distances[first], side="left")
            columns.append(1 - np.take_along_axis(found, hits[:, None], axis=1)[:, 0] / found[:, -1])
        missed.append(np.stack(columns, axis=1))
    number = min(len(np.unique(false_identities)), len(np.unique(true_identities)))
    return np.concatenate(missed), number


def _resampled_weights(
    first: Groups, second: Groups, order: NDArray[np.int64], other_order: NDArray[np.int64], seed: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yields resampled weights of the trials of two sides, (b, n) and (b, m), each in its given order."""
    (first_numbers, n), (second_numbers, m) = _numbered(first), _numbered(second)
    columns = max(len(first), len(second))
    draws = rates.resampled(n, RESAMPLES, seed=seed, columns=columns)
    other_draws = rates.resampled(m, RESAMPLES, seed=seed + 1, columns=columns)
    for weights, others in zip(draws, other_draws, strict=True):
        yield weights[:, first_numbers[order]], others[:, second_numbers[other_order]]


def _resampled_statistic(
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


def _share_figure(value: float, drawn: NDArray[np.float64], trials: int, identities: int) -> Figure:
    if identities < IDENTITIES or not np.ptp(drawn):
        rate = rates.wilson(value * identities, identities)
        return Figure(value, rate.low, rate.high, trials, _wilson_method(identities))
    return _bootstrap(value, drawn, trials, identities)


def _bootstrap(value: float, drawn: NDArray[np.float64], trials: int, identities: int) -> Figure:
    low, high = np.percentile(drawn, [2.5, 97.5])
    method = f"bootstrap over {identities:,} identities"
    return Figure(value, min(float(low), value), max(float(high), value), trials, method)


def _without_interval(value: float, trials: int, identities: int) -> Figure:
    return Figure(
        value, None, None, trials, f"no interval: {identities} identities, and it takes {IDENTITIES}"
    )


def _wilson_method(identities: int) -> str:
    return f"Wilson, as if each of {identities:,} identities were one trial"
