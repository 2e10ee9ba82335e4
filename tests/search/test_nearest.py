"""Searching a gallery: photos and people are those of a float64 brute force over everything stored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.database.filters import Condition, Where
from retrieval.database.records import NewFace
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.index.segments import Vectors
from retrieval.search.nearest import Match, PersonMatch
from tests.gallery.test_identities import sha256

FACES, DIMENSION = 60, 2048
NAMES = ("Kim", "Adi", "Zoë", "Bo", None)

Photo = tuple[int, str | None, NDArray[np.float64]]
Ranking = list[tuple[str, float, list[int]]]


class Stored:
    """A small gallery, and everything in it for brute force: faces of five, in three batches."""

    def __init__(self, gallery: Gallery, seed: int) -> None:
        rng = np.random.default_rng(seed)
        # Small whole numbers along a few axes: many distances are equal.
        self.vectors: Vectors = np.zeros((FACES, DIMENSION), np.float32)
        self.vectors[:, :4] = rng.integers(-2, 3, (FACES, 4))
        if seed % 2:
            self.vectors += rng.standard_normal((FACES, DIMENSION)).astype(np.float32)
        names = [NAMES[one] for one in rng.integers(0, len(NAMES), FACES)]
        faces = [
            NewFace(name, f"/photos/{n}.jpg", sha256(n), metadata={"even": n % 2 == 0})
            for n, name in enumerate(names)
        ]
        for part in (slice(0, 30), slice(30, 55), slice(55, FACES)):
            gallery.enroll_vectors(faces[part], self.vectors[part])
        self.gallery = gallery
        self.photos: list[Photo] = [
            (number, name, vector.astype(np.float64))
            for number, (name, vector) in enumerate(zip(names, self.vectors, strict=True), start=1)
        ]
        # Those who became known in one batch are numbered by name.
        with gallery.vault.store.read() as reader:
            known = {name: reader.identity_id(name) or 0 for name in names if name is not None}
        self.order = sorted(known, key=lambda name: known[name])
        self.queries: Vectors = np.zeros((6, DIMENSION), np.float32)
        self.queries[:, :4] = rng.integers(-2, 3, (6, 4))
        self.queries[3:] = self.vectors[10:13]

    def nearest(self, query: NDArray[Any], photos: Sequence[Photo]) -> list[tuple[float, int]]:
        wide = query.astype(np.float64)
        return sorted((float(np.sqrt(((vector - wide) ** 2).sum())), n) for n, _, vector in photos)

    def people(
        self, query: NDArray[Any], photos: Sequence[Photo], rule: str, mean_of: int, shown: int
    ) -> Ranking:
        found = []
        for place, name in enumerate(self.order):
            theirs = [photo for photo in photos if photo[1] == name]
            if not theirs:
                continue
            near = self.nearest(query, theirs)
            first = [distance for distance, _ in near]
            score = first[0] if rule == "nearest" else float(np.mean(first[:mean_of]))
            if rule == "centroid":
                mean = np.mean([vector for _, _, vector in theirs], axis=0).astype(np.float32)
                score = float(np.linalg.norm(mean.astype(np.float64) - query))
            # Sums in another order may differ in their last bits.
            found.append((round(score, 10), place, name, score, [number for _, number in near[:shown]]))
        return [(name, score, near) for _, _, name, score, near in sorted(found)]


@pytest.fixture(params=[1, 2])
def stored(request: pytest.FixtureRequest, gallery: Gallery) -> Stored:
    return Stored(gallery, request.param)


def assert_photos(found: Sequence[Match], true: Sequence[tuple[float, int]]) -> None:
    assert [match.face.id for match in found] == [number for _, number in true]
    np.testing.assert_allclose([m.distance for m in found], [d for d, _ in true], rtol=1e-9, atol=0)


def assert_people(found: Sequence[PersonMatch], true: Ranking) -> None:
    assert [(one.identity, [match.face.id for match in one.matches]) for one in found] == [
        (name, near) for name, _, near in true
    ]
    np.testing.assert_allclose([one.distance for one in found], [d for _, d, _ in true], rtol=1e-9, atol=0)
    assert all(match.face.identity == one.identity for one in found for match in one.matches)


def wheres(stored: Stored) -> list[tuple[Where | None, list[Photo]]]:
    everybody = stored.photos
    return [
        (None, everybody),
        (Where(identities=("Kim", "Bo")), [photo for photo in everybody if photo[1] in ("Kim", "Bo")]),
        (Where(face_ids=[3, 4, 9, 40, 999]), [photo for photo in everybody if photo[0] in (3, 4, 9, 40)]),
        (Where(faces=(Condition(("even",), "=", True),)), [one for one in everybody if one[0] % 2 == 1]),
        (Where(identities=("Nobody",)), []),
    ]


def test_the_nearest_photos_are_those_of_brute_force(stored: Stored) -> None:
    """By k, within a distance, or both, among all or some; many queries and one."""
    for where, photos in wheres(stored):
        true = [stored.nearest(query, photos) for query in stored.queries]
        for k in (1, 7, FACES, FACES + 9):
            found = stored.gallery.search_by_vectors(stored.queries, k, where=where)
            for some, whole in zip(found, true, strict=True):
                assert_photos(some, whole[:k])
            assert stored.gallery.search_by_vector(stored.queries[0], k, where=where) == found[0]
        for within in (0.0, 2.5, 64.0, 1e6):
            for k in (None, 3):
                found = stored.gallery.search_by_vectors(stored.queries, k, within=within, where=where)
                for some, whole in zip(found, true, strict=True):
                    assert_photos(some, [one for one in whole if one[0] <= within][:k])


def test_the_photos_nearest_to_a_stored_one_leave_itself_out(stored: Stored) -> None:
    for number in (1, 31, FACES):
        for where, photos in wheres(stored):
            others = [photo for photo in photos if photo[0] != number]
            true = stored.nearest(stored.vectors[number - 1], others)
            for k in (1, 5, FACES):
                assert_photos(stored.gallery.search_by_face(number, k, where=where), true[:k])
            near = [one for one in true if one[0] <= 3.0]
            assert_photos(stored.gallery.search_by_face(number, None, within=3.0, where=where), near)


@pytest.mark.parametrize("rule", ["nearest", "mean", "centroid"])
def test_the_nearest_people_are_those_of_brute_force(stored: Stored, rule: str) -> None:
    """Photos without an identity are nobody's, equal people come as they became known."""
    for where, photos in wheres(stored):
        for mean_of, shown, k in ((1, 3, 2), (3, 0, 4), (50, 100, 1), (2, 1, 20)):
            found = stored.gallery.search_people_by_vectors(
                stored.queries, k, rule=rule, mean_of=mean_of, photos=shown, where=where
            )
            for some, query in zip(found, stored.queries, strict=True):
                assert_people(some, stored.people(query, photos, rule, mean_of, shown)[:k])


