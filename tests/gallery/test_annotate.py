"""What people say about faces and identities goes where these go: along, together, to backups, and away."""

import hashlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.database.filters import Where
from retrieval.database.metadata import MOST_BYTES, Metadata
from retrieval.database.records import Face, NewFace
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import GalleryDamaged, InputError, StorageError
from retrieval.gallery.annotate import Annotated
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle


def sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def vector_of(digest: str) -> NDArray[np.float32]:
    return np.random.default_rng(int(digest, 16)).standard_normal(2048).astype(np.float32)


def new(identity: str | None, number: int, path: str | None = None, **metadata: Any) -> NewFace:
    return NewFace(identity, path or f"/photos/{number}.jpg", sha256(number), metadata)


def enroll(gallery: Gallery, *faces: NewFace) -> list[Outcome]:
    return gallery.enroll_vectors(faces, np.stack([vector_of(face.sha256) for face in faces]))


def everybody(gallery: Gallery) -> dict[int, Face]:
    with gallery.vault.store.read() as reader:
        return {face.id: face for part in reader.all_faces() for face in part}


def said(gallery: Gallery) -> dict[int, Metadata]:
    return {number: face.metadata for number, face in everybody(gallery).items() if face.metadata}


def revision(gallery: Gallery) -> int:
    with gallery.vault.store.read() as reader:
        return reader.revision()


@pytest.fixture
def people(gallery: Gallery) -> Gallery:
    """Faces 1 and 2 are Kim, 3 is Adi, 4 is nobody we know; nothing is said about anybody."""
    enroll(gallery, new("Kim", 1), new("Kim", 2), new("Adi", 3), new(None, 4))
    return gallery


def test_metadata_are_replaced_by_id_by_path_and_by_name(people: Gallery) -> None:
    done = people.annotate(
        faces={1: {"year": 2020, "tags": ["a", None], "x": {"y": 1.5}}},
        paths={"/photos/3.jpg": {"year": 2021}, "/photos/../photos/4.jpg": {"é": True}},
        identities={"Kim": {"country": "FR"}},
    )
    assert done == Annotated(faces=3, identities=1, unchanged=0, unknown=())
    assert said(people) == {
        1: {"year": 2020, "tags": ["a", None], "x": {"y": 1.5}},
        3: {"year": 2021},
        4: {"é": True},
    }
    assert people.identity_metadata(["Kim", "Adi", "Nobody"]) == {"Kim": {"country": "FR"}, "Adi": {}}
    people.annotate(faces={1: {"month": 1}, 3: None, 4: {}}, identities={"Kim": None})
    assert said(people) == {1: {"month": 1}}
    assert people.identity_metadata(["Kim"]) == {"Kim": {}}


def test_metadata_of_an_identity_are_replaced_by_its_id(people: Gallery) -> None:
    with people.vault.store.read() as reader:
        [number] = [one.id for one in reader.people(limit=99) if one.name == "Kim"]
    done = people.annotate(identities={number: {"country": "FR"}, 99: {"a": 1}, 0: {}, 2**70: None})
    assert done == Annotated(faces=0, identities=1, unchanged=0, unknown=(99, 0, 2**70))
    assert people.identity_metadata(["Kim"]) == {"Kim": {"country": "FR"}}


def test_a_search_shows_what_is_said(people: Gallery) -> None:
    people.annotate(faces={3: {"year": 2021}})
    (match,) = people.search_by_vector(vector_of(sha256(3)), 1)
    assert match.face.metadata == {"year": 2021}
    with people.vault.store.read() as reader:
        assert reader.face_ids_where(Where.parse(["year>=2021"])).tolist() == [3]


def test_what_is_set_already_changes_nothing_and_is_no_news(people: Gallery) -> None:
    """Whatever the order of the keys; but 1, 1.0 and true are three things."""
    people.annotate(faces={1: {"a": 1, "b": {"c": 2, "d": 3}}}, identities={"Kim": {"x": "y"}})
    before, log = revision(people), people.audit_log()
    done = people.annotate(
        faces={1: {"b": {"d": 3, "c": 2}, "a": 1}, 2: None, 3: {}},
        paths={"/photos/1.jpg": {"a": 1, "b": {"c": 2, "d": 3}}},
        identities={"Kim": {"x": "y"}, "Adi": None},
    )
    assert done == Annotated(faces=0, identities=0, unchanged=5, unknown=())
    assert (revision(people), people.audit_log()) == (before, log)
    for other in (1.0, True, "1"):
        assert people.annotate(faces={2: {"a": 1}, 3: {"a": other}}).faces >= 1
        assert repr(everybody(people)[3].metadata) == repr({"a": other})


def test_what_the_gallery_does_not_know_is_told_and_no_error(people: Gallery) -> None:
    done = people.annotate(
        faces={1: {"a": 1}, 99: {"a": 1}, 0: None, 2**70: {}, -1: {}},
        paths={"/photos/nothing.jpg": {"a": 1}, "/photos/\udcff.jpg": None},
        identities={"Nobody": {"a": 1}, "\udcff": None},
    )
    strange = (99, 0, 2**70, -1, "/photos/nothing.jpg", "/photos/\udcff.jpg", "Nobody", "\udcff")
    assert done == Annotated(faces=1, identities=0, unchanged=0, unknown=strange)


