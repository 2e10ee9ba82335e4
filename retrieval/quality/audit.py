"""The audit of a gallery: finds names that distances contradict, and photos that degrade search results.

The audit changes nothing and decides nothing: each finding is a *doubt* for a person to review. (The audit
log, which records who did what to a gallery, is unrelated.) `docs/audit.md` defines each score.

Neighbours are the exact ones of `index.knn`, in batches of 256 queries. Vectors are gathered one identity at
a time. Beside the mapped vectors, memory is some dozens of numbers for each audited face and for each stored
face; it never grows with the number of pairs. At most 2,048 photos of one identity are compared with each
other.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.database.reader import Reader
from retrieval.database.records import DoubtState
from retrieval.errors import InputError, Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.index.knn import Block, nearest
from retrieval.quality.audit_report import Audited, Doubt, Kind, Limit, doubt, doubt_key
from retrieval.quality.outliers import (
    MIN_GROUP,
    MIN_VALUES,
    Cluster,
    Floats,
    RobustScale,
    Rows,
    skewness,
    widest_gap,
)
from retrieval.search.people import gathered

# A value this many robust standard deviations from the median is a doubt: the "very conservative" choice of
# Leys et al., Detecting outliers, Journal of Experimental Social Psychology, 2013. A person reviews doubts.
LIMIT: Final = 3.0

# The default without `sample`: a gallery of up to 50,000 faces is audited whole, a larger one by a sample of
# 20,000 faces.
FULL_AUDIT_MAX_FACES: Final = 50_000
DEFAULT_SAMPLE: Final = 20_000

QUERY_BATCH: Final = 256

# The most faces of one identity that are compared with each other.
MAX_COMPARED_FACES: Final = 2048

# Each identity is compared with this many others: those that own the nearest foreign face of most of its
# faces.
MAX_RIVALS: Final = 5

# The logarithm of the greatest number: a limit of very many deviations lies beyond it, and no value does.
_MAX_LOGARITHM: Final = math.log(sys.float_info.max)

# The most photos that a doubt shows on each side.
SHOWN_PHOTOS: Final = 4

# The most doubts of a kind that are kept: those with the highest scores.
MAX_DOUBTS: Final = 500


def audit(
    gallery: Gallery,
    *,
    sample: int | None = None,
    seed: int = 0,
    limit: float = LIMIT,
    neighbours: int = 10,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Audited:
    """Returns the names and photos that the gallery's distances contradict. It only reads, beside any writer.

    Args:
        gallery: one snapshot of it is audited; later writes are not seen.
        sample: the approximate number of faces to audit, each compared with all. Whole identities are drawn.
            None audits all of up to 50,000 faces, and 20,000 of a larger gallery.
        seed: the random seed of the sample.
        limit: the number of robust standard deviations from the median at which a value is a doubt.
        neighbours: the number of nearest faces that count for hubs, at least 1.
        on_progress: called with the work done and the total.
        should_stop: called between batches; True stops the audit.

    Raises:
        InputError: `sample` or `neighbours` is below 1, or `limit` is not above 0.
        Interrupted: `should_stop` returned True.
    """
    if (sample is not None and sample < 1) or neighbours < 1 or not limit > 0:
        raise InputError("A sample and neighbours must be at least 1, and the limit above 0.")
    # No transaction stays open during the audit: an erasure would have to wait for it.
    faces, measures = gallery.vault.on_a_snapshot(
        lambda reader: (_Faces.of(gallery, reader), reader.face_measures())
    )
    chosen = _sampled_rows(faces, sample, seed)
    work = _Progress(len(chosen) + len(faces.numbers_of(chosen)), on_progress, should_stop)
    near = _Neighbours.of(faces, chosen, neighbours, work)
    typical = _typical_spread(faces, near)
    found = [*_same_photos(faces, near, limit), _anothers_photos(faces, near, typical, limit)]
    found += [*_people(faces, near, typical, limit, seed, work), _hubs(faces, near, limit)]
    found += _poor_faces(faces, chosen, measures, limit)
    kept = [some.kept() for some in found]
    raw = _without_explained([one for some in kept for one in some])
    stays = set(map(id, raw))
    explained = [sum(id(one) not in stays for one in some) for some in kept]
    with gallery.vault.store.read() as reader:
        every = list(_with_names(reader, faces, raw, gallery.name))
    doubts = [one for one in every if one.state is not DoubtState.DISMISSED]
    return Audited(
        folder=gallery.name,
        faces=len(faces),
        identities=int((faces.numbers > 0).sum()),
        audited=len(chosen),
        people=len(faces.numbers_of(chosen)),
        seed=seed if len(chosen) < len(faces) else None,
        neighbours=neighbours,
        skewness=skewness(near.occurrences(len(faces))),
        limits=tuple(some.limit(number) for some, number in zip(found, explained, strict=True)),
        doubts=tuple(doubts),
        gone=len(raw) - len(every),
        dismissed=tuple(one for one in every if one.state is DoubtState.DISMISSED),
    )


# The faces of a snapshot


class _Faces:
    """The stored vectors of a snapshot: rows ascending by face id, and the identity number of each row.

    Identity number 0 means anonymous.
    """

    def __init__(self, blocks: Sequence[Block], owners: NDArray[np.int64], dimension: int) -> None:
        self._blocks = blocks
        self._firsts = np.cumsum([0] + [len(block) for block in blocks])
        ids = np.concatenate([block.ids for block in blocks] or [np.empty(0, np.int64)])
        self._positions = np.argsort(ids, kind="stable")
        self.ids = ids[self._positions]
        self.dimension = dimension
        self.people = np.zeros(len(ids), np.int64)
        rows = self.rows(owners[:, 0])
        self.people[rows[rows >= 0]] = owners[rows >= 0, 1]
        self._by_person = np.argsort(self.people, kind="stable")
        self.numbers, starts = np.unique(self.people[self._by_person], return_index=True)
        self._ends = np.append(starts, len(ids))
        self.cluster_of = lru_cache(maxsize=1024)(self._cluster_of)

    @classmethod
    def of(cls, gallery: Gallery, reader: Reader) -> "_Faces":
        state = gallery.vault.state(reader)
        return cls(state.vectors.blocks(), reader.identity_of_every_face(), state.generation.dimension)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Rows) -> Rows:
        """Returns the row of each id; -1 where the id has no vector."""
        place = np.searchsorted(self.ids, ids)
        place[place == len(self.ids)] = 0
        return np.where(self.ids[place] == ids, place, -1) if len(self.ids) else np.full(len(ids), -1)

    def numbers_of(self, rows: Rows) -> Rows:
        """Returns the distinct identity numbers of rows, without anonymous ones."""
        numbers = np.unique(self.people[rows])
        return numbers[numbers > 0]

    def rows_of(self, person: int) -> Rows:
        """Returns the rows of an identity, ascending."""
        place = int(np.searchsorted(self.numbers, person))
        return self._by_person[self._ends[place] : self._ends[place + 1]]

    def vectors(self, rows: Rows) -> Floats:
        """Returns the vectors of rows, (n, d) float64."""
        return gathered(self._blocks, self._firsts, self._positions[rows])

    def nearest(self, rows: Rows, k: int, *, among: Rows | None = None) -> tuple[Rows, Floats]:
        """Returns the k nearest rows of each row, itself excluded, and their distances, both (n, k).

        Where there are fewer than k, the rest is -1 and infinity.
        """
        queries = self.vectors(rows).astype(np.float32)
        exclude = [(number,) for number in self.ids[rows].tolist()]
        if among is not None and len(among) <= MAX_COMPARED_FACES:
            # Faster than a search of all vectors with an allow list.
            blocks = [Block(self.ids[among], self.vectors(among).astype(np.float32))]
            answers = nearest(blocks, queries, k, exclude=exclude)
        else:
            allowed = None if among is None else self.ids[among]
            answers = nearest(self._blocks, queries, k, allowed=allowed, exclude=exclude)
        found, distances = np.full((len(rows), k), -1), np.full((len(rows), k), np.inf)
        for number, (far, ids) in enumerate(answers):
            found[number, : len(ids)], distances[number, : len(ids)] = self.rows(ids), far
        return found, distances

    def _cluster_of(self, person: int) -> "Cluster":
        return Cluster.of(self.vectors(part) for part in _chunks(self.rows_of(person), MAX_COMPARED_FACES))


def _sampled_rows(faces: _Faces, sample: int | None, seed: int) -> Rows:
    """Returns the rows to audit: all, or whole identities and single anonymous faces drawn at random."""
    if sample is None:
        sample = DEFAULT_SAMPLE if len(faces) > FULL_AUDIT_MAX_FACES else len(faces)
    if sample >= len(faces):
        return np.arange(len(faces))
    # Each anonymous face is a unit of its own.
    units = np.where(faces.people > 0, faces.people, -1 - np.arange(len(faces)))
    _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    count = int(np.searchsorted(np.cumsum(np.minimum(sizes[drawn], MAX_COMPARED_FACES)), sample)) + 1
    rows = np.flatnonzero(np.isin(unit, drawn[:count]))
    some = [_capped(faces.rows_of(one), seed) for one in faces.numbers_of(rows)]
    return np.sort(np.concatenate([*some, rows[faces.people[rows] == 0]]))


def _capped(rows: Rows, seed: int) -> Rows:
    """Returns the rows of one identity; a random sample of 2,048 where there are more."""
    if len(rows) <= MAX_COMPARED_FACES:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, MAX_COMPARED_FACES, replace=False))


class _Progress:
    """Reports the progress of an audit, and stops it when the caller asks."""

    def __init__(
        self, total: int, on_progress: Callable[[int, int], None], should_stop: Callable[[], bool]
    ) -> None:
        self._done, self._total = 0, total
        self._on_progress, self._should_stop = on_progress, should_stop
        on_progress(0, total)

    def did(self, number: int) -> None:
        """Adds `number` units to the work done, and reports the sum.

        Raises:
            Interrupted: `should_stop` returned True.
        """
        if self._should_stop():
            raise Interrupted("Stopped; nothing was written.")
        self._done += number
        self._on_progress(self._done, self._total)


# Neighbours


@dataclass(frozen=True)
class _Neighbours:
    """The nearest neighbours of the audited faces.

    Attributes:
        rows: (n,) the audited rows.
        found, distances: (n, k) the nearest rows; -1 and infinity where there are no more.
        own, own_distance: (n,) the nearest face of the same identity; -1 and infinity where there is none.
        other, other_distance: (n,) the nearest face of another identity; -1 and infinity where there is none.
    """

    rows: Rows
    found: Rows
    distances: Floats
    own: Rows
    own_distance: Floats
    other: Rows
    other_distance: Floats

    @classmethod
    def of(cls, faces: _Faces, rows: Rows, k: int, work: _Progress) -> "_Neighbours":
        found, distances = np.full((len(rows), k), -1), np.full((len(rows), k), np.inf)
        for part in _chunks(np.arange(len(rows)), QUERY_BATCH):
            found[part], distances[part] = faces.nearest(rows[part], k)
            work.did(len(part))
        person, theirs = faces.people[rows][:, None], np.where(found >= 0, faces.people[found], 0)
        own = _first_match(found, distances, (theirs == person) & (person > 0))
        other = _first_match(found, distances, (theirs != person) & (theirs > 0) & (person > 0))
        near = cls(rows, found, distances, *own, *other)
        near._complete(faces, work)
        return near

    def _complete(self, faces: _Faces, work: _Progress) -> None:
        """Searches for the nearest own and other faces beyond the k nearest, one identity at a time."""
        named_rows = np.flatnonzero(faces.people > 0)
        for person, places in _by_person(faces.people[self.rows]):
            theirs = faces.rows_of(person)
            alone = places[self.own[places] < 0] if len(theirs) > 1 else places[:0]
            among = places[self.other[places] < 0]
            for part in _chunks(alone, QUERY_BATCH):
                self._fill(self.own, self.own_distance, part, faces, theirs)
            others = named_rows[faces.people[named_rows] != person] if len(among) else named_rows[:0]
            for part in _chunks(among, QUERY_BATCH) if len(others) else ():
                self._fill(self.other, self.other_distance, part, faces, others)
            work.did(0)

    def _fill(self, rows: Rows, far: Floats, part: Rows, faces: _Faces, among: Rows) -> None:
        found, distances = faces.nearest(self.rows[part], 1, among=among)
        rows[part], far[part] = found[:, 0], distances[:, 0]

    def occurrences(self, count: int) -> Rows:
        """Returns, (count,), of how many audited faces each row is among the k nearest."""
        return np.bincount(self.found[self.found >= 0], minlength=count)

    @cached_property
    def nothing(self) -> float:
        """The floor of distances under a logarithm: 1e-6 of the median positive distance; 1 without any."""
        known = self.distances[(self.distances > 0) & (self.distances < np.inf)]
        return 1e-6 * float(np.median(known)) if len(known) else 1.0


def _first_match(found: Rows, distances: Floats, which: NDArray[np.bool_]) -> tuple[Rows, Floats]:
    """Returns the first neighbour of each line where `which` is True, and its distance."""
    column, line = which.argmax(axis=1), np.arange(len(found))
    there = which[line, column]
    return np.where(there, found[line, column], -1), np.where(there, distances[line, column], np.inf)


# Doubts


@dataclass(frozen=True)
class _DoubtInNumbers:
    """A doubt in numbers: its identities, and the rows of the photos that show it."""

    kind: Kind
    score: float
    people: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    measured: Mapping[str, float]


@dataclass(frozen=True)
class _DoubtsOfKind:
    """The doubts of one kind. Only the most serious ones are built, on demand."""

    kind: Kind
    measures: str
    usual: RobustScale
    bound: float
    scores: Floats
    make: Callable[[int, float], _DoubtInNumbers]

    def kept(self) -> list[_DoubtInNumbers]:
        """Returns the doubts with the highest scores, at most 500."""
        order = np.argsort(-self.scores, kind="stable")[:MAX_DOUBTS]
        return [self.make(int(place), float(self.scores[place])) for place in order]

    def limit(self, explained: int) -> Limit:
        """Returns the figures of this kind, without the `explained` doubts, which others explain."""
        known = self.usual.deviation > 0
        return Limit(
            self.kind,
            self.measures,
            self.usual.values,
            self.usual.median,
            self.bound if known else math.nan,
            len(self.scores) - explained,
        )


def _same_photos(faces: _Faces, near: _Neighbours, limit: float) -> list[_DoubtsOfKind]:
    """Finds faces at unusually small distances from another: of two identities, and of one."""
    values = -np.log(np.maximum(near.distances[:, 0], near.nothing))
    there = near.found[:, 0] >= 0
    usual = RobustScale.of(values[there])
    scores = usual.scores(values)
    # A distance of 0 is the same photo, whatever the usual distance is.
    same = there & ((scores >= limit) | (near.distances[:, 0] == 0))
    first, second = near.rows, near.found[:, 0]
    pairs = np.sort(np.column_stack([first, second])[same], axis=1)
    _, once = np.unique(pairs, axis=0, return_index=True)
    places = np.flatnonzero(same)[once]
    people = np.sort(np.column_stack([faces.people[first], faces.people[second]])[places], axis=1)
    across = (people[:, 0] > 0) & (people[:, 0] != people[:, 1])

    def make(some: Rows, kind: Kind, place: int, score: float) -> _DoubtInNumbers:
        pair = sorted([int(first[some[place]]), int(second[some[place]])])
        identities = tuple(dict.fromkeys(int(faces.people[row]) for row in pair if faces.people[row]))
        distance = float(near.distances[some[place], 0])
        return _DoubtInNumbers(kind, score, identities, tuple((row,) for row in pair), {"distance": distance})

    measures, bound = "a face's distance to the nearest other one", _exp(-usual.at(limit))
    kinds = ((Kind.SAME_PHOTO_TWO_NAMES, places[across]), (Kind.SAME_PHOTO, places[~across]))
    return [
        _DoubtsOfKind(kind, measures, _exponentiated(usual), bound, scores[some], partial(make, some, kind))
        for kind, some in kinds
    ]


def _anothers_photos(faces: _Faces, near: _Neighbours, typical: float, limit: float) -> _DoubtsOfKind:
    """Finds faces that are far from the others of their identity, and near to another identity.

    "Far" is relative to the spread of those others and to the distance of the nearest foreign face.
    """
    known = np.flatnonzero((near.own >= 0) & (near.other >= 0))
    values = _outlier_values(faces, near, known, typical)
    usual = RobustScale.of(values)
    scores = usual.scores(values)
    beyond = (scores >= limit) & (near.other_distance[known] < near.own_distance[known])
    places, scores, values = known[beyond], scores[beyond], values[beyond]

    def make(place: int, score: float) -> _DoubtInNumbers:
        row = near.rows[[places[place]]]
        person, rival = int(faces.people[row[0]]), int(faces.people[near.other[places[place]]])
        own, _ = faces.nearest(row, SHOWN_PHOTOS, among=faces.rows_of(person))
        theirs, _ = faces.nearest(row, SHOWN_PHOTOS, among=faces.rows_of(rival))
        measured = {
            "own": float(near.own_distance[places[place]]),
            "own_centroid": math.sqrt(faces.cluster_of(person).without(faces.vectors(row)[0])[1]),
            "other": float(near.other_distance[places[place]]),
            "photos": float(len(faces.rows_of(person))),
        }
        groups = ((int(row[0]),), _present(own[0]), _present(theirs[0]))
        return _DoubtInNumbers(Kind.ANOTHERS_PHOTO, score, (person, rival), groups, measured)

    measures = (
        "a face's distance to the centroid of its person's others, over what that is for these, and over its "
        "distance to the nearest of another's"
    )
    bound = _exp(usual.at(limit))
    return _DoubtsOfKind(Kind.ANOTHERS_PHOTO, measures, _exponentiated(usual, sign=1), bound, scores, make)


def _outlier_values(faces: _Faces, near: _Neighbours, known: Rows, typical: float) -> Floats:
    """Returns the logarithm of c/e * c/o for each known face, (n,).

    c is the distance of a face to the centroid of the other faces of its identity, e the expected value of
    that distance, and o the distance to the nearest face of another identity. In a cluster with a root mean
    square distance w between members, a member is sqrt(w^2 / 2 * (1 + 1 / n)) from the centroid of n others.
    """
    values = np.empty(len(known))
    for person, places in _by_person(faces.people[near.rows[known]]):
        shape = faces.cluster_of(person)
        for part in _chunks(places, MAX_COMPARED_FACES):
            for place, vector in zip(part, faces.vectors(near.rows[known[part]]), strict=True):
                others, squared = shape.without(vector)
                expected = _within([others], typical) / 2 * (1 + 1 / others.count)
                values[place] = _log_distance(squared, near.nothing) - 0.5 * _log_distance(
                    expected, near.nothing
                )
    return values - np.log(np.maximum(near.other_distance[known], near.nothing))


def _log_distance(squared: float, nothing: float) -> float:
    """Returns the logarithm of a squared distance, with the distance raised to at least `nothing`."""
    return math.log(max(squared, nothing**2))


def _people(
    faces: _Faces, near: _Neighbours, typical: float, limit: float, seed: int, work: _Progress
) -> list[_DoubtsOfKind]:
    """Finds pairs of identities that may be one person, and identities that may be two."""
    pairs: list[_Pair] = []
    gaps: list[_Gap] = []
    for person, places in _by_person(faces.people[near.rows]):
        pairs += [_pair(faces, person, rival, typical) for rival in _rivals(faces, near, places)]
        gap = _gap(faces, near, person, places, seed)
        if gap is not None:
            gaps.append(gap)
        work.did(1)
    several = [pair for pair in pairs if pair.fewest > 1]
    excess = [(pair.apart - pair.chance) / pair.within for pair in several if pair.within > 0]
    usual = max(0.0, float(np.median(excess))) if len(excess) >= MIN_VALUES else 0.0
    single = [pair for pair in pairs if pair.fewest == 1]
    return [
        _two_like_one(faces, several, usual, "both with 2 photos or more", near.nothing, limit),
        _two_like_one(faces, single, usual, "one with a single photo", near.nothing, limit),
        _one_like_two(faces, near, gaps, typical, limit),
    ]


def _typical_spread(faces: _Faces, near: _Neighbours) -> float:
    """Returns the median of the mean squared distance between two photos of one identity.

    Identities with two photos or more count; NaN without any.
    """
    several = [person for person in faces.numbers_of(near.rows).tolist() if len(faces.rows_of(person)) > 1]
    return float(np.median([faces.cluster_of(person).within for person in several])) if several else math.nan


def _rivals(faces: _Faces, near: _Neighbours, places: Rows) -> list[int]:
    """Returns the identities that own the nearest foreign face of most of these faces, at most 5."""
    there = places[near.other[places] >= 0]
    numbers, votes = np.unique(faces.people[near.other[there]], return_counts=True)
    return [int(one) for one in numbers[np.argsort(-votes, kind="stable")[:MAX_RIVALS]]]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two identities, with squared distances.

    Attributes:
        apart: between their centroids.
        within: the mean between two photos of one identity.
        chance: expected between the centroids of two sets of photos of one person, with as many photos.
        fewest: the number of photos of the identity with fewer.
    """

    person: int
    rival: int
    apart: float
    within: float
    chance: float
    fewest: int


