"""Files that are what they were are known without being opened; all others are looked at."""

import dataclasses
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.bulk.ingest import ingest, ingest_photos
from retrieval.database.records import NewFace
from retrieval.database.store import Store
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import Reason
from retrieval.gallery.gallery import Gallery
from retrieval.images.pixels import read_file
from retrieval.sources.photos import Photo, scan
from retrieval.system.files import Stamp

LONG_AGO = 1_000_000_000 * 10**9


def age(*paths: Path, ns: int = LONG_AGO) -> None:
    """Makes files look as if nobody had written to them for years."""
    for path in paths:
        os.utime(path, ns=(ns, ns))


@pytest.fixture
def photos(faces: Path, tmp_path: Path) -> Path:
    """Four photos of two people, not written to for years."""
    folder = tmp_path / "photos"
    for path in sorted(faces.glob("*/*_000[12].jpg"))[:4]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    age(*folder.glob("*/*"))
    return folder


def files_of(photos: Path) -> list[Path]:
    return sorted(photos.glob("*/*"))


def recognized(gallery: Gallery, photos: Path) -> list[bool]:
    pictures = [Photo(os.fspath(p), p.parent.name) for p in files_of(photos)]
    return [outcome is not None for outcome in gallery.recognize(pictures)]


def revision(gallery: Gallery) -> int:
    with gallery.vault.store.read() as reader:
        return reader.revision()


def rewrite_unnoticed(path: Path, other: Path) -> None:
    """Puts another photo's bytes, padded to the same length, into a file; size, time and inode stay."""
    status = path.stat()
    data = other.read_bytes()[: status.st_size].ljust(status.st_size, b"\0")
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_of_the_same_size_time_and_inode_is_not_opened_unless_hashes_are_insisted_on(
    gallery: Gallery, photos: Path
) -> None:
    """Seen by a change that only its bytes could tell."""
    assert ingest(gallery, [photos]).enrolled == 4
    first, *_, last = files_of(photos)
    rewrite_unnoticed(first, last)
    report = ingest(gallery, [photos])
    assert (report.known, report.bytes_read) == (4, 0)
    outcomes: list[Outcome] = []
    report = ingest(gallery, [photos], rehash=True, on_outcome=outcomes.append)
    assert report.known == 3
    assert report.bytes_read == sum(path.stat().st_size for path in files_of(photos))
    assert outcomes[0].status is not Status.KNOWN


