"""Deduplicator: the outcome of each photo of a batch; batches of any sizes end in the same gallery."""

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrieval.database.records import Face, FaceRegion, NewFace, StoredPhoto
from retrieval.embedding.outcome import Deduplicator, Outcome, Status, of_photo
from retrieval.errors import Reason
from retrieval.images.detection import DetectedFace

FIRST = 10
ELSEWHERE = 7  # another face, which has the path /theirs.jpg


HINT = "; if this name is right, `relabel` moves them to it"


def stored_face(identity: str | None, *paths: str) -> StoredPhoto:
    """Face 1, of the bytes that every photo of the table has."""
    return StoredPhoto(1, (Face(1, identity, paths, "a", "2026-01-01T00:00:00+00:00"),))


def a_deduplicator(photo: StoredPhoto | None) -> Deduplicator:
    """One who knows of face 1, if there is one, and of another photo."""
    stored = {} if photo is None else {photo.sha256: photo}
    owners = {path: photo.id for photo in stored.values() for path in photo.paths}
    return Deduplicator(stored, {**owners, "/theirs.jpg": ELSEWHERE}, first_id=FIRST)


def changes(
    deduplicator: Deduplicator,
) -> tuple[list[tuple[int, NewFace]], dict[int, str], dict[str, int], set[int]]:
    return deduplicator.new, deduplicator.names, deduplicator.paths, deduplicator.orphaned


# Bytes that are not stored


@pytest.mark.parametrize("identity", [None, "Kim"])
@pytest.mark.parametrize("path", [None, "/new.jpg"])
def test_new_bytes_with_a_vector_are_enrolled(identity: str | None, path: str | None) -> None:
    deduplicator, photo = a_deduplicator(None), NewFace(identity, path, "a")
    assert deduplicator.decide(4, photo, has_vector=True) == Outcome(path, identity, Status.ENROLLED, FIRST)
    assert changes(deduplicator) == ([(4, photo)], {}, {} if path is None else {path: FIRST}, set())
    assert not deduplicator.changes_nothing


def test_new_bytes_under_the_path_of_another_face_are_enrolled_and_take_it() -> None:
    deduplicator, photo = a_deduplicator(None), NewFace("Kim", "/theirs.jpg", "a")
    assert deduplicator.decide(0, photo, has_vector=True) == Outcome(
        "/theirs.jpg", "Kim", Status.ENROLLED, FIRST, replaced=ELSEWHERE
    )
    assert changes(deduplicator) == ([(0, photo)], {}, {"/theirs.jpg": FIRST}, {ELSEWHERE})


@pytest.mark.parametrize("identity", [None, "Kim"])
@pytest.mark.parametrize("path", [None, "/new.jpg", "/theirs.jpg"])
def test_new_bytes_without_a_vector_have_no_verdict_and_change_nothing(
    identity: str | None, path: str | None
) -> None:
    deduplicator = a_deduplicator(None)
    assert deduplicator.decide(0, NewFace(identity, path, "a"), has_vector=False) is None
    assert changes(deduplicator) == ([], {}, {}, set())
    assert deduplicator.changes_nothing


# Bytes that are stored: who was said to be on them, who is, and what is known of the path

# (stored, claimed) where the claim says nothing new.
AGREED = [(None, None), ("Kim", None), ("Kim", "Kim")]
HAS_VECTOR = pytest.mark.parametrize("has_vector", [False, True])


@HAS_VECTOR
@pytest.mark.parametrize(("was", "said"), AGREED)
@pytest.mark.parametrize("path", ["/mine.jpg", "/second.jpg"])
def test_the_same_bytes_under_one_of_their_paths_are_known(
    path: str, was: str | None, said: str | None, has_vector: bool
) -> None:
    deduplicator = a_deduplicator(stored_face(was, "/mine.jpg", "/second.jpg"))
    found = deduplicator.decide(0, NewFace(said, path, "a"), has_vector=has_vector)
    assert found == Outcome(path, said, Status.KNOWN, 1)
    assert changes(deduplicator) == ([], {}, {}, set())
    assert deduplicator.changes_nothing