def _pair(faces: _Faces, person: int, rival: int, typical: float) -> _Pair:
    one, other = faces.cluster_of(person), faces.cluster_of(rival)
    within = _within([one, other], typical)
    apart = float(((one.centroid - other.centroid) ** 2).sum())
    chance = within / 2 * (1 / one.count + 1 / other.count)
    return _Pair(person, rival, apart, within, chance, min(one.count, other.count))


def _within(shapes: Sequence[Cluster], typical: float) -> float:
    """Returns the mean squared distance between two photos of one of these identities; NaN where unknown.

    The typical spread of the gallery has the weight of one more photo, so that identities with a single
    photo get the typical value.
    """
    several = [shape for shape in shapes if shape.count > 1]
    known = math.isfinite(typical)
    weight = sum(shape.count - 1 for shape in several) + known
    squares = sum((shape.count - 1) * shape.within for shape in several) + (typical if known else 0.0)
    return squares / weight if weight else math.nan


def _two_like_one(
    faces: _Faces, pairs: Sequence[_Pair], usual_excess: float, which: str, nothing: float, limit: float
) -> _DoubtsOfKind:
    """Finds pairs with centroids nearer than is usual of similar identities with as many photos."""
    nearest_of: dict[int, tuple[float, _Pair]] = {}
    for pair in pairs:
        expected = pair.chance + usual_excess * pair.within
        if expected > 0:
            value = 0.5 * (_log_distance(expected, nothing) - _log_distance(pair.apart, nothing))
            best = nearest_of.get(pair.person)
            if best is None or value > best[0]:
                nearest_of[pair.person] = value, pair
    values = np.array([value for value, _ in nearest_of.values()])
    usual = RobustScale.of(values)
    doubted: dict[tuple[int, int], tuple[float, _Pair]] = {}
    for score, (_, pair) in zip(usual.scores(values).tolist(), nearest_of.values(), strict=True):
        if score >= limit:
            doubted.setdefault((min(pair.person, pair.rival), max(pair.person, pair.rival)), (score, pair))
    kept = list(doubted.items())

    def make(place: int, score: float) -> _DoubtInNumbers:
        (person, rival), (_, pair) = kept[place]
        one, other = faces.cluster_of(person), faces.cluster_of(rival)
        measured = {
            "centroids": math.sqrt(pair.apart),
            "within": math.sqrt(pair.within),
            "by_chance": math.sqrt(pair.chance),
            "usual": math.sqrt(pair.chance + usual_excess * pair.within),
            "photos": float(one.count),
            "other_photos": float(other.count),
        }
        groups = (_closest(faces, person, other.centroid), _closest(faces, rival, one.centroid))
        return _DoubtInNumbers(Kind.TWO_LIKE_ONE, score, (person, rival), groups, measured)

    measures = (
        f"how far the centroids of two people are apart, over what is usual of similar people ({which})"
    )
    scores = np.array([score for _, (score, _) in kept])
    return _DoubtsOfKind(
        Kind.TWO_LIKE_ONE, measures, _exponentiated(usual), _exp(-usual.at(limit)), scores, make
    )


