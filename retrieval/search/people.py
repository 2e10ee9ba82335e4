"""People: the identities nearest to each query, by nearest photo, mean of the nearest, or centroid.

All three are exact. A person's score by photos is at least the distance of their nearest photo, so once the
k-th best score is below the distance of every photo that was not looked at, nobody else can be better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.database.reader import Reader
from retrieval.errors import InputError
from retrieval.index.knn import Block, Ids, Neighbours, nearest

# How many photos are asked for at first, for each person that is wanted, and how that grows.
_FIRST: Final = 4
_GROWTH: Final = 4

# How many vectors are averaged at a time.
_ROWS: Final = 4096

# Asks for the k nearest of some faces: queries, k, the only allowed ids.
Ask: TypeAlias = Callable[[NDArray[np.float32], int, Ids | None], list[Neighbours]]


class Rule(StrEnum):
    """How far a person is: by the nearest photo, by the mean of the nearest few, by the centroid of all."""

    NEAREST = "nearest"
    MEAN = "mean"
    CENTROID = "centroid"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A person in an answer.

    Attributes:
        identity_id: the person's number.
        distance: by the rule.
        face_ids, distances: the person's nearest photos, nearest first, equal distances by face id.
    """

    identity_id: int
    distance: float
    face_ids: tuple[int, ...]
    distances: tuple[float, ...]


def checked_rule(rule: str, mean_of: int, photos: int) -> Rule:
    """A rule by its name.

    Raises:
        InputError: there is no such rule, or fewer than one photo is asked for.
    """
    if rule not in tuple(Rule):
        raise InputError(f"There is no rule {rule}; choose one of {', '.join(Rule)}.")
    if mean_of < 1 or photos < 0:
        raise InputError("A mean needs at least 1 photo, and as many as 0 photos can be shown, not fewer.")
    return Rule(rule)


def by_photos(
    reader: Reader,
    ask: Ask,
    queries: NDArray[np.float32],
    k: int,
    *,
    mean_of: int,
    photos: int,
    allowed: Ids | None,
) -> list[list[Ranked]]:
    """The k nearest people to each query, by the mean distance of their nearest `mean_of` photos.

    A person with fewer photos is judged by those there are. Equal people are ordered by number. Faces without
    an identity are nobody's.

    Args:
        reader: a snapshot.
        ask: gives the nearest faces of that snapshot.
        queries: (n, d).
        k: at least 1.
        mean_of: 1 for the nearest photo.
        photos: how many of a person's photos come back, at most.
        allowed: the only faces that count, ascending; None is all.
    """
    return [_by_photos(reader, ask, query[None], k, mean_of, photos, allowed) for query in queries]


def _by_photos(
    reader: Reader,
    ask: Ask,
    query: NDArray[np.float32],
    k: int,
    mean_of: int,
    photos: int,
    allowed: Ids | None,
) -> list[Ranked]:
    count, scored = _FIRST * k, dict[int, Ranked]()
    while True:
        ((distances, ids),) = ask(query, count, allowed)
        owners = reader.identities_of_faces(ids.tolist())
        new = {owners[number] for number in ids.tolist() if number in owners} - scored.keys()
        for one in _scores(reader, ask, query, sorted(new), mean_of, photos, allowed):
            scored[one.identity_id] = one
        best = sorted(scored.values(), key=lambda one: (one.distance, one.identity_id))[:k]
        # The factor covers the rounding of a mean.
        if len(ids) < count or (len(best) == k and best[-1].distance * (1 + 1e-12) < distances[-1]):
            return best
        count *= _GROWTH