@HAS_VECTOR
@pytest.mark.parametrize(("was", "said"), AGREED)
@pytest.mark.parametrize("paths", [(), ("/mine.jpg",)])
def test_the_same_bytes_without_a_path_are_a_duplicate_that_changes_nothing(
    paths: tuple[str, ...], was: str | None, said: str | None, has_vector: bool
) -> None:
    deduplicator = a_deduplicator(stored_face(was, *paths))
    detail = "the same bytes as /mine.jpg" if paths else "the same bytes as face 1"
    found = deduplicator.decide(0, NewFace(said, None, "a"), has_vector=has_vector)
    assert found == Outcome(None, said, Status.DUPLICATE, 1, detail=detail)
    assert deduplicator.changes_nothing


@HAS_VECTOR
@pytest.mark.parametrize(("was", "said"), AGREED)
@pytest.mark.parametrize("paths", [(), ("/mine.jpg",)])
def test_the_same_bytes_under_a_new_path_are_a_duplicate_and_add_the_path(
    paths: tuple[str, ...], was: str | None, said: str | None, has_vector: bool
) -> None:
    deduplicator = a_deduplicator(stored_face(was, *paths))
    detail = "the same bytes as /mine.jpg" if paths else "the same bytes as face 1"
    found = deduplicator.decide(0, NewFace(said, "/new.jpg", "a"), has_vector=has_vector)
    assert found == Outcome("/new.jpg", said, Status.DUPLICATE, 1, detail=detail)
    assert changes(deduplicator) == ([], {}, {"/new.jpg": 1}, set())
    assert not deduplicator.changes_nothing


@HAS_VECTOR
@pytest.mark.parametrize(("was", "said"), AGREED)
def test_the_same_bytes_under_the_path_of_another_face_take_the_path_from_it(
    was: str | None, said: str | None, has_vector: bool
) -> None:
    deduplicator = a_deduplicator(stored_face(was, "/mine.jpg"))
    found = deduplicator.decide(0, NewFace(said, "/theirs.jpg", "a"), has_vector=has_vector)
    detail = "the same bytes as /mine.jpg"
    assert found == Outcome("/theirs.jpg", said, Status.DUPLICATE, 1, detail=detail, replaced=ELSEWHERE)
    assert changes(deduplicator) == ([], {}, {"/theirs.jpg": 1}, {ELSEWHERE})


@HAS_VECTOR
@pytest.mark.parametrize("path", [None, "/mine.jpg", "/new.jpg", "/theirs.jpg"])
@pytest.mark.parametrize("paths", [(), ("/mine.jpg",)])
def test_the_same_bytes_claimed_for_somebody_else_are_a_conflict_that_changes_nothing(
    paths: tuple[str, ...], path: str | None, has_vector: bool
) -> None:
    deduplicator = a_deduplicator(stored_face("Kim", *paths))
    detail = "the same bytes are enrolled as Kim" + (" from /mine.jpg" if paths else "") + HINT
    found = deduplicator.decide(0, NewFace("Adi", path, "a"), has_vector=has_vector)
    assert found == Outcome(path, "Adi", Status.REJECTED, 1, Reason.IDENTITY_CONFLICT, detail)
    assert changes(deduplicator) == ([], {}, {}, set())
    assert deduplicator.changes_nothing


NAMED = "had no identity until now; it is Kim's"