def test_of_several_paths_to_one_face_the_last_decides(people: Gallery) -> None:
    enroll(people, new("Kim", 1, "/photos/copy.jpg"))
    done = people.annotate(
        faces={1: {"n": 0}}, paths={"/photos/1.jpg": {"n": 1}, "/photos/copy.jpg": {"n": 2}}
    )
    assert (done, said(people)) == (Annotated(1, 0, 0, ()), {1: {"n": 2}})


def test_metadata_that_cannot_be_stored_change_nothing(people: Gallery) -> None:
    before = revision(people)
    for options in (
        {"faces": {1: {"a": 1}, 2: {"a": float("nan")}}},
        {"faces": {1: {"a": 1}}, "paths": {"/photos/2.jpg": {"a": "x" * MOST_BYTES}}},
        {"faces": {1: {"a": 1}}, "identities": {"Kim": {1: 2}}},
        {"faces": {1: {"a": 1}}, "identities": {"Nobody": ["x"]}},
    ):
        with pytest.raises(InputError, match=r"^The metadata of .*\.$"):
            people.annotate(**options)  # type: ignore[arg-type]
    assert (said(people), revision(people)) == ({}, before)


def test_the_audit_log_has_numbers_and_nothing_of_what_was_said(people: Gallery) -> None:
    people.annotate(faces={1: {"secret": "badge 4711"}, 2: {"a": 1}}, identities={"Kim": {"a": 1}})
    entry = people.audit_log()[-1]
    assert (entry.action, entry.faces, entry.detail) == ("annotate", 2, {"identities": 1})


def test_the_newest_entries_of_the_audit_log_come_alone(people: Gallery) -> None:
    people.annotate(faces={1: {"a": 1}})
    people.rename_identity("Kim", "Kim B.")
    log = people.audit_log()
    with people.vault.store.read() as reader:
        assert reader.newest_audit_entries(2) == log[:-3:-1]
        assert reader.newest_audit_entries(9, actions=["annotate"]) == [log[-2]]
        others = [entry for entry in log if entry.action not in ("annotate", "rename")]
        assert reader.newest_audit_entries(99, without=["annotate", "rename"]) == others[::-1]
        assert reader.newest_audit_entries(1, actions=["backup"]) == []


def test_a_gallery_that_is_read_only_is_not_annotated(people: Gallery) -> None:
    with (
        Gallery.open(people.folder, read_only=True) as opened,
        pytest.raises(InputError, match="opened for reading only"),
    ):
        opened.annotate(faces={1: {"a": 1}})


def test_a_new_name_keeps_what_is_said_and_the_old_one_leads_there(people: Gallery) -> None:
    people.annotate(faces={1: {"a": 1}}, identities={"Kim": {"country": "FR"}})
    people.rename_identity("Kim", "Kimberly")
    french = {"country": "FR"}
    assert people.identity_metadata(["Kim", "Kimberly"]) == {"Kim": french, "Kimberly": french}
    people.annotate(identities={"Kim": {"country": "IT"}})
    assert people.identity_metadata(["Kimberly"]) == {"Kimberly": {"country": "IT"}}
    assert said(people) == {1: {"a": 1}}


def test_of_two_who_become_one_the_survivors_keys_win_and_the_others_fill_in(people: Gallery) -> None:
    people.annotate(
        faces={1: {"a": 1}},
        identities={"Kim": {"country": "FR", "badge": 7}, "Adi": {"country": "IT", "age": None}},
    )
    people.merge_identities("Kim", "Adi")
    assert people.identity_metadata(["Adi"]) == {"Adi": {"country": "IT", "age": None, "badge": 7}}
    assert said(people) == {1: {"a": 1}}