def _closest(faces: _Faces, person: int, place: Floats) -> tuple[int, ...]:
    """Returns the rows of an identity that are nearest to the point `place`, at most 4."""
    rows = faces.rows_of(person)
    far = np.concatenate(
        [((faces.vectors(part) - place) ** 2).sum(axis=1) for part in _chunks(rows, MAX_COMPARED_FACES)]
    )
    return tuple(rows[np.argsort(far, kind="stable")[:SHOWN_PHOTOS]].tolist())


@dataclass(frozen=True)
class _Gap:
    """The widest gap among the photos of an identity.

    `group` and `rest` are the smaller and the larger side; `other` is the distance from `group` to the
    nearest face of another identity, `rival`.
    """

    person: int
    width: float
    group: Rows
    rest: Rows
    sides: tuple[Cluster, Cluster]
    other: float
    rival: int


def _gap(faces: _Faces, near: _Neighbours, person: int, places: Rows, seed: int) -> _Gap | None:
    if len(places) < 2 * MIN_GROUP:
        return None
    places = _capped(places, seed)
    vectors = faces.vectors(near.rows[places])
    found = widest_gap(vectors)
    if found is None:
        return None
    width, inside = found
    group = places[inside]
    closest = group[near.other_distance[group].argmin()]
    if near.other[closest] < 0:
        return None
    sides = Cluster.of([vectors[inside]]), Cluster.of([vectors[~inside]])
    rows, rest = near.rows[group], near.rows[places[~inside]]
    rival = int(faces.people[near.other[closest]])
    return _Gap(person, width, rows, rest, sides, float(near.other_distance[closest]), rival)