@HAS_VECTOR
@pytest.mark.parametrize(
    ("path", "expected", "paths", "orphaned"),
    [
        ("/mine.jpg", Outcome("/mine.jpg", "Kim", Status.KNOWN, 1, detail=NAMED), {}, set()),
        (
            None,
            Outcome(None, "Kim", Status.DUPLICATE, 1, detail=f"the same bytes as /mine.jpg, which {NAMED}"),
            {},
            set(),
        ),
        (
            "/new.jpg",
            Outcome(
                "/new.jpg", "Kim", Status.DUPLICATE, 1, detail=f"the same bytes as /mine.jpg, which {NAMED}"
            ),
            {"/new.jpg": 1},
            set(),
        ),
        (
            "/theirs.jpg",
            Outcome(
                "/theirs.jpg",
                "Kim",
                Status.DUPLICATE,
                1,
                detail=f"the same bytes as /mine.jpg, which {NAMED}",
                replaced=ELSEWHERE,
            ),
            {"/theirs.jpg": 1},
            {ELSEWHERE},
        ),
    ],
    ids=["its path", "no path", "new path", "another's path"],
)
def test_a_name_for_bytes_that_have_none_is_taken(
    path: str | None, expected: Outcome, paths: dict[str, int], orphaned: set[int], has_vector: bool
) -> None:
    deduplicator = a_deduplicator(stored_face(None, "/mine.jpg"))
    assert deduplicator.decide(0, NewFace("Kim", path, "a"), has_vector=has_vector) == expected
    assert changes(deduplicator) == ([], {1: "Kim"}, paths, orphaned)
    assert not deduplicator.changes_nothing


# Several photos, one after the other


def statuses(
    deduplicator: Deduplicator, *photos: NewFace
) -> list[tuple[Status, int | None, int | None] | None]:
    """Status, face and replaced face of each."""
    outcomes = [deduplicator.decide(row, photo, has_vector=True) for row, photo in enumerate(photos)]
    return [outcome and (outcome.status, outcome.face_id, outcome.replaced) for outcome in outcomes]


def test_new_faces_have_consecutive_ids_and_the_rows_of_their_photos() -> None:
    deduplicator = a_deduplicator(stored_face("Kim", "/mine.jpg"))
    photos = [NewFace("Kim", "/b.jpg", "b"), NewFace("Kim", "/mine.jpg", "a"), NewFace(None, None, "c")]
    assert statuses(deduplicator, *photos) == [
        (Status.ENROLLED, FIRST, None),
        (Status.KNOWN, 1, None),
        (Status.ENROLLED, FIRST + 1, None),
    ]
    assert deduplicator.new == [(0, photos[0]), (2, photos[2])]


def test_later_photos_of_a_batch_know_what_the_earlier_ones_did() -> None:
    """Enrolled, known, under a second path, named, claimed for somebody else."""
    deduplicator = a_deduplicator(None)
    assert statuses(
        deduplicator,
        NewFace(None, "/1.jpg", "b"),
        NewFace(None, "/1.jpg", "b"),
        NewFace(None, "/2.jpg", "b"),
        NewFace("Kim", "/2.jpg", "b"),
        NewFace("Adi", "/2.jpg", "b"),
        NewFace("Kim", "/1.jpg", "b"),
    ) == [
        (Status.ENROLLED, FIRST, None),
        (Status.KNOWN, FIRST, None),
        (Status.DUPLICATE, FIRST, None),
        (Status.KNOWN, FIRST, None),
        (Status.REJECTED, FIRST, None),
        (Status.KNOWN, FIRST, None),
    ]
    assert (deduplicator.names, deduplicator.paths) == ({FIRST: "Kim"}, {"/1.jpg": FIRST, "/2.jpg": FIRST})


def test_a_path_that_comes_twice_with_different_bytes_is_the_later_ones() -> None:
    deduplicator = a_deduplicator(None)
    assert statuses(deduplicator, NewFace("Kim", "/1.jpg", "b"), NewFace("Kim", "/1.jpg", "c")) == [
        (Status.ENROLLED, FIRST, None),
        (Status.ENROLLED, FIRST + 1, FIRST),
    ]
    assert (deduplicator.paths, deduplicator.orphaned) == ({"/1.jpg": FIRST + 1}, {FIRST})


def test_two_files_that_change_places_keep_their_faces() -> None:
    """Nothing is enrolled, and neither face is without a path at the end."""
    stored = {
        digest: StoredPhoto(n, (Face(n, "Kim", (f"/{digest}.jpg",), digest, ""),))
        for n, digest in enumerate("ab", 1)
    }
    deduplicator = Deduplicator(stored, {"/a.jpg": 1, "/b.jpg": 2}, first_id=3)
    first = deduplicator.decide(0, NewFace("Kim", "/b.jpg", "a"), has_vector=False)
    assert first == Outcome(
        "/b.jpg", "Kim", Status.DUPLICATE, 1, detail="the same bytes as /a.jpg", replaced=2
    )
    # Without a vector this one would have to be read once more: its face had just lost its only path.
    second = deduplicator.decide(1, NewFace("Kim", "/a.jpg", "b"), has_vector=True)
    assert second is not None
    assert second.replaced == 1


