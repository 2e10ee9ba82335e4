"""Searches by vectors, for `Gallery`: the nearest photos or identities in one snapshot, and the decisions.

This module does not handle images: `gallery.image_search` embeds them and adds the classifier's prediction.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval.database.filters import Where
from retrieval.database.reader import Reader
from retrieval.database.records import Face
from retrieval.errors import GalleryDamaged, ModelMismatch, NotFound
from retrieval.images.detection import DetectedFace
from retrieval.index.knn import Neighbours
from retrieval.index.segments import Exclude, Ids
from retrieval.search import decisions, people
from retrieval.search.decisions import Decision
from retrieval.search.people import Ranked, Rule
from retrieval.search.question import PeopleQuestion, PhotoQuestion, Question
from retrieval.storage.any_vault import AnyVault
from retrieval.system.paths import is_below

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Match:
    """A stored photo and its Euclidean distance (not squared) to the query."""

    face: Face
    distance: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The classifier's prediction: an identity that it was trained on, and its softmax probability.

    The classifier always predicts one of these identities, also for a photo of another person.
    """

    identity: str
    probability: float


class Found(tuple[_T, ...], Generic[_T]):
    """The results of a search, nearest first: a tuple with the decision as an attribute.

    Attributes:
        decision: an identity or UNKNOWN; None if the gallery has no threshold and none was given.
    """

    decision: Decision | None = None

    @classmethod
    def of(cls, found: Iterable[_T], decision: Decision | None) -> "Found[_T]":
        """Returns the results with a decision."""
        made = cls(found)
        made.decision = decision
        return made


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search for photos by an image.

    Attributes:
        matches: the nearest stored photos, nearest first, equal distances by face id.
        prediction: the classifier's prediction, from the same pass through the network; None for an imported
            model, which has no classifier.
        decision: an identity or UNKNOWN; None if the gallery has no threshold and none was given.
        face: the face that was searched for, in the upright image; None if the image was taken as it is.
    """

    matches: tuple[Match, ...]
    prediction: Prediction | None
    decision: Decision | None = None
    face: DetectedFace | None = None


@dataclass(frozen=True, slots=True)
class PersonMatch:
    """An identity in a result: its distance by the requested rule, and its nearest photos."""

    identity: str
    distance: float
    matches: tuple[Match, ...]


@dataclass(frozen=True, slots=True)
class PeopleResult:
    """The result of a search for identities by an image: the nearest first, the prediction and the decision.

    The decision depends on the nearest photo, whatever the rule; see `SearchResult`.
    """

    people: tuple[PersonMatch, ...]
    prediction: Prediction | None
    decision: Decision | None = None
    face: DetectedFace | None = None


def faces_near_vectors(
    vault: AnyVault,
    vectors: NDArray[Any],
    exclude: Exclude = None,
    *,
    asked: PhotoQuestion,
    generation: int | None = None,
) -> list[Found[Match]]:
    """Returns the matches of each vector (n, d), all from one snapshot.

    Args:
        vault: the gallery's.
        vectors: (n, d) float.
        exclude: for each vector, the ids of faces to leave out of its results.
        asked: the options of the search, for all vectors.
        generation: number of the generation of the model that embedded the vectors; None skips the check.

    Raises:
        ModelMismatch: the snapshot is of another generation than the given one.
        InputError: the vectors have another shape or are not finite, the distance is negative or not finite,
            or the gallery is not calibrated for the FPIR.
        OutOfDate: the gallery is a copy of a published one, and older than it may be.
    """

    def search(reader: Reader) -> list[Found[Match]]:
        snapshot = _Snapshot(vault, reader, asked, generation)
        found = snapshot.faces(vectors, exclude, within=asked.within)
        decided = snapshot.decide(vectors, exclude, found)
        with asked.explanation.timed("look up"):
            shown = snapshot.matches([(d[: asked.k], ids[: asked.k]) for d, ids in found])
        return list(map(Found.of, shown, decided))

    vault.check_age()
    return vault.on_a_snapshot(search)


def people_near_vectors(
    vault: AnyVault,
    vectors: NDArray[Any],
    exclude: Exclude = None,
    *,
    asked: PeopleQuestion,
    generation: int | None = None,
) -> list[Found[PersonMatch]]:
    """Returns the identities nearest to each vector (n, d); otherwise as `faces_near_vectors`."""
    excluded = [()] * len(vectors) if exclude is None else list(exclude)

    def search(reader: Reader) -> list[Found[PersonMatch]]:
        snapshot = _Snapshot(vault, reader, asked, generation)
        queries = snapshot.vectors.checked(vectors)
        found: list[list[Ranked]] = []
        # Centroids are computed once for consecutive queries that exclude the same faces.
        for left_out, places in groupby(range(len(queries)), key=excluded.__getitem__):
            found += snapshot.rank(queries[list(places)], left_out, asked)
        decided = snapshot.decide(queries, exclude)
        return list(map(Found.of, snapshot.named(found), decided))

    vault.check_age()
    return vault.on_a_snapshot(search)


def faces_near_face(vault: AnyVault, face_id: int, *, asked: PhotoQuestion) -> Found[Match]:
    """Returns the matches of a stored face, without the face itself.

    Raises:
        NotFound: there is no face of that id.
        InputError: as `faces_near_vectors`.
    """
    return faces_near_vectors(vault, vector_of(vault, face_id)[None], [(face_id,)], asked=asked)[0]


def people_near_face(vault: AnyVault, face_id: int, *, asked: PeopleQuestion) -> Found[PersonMatch]:
    """Returns the identities nearest to a stored face; otherwise as `faces_near_face`."""
    return people_near_vectors(vault, vector_of(vault, face_id)[None], [(face_id,)], asked=asked)[0]


def vector_of(vault: AnyVault, face_id: int) -> NDArray[np.float32]:
    """Returns the vector (d,) of a stored face.

    Raises:
        NotFound: there is no face of that id.
    """

    def find(reader: Reader) -> NDArray[np.float32]:
        vector = vault.vector(reader, vault.state(reader).generation, face_id)
        if vector is None:
            raise NotFound(f"There is no face {face_id} in {vault.name}.")
        return vector

    return vault.on_a_snapshot(find)


class _Snapshot:
    """A search in one snapshot of a gallery: its options, the allowed faces, and the threshold.

    Raises:
        ModelMismatch: the snapshot is of another generation than the given one.
        InputError: the gallery is not calibrated for the requested FPIR.
    """

    def __init__(self, vault: AnyVault, reader: Reader, asked: Question, generation: int | None) -> None:
        self.name, self.reader, self.asked = vault.name, reader, asked
        self.state = vault.state(reader)
        if generation not in (None, self.state.generation.id):
            raise ModelMismatch(f"The gallery {self.name} switched models meanwhile; search again.")
        self.allowed = self._allowed()
        calibration, faces = self.state.calibration, self.state.faces
        self.limit = decisions.limit(calibration, faces, asked.fpir, asked.max_distance, self.name)
        self.vectors = self.state.vectors

    def _allowed(self) -> Ids | None:
        """The ids of the allowed faces; None if all faces are allowed."""
        if self.asked.where is None:
            return None
        with self.asked.explanation.timed("where"):
            return self.reader.face_ids_where(self.asked.where)

    def search(
        self,
        queries: NDArray[Any],
        count: int,
        allowed: Ids | None,
        exclude: Exclude,
    ) -> list[Neighbours]:
        """The `count` nearest faces to each query (n, d)."""
        return self.vectors.nearest(
            queries, count, allowed=allowed, exclude=exclude, explanation=self.asked.explanation
        )

    def faces(self, vectors: NDArray[Any], exclude: Exclude, *, within: float | None) -> list[Neighbours]:
        """The nearest faces to each vector (n, d), as requested; a few more if there is a threshold."""
        if within is not None:
            return self.vectors.within(
                vectors,
                within,
                allowed=self.allowed,
                exclude=exclude,
                explanation=self.asked.explanation,
            )
        # A decision needs the second identity too: a few more faces usually include it.
        count = self.asked.k or 1
        count = count if self.limit is None else max(count, decisions.FIRST)
        return self.search(vectors, count, self.allowed, exclude)

    def rank(
        self, queries: NDArray[np.float32], left_out: tuple[int, ...], asked: PeopleQuestion
    ) -> list[list[Ranked]]:
        """The nearest identities to each query (n, d); all queries exclude the same faces."""
        k, photos, allowed = asked.k or 1, asked.photos, self.allowed

        def ask(one: NDArray[np.float32], count: int, only: Ids | None) -> list[Neighbours]:
            return self.search(one, count, only, [left_out])

        if asked.rule is not Rule.CENTROID:
            number = asked.mean_of if asked.rule is Rule.MEAN else 1
            return people.by_photos(
                self.reader, ask, queries, k, mean_of=number, photos=photos, allowed=allowed
            )
        blocks = self.vectors.blocks()
        if left_out:
            candidates = np.fromiter(self.reader.face_ids(), np.int64) if allowed is None else allowed
            allowed = np.setdiff1d(candidates, left_out)
        return people.by_centroid(self.reader, ask, blocks, queries, k, photos=photos, allowed=allowed)

    def decide(
        self,
        vectors: NDArray[Any],
        exclude: Exclude,
        beginnings: Sequence[Neighbours] | None = None,
    ) -> list[Decision | None]:
        """The decision for each vector (n, d); `beginnings` are the nearest faces that are known already."""
        if self.limit is None:
            return [None] * len(vectors)
        queries = self.vectors.checked(vectors)
        excluded = [()] * len(queries) if exclude is None else list(exclude)

        def ask(places: Sequence[int], count: int, only: Ids | None) -> list[Neighbours]:
            some = self._allowed_among(only)
            return self.search(queries[list(places)], count, some, [excluded[place] for place in places])

        if beginnings is None:
            beginnings = [(np.empty(0), np.empty(0, np.int64))] * len(queries)
        explanation = self.asked.explanation
        before, rows = explanation.queries, explanation.rows
        with explanation.timed("decide"):
            found = decisions.two_nearest(self.reader, ask, beginnings)
            names = self.reader.names_of_identities(set(found.people.ravel().tolist()))
        # These searches continue the same queries, so they are not counted twice.
        explanation.queries, explanation.rows = before, rows
        return list(decisions.decide(found, names, self.limit))

    def _allowed_among(self, only: Ids | None) -> Ids | None:
        """The allowed faces among some faces, or among all if `only` is None."""
        if only is None:
            return self.allowed
        return only if self.allowed is None else np.intersect1d(only, self.allowed)

    def named(self, found: Sequence[Sequence[Ranked]]) -> list[tuple[PersonMatch, ...]]:
        """Ranked identities with their names and photos."""
        names = self.reader.names_of_identities({one.identity_id for some in found for one in some})
        photos = [
            (np.array(one.distances), np.array(one.face_ids, np.int64)) for some in found for one in some
        ]
        matches = iter(self.matches(photos))
        return [
            tuple(PersonMatch(names[one.identity_id], one.distance, next(matches)) for one in some)
            for some in found
        ]

    def matches(self, found: Sequence[Neighbours]) -> list[tuple[Match, ...]]:
        """Stored faces with their distances, for pairs of distances and ids.

        Raises:
            GalleryDamaged: there is a vector without a face.
        """
        faces = self.reader.faces({int(number) for _, ids in found for number in ids})
        if self.asked.where is not None and self.asked.where.path_prefixes:
            faces = {number: _matching_paths_first(face, self.asked.where) for number, face in faces.items()}
        try:
            return [
                tuple(
                    Match(faces[number], distance)
                    for distance, number in zip(distances.tolist(), ids.tolist(), strict=True)
                )
                for distances, ids in found
            ]
        except KeyError as error:
            raise GalleryDamaged(
                f"{self.name} has a vector {error} without a face; see `faceprint verify "
                f"{shlex.quote(self.name)}`."
            ) from error


def _matching_paths_first(face: Face, where: Where) -> Face:
    """The face, with its paths that match the condition first."""
    meant = [path for path in face.paths if is_below(path, where.path_prefixes)]
    others = [path for path in face.paths if path not in meant]
    return dataclasses.replace(face, paths=(*meant, *others), meant=len(meant))
