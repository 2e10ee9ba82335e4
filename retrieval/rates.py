"""Rates of an identification system with their intervals: pure functions on arrays of distances.

The terms are those of ISO/IEC 19795-1 and of NIST's face recognition evaluations. A search is *mated* when
the person is enrolled, *non-mated* when the person is a stranger. FPIR, the false positive identification
rate, is the share of non-mated searches that return an identity; FNIR, the false negative identification
rate, the share of mated searches that do not return the right identity first. A search returns the identity
of the nearest face if its distance is at most the threshold.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

# The normal quantile of a two-sided interval of 95%.
_Z = 1.959963984540054

# How often a bootstrap draws.
_DRAWS = 1000

# How often the next searches are drawn: their percentiles lie farther out.
_PREDICTIONS: Final = 4000

# Numbers of a bootstrap in memory at a time.
_CELLS: Final = 2**21


@dataclass(frozen=True)
class Rate:
    """A share of `n` trials, with the ends of its 95% interval.

    Attributes:
        value: between 0 and 1; NaN where there was no trial.
        low: lower end of the interval.
        high: upper end.
        n: how many trials.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Upcoming:
    """A 95% prediction interval, `low` to `high`: false positives among the next `n` non-mated searches."""

    n: int
    low: int
    high: int

    def in_words(self) -> str:
        """Half a sentence."""
        return (
            f"of the next {self.n:,} strangers' searches between {self.low:,} and {self.high:,} may be given "
            "a name (95%)"
        )


def wilson(hits: float, n: int) -> Rate:
    """The share `hits` of `n` with Wilson's 95% score interval (Wilson, 1927); (0, 1) for no trial.

    `hits` may be a fraction, where the trials are groups and a group is right in part.
    """
    if n == 0:
        return Rate(math.nan, 0.0, 1.0, 0)
    share = hits / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At 0 and at n hits the ends are exact, and rounding must not say otherwise.
    low = 0.0 if hits == 0 else max(0.0, middle - half)
    high = 1.0 if hits == n else min(1.0, middle + half)
    return Rate(share, low, high, n)


def by_identity(hits: NDArray[np.bool_], identities: NDArray[np.int64], *, seed: int = 0) -> list[Rate]:
    """Returns the shares of hits among trials that are not independent, since several are of one identity.

    The limits are those of a bootstrap over identities (percentiles of 1,000 draws), or Wilson's where those
    are wider: a bootstrap cannot express an outcome that no identity had, as when there is no hit. If no
    identity has two trials, they are Wilson's.

    Args:
        hits: (n, p), of each trial and of each of p questions.
        identities: (n,) number of the person.
        seed: of the draws.

    Returns:
        A Rate for each question.
    """
    rates = [wilson(int(column.sum()), len(hits)) for column in hits.T]
    _, place = np.unique(identities, return_inverse=True)
    people = int(place.max()) + 1 if len(place) else 0
    if people < 2 or people == len(hits):
        return rates  # one trial per identity, so trials are independent
    sums = np.zeros((people, hits.shape[1] + 1))
    np.add.at(sums, place, np.column_stack([hits, np.ones(len(hits))]).astype(float))
    drawn = np.concatenate([weights @ sums for weights in resampled(people, _DRAWS, seed=seed)])
    lows, highs = np.percentile(drawn[:, :-1] / drawn[:, -1:], [2.5, 97.5], axis=0)
    return [
        Rate(one.value, min(one.low, float(low)), max(one.high, float(high)), one.n)
        for one, low, high in zip(rates, lows, highs, strict=True)
    ]


def upcoming(
    distances: NDArray[np.float64],
    people: NDArray[np.int64],
    limits: NDArray[np.float64],
    *,
    searches: int | None = None,
    seed: int = 0,
) -> list[Upcoming]:
    """Returns 95% prediction intervals of the false positives among the next non-mated searches, per limit.

    A confidence interval states how well a rate was measured. The next strangers vary beside that, and the
    threshold was fitted to those it was found by. So the next people are drawn from Polya's urn: it holds the
    observed people, each with all their searches, and each person drawn is put back twice (the predictive
    distribution of the Bayesian bootstrap: Rubin, 1981, The Annals of Statistics 9; Ghosh and Meeden, 1997,
    Bayesian Methods for Finite Population Sampling). The urn also holds one unobserved person with only
    false positives. With one search per person this is exact: a threshold that k of n searches pass is an
    order statistic, and the number of the next N that pass it is beta-binomial with k + 1 and n - k (the
    number of exceedances: Gumbel and von Schelling, 1950, The Annals of Mathematical Statistics 21). With
    several searches per person, the correlation within a person sets the hits of the unobserved one.
    Percentiles are widened if people are few, as Student's t is wider than the normal (the expanded
    percentiles of Hesterberg, 2015, The American Statistician 69). `tests/test_rates.py` and
    docs/evaluation.md state the measured coverage.

    Args:
        distances: (n,) of each search of a stranger to the nearest enrolled face, n >= 1.
        people: (n,) number of the person searched for; distinct if unknown, which is optimistic.
        limits: (p,) thresholds that `threshold` found by these distances.
        searches: how many are to come, as many as there were by default. They are taken to be of as many
            people, in proportion.
        seed: of the draws.

    Returns:
        An Upcoming for each threshold.
    """
    searches = len(distances) if searches is None else searches
    _, place = np.unique(people, return_inverse=True)
    seen = int(place.max()) + 1
    if seen < 2:
        return [Upcoming(searches, 0, searches)] * len(limits)  # one person says nothing of others
    sums = np.zeros((seen, len(limits) + 1))
    hits = distances[:, None] <= limits
    np.add.at(sums, place, np.column_stack([hits, np.ones(len(hits))]).astype(float))
    usual = len(distances) / seen
    alike = hits.mean(0) + (1 - hits.mean(0)) * _alikeness(distances, place)
    most = (sums[:, :-1] / sums[:, -1:]).max(0)
    unseen = np.maximum(np.maximum(most, alike), min(1.0, 1 / usual))
    # Who is like another in every number is drawn together with them: those without a hit are many.
    kinds, sizes = np.unique(sums, axis=0, return_counts=True)
    kinds, sizes = np.vstack([kinds, usual * np.append(unseen, 1)]), np.append(sizes, 1)
    coming = max(1, round(seen * searches / len(distances)))
    drawn = np.concatenate([counts @ kinds for counts in _polya(sizes, coming, _PREDICTIONS, seed=seed)])
    tail = _expanded(seen)
    shares = drawn[:, :-1] / drawn[:, -1:]
    lows, highs = np.quantile(shares, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return [
        Upcoming(searches, math.floor(low * searches + 1e-9), math.ceil(high * searches - 1e-9))
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True)
    ]


