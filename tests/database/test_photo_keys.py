"""Photos are found by their SHA-256 through keys as if the SHA-256 itself had an index, and stand once."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.database.photo_keys import EPOCH_BITS, PREFIX_BITS, key_of
from retrieval.database.reader import _BY_KEY
from retrieval.database.records import NewFace
from retrieval.database.store import Store
from retrieval.database.tables import face_table, file_table, photo_table
from retrieval.errors import GalleryDamaged
from tests.database.test_store import sha256

EPOCH = 1 << EPOCH_BITS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gallery.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = Store.create(path, fingerprint="f" * 64, dimension=8)
    yield made
    made.close()


def add(store: Store, first: int, *digests: str) -> None:
    with store.write() as writer:
        writer.add_faces(first, [NewFace(None, None, digest) for digest in digests])


def by_text(path: Path, digests: list[str]) -> dict[str, int]:
    """What the comparison of the whole texts finds."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT sha256, id FROM photo").fetchall()
    return {digest: number for digest, number in rows if digest in digests}


# Few beginnings, so that different photos have one key; and what only a damaged database has.
DIGESTS = st.one_of(
    st.tuples(st.sampled_from(["0" * 8, "f" * 8, "80000000", "7fffffff"]), st.integers(0, 3)).map(
        lambda parts: f"{parts[0]}{parts[1]:056x}"
    ),
    st.integers(0, 20).map(sha256),
    st.sampled_from(["", "x", "-fffffff", "0x1234567", "FFFFFFFF", "1_2_3_4_", "é" * 64]),
)

# Where the ids of a batch begin: at borders of epochs too.
FIRST_IDS = st.sampled_from([1, 50, EPOCH - 2, EPOCH + 9, 5 * EPOCH, 2**40, 2**50 - EPOCH, 2**62])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(FIRST_IDS, st.lists(DIGESTS, min_size=1, max_size=4), max_size=5),
    st.lists(DIGESTS, max_size=12),
    st.data(),
)
def test_keys_find_what_comparing_all_texts_finds(
    store: Store, path: Path, batches: dict[int, list[str]], asked: list[str], data: st.DataObject
) -> None:
    """Of photos in any epochs, before and after some are removed."""
    with store.write() as writer:
        for table in (file_table, face_table, photo_table):
            writer.clear(table)
    ids: list[int] = []
    given_out: set[str] = set()
    for first, digests in sorted(batches.items()):
        fresh = [digest for digest in dict.fromkeys(digests) if digest not in given_out]
        given_out.update(fresh)
        add(store, first, *fresh)
        ids += range(first, first + len(fresh))
    everything = [*asked, *given_out]
    for gone in ([], data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []):
        with store.write() as writer:
            writer.remove_faces(gone)
        with store.read() as reader:
            found = reader.photo_ids_by_sha256(everything)
            assert found == by_text(path, everything)
            assert {digest: one.id for digest, one in reader.photos_by_sha256(everything).items()} == found
            assert reader.photo_duplicates() == []


def test_photos_with_one_key_are_two_photos(store: Store, path: Path) -> None:
    one, two, absent = ("1234abcd" + ending * 56 for ending in "012")
    add(store, 1, one, two)
    assert key_of(1, one) == key_of(2, two) == key_of(1, absent)
    with store.read() as reader:
        assert reader.photo_ids_by_sha256([one, two, absent]) == {one: 1, two: 2}
        assert reader.photo_ids_by_sha256([absent]) == {}
        assert reader.photo_duplicates() == []
    with store.write() as writer:
        writer.remove_faces([1])
    with store.read() as reader:
        assert reader.photos_by_sha256([one, two]).keys() == {two}


def test_a_photo_is_never_stored_twice(store: Store, path: Path) -> None:
    """Whether it was looked up before or not, in one transaction or in two, in one epoch or in two."""
    add(store, 1, sha256(1))
    for first in (2, EPOCH):
        with pytest.raises(GalleryDamaged, match="would be stored a second time"):
            add(store, first, sha256(2), sha256(1))

    def looked_up() -> None:
        with store.write() as writer:
            assert writer.photos_by_sha256([sha256(2)]) == {}
            writer.add_faces(2, [NewFace(None, None, sha256(2))])
            writer.add_faces(3, [NewFace(None, None, sha256(2))])

    with pytest.raises(GalleryDamaged, match="would be stored a second time"):
        looked_up()
    with pytest.raises(GalleryDamaged, match="would be stored a second time"):
        add(store, 2, sha256(3), sha256(3))
    assert by_text(path, [sha256(n) for n in range(4)]) == {sha256(1): 1}
    with store.write() as writer:
        assert writer.photos_by_sha256([sha256(2)]) == {}
        writer.add_faces(2, [NewFace(None, None, sha256(2)), NewFace(None, None, sha256(4))])
    with store.write() as writer:
        writer.remove_faces([2])
        writer.add_faces(4, [NewFace(None, None, sha256(2))])
    assert by_text(path, [sha256(n) for n in range(5)]) == {sha256(1): 1, sha256(2): 4, sha256(4): 3}


def test_rows_of_another_gallery_with_a_photo_twice_are_not_taken_over(store: Store, path: Path) -> None:
    add(store, 1, sha256(1))
    rows = [
        {"id": number, "sha256": sha256(2), "closed": 0, "sha256_key": key_of(number, sha256(2))}
        for number in (5, EPOCH)
    ]

    def filled() -> None:
        with store.write() as writer:
            writer.clear(face_table)
            writer.clear(photo_table)
            writer.fill(photo_table, rows)

    with pytest.raises(GalleryDamaged, match=f"the photos with numbers 5, {EPOCH} have the same SHA-256"):
        filled()
    assert by_text(path, [sha256(1), sha256(2)]) == {sha256(1): 1}


@pytest.mark.parametrize("damaged", ["'text'", "1e300", "x'00'", "-5"])
@pytest.mark.parametrize("first", [1, 7 * EPOCH])
def test_a_search_ends_where_a_key_is_no_integer_of_photos(
    damaged: str, first: int, store: Store, path: Path
) -> None:
    add(store, first, sha256(1), sha256(2), sha256(3))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE photo SET sha256_key = {damaged} WHERE id = {first + 1}")
        # SQLite gives up after as many instructions.
        connection.set_progress_handler(lambda: 1, 1_000_000)
        keys = f"[{key_of(0, sha256(1))}, {key_of(0, sha256(3))}]"
        assert connection.execute(_BY_KEY, (keys,)).fetchall() == [(first, sha256(1)), (first + 2, sha256(3))]


@pytest.mark.parametrize("number", [1, EPOCH, 2**62, 2**63 - 1])
def test_a_key_is_an_integer_of_the_database(number: int) -> None:
    for digest in ("0" * 64, "f" * 64, "no digits", ""):
        assert 0 <= key_of(number, digest) < 2**63
    # SQLite stores it in 6 bytes, up to 17 billion photos.
    assert key_of(2**34 - 1, "f" * 64) < 2**47
    assert key_of(EPOCH, "0" * 64) == 2**PREFIX_BITS


def test_a_search_by_keys_reads_no_whole_table(store: Store, path: Path) -> None:
    add(store, 1, *map(sha256, range(100)))
    with closing(sqlite3.connect(path)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {_BY_KEY}", ("[]",))]
    photos = [step for step in plan if "photo" in step]
    assert photos
    assert {step.split()[0] for step in photos} == {"SEARCH"}, plan
    assert all("ix_photo_sha256_key" in step for step in photos), plan
