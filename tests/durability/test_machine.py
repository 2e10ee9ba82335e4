"""A gallery against a plain dictionary: whatever is done, in whichever order, both hold and find the same."""

import copy
import hashlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from retrieval.database.records import NewFace, Receipt
from retrieval.embedding.outcome import Status
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.models.bundle import FORGOTTEN
from retrieval.storage.backup_integrity import check_backup
from tests.operations import DIMENSION, PEOPLE, tiny_model, vector_of

# Every example copies a gallery and commits a few dozen times, each with several fsyncs; where there is a
# file system in memory those cost nothing. What survives a crash is for test_crash.py to say.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# Small enough that photos, paths and names collide all the time. Two of the names look the same.
DIGESTS = [hashlib.sha256(f"photo {number}".encode()).hexdigest() for number in range(9)]
PATHS = ["/photos/a.png", "/photos/b.png", "/photos/c.png", "/photos/李 雷.png", "/photos/%s?'\".png"]
NAMES = [*PEOPLE, "Zoë", "Zoe\u0308"]

# Few enough rows that a handful of photos makes several segments.
CEILING = 4


def numbers_of(sha256: str) -> NDArray[np.float32]:
    """A vector of whole numbers, so that distances are exact and many of them are equal."""
    return np.rint(2 * vector_of(sha256))


VECTORS = {sha256: numbers_of(sha256) for sha256 in DIGESTS}

PHOTOS = st.builds(
    NewFace,
    identity=st.none() | st.sampled_from(NAMES),
    path=st.none() | st.sampled_from(PATHS),
    sha256=st.sampled_from(DIGESTS),
)
ANYBODY = st.sampled_from(NAMES)
BACKUPS = st.sampled_from(["daily", "weekly"])


@dataclass
class State:
    """Who is in a gallery: what a backup of it keeps. People are numbers here, which are never used again."""

    ids: dict[str, int] = field(default_factory=dict)  # by SHA-256
    people: dict[str, int | None] = field(default_factory=dict)  # by SHA-256
    photo_of: dict[str, str] = field(default_factory=dict)  # SHA-256 by path
    names: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    part_of: dict[int, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=lambda: list(PEOPLE))

    def person(self, name: str) -> int | None:
        """Who is called so today."""
        return next((person for person, today in self.names.items() if today == name), None)

    def names_of(self, person: int) -> set[str]:
        """What somebody is called, and was."""
        return {self.names[person]} | {name for name, whose in self.aliases.items() if whose == person}

    def merged_into(self, person: int) -> set[int]:
        """Somebody, and whoever became part of them."""
        parts = {person}
        for one in [part for part, whole in self.part_of.items() if whole == person]:
            parts |= self.merged_into(one)
        return parts

    def drop(self, sha256: str) -> None:
        """A face goes, with its paths."""
        del self.ids[sha256], self.people[sha256]
        self.photo_of = {path: photo for path, photo in self.photo_of.items() if photo != sha256}

    def drop_people(self) -> None:
        """Who has no face left goes, with every name."""
        alive = set(self.people.values())
        self.names = {person: name for person, name in self.names.items() if person in alive}
        self.aliases = {name: person for name, person in self.aliases.items() if person in alive}

    def relabel(self, names: set[str], new_name: str) -> None:
        """The classifier's labels go with the names."""
        self.labels = [new_name if label in names else label for label in self.labels]

    def contents(self) -> dict[str, tuple[int, str | None, frozenset[str]]]:
        """By SHA-256: the face's id, who is on it, and its paths."""
        return {
            sha256: (
                number,
                None if self.people[sha256] is None else self.names[self.people[sha256] or 0],
                frozenset(path for path, photo in self.photo_of.items() if photo == sha256),
            )
            for sha256, number in self.ids.items()
        }


@dataclass
class Kept:
    """A backup: a state, and the newest id at that time."""

    state: State
    newest_id: int


