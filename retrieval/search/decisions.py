"""Decisions, for searches and calibration: an identity or UNKNOWN, and the margin to the next identity.

The decision is the identity of the nearest face that has one, unless that face is farther than the threshold.
Faces without an identity do not count, as in the search for identities.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.database.reader import Reader
from retrieval.database.records import Calibration
from retrieval.errors import InputError
from retrieval.index.knn import Ids, Neighbours
from retrieval.rates import Upcoming

# The number of nearest faces in the first request, its growth factor, and its maximum. A second identity is
# usually found early. Otherwise, a search without the faces of the first identity is cheaper.
FIRST: Final = 16
_REQUEST_GROWTH: Final = 4
_MAX_REQUEST: Final = 4096

# The identity number that stands for no identity.
NO_IDENTITY: Final = -1

# The growth factor of a gallery above which it should be calibrated again.
_OUTGROWN_FACTOR: Final = 1.25

# Searches for some of the queries, given by their positions: (positions, k, allowed ids or None for all).
Ask: TypeAlias = Callable[[Sequence[int], int, Ids | None], Sequence[Neighbours]]


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision of a search: an identity, or UNKNOWN.

    Attributes:
        identity: the identity of the nearest face; None is UNKNOWN: that face is farther than the threshold.
        distance: Euclidean distance to the nearest face with an identity; None if there was no such face.
        margin: how much farther the nearest face of a second identity is; None if there is no second one.
        second: the second identity.
        threshold: the greatest distance at which an identity is returned.
        classifier_agrees: whether the classifier predicts the same identity; None for UNKNOWN, if the
            classifier was not trained on that identity, and if there is no prediction, as for a vector.
        fpir: the share of non-mated searches that the threshold was to accept; None if a distance was given.
        expected_fpir: rough estimate of that share today: the measured share, times the gallery's growth.
        outgrown: whether the gallery has grown so much that it should be calibrated again.
        upcoming: how many of the next non-mated searches may return an identity, at the calibrated size; None
            if a distance was given, or if an older version calibrated the gallery.
    """

    identity: str | None
    distance: float | None
    margin: float | None
    second: str | None
    threshold: float
    classifier_agrees: bool | None = None
    fpir: float | None = None
    expected_fpir: float | None = None
    outgrown: bool = False
    upcoming: Upcoming | None = None

    def beside(self, predicted: str, labels: Sequence[str]) -> "Decision":
        """Returns the decision with `classifier_agrees`, for a prediction and the classifier's labels."""
        if self.identity is None or self.identity not in labels:
            return self
        return replace(self, classifier_agrees=predicted == self.identity)


@dataclass(frozen=True, slots=True)
class Limit:
    """The threshold of a search; the attributes are those of `Decision`."""

    threshold: float
    fpir: float | None = None
    expected_fpir: float | None = None
    outgrown: bool = False
    upcoming: Upcoming | None = None


@dataclass(frozen=True, slots=True)
class Nearest:
    """The two nearest identities to each of n queries, by the nearest face of each identity.

    Attributes:
        people: (n, 2) int64, identity numbers; `NO_IDENTITY` if there is no such identity.
        distances: (n, 2) float64, Euclidean; infinite if there is no such identity.
    """

    people: NDArray[np.int64]
    distances: NDArray[np.float64]


def check_wanted(fpir: float | None, max_distance: float | None) -> None:
    """Checks the arguments that choose the threshold of a search.

    Raises:
        InputError: both are given, the rate is not above 0 and at most 0.5, or the distance is negative or
            not finite.
    """
    if fpir is not None and max_distance is not None:
        raise InputError("Give an FPIR or a greatest distance, not both: each is a threshold.")
    if fpir is not None:
        check_fpir(fpir)
    if max_distance is not None and not 0 <= max_distance < math.inf:
        raise InputError(f"The greatest distance must be a number of at least 0, not {max_distance}.")


def check_fpir(fpir: float) -> None:
    """Checks an FPIR.

    Raises:
        InputError: the rate is not above 0 and at most 0.5.
    """
    if not 0 < fpir <= 0.5:
        raise InputError(f"An FPIR lies above 0 and is at most 0.5, as in 0.01; it cannot be {fpir:g}.")