# Batches of any sizes

# Who a photo's bytes belong to, and the paths that lead to them: what a gallery comes to, ids aside.
Contents = dict[str, tuple[str | None, frozenset[str]]]


@dataclasses.dataclass
class Model:
    """A gallery as two dictionaries, and the rules in a few lines."""

    identity: dict[str, str | None] = dataclasses.field(default_factory=dict)
    digest_of: dict[str, str] = dataclasses.field(default_factory=dict)
    contested: set[str] = dataclasses.field(default_factory=set)

    def take(self, photo: NewFace) -> Status:
        digest, path = photo.sha256, photo.path
        known = digest in self.identity
        if known and None is not photo.identity != self.identity[digest] is not None:
            self.contested.add(digest)
            return Status.REJECTED
        self.identity[digest] = photo.identity or self.identity.get(digest)
        before = self.digest_of.get(path) if path is not None else None
        if path is not None:
            self.digest_of[path] = digest
        # Bytes that the run was offered under another name stay, though no path leads to them.
        if before not in (None, digest, *self.contested, *self.digest_of.values()):
            del self.identity[before]
        if not known:
            return Status.ENROLLED
        return Status.KNOWN if before == digest else Status.DUPLICATE

    def contents(self) -> Contents:
        return {
            digest: (name, frozenset(path for path, of in self.digest_of.items() if of == digest))
            for digest, name in self.identity.items()
        }


class Stored:
    """A gallery's tables as dictionaries, changed by a deduplicator as `Gallery` changes them."""

    def __init__(self) -> None:
        self.faces: dict[int, Face] = {}
        self.owners: dict[str, int] = {}
        self.next_id = 1
        self.contested: set[int] = set()

    def take(self, photos: Sequence[NewFace]) -> list[Status]:
        """Enrolls a batch, one of a run."""
        known = {face.sha256: StoredPhoto(face.id, (face,)) for face in self.faces.values()}
        deduplicator = Deduplicator(known, self.owners, first_id=self.next_id, contested=self.contested)
        outcomes = [deduplicator.decide(row, photo, has_vector=True) for row, photo in enumerate(photos)]
        for number, (_, photo) in enumerate(deduplicator.new, self.next_id):
            self.faces[number] = Face(number, photo.identity, (), photo.sha256, "")
        self.next_id += len(deduplicator.new)
        self.owners.update(deduplicator.paths)
        for number, name in deduplicator.names.items():
            self.faces[number] = dataclasses.replace(self.faces[number], identity=name)
        self.contested |= deduplicator.contested
        for number in deduplicator.orphaned - set(self.owners.values()) - self.contested:
            del self.faces[number]
        for number, face in self.faces.items():
            paths = tuple(path for path, owner in self.owners.items() if owner == number)
            self.faces[number] = dataclasses.replace(face, paths=paths)
        return [outcome.status for outcome in outcomes if outcome is not None]

    def contents(self) -> Contents:
        digests = [face.sha256 for face in self.faces.values()]
        assert len(digests) == len(set(digests))
        return {face.sha256: (face.identity, frozenset(face.paths)) for face in self.faces.values()}


PHOTOS = st.builds(
    NewFace,
    st.sampled_from([None, "Kim", "Adi"]),
    st.sampled_from([None, "/1.jpg", "/2.jpg", "/3.jpg"]),
    st.sampled_from("abcd"),
)