def _scores(
    reader: Reader,
    ask: Ask,
    query: NDArray[np.float32],
    people: Sequence[int],
    mean_of: int,
    photos: int,
    allowed: Ids | None,
) -> list[Ranked]:
    """What some people come to."""
    theirs = np.sort(np.array(reader.face_ids_of_identities(people), np.int64))
    if allowed is not None:
        theirs = np.intersect1d(theirs, allowed)
    if not len(theirs):
        return []
    ((distances, ids),) = ask(query, len(theirs), theirs)
    owners = reader.identities_of_faces(ids.tolist())
    found: dict[int, list[tuple[float, int]]] = {}
    for distance, number in zip(distances.tolist(), ids.tolist(), strict=True):
        found.setdefault(owners[number], []).append((distance, number))
    return [_ranked(person, of, mean_of, photos) for person, of in found.items()]


def _ranked(person: int, photos: Sequence[tuple[float, int]], mean_of: int, shown: int) -> Ranked:
    score = float(np.mean([distance for distance, _ in photos[:mean_of]]))
    some = photos[:shown]
    return Ranked(person, score, tuple(number for _, number in some), tuple(distance for distance, _ in some))


def by_centroid(
    reader: Reader,
    ask: Ask,
    blocks: Sequence[Block],
    queries: NDArray[np.float32],
    k: int,
    *,
    photos: int,
    allowed: Ids | None,
) -> list[list[Ranked]]:
    """The k people whose centroids are nearest to each query; otherwise as `by_photos`.

    A centroid is the mean of a person's allowed vectors, summed in float64 by face id and rounded to float32.
    All of them are computed for each call, which reads every allowed vector once: ask for many at a time.
    """
    centroids = Block(*_centroids(reader, blocks, allowed))
    found = nearest([centroids], queries, k) if len(centroids) else []
    answers = []
    for query, (distances, people) in zip(queries, found, strict=False):
        of = {
            one.identity_id: one
            for one in _scores(reader, ask, query[None], people.tolist(), 1, photos, allowed)
        }
        answers.append(
            [
                Ranked(person, distance, of[person].face_ids, of[person].distances)
                for person, distance in zip(people.tolist(), distances.tolist(), strict=True)
            ]
        )
    return answers or [[] for _ in queries]


def _centroids(
    reader: Reader, blocks: Sequence[Block], allowed: Ids | None
) -> tuple[Ids, NDArray[np.float32]]:
    """The numbers of people and their centroids (n, d), by number."""
    owners = reader.identity_of_every_face()
    ids = np.concatenate([block.ids for block in blocks] or [np.empty(0, np.int64)])
    known, place = np.searchsorted(owners[:, 0], ids), np.arange(len(ids))
    counts = np.zeros(len(ids), bool)
    if len(owners):
        known[known == len(owners)] = 0
        counts = owners[known, 0] == ids
    if allowed is not None:
        counts &= np.isin(ids, allowed)
    ids, place = ids[counts], place[counts]
    people = owners[known[counts], 1]
    order = np.lexsort((ids, people))
    people, place = people[order], place[order]
    numbers, starts = np.unique(people, return_index=True)
    dimension = blocks[0].matrix.shape[1] if blocks else 0
    centroids = np.empty((len(numbers), dimension), np.float32)
    firsts = np.cumsum([0] + [len(block) for block in blocks])
    ends = np.append(starts[1:], len(people))
    # Groups of whole people, some thousand vectors at a time.
    for _, group in groupby(range(len(numbers)), key=lambda one: int(starts[one]) // _ROWS):
        some = list(group)
        rows = place[starts[some[0]] : ends[some[-1]]]
        sums = np.add.reduceat(gathered(blocks, firsts, rows), starts[some] - starts[some[0]], axis=0)
        centroids[some] = sums / (ends[some] - starts[some])[:, None]
    return numbers, centroids


def gathered(blocks: Sequence[Block], firsts: NDArray[np.int64], rows: Ids) -> NDArray[np.float64]:
    """Vectors (n, d) in float64 by their place among those of all blocks; block i begins at `firsts[i]`."""
    vectors = np.empty((len(rows), blocks[0].matrix.shape[1]))
    number = np.searchsorted(firsts, rows, side="right") - 1
    for one in np.unique(number):
        mine = number == one
        vectors[mine] = blocks[one].matrix[rows[mine] - firsts[one]]
    return vectors