def _one_like_two(
    faces: _Faces, near: _Neighbours, gaps: Sequence[_Gap], typical: float, limit: float
) -> _DoubtsOfKind:
    """Finds identities with photos on two sides of a gap that are as far apart as two people's."""
    across = np.array([one.across(other) for one, other in (gap.sides for gap in gaps)])
    within = np.array([_within(gap.sides, typical) for gap in gaps])
    values = 0.5 * _log_ratio(across, within, near.nothing**2)
    usual = RobustScale.of(values)
    scores = usual.scores(values)
    apart = np.array([gap.width > gap.other for gap in gaps], bool)
    places = np.flatnonzero((scores >= limit) & apart)

    def make(place: int, score: float) -> _DoubtInNumbers:
        gap = gaps[places[place]]
        measured = {"gap": gap.width, "other": gap.other, "photos": float(len(gap.group))}
        measured["other_photos"] = float(len(gap.rest))
        groups = (
            tuple(gap.group[:SHOWN_PHOTOS].tolist()),
            tuple(gap.rest[:SHOWN_PHOTOS].tolist()),
            _closest(faces, gap.rival, gap.sides[0].centroid),
        )
        return _DoubtInNumbers(Kind.ONE_LIKE_TWO, score, (gap.person, gap.rival), groups, measured)

    measures = (
        "how far photos on two sides of a person's widest gap are apart, over how far those of one side are"
    )
    bound = _exp(usual.at(limit))
    return _DoubtsOfKind(
        Kind.ONE_LIKE_TWO, measures, _exponentiated(usual, sign=1), bound, scores[places], make
    )


