"""Decisions: an identity or UNKNOWN for each search, with the margin to the next identity.

A search names the person of the nearest face that has one, unless that face is farther than the threshold.
Faces without an identity are nobody's and decide nothing, as with the nearest people.
"""

import math
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

# How many of the nearest are asked for at first, how that grows, and up to where: mostly a second person is
# soon among them, and otherwise it is cheaper to leave the first one out.
FIRST: Final = 16
_GROWTH: Final = 4
_MOST: Final = 4096

# The number of no person.
NOBODY: Final = -1

# By how much a gallery may have grown before its threshold should be found anew.
_GROWN: Final = 1.25

# Asks for some of the queries, by their places: so many of the nearest, of the only allowed ids or of all.
Ask: TypeAlias = Callable[[Sequence[int], int, Ids | None], Sequence[Neighbours]]


@dataclass(frozen=True, slots=True)
class Decision:
    """Who it is, or that it is nobody the gallery knows.

    Attributes:
        identity: the person of the nearest face; None is UNKNOWN: that face is farther than the threshold.
        distance: Euclidean, to the nearest face of anybody; None where nobody was to be compared with.
        margin: by how much the nearest face of a second person is farther; None where there is none.
        second: who that is.
        threshold: the greatest distance at which somebody is named.
        classifier_agrees: whether the classifier names the same person; None where nobody is named, where it
            does not know that person, and where it was not asked, as about a vector.
        fpir: the share of strangers that the threshold was to let pass; None where a distance was given.
        expected_fpir: roughly what that share has become: as it was measured, times the gallery's growth.
        outgrown: whether the gallery has grown so much that it should be calibrated again.
        upcoming: how many of the next strangers' searches may be named, at the size that was calibrated; None
            where a distance was given, and where an older version calibrated.
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
        """The same, with what the classifier says, which knows the people of `labels`."""
        if self.identity is None or self.identity not in labels:
            return self
        return replace(self, classifier_agrees=predicted == self.identity)


@dataclass(frozen=True, slots=True)
class Limit:
    """The threshold in force; the attributes are those of `Decision`."""

    threshold: float
    fpir: float | None = None
    expected_fpir: float | None = None
    outgrown: bool = False
    upcoming: Upcoming | None = None


@dataclass(frozen=True, slots=True)
class Nearest:
    """The two nearest people to each of n queries, each by their nearest face.

    Attributes:
        people: (n, 2) int64, numbers of identities, `NOBODY` where there is none.
        distances: (n, 2) float64, Euclidean, infinite where there is nobody.
    """

    people: NDArray[np.int64]
    distances: NDArray[np.float64]


def check_wanted(fpir: float | None, max_distance: float | None) -> None:
    """Checks how a search is to be decided.

    Raises:
        InputError: both are given, or a rate that is none, or a distance that is negative or not a number.
    """
    if fpir is not None and max_distance is not None:
        raise InputError("Give an FPIR or a greatest distance, not both: each is a threshold.")
    if fpir is not None:
        check_fpir(fpir)
    if max_distance is not None and not 0 <= max_distance < math.inf:
        raise InputError(f"The greatest distance must be a number of at least 0, not {max_distance}.")


def check_fpir(fpir: float) -> None:
    """Checks a rate.

    Raises:
        InputError: it is not above 0 and at most 0.5.
    """
    if not 0 < fpir <= 0.5:
        raise InputError(f"An FPIR lies above 0 and is at most 0.5, as in 0.01; it cannot be {fpir:g}.")


def limit(
    calibration: Calibration | None, faces: int, fpir: float | None, max_distance: float | None, name: str
) -> Limit | None:
    """The threshold that is in force; None where nothing is known and nothing was asked for.

    Args:
        calibration: the gallery's.
        faces: how many it has today.
        fpir, max_distance: what was asked for.
        name: the gallery's, for errors.

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
            f"run `faceprint calibrate {name} --fpir {fpir:g}`."
        )
    growth = faces / max(calibration.faces, 1)
    expected = min(1.0, point.seen.value * growth)
    return Limit(point.threshold, point.fpir, expected, growth > _GROWN, point.upcoming)


def two_nearest(reader: Reader, ask: Ask, beginnings: Sequence[Neighbours]) -> Nearest:
    """The two nearest people to each query: exactly, however many faces of one of them are nearer.

    Args:
        reader: a snapshot.
        ask: gives the nearest faces of that snapshot.
        beginnings: of each query the nearest faces as far as they are known already, maybe none.
    """
    found = Nearest(
        np.full((len(beginnings), 2), NOBODY, np.int64), np.full((len(beginnings), 2), np.inf, np.float64)
    )
    left = _fill(reader, found, range(len(beginnings)), beginnings)
    count = FIRST
    while left and count <= _MOST:
        answers = ask(left, count, None)
        unsettled = set(_fill(reader, found, left, answers))
        # Who has fewer than were asked for has all there are.
        left = [
            one for one, (_, ids) in zip(left, answers, strict=True) if one in unsettled and len(ids) == count
        ]
        count *= _GROWTH
    if left:
        _without_the_first(reader, ask, found, left)
    return found


def _fill(reader: Reader, found: Nearest, places: Sequence[int], answers: Sequence[Neighbours]) -> list[int]:
    """Reads two people off the beginnings of rankings; returns the places at which there was no second."""
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


def _without_the_first(reader: Reader, ask: Ask, found: Nearest, places: Sequence[int]) -> None:
    """Asks among the faces of everybody but who was found already, first for whom nobody was found."""
    owners = reader.identity_of_every_face()
    for column in (0, 1):
        lacking = [one for one in places if found.people[one, column] == NOBODY]

        def first(place: int) -> int:
            return int(found.people[place, 0])

        for person, group in groupby(sorted(lacking, key=first), key=first):
            some = list(group)
            answers = ask(some, 1, owners[owners[:, 1] != person, 0])
            for place, (distances, ids) in zip(some, answers, strict=True):
                if len(ids):
                    found.people[place, column] = owners[np.searchsorted(owners[:, 0], ids[0]), 1]
                    found.distances[place, column] = distances[0]


def decide(found: Nearest, names: Mapping[int, str], limit: Limit) -> list[Decision]:
    """A decision for each query.

    Args:
        found: the two nearest people to each.
        names: of all these people, by number.
        limit: the threshold in force.
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