def test_two_of_whom_too_much_is_said_stay_two(people: Gallery) -> None:
    half = "x" * (MOST_BYTES // 2)
    people.annotate(identities={"Kim": {"a": half}, "Adi": {"b": half}})
    with pytest.raises(InputError, match=r"^The metadata of Kim and Adi together take "):
        people.merge_identities("Kim", "Adi")
    assert people.identity_metadata(["Kim"]) == {"Kim": {"a": half}}


def test_a_face_can_come_with_metadata_and_a_known_one_keeps_its_own(gallery: Gallery) -> None:
    """Offered once more, they fill in what the face has no key for, and then there is no news."""
    enroll(gallery, new("Kim", 1, a=1), new("Kim", 2))
    assert said(gallery) == {1: {"a": 1}}
    again = [new("Kim", 1, a=2, b=2), new("Kim", 2, "/photos/copy.jpg", c=3), new("Adi", 2, d=4)]
    outcomes = enroll(gallery, *again)
    assert [one.status for one in outcomes] == [Status.KNOWN, Status.DUPLICATE, Status.REJECTED]
    assert said(gallery) == {1: {"a": 1, "b": 2}, 2: {"c": 3}}
    before = revision(gallery)
    enroll(gallery, *again)
    assert revision(gallery) == before


def test_twice_in_one_batch_is_once_with_what_both_say(gallery: Gallery) -> None:
    enroll(gallery, new("Kim", 1, a=1), new("Kim", 1, "/photos/copy.jpg", a=2, b=2))
    assert said(gallery) == {1: {"a": 1, "b": 2}}


def test_a_changed_photo_is_a_new_face_of_which_nothing_is_said(people: Gallery) -> None:
    people.annotate(paths={"/photos/1.jpg": {"a": 1}})
    enroll(people, new("Kim", 9, "/photos/1.jpg"))
    assert (said(people), people.annotate(paths={"/photos/1.jpg": {"a": 1}}).faces) == ({}, 1)


def test_bytes_that_come_back_in_the_batch_that_lost_them_say_what_they_say_now(gallery: Gallery) -> None:
    enroll(gallery, new("Kim", 1, "/a.jpg", a=1))
    enroll(gallery, new("Kim", 2, "/a.jpg"), new("Kim", 1, "/b.jpg", b=2))
    assert said(gallery) == {1: {"b": 2}}


@pytest.mark.parametrize("who", [{"identity": "Kim"}, {"face_id": 1}, {"path": "/photos/1.jpg"}])
def test_no_byte_of_what_was_said_about_the_forgotten_is_left(people: Gallery, who: dict[str, Any]) -> None:
    """In any file of the gallery; also what was there before and was replaced."""
    secrets = ["badge-of-nobody-else-4711", "ein Geheimnis, das nur sie kennt: Ünï"]
    people.annotate(faces={1: {"badge": "an-older-badge-4712"}})
    people.annotate(
        faces={1: {"badge": secrets[0], "n": list(range(2000))}}, identities={"Kim": {"k": secrets[1]}}
    )
    # Rows before and after it, so that it moves between pages.
    enroll(people, *(new("Adi", number, pad="x" * 900) for number in range(10, 60)))
    people.annotate(faces={3: {"badge": "somebody-elses"}})

    def files_with(text: str) -> list[str]:
        paths = [path for path in people.folder.rglob("*") if path.is_file()]
        return [path.name for path in paths if text.encode() in path.read_bytes()]

    assert all(files_with(secret) for secret in secrets)
    people.forget(**who)
    assert files_with(secrets[0]) == files_with("an-older-badge-4712") == []
    if "identity" in who:
        assert files_with(secrets[1]) == []
    assert files_with("somebody-elses")


def test_a_backup_has_what_was_said_and_brings_it_back(people: Gallery, tmp_path: Path) -> None:
    faces = {1: {"é": 1.0, "n": 2**60, "deep": [{"a": None}]}, 3: {"b": True}}
    people.annotate(faces=faces, identities={"Kim": {"country": "FR"}})
    people.backup(tmp_path / "backup")
    people.annotate(faces={1: None, 2: {"later": 1}}, identities={"Kim": None, "Adi": {"later": 1}})
    people.close()
    Gallery.restore(tmp_path / "backup", people.folder)
    Gallery.restore(tmp_path / "backup", tmp_path / "new.gallery")
    for folder in (people.folder, tmp_path / "new.gallery"):
        with Gallery.open(folder) as opened:
            assert repr(said(opened)[1]) == repr(dict(sorted(faces[1].items())))
            assert said(opened) == faces
            assert opened.identity_metadata(["Kim", "Adi"]) == {"Kim": {"country": "FR"}, "Adi": {}}
            assert opened.verify().whole


def test_damaged_metadata_are_a_damaged_gallery_in_one_sentence(people: Gallery) -> None:
    people.annotate(faces={1: {"a": 1}})
    with people.vault.store.file.driver() as driver:
        driver.execute("UPDATE face SET metadata = '{\"a\":' WHERE id = 1")
    with pytest.raises(GalleryDamaged, match=r"or it is damaged .*; restore it from a backup\.$"):
        everybody(people)
    with pytest.raises(StorageError, match="malformed JSON"), people.vault.store.read() as reader:
        reader.face_ids_where(Where.parse(["a=1"]))


def test_a_gallery_of_schema_0002_can_be_annotated(bundle: ModelBundle, tmp_path: Path) -> None:
    data = Path(__file__).parent.parent / "data" / "gallery-0002"
    shutil.copytree(data, tmp_path / "old.gallery")
    shutil.copytree(bundle.folder, tmp_path / "old.gallery" / "model")
    connection = sqlite3.connect(tmp_path / "old.gallery" / "gallery.db")
    values = (bundle.fingerprint, bundle.card_sha256())
    connection.execute("UPDATE generation SET fingerprint = ?, card_sha256 = ?", values)
    connection.commit()
    connection.close()
    with Gallery.open(tmp_path / "old.gallery") as opened:
        assert said(opened) == {}
        done = opened.annotate(
            faces={8: {"a": 1}}, paths={"/photos/kim/copy.jpg": {"b": 2}}, identities={"Ana": {"c": 3}}
        )
        assert done == Annotated(2, 1, 0, ())
        assert said(opened) == {1: {"b": 2}, 8: {"a": 1}}
        assert opened.identity_metadata(["Kim"]) == {"Kim": {"c": 3}}