@given(st.lists(st.tuples(PHOTOS, st.booleans()), max_size=12))
# A face that has lost its only path is gone: its bytes come as new ones, in the same batch too.
@example(
    [
        (NewFace("Kim", "/1.jpg", "a"), False),
        (NewFace("Kim", "/1.jpg", "b"), False),
        (NewFace("Adi", "/2.jpg", "a"), False),
    ]
)
def test_batches_of_any_sizes_end_in_the_gallery_that_single_photos_give(
    photos: list[tuple[NewFace, bool]],
) -> None:
    """The same people, paths and outcomes as the rules give for one photo at a time; True ends a batch."""
    model, stored, alone = Model(), Stored(), Stored()
    expected = [model.take(photo) for photo, _ in photos]
    assert [status for photo, _ in photos for status in alone.take([photo])] == expected
    assert alone.contents() == model.contents()
    found: list[Status] = []
    batch: list[NewFace] = []
    for photo, last in photos:
        batch.append(photo)
        if last:
            found += stored.take(batch)
            batch = []
    found += stored.take(batch)
    assert stored.contents() == model.contents()
    assert found == expected


# Photos of several people


def region(left: float) -> FaceRegion:
    points = ((2.0, 2.0), (4.0, 2.0), (3.0, 3.0), (2.0, 4.0), (4.0, 4.0))
    return FaceRegion(DetectedFace((left, 0.0, 6.0, 6.0), points, 0.9))


def a_group(*identities: str | None) -> StoredPhoto:
    """A stored photo of faces 1, 2 and so on, side by side."""
    return StoredPhoto(
        1,
        tuple(
            Face(number, identity, ("/mine.jpg",), "a", "", region=region(8.0 * number))
            for number, identity in enumerate(identities, 1)
        ),
    )


@HAS_VECTOR
def test_a_photo_of_several_people_is_known_with_all_faces(has_vector: bool) -> None:
    deduplicator = a_deduplicator(a_group(None, "Kim", None))
    found = deduplicator.decide(0, NewFace(None, "/mine.jpg", "a"), has_vector=has_vector)
    assert found == Outcome("/mine.jpg", None, Status.KNOWN, 1, further_ids=(2, 3))
    assert found.face_ids == (1, 2, 3)
    again = deduplicator.decide(1, NewFace("Kim", "/new.jpg", "a"), has_vector=has_vector)
    assert again is not None
    assert (again.status, again.face_ids) == (Status.DUPLICATE, (1, 2, 3))
    assert deduplicator.paths == {"/new.jpg": 1}


@HAS_VECTOR
def test_a_name_that_is_none_of_several_faces_is_rejected_and_the_photo_stays(has_vector: bool) -> None:
    deduplicator = a_deduplicator(a_group(None, "Kim"))
    found = deduplicator.decide(0, NewFace("Adi", "/new.jpg", "a"), has_vector=has_vector)
    assert found is not None
    assert (found.status, found.reason) == (Status.REJECTED, Reason.SEVERAL_FACES)
    assert found.detail == "the same bytes are enrolled with 2 faces, and Adi is none of them"
    assert deduplicator.changes_nothing
    assert deduplicator.contested == {1}


def test_a_face_that_its_stored_photo_lacks_is_added_to_it() -> None:
    deduplicator = a_deduplicator(a_group("Kim"))
    new = NewFace("Adi", "/mine.jpg", "a", region=region(80.0))
    assert deduplicator.decide(5, new, has_vector=True) == Outcome("/mine.jpg", "Adi", Status.ENROLLED, FIRST)
    assert (deduplicator.new, deduplicator.photos) == ([(5, new)], {FIRST: 1})
    assert (deduplicator.paths, deduplicator.orphaned) == ({}, set())
    nearly = NewFace(None, "/mine.jpg", "a", region=region(80.001))
    again = deduplicator.decide(6, nearly, has_vector=True)
    assert again is not None
    assert (again.status, again.face_ids) == (Status.KNOWN, (FIRST,))


@pytest.mark.parametrize("stored", [a_group(None), stored_face(None, "/mine.jpg")])
@pytest.mark.parametrize("new", [None, FaceRegion()])
def test_a_picture_that_was_taken_as_it_is_stands_for_the_faces_of_its_photo(
    stored: StoredPhoto, new: FaceRegion | None
) -> None:
    deduplicator = a_deduplicator(stored)
    found = deduplicator.decide(0, NewFace(None, "/mine.jpg", "a", region=new), has_vector=True)
    assert found == Outcome("/mine.jpg", None, Status.KNOWN, 1)


