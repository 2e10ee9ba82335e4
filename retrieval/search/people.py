"""Ranks identities by distance, for searches: by nearest photo, mean of the nearest photos, or centroid.

All three rules are exact. The score of an identity by its photos is at least the distance of its nearest
photo. So once the k-th best score is below the distance of all remaining photos, no other identity can be
better.
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

# Photos in the first request, for each requested identity, and the growth factor of later requests.
_FIRST_PHOTOS_PER_IDENTITY: Final = 4
_REQUEST_GROWTH: Final = 4

# Vectors that are averaged at a time, roughly: identities are not split.
_CENTROID_ROWS: Final = 4096

# Searches for the k nearest faces: (queries, k, allowed ids or None for all).
Ask: TypeAlias = Callable[[NDArray[np.float32], int, Ids | None], list[Neighbours]]


class Rule(StrEnum):
    """The distance of an identity: of its nearest photo, the mean of its nearest, or of its centroid."""

    NEAREST = "nearest"
    MEAN = "mean"
    CENTROID = "centroid"


@dataclass(frozen=True, slots=True)
class Ranked:
    """An identity in a ranking.

    Attributes:
        identity_id: number of the identity.
        distance: distance by the rule.
        face_ids, distances: the nearest photos of the identity, nearest first, equal distances by face id.
    """

    identity_id: int
    distance: float
    face_ids: tuple[int, ...]
    distances: tuple[float, ...]


def checked_rule(rule: str, mean_of: int, photos: int) -> Rule:
    """Returns a rule by its name, after a check of the options of all rules.

    Raises:
        InputError: there is no such rule, `mean_of` is below 1, or `photos` is below 0.
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
    """Returns the k nearest identities to each query, by the mean distance of their nearest photos.

    Identities with equal distances are ordered by number. Faces without an identity do not count.

    Args:
        reader: a snapshot.
        ask: returns the nearest faces in that snapshot.
        queries: (n, d) float32.
        k: number of identities, at least 1.
        mean_of: number of photos in the mean, 1 for the nearest photo; all photos, if an identity has fewer.
        photos: greatest number of photos to return for each identity.
        allowed: ids of the allowed faces, ascending; None allows all.
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
    count, scored = _FIRST_PHOTOS_PER_IDENTITY * k, dict[int, Ranked]()
    while True:
        ((distances, ids),) = ask(query, count, allowed)
        owners = reader.identities_of_faces(ids.tolist())
        new = {owners[number] for number in ids.tolist() if number in owners} - scored.keys()
        for one in _scores(reader, ask, query, sorted(new), mean_of, photos, allowed):
            scored[one.identity_id] = one
        best = sorted(scored.values(), key=lambda one: (one.distance, one.identity_id))[:k]
        # The factor covers rounding errors of a mean.
        if len(ids) < count or (len(best) == k and best[-1].distance * (1 + 1e-12) < distances[-1]):
            return best
        count *= _REQUEST_GROWTH


def _scores(
    reader: Reader,
    ask: Ask,
    query: NDArray[np.float32],
    people: Sequence[int],
    mean_of: int,
    photos: int,
    allowed: Ids | None,
) -> list[Ranked]:
    """The scores of some identities, by the mean distance of their nearest `mean_of` photos."""
    face_ids = np.sort(np.array(reader.face_ids_of_identities(people), np.int64))
    if allowed is not None:
        face_ids = np.intersect1d(face_ids, allowed)
    if not len(face_ids):
        return []
    ((distances, ids),) = ask(query, len(face_ids), face_ids)
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
    """Returns the k identities with the nearest centroids to each query; otherwise as `by_photos`.

    A centroid is the mean of the allowed vectors of an identity, summed in float64 in the order of face ids
    and rounded to float32. Each call reads all allowed vectors once and computes all centroids: pass many
    queries at a time.
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
    """The numbers of all identities, ascending, and their centroids (n, d)."""
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
    # Each group has all vectors of its identities, some thousand vectors in total.
    for _, group in groupby(range(len(numbers)), key=lambda one: int(starts[one]) // _CENTROID_ROWS):
        some = list(group)
        rows = place[starts[some[0]] : ends[some[-1]]]
        sums = np.add.reduceat(gathered(blocks, firsts, rows), starts[some] - starts[some[0]], axis=0)
        centroids[some] = sums / (ends[some] - starts[some])[:, None]
    return numbers, centroids


def gathered(blocks: Sequence[Block], firsts: NDArray[np.int64], rows: Ids) -> NDArray[np.float64]:
    """Returns vectors (n, d) in float64 by row number over all blocks; block i begins at `firsts[i]`."""
    vectors = np.empty((len(rows), blocks[0].matrix.shape[1]))
    number = np.searchsorted(firsts, rows, side="right") - 1
    for one in np.unique(number):
        mine = number == one
        vectors[mine] = blocks[one].matrix[rows[mine] - firsts[one]]
    return vectors