def _hubs(faces: _Faces, near: _Neighbours, limit: float) -> _DoubtsOfKind:
    """Finds hubs: faces that are among the nearest of unusually many faces of other identities."""
    there = near.found >= 0
    theirs, own = np.where(there, faces.people[near.found], 0), faces.people[near.rows][:, None]
    foreign = there & ((theirs != own) | (own == 0))
    counts = np.bincount(near.found[foreign], minlength=len(faces))
    values = np.sqrt(counts)
    usual = RobustScale.of(values)
    scores = usual.scores(values)
    rows = np.flatnonzero((scores >= limit) & (counts > 2))

    def make(place: int, score: float) -> _DoubtInNumbers:
        row = int(rows[place])
        lines = np.flatnonzero((foreign & (near.found == row)).any(axis=1))
        witnesses = near.rows[lines[_first_row_of_each(faces.people[near.rows[lines]])]]
        measured = {"neighbour_of": float(counts[row]), "people": float(len(witnesses))}
        person = int(faces.people[row])
        groups = ((row,), tuple(witnesses[: 2 * SHOWN_PHOTOS].tolist()))
        return _DoubtInNumbers(Kind.HUB, score, (person,) if person else (), groups, measured)

    measures = f"of how many others' faces a face is among the {near.found.shape[1]} nearest"
    plain = RobustScale(usual.values, usual.median**2, usual.deviation)
    root = usual.at(limit)
    bound = root * root  # ** raises where the product is infinite
    return _DoubtsOfKind(Kind.HUB, measures, plain, bound, scores[rows], make)


