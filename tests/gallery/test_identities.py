"""People: whose faces these are, under which names and paths, and that nothing is left of the forgotten."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sqlalchemy import event

from retrieval.database import page_checksums
from retrieval.database.engines.sqlite_file import SqliteFile
from retrieval.database.records import Face, NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import FaceprintError, GalleryBusy, InputError, Reason, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import FORGOTTEN, ModelBundle
from retrieval.storage.any_vault import who
from tests.disks import on_read_only_media

# A process that has imported everything and started no thread; each child is a fork of it, in milliseconds.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["pytest", "retrieval.gallery.gallery"])

Contents = dict[str, tuple[str | None, tuple[str, ...]]]


HINT = "; if this name is right, `relabel` moves them to it"


def sha256(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vector_of(digest: str) -> NDArray[np.float32]:
    """A vector that a photo with these bytes might have given: the same every time."""
    return np.random.default_rng(int(digest, 16)).standard_normal(2048).astype(np.float32)


def new(identity: str | None, number: int, path: str | None = None) -> NewFace:
    """Photo `number`, of somebody, at /photos/NUMBER.jpg unless another path is given."""
    return NewFace(identity, f"/photos/{number}.jpg" if path is None else path, sha256(number))


def enroll(gallery: Gallery, *faces: NewFace) -> list[Outcome]:
    """In one batch."""
    return gallery.enroll_vectors(faces, np.stack([vector_of(face.sha256) for face in faces]))


def everybody(gallery: Gallery) -> dict[int, Face]:
    with gallery.vault.store.read() as reader:
        return {face.id: face for part in reader.all_faces() for face in part}


def contents(gallery: Gallery) -> Contents:
    """Who is on the photos and where they lie, by SHA-256; every face finds itself, and only faces are."""
    faces = everybody(gallery)
    for face in faces.values():
        found = gallery.search_by_vector(vector_of(face.sha256), len(faces) + 9)
        assert (found[0].face, found[0].distance) == (face, 0.0)
        assert sorted(match.face.id for match in found) == sorted(faces)
    return {face.sha256: (face.identity, face.paths) for face in faces.values()}


def files_with(folder: Path, needle: str | bytes) -> list[str]:
    """The names of a gallery's files that hold some bytes or a text, composed or decomposed."""
    forms = {needle} if isinstance(needle, bytes) else set()
    if isinstance(needle, str):
        forms = {unicodedata.normalize(form, needle).encode() for form in ("NFC", "NFD")}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in files if any(form in path.read_bytes() for form in forms))


def revision(gallery: Gallery) -> int:
    with gallery.vault.store.read() as reader:
        return reader.revision()


@pytest.fixture
def three(gallery: Gallery) -> Gallery:
    """A gallery with three faces of Kim and two of Adi, in two segments."""
    enroll(gallery, new("Kim", 1), new("Kim", 2), new("Adi", 3), new("Kim", 4))
    enroll(gallery, new("Adi", 5))
    return gallery


# Paths


def test_a_face_has_every_path_that_its_bytes_were_enrolled_from(gallery: Gallery) -> None:
    """In the order in which they became known; its first one is `path`."""
    paths = tuple(f"/{name}.jpg" for name in "zay")
    assert enroll(gallery, new("Kim", 1, paths[0]), new(None, 1, paths[1])) == [
        Outcome(paths[0], "Kim", Status.ENROLLED, 1),
        Outcome(paths[1], None, Status.DUPLICATE, 1, detail="the same bytes as /z.jpg"),
    ]
    assert enroll(gallery, new("Kim", 1, paths[2]), new("Kim", 1, paths[1])) == [
        Outcome(paths[2], "Kim", Status.DUPLICATE, 1, detail="the same bytes as /z.jpg"),
        Outcome(paths[1], "Kim", Status.KNOWN, 1),
    ]
    assert contents(gallery) == {sha256(1): ("Kim", paths)}
    assert everybody(gallery)[1].path == "/z.jpg"
    assert (gallery.info().faces, gallery.info().files) == (1, 3)


def test_a_file_that_was_renamed_is_the_same_face(gallery: Gallery, faces: Path, tmp_path: Path) -> None:
    """Its photo is not embedded again."""
    photo = sorted(faces.glob("*/*.jpg"))[0]
    before, after = tmp_path / "before.jpg", tmp_path / "after.jpg"
    shutil.copy(photo, before)
    gallery.enroll([(before, "Kim")])
    files = sorted((gallery.folder / "vectors").iterdir())
    before.rename(after)
    detail = f"the same bytes as {before}"
    assert gallery.enroll([(after, "Kim")]) == [
        Outcome(str(after), "Kim", Status.DUPLICATE, 1, detail=detail)
    ]
    assert everybody(gallery)[1].paths == (str(before), str(after))
    assert sorted((gallery.folder / "vectors").iterdir()) == files
    assert gallery.enroll([(after, "Kim")]) == [Outcome(str(after), "Kim", Status.KNOWN, 1)]


def test_a_file_with_other_bytes_replaces_its_face_in_one_transaction(three: Gallery) -> None:
    """The old vector is in no segment afterwards, whichever it was in."""
    old = vector_of(sha256(2))[:8].tobytes()
    assert len(files_with(three.folder / "vectors", old)) == 1
    before, changed = revision(three), everybody(three)
    assert enroll(three, new("Kim", 9, "/photos/2.jpg")) == [
        Outcome("/photos/2.jpg", "Kim", Status.ENROLLED, 6, replaced=2)
    ]
    assert revision(three) == before + 1
    del changed[2]
    found = everybody(three)
    assert found.pop(6).paths == ("/photos/2.jpg",)
    assert found == changed
    assert files_with(three.folder / "vectors", old) == []
    assert sha256(2) not in contents(three)


def test_photos_that_change_are_embedded_anew(gallery: Gallery, faces: Path, tmp_path: Path) -> None:
    first, second = sorted(faces.glob("*/*.jpg"))[:2]
    path = tmp_path / "photo.jpg"
    shutil.copy(first, path)
    gallery.enroll([(path, "Kim")])
    shutil.copy(second, path)
    assert gallery.enroll([(path, "Kim")]) == [Outcome(str(path), "Kim", Status.ENROLLED, 2, replaced=1)]
    (match,) = gallery.search(second, 9).matches
    assert (match.face.id, match.face.sha256) == (2, sha256_of(path))
    assert match.distance < 1e-4
    with pytest.raises(InputError, match="There is no face 1 in "):
        gallery.search_by_face(1)


def test_a_replaced_face_stays_when_it_has_another_path(three: Gallery) -> None:
    enroll(three, new("Kim", 2, "/copy.jpg"))
    assert enroll(three, new("Kim", 9, "/photos/2.jpg"))[0].replaced == 2
    found = contents(three)
    assert found[sha256(2)] == ("Kim", ("/copy.jpg",))
    assert found[sha256(9)] == ("Kim", ("/photos/2.jpg",))
    assert len(found) == 6