def limit(
    calibration: Calibration | None, faces: int, fpir: float | None, max_distance: float | None, name: str
) -> Limit | None:
    """Returns the threshold of a search; None if the gallery is not calibrated and none was requested.

    Args:
        calibration: the gallery's; None if it is not calibrated.
        faces: current number of faces in the gallery.
        fpir, max_distance: the requested rate or distance.
        name: the gallery's name in errors.

    Raises:
        InputError: the gallery was not calibrated for this FPIR.
    """
    if max_distance is not None:
        return Limit(float(max_distance))
    if calibration is None and fpir is None:
        return None
    point = calibration.point(fpir) if calibration is not None else None
    if calibration is None or point is None:
        points = () if calibration is None else calibration.points
        known = ", only for " + ", ".join(f"{one.fpir:g}" for one in points) if points else ""
        raise InputError(
            f"{name} is not calibrated for an FPIR of {fpir:g}{known}; "
            f"run `faceprint calibrate {shlex.quote(name)}` with `fpir={fpir:g}`."
        )
    growth = faces / max(calibration.faces, 1)
    expected = min(1.0, point.seen.value * growth)
    return Limit(point.threshold, point.fpir, expected, growth > _OUTGROWN_FACTOR, point.upcoming)


def two_nearest(reader: Reader, ask: Ask, beginnings: Sequence[Neighbours]) -> Nearest:
    """Returns the two nearest identities to each query, exactly, however many faces one of them has.

    Args:
        reader: a snapshot.
        ask: returns the nearest faces in that snapshot.
        beginnings: the nearest faces of each query that are known already; may be empty.
    """
    found = Nearest(
        np.full((len(beginnings), 2), NO_IDENTITY, np.int64),
        np.full((len(beginnings), 2), np.inf, np.float64),
    )
    left = _fill_two_nearest(reader, found, range(len(beginnings)), beginnings)
    count = FIRST
    while left and count <= _MAX_REQUEST:
        answers = ask(left, count, None)
        unsettled = set(_fill_two_nearest(reader, found, left, answers))
        # A query with fewer faces than requested has all faces, so that a larger request is useless.
        left = [
            one for one, (_, ids) in zip(left, answers, strict=True) if one in unsettled and len(ids) == count
        ]
        count *= _REQUEST_GROWTH
    if left:
        _search_without_first(reader, ask, found, left)
    return found


def _fill_two_nearest(
    reader: Reader, found: Nearest, places: Sequence[int], answers: Sequence[Neighbours]
) -> list[int]:
    """Fills in up to two identities from ranked faces; returns the queries without a second identity."""
    owners = reader.identities_of_faces({number for _, ids in answers for number in ids.tolist()})
    left = []
    for place, (distances, ids) in zip(places, answers, strict=True):
        seen: dict[int, float] = {}
        for number, distance in zip(ids.tolist(), distances.tolist(), strict=True):
            if number in owners:
                seen.setdefault(owners[number], distance)
                if len(seen) == 2:
                    break
        for column, (person, distance) in enumerate(seen.items()):
            found.people[place, column], found.distances[place, column] = person, distance
        if len(seen) < 2:
            left.append(place)
    return left


def _search_without_first(reader: Reader, ask: Ask, found: Nearest, places: Sequence[int]) -> None:
    """Fills in missing identities by searches without the faces of the first identity.

    Queries without any identity are searched first, among all faces with an identity.
    """
    owners = reader.identity_of_every_face()
    for column in (0, 1):
        incomplete = [one for one in places if found.people[one, column] == NO_IDENTITY]

        def first(place: int) -> int:
            return int(found.people[place, 0])

        for person, group in groupby(sorted(incomplete, key=first), key=first):
            some = list(group)
            answers = ask(some, 1, owners[owners[:, 1] != person, 0])
            for place, (distances, ids) in zip(some, answers, strict=True):
                if len(ids):
                    found.people[place, column] = owners[np.searchsorted(owners[:, 0], ids[0]), 1]
                    found.distances[place, column] = distances[0]


def decide(found: Nearest, names: Mapping[int, str], limit: Limit) -> list[Decision]:
    """Returns the decision for each query.

    Args:
        found: the two nearest identities to each query.
        names: name by number, of all these identities.
        limit: the threshold.
    """
    return [
        _decision(people, distances, names, limit)
        for people, distances in zip(found.people.tolist(), found.distances.tolist(), strict=True)
    ]


def _decision(
    people: Sequence[int], distances: Sequence[float], names: Mapping[int, str], limit: Limit
) -> Decision:
    nearest, farther = distances
    first, second = (names.get(person) for person in people)
    return Decision(
        identity=first if nearest <= limit.threshold else None,
        distance=nearest if first is not None else None,
        margin=farther - nearest if second is not None else None,
        second=second,
        threshold=limit.threshold,
        fpir=limit.fpir,
        expected_fpir=limit.expected_fpir,
        outgrown=limit.outgrown,
        upcoming=limit.upcoming,
    )