class GalleryMachine(RuleBasedStateMachine):
    """Does something to a gallery and to `State`; a second Gallery, never reopened, must see it at once."""

    template: Path

    @initialize()
    def open(self) -> None:
        self.temporary = TemporaryDirectory(dir=IN_MEMORY)
        self.root = Path(self.temporary.name)
        self.folder = self.root / "people.gallery"
        shutil.copytree(self.template, self.folder)
        self.gallery = Gallery.open(self.folder)
        self.watcher = Gallery.open(self.folder, read_only=True)
        self.state = State()
        self.newest_id = self.newest_person = self.steps = 0
        self.erased_ids: set[int] = set()
        self.erased_people: set[int] = set()
        self.receipts: list[Receipt] = []
        self.backups: dict[str, Kept] = {}
        self.dropped: dict[str, int] = {}
        self.contested: set[str] = set()

    def teardown(self) -> None:
        if hasattr(self, "temporary"):
            try:
                self.watcher.close()
                self.gallery.close()
                assert verify(self.folder).findings == ()
            finally:
                self.temporary.cleanup()

    # Enrolling

    @rule(photo=PHOTOS)
    def enroll(self, photo: NewFace) -> None:
        self.enroll_many([photo])

    @rule(photos=st.lists(PHOTOS, min_size=2, max_size=7))
    def enroll_many(self, photos: list[NewFace]) -> None:
        """New bytes, known bytes, other bytes under a known path, names that contradict each other."""
        self.lower_the_ceiling()
        vectors = np.stack([VECTORS[photo.sha256] for photo in photos])
        self.contested.clear()
        outcomes = self.gallery.enroll_vectors(photos, vectors)
        assert [(outcome.path) for outcome in outcomes] == [photo.path for photo in photos]
        for start in range(0, len(photos), CEILING):
            # What a name means is asked once for each transaction, and who has gone is seen at its end.
            today = {name: self.state.names[person] for name, person in self.state.aliases.items()}
            self.dropped.clear()
            for photo, outcome in list(zip(photos, outcomes, strict=True))[start : start + CEILING]:
                name = today.get(photo.identity or "", photo.identity)
                assert outcome.identity == name
                before = self.state.ids.get(self.state.photo_of.get(photo.path or "", ""))
                expected, number = self.take(photo, name, outcome.face_id or 0)
                assert (outcome.status, outcome.face_id) == (expected, number)
                moved = expected is not Status.REJECTED and before != number
                assert outcome.replaced == (before if moved else None)
            self.state.drop_people()

    def take(self, photo: NewFace, name: str | None, given: int) -> tuple[Status, int]:
        """What ought to become of a photo, and the id of its face; `given` is the id that a new one got."""
        state, sha256, path = self.state, photo.sha256, photo.path
        known = sha256 in state.ids
        named = known and state.people[sha256] is not None
        if named and name is not None and state.person(name) != state.people[sha256]:
            self.contested.add(sha256)
            return Status.REJECTED, state.ids[sha256]
        if not known:
            # What a transaction drops and takes up again may stay the face that it was.
            assert given > self.newest_id or given == self.dropped.get(sha256), "an id was used again"
            self.newest_id = max(self.newest_id, given)
            state.ids[sha256] = given
            state.people[sha256] = None
        if name is not None:
            state.people[sha256] = self.somebody(name)
        before = state.photo_of.get(path) if path is not None else None
        if path is not None:
            state.photo_of[path] = sha256
        # Bytes that were offered under another name stay, though no path leads to them.
        lost = before is not None and before not in state.photo_of.values()
        if before is not None and lost and before not in self.contested:
            self.dropped[before] = state.ids[before]
            state.drop(before)
        if not known:
            return Status.ENROLLED, given
        return Status.KNOWN if before == sha256 else Status.DUPLICATE, state.ids[sha256]

    def somebody(self, name: str) -> int:
        person = self.state.person(name)
        if person is None:
            person = self.newest_person = self.newest_person + 1
            self.state.names[person] = name
        return person

    # Who is who

    @rule(name=ANYBODY, new_name=ANYBODY, keep_alias=st.booleans())
    def rename(self, name: str, new_name: str, keep_alias: bool) -> None:
        person, taken = self.state.person(name), self.state.person(new_name)
        if person is None or taken not in (None, person):
            with pytest.raises(InputError):
                self.gallery.rename_identity(name, new_name, keep_alias=keep_alias)
            return
        faces = self.gallery.rename_identity(name, new_name, keep_alias=keep_alias)
        assert faces == list(self.state.people.values()).count(person)
        self.state.relabel(self.state.names_of(person), new_name)
        self.state.names[person] = new_name
        self.state.aliases.pop(new_name, None)
        if keep_alias and name != new_name:
            self.state.aliases[name] = person

    @rule(name=ANYBODY, into=ANYBODY)
    def merge(self, name: str, into: str) -> None:
        person, target = self.state.person(name), self.state.person(into)
        if person is None or target is None or person == target:
            with pytest.raises(InputError):
                self.gallery.merge_identities(name, into)
            return
        faces = self.gallery.merge_identities(name, into)
        state = self.state
        assert faces == list(state.people.values()).count(person)
        state.relabel(state.names_of(person), into)
        state.people = {s: target if p == person else p for s, p in state.people.items()}
        state.aliases = {n: target if p == person else p for n, p in state.aliases.items()}
        state.aliases[name] = target
        state.part_of[person] = target
        del state.names[person]

    @rule(name=ANYBODY, into=ANYBODY)
    def merge_and_undo(self, name: str, into: str) -> None:
        """Everything is as before, except that labels of former names have the current one."""
        person, target = self.state.person(name), self.state.person(into)
        if person is None or target is None or person == target:
            return
        self.gallery.merge_identities(name, into)
        done = self.gallery.undo_merge()
        assert set(done.face_ids) == {
            self.state.ids[photo] for photo, whose in self.state.people.items() if whose == person
        }
        assert (done.elsewhere, done.forgotten, done.lost_names, done.kept_keys) == ((), 0, (), ())
        self.state.relabel(self.state.names_of(person), name)

    # Forgetting

    @rule(name=ANYBODY)
    def forget_somebody(self, name: str) -> None:
        person = self.state.person(name)
        if person is None and name not in self.state.labels:
            with pytest.raises(InputError):
                self.gallery.forget(name)
            return
        receipt = self.gallery.forget(name)
        if person is None:  # known to the classifier alone
            self.state.relabel({name}, FORGOTTEN)
            self.forgotten(receipt, "identity", [])
            return
        self.erased_people |= self.state.merged_into(person)
        photos = [photo for photo, whose in self.state.people.items() if whose == person]
        self.forgotten(receipt, "identity", photos)

    @rule(photo=st.sampled_from(DIGESTS))
    def forget_a_face(self, photo: str) -> None:
        number = self.state.ids.get(photo)
        if number is None:
            with pytest.raises(InputError):
                self.gallery.forget(face_id=self.newest_id + 1)
            return
        self.forgotten(self.gallery.forget(face_id=number), "face", [photo])

    @rule(path=st.sampled_from(PATHS))
    def forget_a_path(self, path: str) -> None:
        if path not in self.state.photo_of:
            with pytest.raises(InputError):
                self.gallery.forget(path=path)
            return
        self.forgotten(self.gallery.forget(path=path), "path", [self.state.photo_of[path]])

    def forgotten(self, receipt: Receipt, what: str, photos: list[str]) -> None:
        ids = {self.state.ids[photo] for photo in photos}
        assert (receipt.what, receipt.faces, set(receipt.face_ids)) == (what, len(photos), ids)
        self.receipts.append(receipt)
        self.erased_ids |= ids
        before = {person: self.state.names_of(person) for person in self.state.names}
        for photo in photos:
            self.state.drop(photo)
        self.state.drop_people()
        # With the last face of somebody every name goes, the classifier's too.
        for person in before.keys() - self.state.names.keys():
            self.state.relabel(before[person], FORGOTTEN)

    # Looking after it

    @rule()
    def compact(self) -> None:
        self.lower_the_ceiling()
        done = self.gallery.compact()
        assert done.segments_after <= done.segments_before
        with self.gallery.vault.store.read() as reader:
            rows = [segment.rows for segment in reader.segments()]
        assert len(rows) == done.segments_after
        assert all(one + other > CEILING for one, other in pairwise(rows))

    @rule()
    def reopen(self) -> None:
        self.gallery.close()
        self.gallery = Gallery.open(self.folder)

    @rule(name=BACKUPS)
    def back_up(self, name: str) -> None:
        done = self.gallery.backup(self.root / name)
        assert done.faces == len(self.state.ids)
        assert check_backup(self.root / name) == []
        self.backups[name] = Kept(copy.deepcopy(self.state), self.newest_id)

    @precondition(lambda self: self.backups)
    @rule(data=st.data())
    def restore_in_place(self, data: st.DataObject) -> None:
        """What was forgotten since, and nothing else, is missing; ids go on from where they were."""
        name = data.draw(st.sampled_from(sorted(self.backups)))
        restored, again = self.remembered(self.backups[name].state)
        for number, label in enumerate(self.state.labels):
            if label == FORGOTTEN:
                restored.labels[number] = FORGOTTEN
        done = Gallery.restore(self.root / name, self.folder)
        assert (done.faces, done.forgotten_again) == (len(restored.ids), again)
        self.state = restored

    @precondition(lambda self: self.backups)
    @rule(data=st.data())
    def restore_after_a_loss(self, data: st.DataObject) -> None:
        """The gallery is lost; a new one is made of a backup and the receipts, and goes on in its place."""
        name = data.draw(st.sampled_from(sorted(self.backups)))
        self.gallery.close()
        self.watcher.close()
        shutil.rmtree(self.folder)
        kept = self.backups[name]
        restored, again = self.remembered(kept.state)
        done = Gallery.restore(self.root / name, self.folder, receipts=self.receipts)
        assert (done.faces, done.forgotten_again) == (len(restored.ids), again)
        self.gallery, self.watcher = Gallery.open(self.folder), Gallery.open(self.folder, read_only=True)
        self.state = restored
        # Faces that no backup had are unknown now, and so are their ids, but for those on a receipt.
        self.newest_id = max({kept.newest_id, *self.erased_ids})
        self.backups = {name: kept}

    def remembered(self, backup: State) -> tuple[State, int]:
        """A backup's state without what was forgotten, before or since; and how many faces that were."""
        state = copy.deepcopy(backup)
        names = {
            name for person in self.erased_people & state.names.keys() for name in state.names_of(person)
        }
        gone = [
            photo
            for photo, number in state.ids.items()
            if number in self.erased_ids or state.people[photo] in self.erased_people
        ]
        for photo in gone:
            state.drop(photo)
        state.drop_people()
        state.labels = [FORGOTTEN if label in names else label for label in state.labels]
        return state, len(gone)

    def lower_the_ceiling(self) -> None:
        """For the model that serves now; a Gallery that was opened anew does not know of it."""
        with self.gallery.vault.store.read() as reader:
            generation = self.gallery.vault.serving(reader)
        self.gallery.vault.vectors(generation).ceiling = CEILING

    # What holds after each step

    @invariant()
    def everybody_sees_the_same(self) -> None:
        if not hasattr(self, "temporary"):
            return
        self.steps += 1
        for gallery in (self.gallery, self.watcher):
            self.check_faces(gallery)
            self.check_searches(gallery)
            self.check_counts(gallery)
            assert list(gallery.bundle.labels) == self.state.labels
        assert len(list((self.folder / "vectors").glob("*.faiss"))) == self.gallery.info().segments
        if self.steps % 4 == 0:
            assert verify(self.folder).findings == ()

    def check_searches(self, gallery: Gallery) -> None:
        rng = np.random.default_rng(self.steps)
        anything = rng.integers(-3, 4, DIMENSION).astype(np.float32)
        for query, k in ((anything, 1), (anything, 99), (VECTORS[DIGESTS[self.steps % len(DIGESTS)]], 3)):
            found = gallery.search_by_vector(query, k)
            assert [(match.face.id, match.distance) for match in found] == self.brute_force(query, k)

    def brute_force(self, query: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
        distances = [
            (float(np.sqrt(((VECTORS[sha256].astype(np.float64) - query) ** 2).sum())), number)
            for sha256, number in self.state.ids.items()
        ]
        return [(number, distance) for distance, number in sorted(distances)[:k]]

    def check_faces(self, gallery: Gallery) -> None:
        expected = self.state.contents()
        with gallery.vault.store.read() as reader:
            faces = [one for part in reader.all_faces() for one in part]
        assert {f.sha256: (f.id, f.identity, frozenset(f.paths)) for f in faces} == expected
        assert len(faces) == len(expected)

    def check_counts(self, gallery: Gallery) -> None:
        info, state = gallery.info(), self.state
        sizes = Counter(state.names[person] for person in state.people.values() if person is not None)
        nameless = list(state.people.values()).count(None)
        assert (info.faces, info.files, info.erasures) == (
            len(state.ids),
            len(state.photo_of),
            len(self.receipts),
        )
        assert (info.identities, info.faces_without_identity) == (len(sizes), nameless)
        assert list(info.largest) == sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))


def test_a_gallery_holds_and_finds_what_a_dictionary_does_after_each_step(tmp_path: Path) -> None:
    """Ids of the living stay, no id comes twice, answers are a brute force's, `verify` finds nothing."""
    Gallery.create(tmp_path / "template", tiny_model(tmp_path / "model")).close()

    class Machine(GalleryMachine):
        template = tmp_path / "template"

    run_state_machine_as_test(
        Machine,
        settings=settings(
            deadline=None,
            max_examples=25,
            stateful_step_count=20,
            # Shrinking takes minutes, and twenty steps can be read as they are.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