def test_a_path_may_go_to_a_face_that_is_stored_already(three: Gallery) -> None:
    """Photo 1 was copied over photo 2: one face is left, with both paths."""
    (outcome,) = enroll(three, new("Kim", 1, "/photos/2.jpg"))
    detail = "the same bytes as /photos/1.jpg"
    assert outcome == Outcome("/photos/2.jpg", "Kim", Status.DUPLICATE, 1, detail=detail, replaced=2)
    found = contents(three)
    assert found[sha256(1)] == ("Kim", ("/photos/1.jpg", "/photos/2.jpg"))
    assert sha256(2) not in found


def test_a_person_whose_only_photo_was_replaced_by_somebody_elses_is_gone(gallery: Gallery) -> None:
    enroll(gallery, new("Kim", 1))
    enroll(gallery, new("Adi", 2, "/photos/1.jpg"))
    assert contents(gallery) == {sha256(2): ("Adi", ("/photos/1.jpg",))}
    assert gallery.info().largest == (("Adi", 1),)
    with pytest.raises(InputError, match="There is no identity Kim in "):
        gallery.forget("Kim")


@pytest.mark.parametrize("together", [False, True])
def test_files_that_changed_places_keep_their_people(
    together: bool, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    """Whether they are enrolled in one batch or one after the other."""
    photos = sorted(faces.glob("*/*.jpg"))[:2]
    paths = [tmp_path / "0.jpg", tmp_path / "1.jpg"]
    for photo, path in zip(photos, paths, strict=True):
        shutil.copy(photo, path)
    gallery.enroll([(path, "Kim") for path in paths])
    for photo, path in zip(photos, reversed(paths), strict=True):
        shutil.copy(photo, path)
    for batch in [paths] if together else [paths[:1], paths[1:]]:
        outcomes = gallery.enroll([(path, "Kim") for path in batch])
        assert Status.REJECTED not in {outcome.status for outcome in outcomes}
    found = {face.sha256: face.paths for face in everybody(gallery).values()}
    assert found == {sha256_of(path): (str(path),) for path in paths}
    for path in paths:
        (match,) = gallery.search(path, 1).matches
        assert (match.face.path, match.distance < 1e-4) == (str(path), True)


@pytest.mark.parametrize("together", [False, True])
def test_a_photo_that_moved_to_another_person_is_that_persons(
    together: bool, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    """Kim's file has other bytes now, and its old bytes lie in Adi's folder: in one batch as in two."""
    first, second = sorted(faces.glob("*/*.jpg"))[:2]
    kim, adi = tmp_path / "kim.jpg", tmp_path / "adi.jpg"
    shutil.copy(first, kim)
    gallery.enroll([(kim, "Kim")])
    kim.rename(adi)
    shutil.copy(second, kim)
    batch = [(kim, "Kim"), (adi, "Adi")]
    outcomes = gallery.enroll(batch) if together else gallery.enroll(batch[:1]) + gallery.enroll(batch[1:])
    assert [outcome.status for outcome in outcomes] == [Status.ENROLLED, Status.ENROLLED]
    found = {face.sha256: (face.identity, face.paths) for face in everybody(gallery).values()}
    assert found == {sha256_of(kim): ("Kim", (str(kim),)), sha256_of(adi): ("Adi", (str(adi),))}


def test_of_one_path_with_different_bytes_in_a_batch_the_last_is_stored(gallery: Gallery) -> None:
    outcomes = enroll(gallery, *(new("Kim", number, "/one.jpg") for number in (1, 2, 3)), new("Kim", 4))
    assert [(outcome.face_id, outcome.replaced) for outcome in outcomes] == [
        (1, None),
        (2, 1),
        (3, 2),
        (4, None),
    ]
    assert contents(gallery) == {
        sha256(3): ("Kim", ("/one.jpg",)),
        sha256(4): ("Kim", ("/photos/4.jpg",)),
    }


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_a_photo_that_was_forgotten_between_reading_and_adding_is_enrolled(
    kind: str, gallery: Gallery, faces: Path
) -> None:
    """It was stored when it was read, so its picture was not kept; then somebody else forgot it."""
    path = sorted(faces.glob("*/*.jpg"))[0]
    gallery.enroll([(path.read_bytes(), None)])
    prepared = gallery.prepare(path if kind == "path" else path.read_bytes(), "Kim")
    gallery.forget(face_id=1)
    (outcome,) = gallery.enroll_prepared([prepared])
    assert outcome == Outcome(str(path) if kind == "path" else None, "Kim", Status.ENROLLED, 2)
    assert gallery.search(path, 1).matches[0].face.id == 2


# Names


def test_a_name_for_a_photo_without_one_is_found_by_the_next_search(gallery: Gallery) -> None:
    """Also by a gallery that was open before."""
    enroll(gallery, new(None, 1), new("Adi", 2))
    with Gallery.open(gallery.folder) as other:
        assert other.search_by_vector(vector_of(sha256(1)), 1)[0].face.identity is None
        named = "had no identity until now; it is Kim's"
        assert enroll(gallery, new("Kim", 1)) == [
            Outcome("/photos/1.jpg", "Kim", Status.KNOWN, 1, detail=named)
        ]
        assert other.search_by_vector(vector_of(sha256(1)), 1)[0].face.identity == "Kim"
    assert contents(gallery)[sha256(1)] == ("Kim", ("/photos/1.jpg",))
    assert gallery.info().faces_without_identity == 0


def test_a_renamed_person_keeps_every_face(three: Gallery) -> None:
    before = contents(three)
    assert three.rename_identity("Kim", "Kimberly") == 3
    assert contents(three) == {
        digest: ("Kimberly" if name == "Kim" else name, paths) for digest, (name, paths) in before.items()
    }
    assert three.info().largest == (("Kimberly", 3), ("Adi", 2))


def test_a_folder_of_the_old_name_goes_on_to_mean_the_person(three: Gallery) -> None:
    """Its photos are known, and new ones of it are the person's under today's name."""
    three.rename_identity("Kim", "Kimberly")
    known, added = enroll(three, new("Kim", 1), new("Kim", 9))
    assert known == Outcome("/photos/1.jpg", "Kimberly", Status.KNOWN, 1)
    assert added == Outcome("/photos/9.jpg", "Kimberly", Status.ENROLLED, 6)
    assert three.info().largest == (("Kimberly", 4), ("Adi", 2))


def test_without_an_alias_the_old_name_is_somebody_else(three: Gallery) -> None:
    three.rename_identity("Kim", "Kimberly", keep_alias=False)
    conflict, added = enroll(three, new("Kim", 1), new("Kim", 9))
    assert (conflict.status, conflict.reason) == (Status.REJECTED, Reason.IDENTITY_CONFLICT)
    assert conflict.detail == f"the same bytes are enrolled as Kimberly from /photos/1.jpg{HINT}"
    assert (added.status, added.identity) == (Status.ENROLLED, "Kim")
    assert three.info().largest == (("Kimberly", 3), ("Adi", 2), ("Kim", 1))


def test_without_an_alias_no_byte_of_the_old_name_remains(gallery: Gallery) -> None:
    enroll(gallery, NewFace("Zephyr Kant", None, sha256(1)))
    gallery.rename_identity("Zephyr Kant", "Kimberly", keep_alias=False)
    gallery.close()
    assert files_with(gallery.folder, "Zephyr") == []
    assert files_with(gallery.folder, "Kimberly") == ["gallery.db"]


def test_a_name_that_somebody_has_is_refused_and_nothing_changes(three: Gallery) -> None:
    before = revision(three)
    with pytest.raises(InputError) as caught:
        three.rename_identity("Kim", "Adi")
    assert str(caught.value) == (
        f"{three.folder} already has an identity Adi; if they are the same person, merge the two "
        "with `faceprint merge-identities`."
    )
    assert revision(three) == before


@pytest.mark.parametrize("name", ["", "kim", "Kim ", "Nobody"])
def test_nobody_is_renamed_or_merged_under_a_name_that_does_not_exist(name: str, three: Gallery) -> None:
    before = revision(three)
    nearest = "; the nearest name is Kim" if name in ("kim", "Kim ") else ""
    calls: list[Callable[[], object]] = [
        lambda: three.rename_identity(name, "Ida"),
        lambda: three.merge_identities(name, "Kim"),
        lambda: three.merge_identities("Kim", name),
    ]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == f"There is no identity {name} in {three.folder}{nearest}."
    assert revision(three) == before


def test_a_name_of_before_is_told_by_todays(three: Gallery) -> None:
    three.rename_identity("Kim", "Kimberly")
    for call in (lambda: three.rename_identity("Kim", "Ida"), lambda: three.forget("Kim")):
        with pytest.raises(InputError) as caught:
            call()
        sentence = f"There is no identity Kim in {three.folder}; Kim is called Kimberly now."
        assert str(caught.value) == sentence


def test_a_new_name_that_is_no_text_is_refused(three: Gallery) -> None:
    with pytest.raises(InputError, match=r"^The identity 'Kim\\udcff' cannot be stored"):
        three.rename_identity("Kim", "Kim\udcff")


def test_a_person_may_get_the_old_name_back(three: Gallery) -> None:
    """Both names mean the person all the while."""
    before = contents(three)
    three.rename_identity("Kim", "Kimberly")
    assert three.rename_identity("Kimberly", "Kim") == 3
    assert contents(three) == before
    names = [outcome.identity for outcome in enroll(three, new("Kimberly", 1), new("Kim", 2))]
    assert names == ["Kim", "Kim"]
    assert three.rename_identity("Kim", "Kim") == 3
    assert contents(three) == before


def test_a_new_person_may_take_an_old_name(three: Gallery) -> None:
    """From then on it means the new one."""
    three.rename_identity("Kim", "Kimberly")
    three.rename_identity("Adi", "Kim")
    assert [outcome.identity for outcome in enroll(three, new("Kim", 3), new("Kimberly", 1))] == [
        "Kim",
        "Kimberly",
    ]
    assert three.info().largest == (("Kimberly", 3), ("Kim", 2))


def test_merged_people_are_one_under_both_names(three: Gallery) -> None:
    assert three.merge_identities("Adi", "Kim") == 2
    assert three.info().largest == (("Kim", 5),)
    assert {name for name, _ in contents(three).values()} == {"Kim"}
    known, again, added = enroll(three, new("Adi", 3), new("Adi", 1), new("Adi", 9))
    assert [outcome.status for outcome in (known, again, added)] == [
        Status.KNOWN,
        Status.KNOWN,
        Status.ENROLLED,
    ]
    assert {outcome.identity for outcome in (known, again, added)} == {"Kim"}


def test_names_of_before_go_along_when_people_are_merged(three: Gallery) -> None:
    three.rename_identity("Adi", "Adriana")
    three.merge_identities("Adriana", "Kim")
    three.rename_identity("Kim", "Kimberly")
    outcomes = enroll(three, *(new(name, 3) for name in ("Adi", "Adriana", "Kim", "Kimberly")))
    assert [(outcome.identity, outcome.status) for outcome in outcomes] == [("Kimberly", Status.KNOWN)] * 4


def test_nobody_is_merged_with_oneself(three: Gallery) -> None:
    with pytest.raises(InputError, match=r"^Kim and Kim are one identity already\."):
        three.merge_identities("Kim", "Kim")


# The model's labels


@pytest.fixture
def labelled(bundle: ModelBundle, tmp_path: Path) -> ModelBundle:
    """The tests' model as if it had been trained on Zephyr Känt and others, on files of macOS too."""
    copied = bundle.save(tmp_path / "labelled")
    split = [f"Zephyr Känt/{number}.jpg" for number in range(3)]
    split.append(unicodedata.normalize("NFD", "Zephyr Känt/4.jpg"))
    made = dataclasses.replace(
        copied,
        labels=("Zephyr Känt", *bundle.labels[1:]),
        split={"train": [*split, "Kim/1.jpg", "Zephyr Käntner/1.jpg"], "validation": ["Zephyr Känt/9.jpg"]},
    )
    made.rewrite_card()
    return made


@pytest.fixture
def zephyr(labelled: ModelBundle, tmp_path: Path) -> Iterator[Gallery]:
    """A gallery with two photos of Zephyr Känt, whom its model knows, and one of Kim."""
    with Gallery.create(tmp_path / "zephyr.gallery", labelled) as gallery:
        photos = [new("Zephyr Känt", 1, "/private/1.jpg"), new("Kim", 2), new("Zephyr Känt", 3, "/private/3")]
        enroll(gallery, *photos)
        yield gallery


@pytest.fixture
def picture(zephyr: Gallery) -> NDArray[np.uint8]:
    """A picture that the model takes for Zephyr Känt."""
    for seed in range(200):
        drawn = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        colour = np.uint8(np.random.default_rng(seed).integers(0, 256, 3))
        for candidate in (drawn, np.full((32, 32, 3), colour)):
            if zephyr.search(candidate).prediction.identity == "Zephyr Känt":
                return candidate
    raise AssertionError("The model takes nothing for Zephyr Känt.")


def labels_on_disk(gallery: Gallery) -> list[str]:
    return json.loads((gallery.folder / "model" / "bundle.json").read_text("utf-8"))["labels"]


@pytest.mark.parametrize("keep_alias", [False, True])
def test_a_label_goes_with_the_name(keep_alias: bool, zephyr: Gallery, picture: NDArray[np.uint8]) -> None:
    """On disk, in this gallery, and in one that was open all the while; the model stays the same."""
    with Gallery.open(zephyr.folder) as other:
        expected = [dataclasses.replace(zephyr.search(picture).prediction, identity="Zoë")] * 2
        zephyr.rename_identity("Zephyr Känt", "Zoë", keep_alias=keep_alias)
        assert [one.search(picture).prediction for one in (zephyr, other)] == expected
        labels = ("Zoë", *zephyr.bundle.labels[1:])
        assert zephyr.bundle.labels == other.bundle.labels == tuple(labels_on_disk(zephyr)) == labels
        assert zephyr.bundle.fingerprint == other.bundle.fingerprint
        other.require(zephyr.bundle)
        zephyr.rename_identity("Zoë", "Zephyr Känt")
        assert [one.search(picture).prediction.identity for one in (zephyr, other)] == ["Zephyr Känt"] * 2


def test_a_label_goes_with_a_merger(zephyr: Gallery, picture: NDArray[np.uint8]) -> None:
    with Gallery.open(zephyr.folder) as other:
        zephyr.merge_identities("Zephyr Känt", "Kim")
        assert [one.search(picture).prediction.identity for one in (zephyr, other)] == ["Kim"] * 2


def test_a_forgotten_label_is_never_predicted(zephyr: Gallery, picture: NDArray[np.uint8]) -> None:
    """Not in this gallery, not in one that was open all the while, and not in one that is opened later."""
    with Gallery.open(zephyr.folder) as other:
        assert other.search(picture).prediction.identity == "Zephyr Känt"
        assert zephyr.forget("Zephyr Känt").faces == 2
        with Gallery.open(zephyr.folder) as later:
            for gallery in (zephyr, other, later):
                prediction = gallery.search(picture).prediction
                assert prediction.identity in gallery.bundle.labels[1:]
                assert prediction.identity != FORGOTTEN
                assert 0 < prediction.probability < 0.5
                assert gallery.bundle.labels[0] == labels_on_disk(zephyr)[0] == FORGOTTEN


@pytest.mark.parametrize("change", ["forget", "rename"])
def test_a_search_between_the_commit_and_the_new_card_does_not_keep_the_old_label(
    change: str, zephyr: Gallery, picture: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second gallery looks at the very moment when the rows are new and the model's card is still old."""
    rewrite_card, looked = ModelBundle.rewrite_card, []

    with Gallery.open(zephyr.folder) as other:

        def look_and_rewrite(bundle: ModelBundle) -> None:
            looked.append(other.search(picture).prediction.identity)
            rewrite_card(bundle)

        monkeypatch.setattr(ModelBundle, "rewrite_card", look_and_rewrite)
        if change == "forget":
            zephyr.forget("Zephyr Känt")
        else:
            zephyr.rename_identity("Zephyr Känt", "Zoë")
        assert len(looked) == 1
        assert other.search(picture).prediction.identity != "Zephyr Känt"
        assert "Zephyr Känt" not in other.bundle.labels
        assert other.search(picture).prediction == zephyr.search(picture).prediction


def test_somebody_who_is_only_a_label_is_forgotten(zephyr: Gallery, picture: NDArray[np.uint8]) -> None:
    """Nobody enrolled them, but the model was trained on them."""
    name = zephyr.bundle.labels[1]
    before = contents(zephyr)
    receipt = zephyr.forget(name)
    assert (receipt.what, receipt.faces, receipt.face_ids, receipt.identity_ids) == ("identity", 0, (), ())
    assert name not in zephyr.bundle.labels
    assert files_with(zephyr.folder, name) == []
    assert contents(zephyr) == before
    with pytest.raises(InputError, match=f"^There is no identity {name} in "):
        zephyr.forget(name)


def test_a_gallery_whose_label_was_forgotten_is_whole(zephyr: Gallery) -> None:
    """The model's card is the one that the database names, and its files are what the card names."""
    zephyr.forget("Zephyr Känt")
    zephyr.bundle.verify()
    with zephyr.vault.store.read() as reader:
        (generation,) = reader.generations().values()
    assert generation.card_sha256 == zephyr.bundle.card_sha256()


# Forgetting


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"identity": "Kim", "face_id": 1},
        {"identity": "Kim", "path": "/photos/1.jpg"},
        {"face_id": 1, "path": "/photos/1.jpg"},
        {"identity": "Kim", "face_id": 1, "path": "/photos/1.jpg"},
    ],
)
def test_exactly_one_thing_is_forgotten_at_a_time(asked: dict[str, Any], three: Gallery) -> None:
    before = revision(three)
    with pytest.raises(InputError) as caught:
        three.forget(**asked)
    assert str(caught.value) == ("Say what to forget: an identity, or a face, or a path; one of the three.")
    assert revision(three) == before