def test_the_outcome_of_a_photo_is_that_of_its_faces() -> None:
    enrolled = [Outcome("/a.jpg", None, Status.ENROLLED, number, replaced=4 - number) for number in (1, 2)]
    known = Outcome("/a.jpg", None, Status.KNOWN, 3)
    assert of_photo([known]) == known
    assert of_photo([known, *enrolled]) == dataclasses.replace(enrolled[0], further_ids=(2,))
    assert of_photo([known, dataclasses.replace(known, face_id=5)]).face_ids == (3, 5)


class StoredPhotos:
    """The tables with several faces a photo as dictionaries, changed as `FaceWriter` changes them."""

    def __init__(self) -> None:
        self.photos: dict[int, StoredPhoto] = {}
        self.owners: dict[str, int] = {}
        self.next_id = 1
        self.contested: set[int] = set()

    def take(self, faces: Sequence[NewFace]) -> list[Status]:
        stored = {photo.sha256: photo for photo in self.photos.values()}
        deduplicator = Deduplicator(stored, self.owners, first_id=self.next_id, contested=self.contested)
        outcomes = [deduplicator.decide(row, face, has_vector=True) for row, face in enumerate(faces)]
        for number, (_, face) in enumerate(deduplicator.new, self.next_id):
            photo_id = deduplicator.photos.get(number, number)
            new = Face(number, face.identity, (), face.sha256, "", region=face.region)
            before = self.photos[photo_id].faces if photo_id in self.photos else ()
            self.photos[photo_id] = StoredPhoto(photo_id, (*before, new))
        self.next_id += len(deduplicator.new)
        self.owners.update(deduplicator.paths)
        self.contested |= deduplicator.contested
        for number in deduplicator.orphaned - set(self.owners.values()) - self.contested:
            del self.photos[number]
        for number, photo in self.photos.items():
            paths = tuple(path for path, owner in self.owners.items() if owner == number)
            self.photos[number] = StoredPhoto(
                number,
                tuple(
                    dataclasses.replace(
                        face, paths=paths, identity=deduplicator.names.get(face.id, face.identity)
                    )
                    for face in photo.faces
                ),
            )
        return [outcome.status for outcome in outcomes if outcome is not None]

    def contents(self) -> set[tuple[str, str, str | None, tuple[str, ...]]]:
        faces = [face for photo in self.photos.values() for face in photo.faces]
        found = {
            (face.sha256, face.region.box if face.region else "", face.identity, tuple(sorted(face.paths)))
            for face in faces
        }
        assert len({row[:2] for row in found}) == len(faces), "a face is there twice"
        assert self.owners.keys() == {path for face in faces for path in face.paths}
        return found


def of_bytes(identity: str | None, folder: str | None, sha256: str, place: FaceRegion) -> NewFace:
    """A face of a photo whose paths no other photo has."""
    return NewFace(identity, folder and f"{folder}/{sha256}.jpg", sha256, region=place)


FACES = st.builds(
    of_bytes,
    st.sampled_from([None, "Kim", "Adi"]),
    st.sampled_from([None, "/1", "/2"]),
    st.sampled_from("abc"),
    st.sampled_from([region(0.0), region(8.0), region(16.0), FaceRegion()]),
)


@given(st.lists(st.tuples(FACES, st.booleans()), max_size=12))
def test_faces_of_photos_are_the_same_in_batches_of_any_sizes(faces: list[tuple[NewFace, bool]]) -> None:
    """True ends a batch."""
    alone, together = StoredPhotos(), StoredPhotos()
    expected = [status for face, _ in faces for status in alone.take([face])]
    found: list[Status] = []
    batch: list[NewFace] = []
    for face, last in faces:
        batch.append(face)
        if last:
            found += together.take(batch)
            batch = []
    found += together.take(batch)
    assert together.contents() == alone.contents()
    assert found == expected
