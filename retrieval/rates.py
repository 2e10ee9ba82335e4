"""Rates of an identification system with their intervals: pure functions on arrays of distances.

The terms are those of ISO/IEC 19795-1 and of NIST's face recognition evaluations. A search is *mated* when
the person is enrolled, *non-mated* when the person is a stranger. FPIR, the false positive identification
rate, is the share of non-mated searches that name anybody; FNIR, the false negative identification rate, the
share of mated searches that do not name the right person first. A search names the nearest face's person
when the distance is at most the threshold.
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
    """Shares of trials of which several are of one person, and so not independent.

    The ends are those of a bootstrap over identities (percentiles of 1,000 draws), or Wilson's where those
    are farther out: a bootstrap knows nothing of what no identity has shown, as with no hit at all. They are
    Wilson's where nobody comes twice.

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
        return rates  # nobody comes twice, so trials are independent
    sums = np.zeros((people, hits.shape[1] + 1))
    np.add.at(sums, place, np.column_stack([hits, np.ones(len(hits))]).astype(float))
    drawn = np.concatenate([weights @ sums for weights in resampled(people, _DRAWS, seed=seed)])
    lows, highs = np.percentile(drawn[:, :-1] / drawn[:, -1:], [2.5, 97.5], axis=0)
    return [
        Rate(one.value, min(one.low, float(low)), max(one.high, float(high)), one.n)
        for one, low, high in zip(rates, lows, highs, strict=True)
    ]


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
    """The largest distance at which at most `fpir` of non-mated searches name somebody.

    Args:
        strangers: (n,) distance of each non-mated search to its nearest enrolled face, n >= 1.
        fpir: the share that is allowed, at least 0 and less than 1.

    Returns:
        A distance just below that of the first search that may not be named any more.
    """
    allowed = math.floor(fpir * len(strangers) + 1e-9)
    return float(np.nextafter(np.partition(strangers, allowed)[allowed], -np.inf))


def fpir(strangers: NDArray[np.float64], limit: float) -> Rate:
    """Share of non-mated searches, by their nearest distances (n,), that name somebody at `limit`."""
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