@pytest.mark.parametrize("rule", ["nearest", "mean", "centroid"])
def test_the_people_nearest_to_a_stored_face_are_judged_without_it(stored: Stored, rule: str) -> None:
    for number in (1, 31, FACES):
        for where, photos in wheres(stored):
            others = [photo for photo in photos if photo[0] != number]
            found = stored.gallery.search_people_by_face(number, 9, rule=rule, where=where)
            assert_people(found, stored.people(stored.vectors[number - 1], others, rule, 3, 3))


@pytest.mark.parametrize("rule", ["nearest", "mean", "centroid"])
def test_a_picture_can_be_searched_for_without_itself(gallery: Gallery, faces: Path, rule: str) -> None:
    """Its very bytes are left out, as a photo and among its person's photos."""
    photos = sorted(faces.glob("*/*.jpg"))[:12]
    gallery.enroll([(photo, photo.parent.name) for photo in photos])
    picture = photos[0]
    mine = gallery.search(picture, 12).matches
    others = gallery.search(picture, 12, exclude_self=True).matches
    assert (mine[0].face.path, len(mine), len(others)) == (str(picture), 12, 11)
    assert [match.face.id for match in others] == [match.face.id for match in mine[1:]]
    (found,) = gallery.search_people([picture], 9, rule=rule, photos=12, exclude_self=True)
    shown = [match.face.path for one in found.people for match in one.matches]
    assert sorted(map(str, shown)) == sorted(map(str, photos[1:]))


@pytest.mark.parametrize("rule", ["nearest", "mean", "centroid"])
def test_an_empty_gallery_answers_with_nobody(gallery: Gallery, rule: str) -> None:
    queries = np.zeros((3, DIMENSION), np.float32)
    assert gallery.search_people_by_vectors(queries, 5, rule=rule) == [()] * 3
    assert gallery.search_by_vectors(queries, 5) == [()] * 3
    assert gallery.search_by_vectors(queries, None, within=1.0) == [()] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "The number of neighbours must be at least 1, not 0"),
        ({"k": -3}, "The number of neighbours must be at least 1, not -3"),
        ({"k": 0, "within": 1.0}, "The number of neighbours must be at least 1, not 0"),
        ({"k": None}, "Say how many neighbours, or within which distance"),
        ({"within": -0.5}, "The distance must be a number of at least 0"),
        ({"within": float("nan")}, "The distance must be a number of at least 0"),
        ({"within": float("inf")}, "The distance must be a number of at least 0"),
    ],
)
def test_a_number_or_distance_that_cannot_be_is_refused(
    gallery: Gallery, options: dict[str, Any], words: str
) -> None:
    gallery.enroll_vectors([NewFace(None, None, sha256(1))], np.ones((1, DIMENSION)))
    with pytest.raises(InputError, match=words):
        gallery.search_by_vectors(np.zeros((1, DIMENSION)), **options)
    with pytest.raises(InputError, match=words):
        gallery.search_by_face(1, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "The number of neighbours must be at least 1, not 0"),
        ({"rule": "median"}, "There is no rule median; choose one of nearest, mean, centroid"),
        ({"rule": "mean", "mean_of": 0}, "A mean needs at least 1 photo"),
        ({"photos": -1}, "as many as 0 photos can be shown"),
    ],
)
def test_a_question_about_people_that_cannot_be_is_refused(
    gallery: Gallery, options: dict[str, Any], words: str
) -> None:
    gallery.enroll_vectors([NewFace("Kim", None, sha256(1))], np.ones((1, DIMENSION)))
    with pytest.raises(InputError, match=words):
        gallery.search_people_by_vectors(np.zeros((1, DIMENSION)), **options)
    with pytest.raises(InputError, match=words):
        gallery.search_people_by_face(1, **options)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_face_that_is_not_there_cannot_be_searched_for(gallery: Gallery, number: int) -> None:
    gallery.enroll_vectors([NewFace("Kim", None, sha256(1))], np.ones((1, DIMENSION)))
    for ask in (gallery.search_by_face, gallery.search_people_by_face):
        with pytest.raises(InputError, match=f"There is no face {number} in "):
            ask(number)