def _poor_faces(
    faces: _Faces, chosen: Rows, measures: NDArray[np.float64], limit: float
) -> list[_DoubtsOfKind]:
    """Finds faces that are unusually small, blurred or turned; none where no face has a known place."""
    known = measures[np.isin(measures[:, 0], faces.ids[chosen])]
    if not len(known):
        return []
    rows = faces.rows(known[:, 0].astype(np.int64))
    _, sides, sharpness, yaw = known.T
    return [
        _poor(faces, rows, Kind.SMALL_FACE, "the shorter side of a face in pixels", sides, limit, low=True),
        _poor(faces, rows, Kind.BLURRED_FACE, "the sharpness of an aligned face", sharpness, limit, low=True),
        _poor(faces, rows, Kind.TURNED_FACE, "the yaw of a face to either side", yaw, limit, low=False),
    ]


def _poor(
    faces: _Faces, rows: Rows, kind: Kind, measures: str, values: Floats, limit: float, *, low: bool
) -> _DoubtsOfKind:
    """Finds unusual values: by their logarithms where `low` ones are doubts, else the large ones."""
    scaled = -np.log(np.maximum(values, np.finfo(np.float64).tiny)) if low else values
    usual = RobustScale.of(scaled)
    scores = usual.scores(scaled)
    places = np.flatnonzero(scores >= limit)
    plain = _exponentiated(usual) if low else usual
    bound = _exp(-usual.at(limit)) if low else usual.at(limit)

    def make(place: int, score: float) -> _DoubtInNumbers:
        row = int(rows[places[place]])
        person = int(faces.people[row])
        measured = {"value": float(values[places[place]]), "usual": plain.median}
        return _DoubtInNumbers(kind, score, (person,) if person else (), ((row,),), measured)

    return _DoubtsOfKind(kind, measures, plain, bound, scores[places], make)