def _alikeness(distances: NDArray[np.float64], place: NDArray[np.int64]) -> float:
    """How much the searches of one person are alike, where about five people's are hits: from 0 to 1, wholly.

    That is kappa, the intraclass correlation of hits (Fleiss and Cuzick, 1979, Applied Psychological
    Measurement 3). It is measured beyond the threshold, below which there may be part of one person only.
    """
    people = int(place.max()) + 1
    hits = distances <= np.quantile(distances, min(0.5, 5 / people))
    each, all_of = np.bincount(place, hits, people), np.bincount(place, minlength=people)
    pairs = (each * (all_of - 1)).sum()
    share = float(hits.mean())
    if not pairs or share == 1:
        return 1.0  # one search per person, or equal distances: the conservative value
    return float(np.clip(((each * (each - 1)).sum() / pairs - share) / (1 - share), 0, 1))


def _polya(sizes: NDArray[np.int64], coming: int, draws: int, *, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each kind of people, so many of each, comes among `coming` draws from Polya's urn.

    Yields:
        (b, kinds), `draws` rows in all.
    """
    rng = np.random.default_rng(seed)
    size = max(1, _CELLS // len(sizes))
    for start in range(0, draws, size):
        weights = rng.standard_gamma(sizes.astype(float), (min(size, draws - start), len(sizes)))
        yield rng.multinomial(coming, weights / weights.sum(1, keepdims=True)).astype(np.float64)


def _expanded(people: int) -> float:
    """The share that is cut off at each end of a bootstrap over so many people, at least 2; 0.025 of many."""
    degrees = people - 1
    if degrees < 4:
        return 0.0  # the series below needs 4; the farthest of the draws it is
    # Student's t by the series of Cornish and Fisher, exact to 0.01 from 4 degrees of freedom on.
    z = _Z
    student = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    student += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return 0.5 * math.erfc(student * math.sqrt(people / degrees) / math.sqrt(2))


def resampled(
    people: int, draws: int, *, seed: int, columns: int | None = None
) -> Iterator[NDArray[np.float64]]:
    """How often each of some people comes where as many are drawn with replacement, `draws` times.

    Args:
        people: how many, at least 1.
        draws: how many times.
        seed: of the draws.
        columns: how many numbers the caller makes of a draw; as many as people by default.

    Yields:
        (b, people), `draws` rows in all; so few at a time that they make 2 million numbers at most.
    """
    rng = np.random.default_rng(seed)
    chances = np.full(people, 1 / people)
    size = max(1, _CELLS // (columns or people))
    for start in range(0, draws, size):
        yield rng.multinomial(people, chances, size=min(size, draws - start)).astype(np.float64)


def threshold(strangers: NDArray[np.float64], fpir: float) -> float:
    """Returns the largest threshold at which at most `fpir` of non-mated searches return an identity.

    Args:
        strangers: (n,) distance of each non-mated search to its nearest enrolled face, n >= 1.
        fpir: the share that is allowed, at least 0 and less than 1.

    Returns:
        A distance just below that of the first search that may not be named any more.
    """
    allowed = math.floor(fpir * len(strangers) + 1e-9)
    return float(np.nextafter(np.partition(strangers, allowed)[allowed], -np.inf))


def fpir(strangers: NDArray[np.float64], limit: float) -> Rate:
    """Returns the share of non-mated searches, by nearest distances (n,), with an identity at `limit`."""
    return wilson(int((strangers <= limit).sum()), len(strangers))


def fnir(distances: NDArray[np.float64], right: NDArray[np.bool_], limit: float) -> Rate:
    """Share of mated searches that do not name the right person at `limit`.

    Args:
        distances: (n,) to the nearest enrolled face.
        right: (n,) whether that face shows the person searched for.
        limit: the threshold.
    """
    return wilson(int((~right | (distances > limit)).sum()), len(distances))


def det(
    strangers: NDArray[np.float64],
    distances: NDArray[np.float64],
    right: NDArray[np.bool_],
    limits: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FPIR and FNIR at each of some thresholds: the points of a DET curve (Martin et al., 1997).

    Args:
        strangers: (n,) distance of each non-mated search to its nearest enrolled face, n >= 1.
        distances: (m,) the same of each mated search, m >= 1.
        right: (m,) whether that face shows the person searched for.
        limits: (t,) thresholds.

    Returns:
        FPIR (t,), which rises with the threshold, and FNIR (t,), which falls.
    """
    named = np.searchsorted(np.sort(strangers), limits, side="right") / len(strangers)
    found = np.searchsorted(np.sort(distances[right]), limits, side="right") / len(distances)
    return named, 1 - found