def test_an_unchanged_rerun_changes_nothing_and_a_touched_file_is_stored_once_more(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    before = revision(gallery)
    assert ingest(gallery, [photos], rehash=True).known == 4
    assert revision(gallery) == before
    age(files_of(photos)[0], ns=LONG_AGO + 1)
    assert recognized(gallery, photos) == [False, True, True, True]
    assert ingest(gallery, [photos]).known == 4
    assert revision(gallery) == before + 1
    assert recognized(gallery, photos) == [True] * 4
    assert ingest(gallery, [photos]).bytes_read == 0
    assert revision(gallery) == before + 1
    assert [entry.action for entry in gallery.audit_log()].count("enroll") == 1


def test_other_bytes_of_the_same_size_under_a_new_time_are_a_new_face(gallery: Gallery, photos: Path) -> None:
    ingest(gallery, [photos])
    first, second, *_ = files_of(photos)
    status = first.stat()
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    age(first, ns=LONG_AGO + 10**9)
    assert first.stat().st_size == status.st_size
    outcomes: list[Outcome] = []
    ingest(gallery, [photos], on_outcome=outcomes.append)
    assert (outcomes[0].status, outcomes[0].replaced) == (Status.ENROLLED, 1)
    assert recognized(gallery, photos) == [True] * 4
    assert second.exists()


def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time_is_looked_at(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    first = files_of(photos)[0]
    copy = first.with_name(".copy")
    shutil.copy2(first, copy)
    copy.rename(first)
    assert recognized(gallery, photos) == [False, True, True, True]


def test_a_file_that_was_just_written_is_looked_at_again_until_it_has_settled(
    gallery: Gallery, photos: Path
) -> None:
    """Whoever writes to it right after it was read may leave its time as it is."""
    first = files_of(photos)[0]
    now = time.time_ns()
    age(first, ns=now)
    ingest(gallery, [photos])
    assert recognized(gallery, photos) == [False, True, True, True]
    age(first, ns=now + 3600 * 10**9)  # in the future, by whatever clock
    ingest(gallery, [photos])
    assert recognized(gallery, photos) == [False, True, True, True]


@pytest.mark.parametrize(("older_ns", "settled"), [(0, False), (3 * 10**9, False), (3 * 10**9 + 1, True)])
def test_a_stamp_is_settled_when_the_file_is_three_seconds_older_than_its_reading(
    older_ns: int, settled: bool
) -> None:
    assert Stamp(1, LONG_AGO - older_ns, 1).settled(LONG_AGO) is settled


def test_reading_gives_the_stamp_of_what_was_read(photos: Path) -> None:
    path = files_of(photos)[0]
    assert read_file(path) == (path.read_bytes(), Stamp.of(os.stat(path)))


@given(inode=st.integers(0, 2**64 - 1))
def test_every_inode_fits_into_a_database(inode: int) -> None:
    status = os.stat_result((0o100644, inode, 0, 1, 0, 0, 7, 0, 0, 0))
    stamp = Stamp.of(status)
    assert -(2**63) <= stamp.inode < 2**63
    assert stamp.inode % 2**64 == inode


def test_stamps_come_out_of_the_store_as_they_went_in(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "gallery.db", fingerprint="f" * 64, dimension=8)
    stamps = {"/a.jpg": Stamp(2**40, -5, -(2**63)), "/b.jpg": Stamp(0, 2**62, 2**63 - 1)}
    with store.write() as writer:
        writer.add_faces(1, [NewFace("Kim", None, "a" * 64, {"year": 2020})])
        writer.add_files([(path, 1) for path in (*stamps, "/c.jpg")], stamps)
    with store.write() as writer:
        writer.set_stamps({"/c.jpg": Stamp(1, 2, 3)})
    with store.read() as reader:
        known = reader.known_files([*stamps, "/c.jpg", "/d.jpg"])
    assert {path: file.stamp for path, file in known.items()} == {**stamps, "/c.jpg": Stamp(1, 2, 3)}
    assert {(file.photo_id, file.face_ids, file.identities) for file in known.values()} == {
        (1, (1,), ("Kim",))
    }
    assert all(file.metadata == ({"year": 2020},) for file in known.values())
    store.close()


def test_an_unchanged_file_that_is_said_to_be_somebody_else_is_a_conflict(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    path = os.fspath(files_of(photos)[0])
    (outcome,) = gallery.recognize([Photo(path, "Zoë")])
    assert outcome is None
    photo = next(scan([photos]))
    outcomes: list[Outcome] = []
    ingest_photos(gallery, [dataclasses.replace(photo, identity="Zoë")], on_outcome=outcomes.append)
    assert [one.reason for one in outcomes] == [Reason.IDENTITY_CONFLICT]


def test_an_unchanged_file_whose_face_has_no_name_gets_the_one_that_is_said(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, files_of(photos))
    assert {name for name, _ in gallery.info().largest} == set()
    report = ingest(gallery, [photos])
    assert report.known == 4
    assert sorted(name for name, _ in gallery.info().largest) == sorted(p.name for p in photos.iterdir())


def test_an_unchanged_file_of_somebody_who_was_renamed_is_known_under_todays_name(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    old = files_of(photos)[0].parent.name
    gallery.rename_identity(old, "Zoë")
    outcomes: list[Outcome] = []
    report = ingest(gallery, [photos], on_outcome=outcomes.append)
    assert (report.known, report.bytes_read) == (4, 0)
    assert outcomes[0].identity == "Zoë"


def test_an_unchanged_file_is_looked_at_when_something_new_is_said_about_it(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    path = os.fspath(files_of(photos)[0])
    gallery.annotate(paths={path: {"year": 2020}})
    said = [{}, {"year": 2020}, {"year": 1999}, {"camera": "north"}]
    found = gallery.recognize([Photo(path, None, metadata=one) for one in said])
    # A key that has another value stays as it is, as with known bytes: only missing ones are filled in.
    assert [one is not None for one in found] == [True, True, True, False]


def test_pictures_that_are_no_files_are_never_recognized(gallery: Gallery, photos: Path) -> None:
    ingest(gallery, [photos])
    path = files_of(photos)[0]
    content = path.read_bytes()
    pictures = [Photo(os.fspath(path), None, content=content), Photo(None, None, content=content)]
    assert gallery.recognize(pictures) == [None, None]


@pytest.mark.parametrize("instead", ["nothing", "pipe", "folder"])
def test_a_file_that_has_become_something_else_is_looked_at(
    instead: str, gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    first = files_of(photos)[0]
    first.unlink()
    if instead == "pipe":
        os.mkfifo(first)
    elif instead == "folder":
        first.mkdir()
    path = os.fspath(first)
    assert gallery.recognize([Photo(path, None)]) == [None]


def test_what_is_forgotten_leaves_no_stamp(gallery: Gallery, photos: Path) -> None:
    age(*files_of(photos), ns=LONG_AGO + 123_456_789)
    ingest(gallery, [photos])
    for person in photos.iterdir():
        gallery.forget(person.name)
    gallery.close()
    with sqlite3.connect(gallery.folder / "gallery.db") as connection:
        assert connection.execute("SELECT count(*) FROM file").fetchone() == (0,)
    number = (LONG_AGO + 123_456_789).to_bytes(8, "big")
    for path in gallery.folder.iterdir():
        assert path.is_dir() or number not in path.read_bytes()


def test_stamps_are_in_a_backup_and_still_hold_after_a_restore(
    gallery: Gallery, photos: Path, tmp_path: Path
) -> None:
    ingest(gallery, [photos])
    gallery.backup(tmp_path / "backup")
    age(files_of(photos)[0], ns=LONG_AGO + 1)
    Gallery.restore(tmp_path / "backup", tmp_path / "restored")
    with Gallery.open(tmp_path / "restored") as restored:
        assert recognized(restored, photos) == [False, True, True, True]


def test_the_library_stores_stamps_too_and_always_looks_at_the_bytes(gallery: Gallery, photos: Path) -> None:
    first, *_, last = files_of(photos)
    gallery.enroll([(first, "Kim")])
    assert gallery.recognize([Photo(os.fspath(first), "Kim")])[0] is not None
    rewrite_unnoticed(first, last)
    (outcome,) = gallery.enroll([(first, "Kim")])
    assert outcome.status is not Status.KNOWN


def test_a_path_that_moves_to_another_face_does_not_keep_the_old_stamp(
    gallery: Gallery, photos: Path
) -> None:
    ingest(gallery, [photos])
    first, second, *_ = files_of(photos)
    shutil.copyfile(second, first)  # a copy that is not settled
    ingest(gallery, [photos])
    with gallery.vault.store.read() as reader:
        assert reader.known_files([os.fspath(first)])[os.fspath(first)].stamp is None