def _first_row_of_each(people: Rows) -> Rows:
    """Returns the first position of each identity, and every anonymous position, ascending."""
    apart = np.where(people > 0, people, -1 - np.arange(len(people)))
    return np.sort(np.unique(apart, return_index=True)[1])


def _log_ratio(above: Floats, below: Floats, nothing: float) -> Floats:
    return np.asarray(np.log(np.maximum(above, nothing)) - np.log(np.maximum(below, nothing)))


def _exp(value: float) -> float:
    """Returns the exponential; of what is too large, the greatest number."""
    return math.exp(min(value, _MAX_LOGARITHM))


def _exponentiated(usual: RobustScale, *, sign: int = -1) -> RobustScale:
    """Returns the scale with its median converted from a logarithm (times `sign`) to the value itself."""
    return RobustScale(usual.values, _exp(sign * usual.median), usual.deviation)


def _present(rows: Rows) -> tuple[int, ...]:
    return tuple(rows[rows >= 0].tolist())


def _chunks(rows: Rows, size: int) -> Iterator[Rows]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _by_person(people: Rows) -> Iterator[tuple[int, Rows]]:
    """Yields each identity number, ascending, with its positions; anonymous ones are left out."""
    order = np.argsort(people, kind="stable")
    order = order[people[order] > 0]
    numbers, starts = np.unique(people[order], return_index=True)
    return zip(numbers.tolist(), np.split(order, starts[1:]), strict=bool(len(numbers)))