def test_one_face_is_forgotten_by_its_number(three: Gallery) -> None:
    before = contents(three)
    receipt = three.forget(face_id=2)
    assert (receipt.what, receipt.faces, receipt.face_ids, receipt.identity_ids) == ("face", 1, (2,), ())
    del before[sha256(2)]
    assert contents(three) == before
    for needle in ("/photos/2.jpg", sha256(2), vector_of(sha256(2))[:8].tobytes()):
        assert files_with(three.folder, needle) == []


@pytest.mark.parametrize("path", ["/photos/2.jpg", Path("/photos/2.jpg"), "../photos/2.jpg", "/copy.jpg"])
def test_one_face_is_forgotten_by_any_of_its_paths(
    path: str | Path, three: Gallery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With all of them."""
    monkeypatch.chdir("/usr")
    enroll(three, new("Kim", 2, "/copy.jpg"))
    before = contents(three)
    receipt = three.forget(path=path)
    assert (receipt.what, receipt.faces, receipt.face_ids) == ("path", 1, (2,))
    del before[sha256(2)]
    assert contents(three) == before
    for needle in ("/photos/2.jpg", "/copy.jpg", sha256(2), vector_of(sha256(2))[:8].tobytes()):
        assert files_with(three.folder, needle) == []


@pytest.mark.parametrize("number", [0, 6, -1, 2**63, 2**70])
def test_a_face_that_does_not_exist_is_not_forgotten(number: int, three: Gallery) -> None:
    with pytest.raises(InputError) as caught:
        three.forget(face_id=number)
    assert str(caught.value) == f"There is no face {number} in {three.folder}."


def test_a_path_that_nobody_knows_is_not_forgotten(three: Gallery) -> None:
    for path, shown in (("/photos", "/photos"), ("/\udcff.jpg", "/\\xff.jpg")):
        with pytest.raises(InputError) as caught:
            three.forget(path=path)
        assert str(caught.value) == f"There is no face of {shown} in {three.folder}."


def test_a_person_leaves_with_the_last_face(gallery: Gallery) -> None:
    """With every name of before, though only a face was asked to be forgotten."""
    enroll(gallery, new("Zephyr Kant", 1), new("Kim", 2), new("Zephyr Kant", 3))
    gallery.rename_identity("Zephyr Kant", "Zoë Kant")
    gallery.forget(face_id=1)
    assert gallery.info().largest == (("Kim", 1), ("Zoë Kant", 1))
    gallery.forget(face_id=3)
    assert gallery.info().largest == (("Kim", 1),)
    assert files_with(gallery.folder, "Kant") == []


def test_receipts_say_what_when_and_how_many_and_nothing_of_the_person(zephyr: Gallery) -> None:
    """They are returned and stored, and are there when the gallery is opened again."""
    zephyr.merge_identities("Kim", "Zephyr Känt")
    first = zephyr.forget("Zephyr Känt")
    enroll(zephyr, new("Zephyr Känt", 9, "/private/9.jpg"))
    second = zephyr.forget(path="/private/9.jpg")
    assert (first.what, first.faces, set(first.face_ids), first.identity_ids) == (
        "identity",
        3,
        {1, 2, 3},
        (2, 1),
    )
    assert (second.what, second.faces, second.face_ids, second.identity_ids) == ("path", 1, (4,), ())
    for receipt in (first, second):
        assert (len(receipt.id), receipt.gallery, receipt.who) == (36, zephyr.info().uuid, who())
        assert receipt.at[:2] == "20"
        for secret in ("Zephyr", "private", "Kim", sha256(9)):
            assert secret not in repr(receipt)
    assert first.id != second.id
    assert {receipt.id: receipt for receipt in zephyr.receipts()} == {first.id: first, second.id: second}
    assert zephyr.info().erasures == 2
    zephyr.close()
    with Gallery.open(zephyr.folder, read_only=True) as reopened:
        assert {receipt.id: receipt for receipt in reopened.receipts()} == {
            first.id: first,
            second.id: second,
        }


SECRETS = ["Zephyr Känt", "/private/1.jpg", "/private/3", sha256(1), sha256(3)]


def a_copy_of_an_upgrade(gallery: Gallery) -> None:
    """As if an older version had made the gallery: a copy of its database, with the names in it."""
    gallery.vault.store.file.copy(gallery.folder / "gallery-0001.db")


def test_no_byte_of_the_forgotten_remains_in_any_file_of_the_gallery(zephyr: Gallery) -> None:
    """Rows, vectors, log, free pages, the model's label and its list of photos, the copy of an upgrade."""
    whole = [vector_of(sha256(number)) for number in (1, 3)]
    vectors = [part.tobytes() for vector in whole for part in (vector[:2], vector[-2:])]
    a_copy_of_an_upgrade(zephyr)
    found = {name for secret in SECRETS for name in files_with(zephyr.folder, secret)}
    assert found >= {"gallery-0001.db", "gallery.db-wal", "bundle.json"}
    assert [len(files_with(zephyr.folder, vector)) for vector in vectors] == [1] * 4
    zephyr.forget("Zephyr Känt")
    names = {path.name for path in zephyr.folder.rglob("*")}
    assert names >= {"gallery.db", "gallery.sums", "writer.lock", "bundle.json"}
    assert "gallery-0001.db" not in names
    # Somebody of a longer name is not the one who was forgotten.
    assert files_with(zephyr.folder, "Zephyr Käntner/1.jpg") == ["bundle.json"]
    card = (zephyr.folder / "model" / "bundle.json").read_text("utf-8")
    assert json.loads(card)["split"] == {"train": ["Kim/1.jpg", "Zephyr Käntner/1.jpg"], "validation": []}
    for secret in [*SECRETS[1:], "Zephyr Känt/", '"Zephyr Känt"', *vectors]:
        assert files_with(zephyr.folder, secret) == []
    for path in zephyr.folder.iterdir():
        if path.is_file():
            assert b"Zephyr" not in path.read_bytes(), path
    zephyr.close()
    assert [name for name in SECRETS[1:] if files_with(zephyr.folder, name)] == []


@pytest.mark.parametrize("change", ["rename", "merge"])
def test_no_byte_of_a_name_of_before_remains_when_somebody_is_forgotten(change: str, zephyr: Gallery) -> None:
    """Neither the alias nor, on the model's card, the photos of that folder."""
    if change == "rename":
        zephyr.rename_identity("Zephyr Känt", "Zoë Bellweather")
    else:
        zephyr.rename_identity("Kim", "Zoë Bellweather")
        zephyr.merge_identities("Zephyr Känt", "Zoë Bellweather")
    assert "gallery.db-wal" in files_with(zephyr.folder, "Zephyr Känt")
    zephyr.forget("Zoë Bellweather")
    for name in ("Zoë Bellweather", '"Zephyr Känt"', "Zephyr Känt/", "/private/"):
        assert files_with(zephyr.folder, name) == []
    for path in zephyr.folder.iterdir():
        if path.is_file():
            assert b"Zephyr" not in path.read_bytes(), path


def test_a_label_that_is_a_name_of_before_is_forgotten_too(
    gallery: Gallery, labelled: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """A model that came later was trained on a folder of the old name."""
    gallery.enroll([(path, "Zephyr Känt") for path in sorted(faces.glob("*/*_0001.jpg"))[:2]])
    gallery.rename_identity("Zephyr Känt", "Zoë")
    fields = {field.name: getattr(labelled, field.name) for field in dataclasses.fields(labelled)}
    for name in ("folder", "fingerprint", "files"):
        del fields[name]
    fields["preprocessing"] = Preprocessing(size=32, crop=0.5)
    tensors = load_file(labelled.weights_path)
    graph = labelled.graph_path.read_bytes()
    later = ModelBundle.create(tmp_path / "later", tensors=tensors, graph=graph, **fields)
    gallery.reembed(later)
    assert gallery.info().fingerprint == later.fingerprint
    gallery.forget("Zoë")
    assert files_with(gallery.folder, '"Zephyr Känt"') == files_with(gallery.folder, "Zephyr Känt/") == []
    assert gallery.bundle.labels[0] == FORGOTTEN


def an_erasure_that_dies(folder: Path) -> None:
    """Forgets, and is killed when only the traces are left to be erased. Runs in a child."""

    def die(self: SqliteFile, *, timeout: float) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return False

    SqliteFile.checkpoint = die  # type: ignore[method-assign]
    with Gallery.open(folder) as gallery:
        gallery.forget("Zephyr Känt")


def an_erasure_that_dies_before_the_card(folder: Path) -> None:
    """Forgets, and is killed right after the commit. Runs in a child."""
    ModelBundle.rewrite_card = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with Gallery.open(folder) as gallery:
        gallery.forget("Zephyr Känt")


def add_one(gallery: Gallery) -> object:
    return enroll(gallery, new("Ida", 50))


def add_a_known_one(gallery: Gallery) -> object:
    return enroll(gallery, new("Kim", 2))


def compact(gallery: Gallery) -> object:
    return gallery.compact()


def forget_another(gallery: Gallery) -> object:
    return gallery.forget("Kim")


def assert_no_trace(folder: Path) -> None:
    vectors = [vector_of(sha256(number))[:2].tobytes() for number in (1, 3)]
    for secret in [*SECRETS[1:], "Zephyr Känt/", '"Zephyr Känt"', *vectors]:
        assert files_with(folder, secret) == []
    for path in folder.iterdir():
        if path.is_file():
            assert b"Zephyr" not in path.read_bytes(), path


@pytest.mark.parametrize("killed", [an_erasure_that_dies, an_erasure_that_dies_before_the_card])
@pytest.mark.parametrize("write", [add_one, add_a_known_one, compact, forget_another])
def test_a_forget_killed_after_its_commit_is_finished_by_the_next_write(
    write: Callable[[Gallery], object], killed: Callable[[Path], None], zephyr: Gallery
) -> None:
    """Whatever that is; until then the faces are in no answer, though their bytes are still there."""
    a_copy_of_an_upgrade(zephyr)
    zephyr.close()
    child = CHILDREN.Process(target=killed, args=(zephyr.folder,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert files_with(zephyr.folder, SECRETS[1]) != []
    with Gallery.open(zephyr.folder) as gallery:
        assert set(contents(gallery)) == {sha256(2)}
        assert [receipt.faces for receipt in gallery.receipts()] == [2]
        write(gallery)
        assert_no_trace(zephyr.folder)
        gallery.info()
        assert gallery.bundle.labels[0] == FORGOTTEN
    assert_no_trace(zephyr.folder)


def test_a_forgotten_label_is_not_predicted_after_a_forget_that_was_killed(
    zephyr: Gallery, picture: NDArray[np.uint8]
) -> None:
    """Even before the next write, and by a gallery that cannot write."""
    zephyr.close()
    child = CHILDREN.Process(target=an_erasure_that_dies_before_the_card, args=(zephyr.folder,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with Gallery.open(zephyr.folder, read_only=True) as reader:
        assert reader.search(picture).prediction.identity != "Zephyr Känt"


def test_where_bytes_cannot_be_zeroed_in_place_a_forget_writes_the_database_anew(zephyr: Gallery) -> None:
    """As in a file whose pages are of kinds that faceprint never makes."""
    zephyr.close()
    with closing(sqlite3.connect(zephyr.folder / "gallery.db")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # in WAL mode auto_vacuum cannot be switched on
        connection.execute("PRAGMA auto_vacuum = FULL")
        connection.execute("VACUUM")
        assert connection.execute("PRAGMA auto_vacuum").fetchall() == [(1,)]
    page_checksums.discard(zephyr.folder / "gallery.db")
    with Gallery.open(zephyr.folder) as gallery:
        gallery.forget("Zephyr Känt")
        assert_no_trace(gallery.folder)
        assert set(contents(gallery)) == {sha256(2)}


def test_an_erasure_that_the_disk_refuses_says_so_and_is_finished_by_the_next_write(
    zephyr: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SqliteFile, **__: float) -> bool:
        raise StorageError("The database cannot be used: disk full.")

    with monkeypatch.context() as patched:
        patched.setattr(SqliteFile, "checkpoint", refuse)
        with pytest.raises(StorageError) as caught:
            zephyr.forget("Zephyr Känt")
    assert str(caught.value) == (
        "What was deleted is gone from every answer, but its traces cannot be erased from "
        f"{zephyr.folder / 'gallery.db'} (The database cannot be used: disk full); "
        f"run `faceprint compact {zephyr.folder}` when that is mended."
    )
    assert set(contents(zephyr)) == {sha256(2)}
    assert files_with(zephyr.folder, SECRETS[1]) != []
    zephyr.compact()
    assert_no_trace(zephyr.folder)
    assert [receipt.faces for receipt in zephyr.receipts()] == [2]


def test_an_erasure_waits_for_one_who_reads_an_older_state_and_says_so(
    zephyr: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.storage.deferred.ERASE_TIMEOUT", 0.1)
    with Gallery.open(zephyr.folder) as other:
        with other.vault.store.read() as reader:
            assert reader.count() == 3
            with pytest.raises(StorageError) as caught:
                zephyr.forget("Zephyr Känt")
            assert reader.count() == 3
        assert str(caught.value) == (
            "What was deleted is gone from every answer, but another process still reads an older state of "
            f"{zephyr.folder}; run `faceprint compact {zephyr.folder}` when it has finished."
        )
        assert set(contents(other)) == {sha256(2)}
        zephyr.compact()
        assert_no_trace(zephyr.folder)


# The audit log


def test_the_audit_log_says_who_did_what_how_and_to_how_many(three: Gallery) -> None:
    three.close()
    with Gallery.open(three.folder, via="faceprint ingest") as gallery:
        enroll(gallery, new("Kim", 6), new("Kim", 7))
        gallery.rename_identity("Kim", "Kimberly")
        gallery.merge_identities("Adi", "Kimberly")
        receipt = gallery.forget(face_id=1)
        gallery.compact()
    with Gallery.open(three.folder, read_only=True) as gallery:
        log = gallery.audit_log()
    assert {entry.who for entry in log} == {who()}
    assert [(entry.via, entry.action, entry.faces) for entry in log] == [
        ("library", "enroll", 5),
        ("faceprint ingest", "enroll", 2),
        ("faceprint ingest", "rename-identity", 5),
        ("faceprint ingest", "merge-identities", 2),
        ("faceprint ingest", "forget", 1),
        ("faceprint ingest", "compact", 0),
    ]
    assert log[4].detail == {"receipt": receipt.id}
    assert all(entry.began_at <= entry.ended_at for entry in log)


def test_the_audit_log_has_no_name_no_path_and_no_embedding_in_it(three: Gallery) -> None:
    three.rename_identity("Kim", "Kimberly")
    three.merge_identities("Adi", "Kimberly")
    three.forget(path="/photos/1.jpg")
    three.forget("Kimberly")
    text = repr(three.audit_log())
    for secret in ("Kim", "Adi", "photos", *(sha256(number) for number in range(1, 6))):
        assert secret not in text
    for entry in three.audit_log():
        for value in entry.detail.values():
            assert isinstance(value, int) or value in {receipt.id for receipt in three.receipts()}


def test_many_single_enrollments_of_one_gallery_are_one_entry(gallery: Gallery) -> None:
    """Until somebody does something else; those of another gallery object are another entry."""
    for number in range(10):
        enroll(gallery, new("Kim", number))
    enroll(gallery, new("Kim", 0))  # changes nothing
    assert [(entry.action, entry.faces) for entry in gallery.audit_log()] == [("enroll", 10)]
    with Gallery.open(gallery.folder) as other:
        enroll(other, new("Adi", 10))
        enroll(gallery, new("Kim", 11))
        enroll(gallery, new("Kim", 12))
    gallery.forget("Adi")
    enroll(gallery, new("Kim", 13))
    assert [(entry.action, entry.faces) for entry in gallery.audit_log()] == [
        ("enroll", 10),
        ("enroll", 1),
        ("enroll", 2),
        ("forget", 1),
        ("enroll", 1),
    ]


def test_what_changes_nothing_is_not_in_the_audit_log(three: Gallery) -> None:
    before = three.audit_log()
    enroll(three, new("Kim", 1), new("Adi", 2))
    with pytest.raises(InputError):
        three.forget("Nobody")
    assert three.audit_log() == before


# Reading only


CHANGES: dict[str, Callable[[Gallery], object]] = {
    "enroll_vectors": lambda gallery: enroll(gallery, new("Kim", 9)),
    "enroll": lambda gallery: gallery.enroll([(np.zeros((32, 32, 3), np.uint8), "Kim")]),
    "forget": lambda gallery: gallery.forget("Kim"),
    "rename": lambda gallery: gallery.rename_identity("Kim", "Ida"),
    "merge": lambda gallery: gallery.merge_identities("Kim", "Adi"),
    "compact": lambda gallery: gallery.compact(),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file that lasts; SQLite makes files beside the database even to read it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path): path.read_bytes() for path in files if not path.name.endswith(("-wal", "-shm", ".lock"))
    }


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_gallery_that_is_only_read_refuses_every_change(change: str, three: Gallery) -> None:
    three.close()
    before = snapshot(three.folder)
    with Gallery.open(three.folder, read_only=True) as reader:
        with pytest.raises(InputError) as caught:
            CHANGES[change](reader)
        assert str(caught.value) == (f"{three.folder} was opened for reading only; open it for writing.")
        assert len(contents(reader)) == 5
    assert snapshot(three.folder) == before


def test_a_gallery_that_is_only_read_sees_what_others_write(three: Gallery) -> None:
    with Gallery.open(three.folder, read_only=True) as reader:
        assert len(contents(reader)) == 5
        enroll(three, new("Ida", 9))
        assert contents(reader)[sha256(9)] == ("Ida", ("/photos/9.jpg",))
        three.forget("Kim")
        assert contents(reader) == contents(three)


READ = """
import sys
from retrieval.gallery.gallery import Gallery
from tests.gallery.test_identities import contents
with Gallery.open(sys.argv[1], read_only=True) as gallery:
    print(sorted(contents(gallery)), gallery.info().faces, len(gallery.audit_log()))
"""


def test_a_gallery_on_read_only_media_is_read(three: Gallery) -> None:
    """After it was closed by its last writer; nothing is written beside it."""
    three.close()
    before = sorted(os.listdir(three.folder))
    done = on_read_only_media(three.folder, READ)
    assert (done.returncode, done.stderr) == (0, "")
    expected = sorted(sha256(number) for number in range(1, 6))
    assert done.stdout == f"{expected} 5 1\n"
    assert sorted(os.listdir(three.folder)) == before


def die_after_adding(folder: Path) -> None:
    """Leaves the log of SQLite uncopied. Runs in a child."""
    gallery = Gallery.open(folder)
    enroll(gallery, new("Ida", 9))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_gallery_on_read_only_media_whose_writer_was_killed_is_read_whole_or_not_at_all(
    three: Gallery,
) -> None:
    """What was committed last stands in SQLite's log alone: it is found, or the gallery is refused."""
    three.compact()  # the segment of before stays when one more face is added
    three.close()
    child = CHILDREN.Process(target=die_after_adding, args=(three.folder,))
    child.start()
    child.join()
    assert (three.folder / "gallery.db-wal").stat().st_size > 0
    done = on_read_only_media(three.folder, READ)
    expected = sorted(sha256(number) for number in (1, 2, 3, 4, 5, 9))
    if done.returncode == 0:
        assert done.stdout == f"{expected} 6 3\n"
    else:
        assert done.stderr.splitlines()[-1].startswith("retrieval.errors.")


def read_as_nobody(folder: Path, there: Any) -> None:
    """Reads a gallery as a user who may not write to it, whenever it is told to. Runs in a child."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with suppress(EOFError):
        try:
            with Gallery.open(folder, read_only=True) as gallery:
                while there.recv():
                    there.send(sorted(face.sha256 for face in everybody(gallery).values()))
        except FaceprintError as error:
            there.send(repr(error))


@pytest.fixture
def public(bundle: ModelBundle) -> Iterator[Gallery]:
    """A gallery of root's that everybody may read and nobody else may change, with five faces."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory(prefix="faceprint-public-") as temporary:
        os.chmod(temporary, 0o755)
        with Gallery.create(Path(temporary) / "people.gallery", bundle) as gallery:
            enroll(gallery, *(new("Kim", number) for number in range(5)))
            for path in (gallery.folder, *gallery.folder.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            yield gallery


@pytest.mark.parametrize("writer", ["open", "closed"])
def test_a_user_who_may_not_write_sees_what_the_owner_writes(writer: str, public: Gallery) -> None:
    """Whether or not the owner has the gallery open when the reader opens it."""
    if writer == "closed":
        public.close()
    here, there = CHILDREN.Pipe()
    child = CHILDREN.Process(target=read_as_nobody, args=(public.folder, there))
    child.start()
    there.close()
    here.send(True)
    assert here.recv() == sorted(sha256(number) for number in range(5))
    with Gallery.open(public.folder) as owner:
        for number in range(5, 40):
            enroll(owner, new(f"Person {number}", number))
            here.send(True)
            assert here.recv() == sorted(sha256(n) for n in range(number + 1))
    here.send(False)
    child.join()
    assert child.exitcode == 0


# A reader that stays


@contextmanager
def statements(gallery: Gallery) -> Iterator[list[str]]:
    """What SQLite is asked meanwhile, BEGIN left out."""
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement != "BEGIN":
            asked.append(" ".join(statement.split()))

    engine = gallery.vault.store.file.sql
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_search_asks_for_the_revision_and_for_what_it_found_when_nothing_has_changed(
    three: Gallery,
) -> None:
    three.search_by_vector(vector_of(sha256(1)))
    with statements(three) as asked:
        three.search_by_vector(vector_of(sha256(1)))
    tables = [statement.split(" FROM ")[1].split()[0] for statement in asked]
    assert tables == ["gallery", "face", "file"]
    assert asked[0] == "SELECT gallery.revision FROM gallery"
    with statements(three) as asked:
        three._model.current()
    assert asked == ["SELECT gallery.revision FROM gallery"]


def test_a_search_of_an_empty_gallery_asks_for_the_revision_alone(gallery: Gallery) -> None:
    gallery.search_by_vector(vector_of(sha256(1)))
    with statements(gallery) as asked:
        assert gallery.search_by_vector(vector_of(sha256(1))) == ()
    assert asked == ["SELECT gallery.revision FROM gallery"]


def change_and_tell(folder: Path, there: Any) -> None:
    """Changes a gallery step by step, each when it is told to. Runs in a child."""
    steps: list[Callable[[Gallery], object]] = [
        lambda gallery: enroll(gallery, new("Ida", 9)),
        lambda gallery: gallery.rename_identity("Ida", "Idalia"),
        lambda gallery: enroll(gallery, new("Kim", 10, "/photos/1.jpg")),
        lambda gallery: gallery.compact(),
        lambda gallery: gallery.forget("Kim"),
        lambda gallery: gallery.forget(path="/photos/9.jpg"),
    ]
    with Gallery.open(folder) as gallery:
        for step in steps:
            there.recv()
            step(gallery)
            there.send({face.sha256: (face.identity, face.paths) for face in everybody(gallery).values()})


def test_a_reader_that_stays_sees_each_change_of_another_process_at_its_next_search(three: Gallery) -> None:
    here, there = CHILDREN.Pipe()
    child = CHILDREN.Process(target=change_and_tell, args=(three.folder, there))
    child.start()
    there.close()
    with Gallery.open(three.folder, read_only=True) as reader:
        seen = [contents(reader)]
        for _ in range(6):
            here.send("go")
            expected = here.recv()
            found = contents(reader)
            assert found == expected == contents(three)
            seen.append(found)
    child.join()
    assert child.exitcode == 0
    assert [len(one) for one in seen] == [5, 6, 6, 6, 6, 3, 2]


# Vectors that exist already


def test_enrolling_vectors_is_enrolling_photos(gallery: Gallery, faces: Path, tmp_path: Path) -> None:
    """The same rows, outcomes and answers as when the photos themselves are enrolled."""
    photos = [(path, path.parent.name) for path in sorted(faces.glob("*/*.jpg"))[:20]]
    expected = gallery.enroll(photos)
    with gallery.vault.store.read() as reader:
        generation = gallery.vault.serving(reader)
        vectors = np.stack([gallery.vault.vector(reader, generation, n) for n in range(1, 21)])
    given = [NewFace(name, str(path), sha256_of(path)) for path, name in photos]
    with Gallery.create(tmp_path / "other.gallery", gallery.bundle) as other:
        assert other.enroll_vectors(given, vectors) == expected
        assert [dataclasses.replace(face, enrolled_at="") for face in everybody(other).values()] == [
            dataclasses.replace(face, enrolled_at="") for face in everybody(gallery).values()
        ]
        for vector in vectors[::7]:
            found = [(m.face.id, m.distance) for m in other.search_by_vector(vector, 20)]
            assert found == [(m.face.id, m.distance) for m in gallery.search_by_vector(vector, 20)]
        again = other.enroll_vectors(given, vectors)
        assert {outcome.status for outcome in again} == {Status.KNOWN}
        assert gallery.enroll(photos) == again


@pytest.mark.parametrize(
    ("face", "sentence"),
    [
        (NewFace("Kim", None, "a" * 63), f"'{'a' * 63}' is not a SHA-256 in hexadecimal digits."),
        (NewFace("Kim", None, "A" * 64), f"'{'A' * 64}' is not a SHA-256 in hexadecimal digits."),
        (NewFace("Kim", None, "a" * 64 + "\n"), f"'{'a' * 64}\\n' is not a SHA-256 in hexadecimal digits."),
        (
            NewFace("Kim", "/\udcff.jpg", "a" * 64),
            "The path '/\\udcff.jpg' cannot be stored: it must be absolute, in Unicode.",
        ),
        (
            NewFace("Kim", "here.jpg", "a" * 64),
            "The path 'here.jpg' cannot be stored: it must be absolute, in Unicode.",
        ),
        (
            NewFace("\udcff", None, "a" * 64),
            "The identity '\\udcff' cannot be stored: it is not valid Unicode.",
        ),
    ],
    ids=["short", "capitals", "a line too many", "path", "relative", "identity"],
)
def test_a_malformed_face_is_refused_and_none_is_enrolled(
    face: NewFace, sentence: str, gallery: Gallery
) -> None:
    with pytest.raises(InputError) as caught:
        gallery.enroll_vectors([new("Kim", 1), face], np.ones((2, 2048), np.float32))
    assert str(caught.value) == sentence
    assert everybody(gallery) == {}


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (np.ones((1, 2048)), "2 faces came with 1 vectors; give as many of both."),
        (np.ones((3, 2048)), "2 faces came with 3 vectors; give as many of both."),
        (np.ones((2, 2047)), "Vectors must have shape (n, 2048) as this gallery's model gives them, "),
        (np.ones(2), "Vectors must have shape (n, 2048) as this gallery's model gives them, not (2,)."),
        (np.full((2, 2048), np.nan), "Vectors must be finite numbers, with a length of at most 1e18."),
        (np.full((2, 2048), np.inf), "Vectors must be finite numbers, with a length of at most 1e18."),
        (np.full((2, 2048), 1e30), "Vectors must be finite numbers, with a length of at most 1e18."),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_none_is_enrolled(
    vectors: NDArray[Any], sentence: str, gallery: Gallery
) -> None:
    with pytest.raises(InputError) as caught:
        gallery.enroll_vectors([new("Kim", 1), new("Kim", 2)], vectors)
    assert str(caught.value).startswith(sentence)
    assert everybody(gallery) == {}
    assert list((gallery.folder / "vectors").glob("*.faiss")) == []


def test_no_vectors_are_enrolled_without_a_trace(gallery: Gallery) -> None:
    before = revision(gallery)
    assert gallery.enroll_vectors([], np.empty((0, 2048), np.float32)) == []
    assert revision(gallery) == before


def test_rows_before_those_that_are_refused_are_enrolled(gallery: Gallery) -> None:
    """Each step of at most as many rows as a segment takes is a transaction of its own."""
    gallery.vault.vectors(gallery._model.current()).ceiling = 2
    vectors = np.stack([vector_of(sha256(number)) for number in range(4)])
    vectors[3, 7] = np.nan
    with pytest.raises(InputError):
        gallery.enroll_vectors([new("Kim", number) for number in range(4)], vectors)
    assert set(contents(gallery)) == {sha256(0), sha256(1)}


@pytest.mark.parametrize("ceiling", [1, 3, 7])
def test_more_rows_than_a_segment_takes_become_several(ceiling: int, gallery: Gallery) -> None:
    """Whatever was stored before; an odd one out among them is an outcome, not an error."""
    gallery.vault.vectors(gallery._model.current()).ceiling = ceiling
    enroll(gallery, new("Kim", 0))
    outcomes = enroll(gallery, *(new("Kim", number) for number in range(1, 18)), new("Adi", 4))
    assert [outcome.face_id for outcome in outcomes] == [*range(2, 19), 5]
    assert outcomes[-1].reason is Reason.IDENTITY_CONFLICT
    with gallery.vault.store.read() as reader:
        rows = [segment.rows for segment in reader.segments()]
    assert sum(rows) == 18
    assert max(rows) <= ceiling
    assert set(contents(gallery)) == {sha256(number) for number in range(18)}


def test_one_batch_larger_than_a_segment_becomes_several(gallery: Gallery) -> None:
    """As when the ceiling was higher in the batch's first step than it is now."""
    gallery.vault.vectors(gallery._model.current()).ceiling = 4
    photos = [new("Kim", number) for number in range(11)]
    gallery.enrollment._writer.add(photos, np.stack([vector_of(face.sha256) for face in photos]))
    with gallery.vault.store.read() as reader:
        assert [segment.rows for segment in reader.segments()] == [4, 4, 3]
    assert len(contents(gallery)) == 11


# What a write costs


def test_a_photo_that_replaces_nobody_does_not_open_the_segments_of_others(gallery: Gallery) -> None:
    """A writer that has just been started adds one face: it reads no vector that it does not merge."""
    enroll(gallery, *(new("Kim", number) for number in range(16)))
    with Gallery.open(gallery.folder) as writer:
        enroll(writer, new("Kim", 99))
        vectors = writer.vault.vectors(writer._model.current())
        assert 1 not in vectors._open


def test_a_busy_gallery_is_told_from_every_change(three: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else writes: each change waits the stated time and gives up in one sentence."""
    monkeypatch.setattr("retrieval.storage.vault.LOCK_TIMEOUT", 0.02)
    before = contents(three)
    with Gallery.open(three.folder) as other, other.vault.writing() as writer:
        assert not writer.changed
        for change in CHANGES.values():
            with pytest.raises(GalleryBusy, match=f"^Process {os.getpid()} is writing to "):
                change(three)
    assert contents(three) == before