def _without_explained(raw: Sequence[_DoubtInNumbers]) -> list[_DoubtInNumbers]:
    """Returns doubts by falling score, near duplicates last because they do no harm.

    Doubts that another doubt explains are dropped. A mislabelled photo is near to its true identity, so that
    the photos of that identity seem mislabelled too. An identity that holds two people has a wide spread, so
    that other identities seem near.
    """
    photos = {one.groups[0][0]: one.score for one in raw if one.kind is Kind.ANOTHERS_PHOTO}
    twice = [one for one in raw if one.kind is Kind.SAME_PHOTO_TWO_NAMES]
    same = {frozenset(row for group in one.groups for row in group) for one in twice}
    double = {one.people[0] for one in raw if one.kind is Kind.ONE_LIKE_TWO}

    def explained(one: _DoubtInNumbers) -> bool:
        rows = frozenset(row for group in one.groups for row in group)
        if one.kind is Kind.ANOTHERS_PHOTO:
            nearest_other = one.groups[2][0]
            pair = frozenset({one.groups[0][0], nearest_other})
            return pair in same or photos.get(nearest_other, 0.0) > one.score
        return one.kind is Kind.TWO_LIKE_ONE and (rows in same or not double.isdisjoint(one.people))

    kept = (one for one in raw if not explained(one))
    return sorted(kept, key=lambda one: (one.kind is Kind.SAME_PHOTO, -one.score))


def _with_names(
    reader: Reader, faces: _Faces, raw: Sequence[_DoubtInNumbers], folder: str
) -> Iterator[Doubt]:
    """Yields doubts with the current names and photos; without those that lost an identity or a photo."""
    names, states = reader.names_of_identities({p for one in raw for p in one.people}), reader.doubt_states()
    ids = {int(faces.ids[row]) for one in raw for group in one.groups for row in group}
    known = reader.faces(ids)
    for one in raw:
        groups = [[known.get(int(faces.ids[row])) for row in group] for group in one.groups]
        people = [names.get(person) for person in one.people]
        whole = [[face for face in group if face is not None] for group in groups]
        named = tuple(name for name in people if name is not None)
        if groups == whole and len(named) == len(people):
            shown = tuple(map(tuple, whole))
            key = doubt_key(one.kind, [[face.id for face in group] for group in whole], one.people)
            state = states.get(str(key), DoubtState.OPEN)
            yield doubt(one.kind, one.score, named, shown, one.measured, folder, key=key, state=state)
