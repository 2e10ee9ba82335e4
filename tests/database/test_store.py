"""Store: what goes in comes out, a snapshot stands still, a failed write never was, the removed are gone."""

import hashlib
import os
import random
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import event

from retrieval.database.records import Face, GalleryRow, Generation, NewFace, Segment, StoredPhoto
from retrieval.database.store import Store
from retrieval.database.tables import identity_table
from retrieval.errors import GalleryDamaged, GalleryError, StorageError


def sha256(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def new(identity: str | None, number: int) -> NewFace:
    return NewFace(identity, f"/photos/{number}.jpg", sha256(number))


def add(store: Store, *faces: NewFace) -> list[int]:
    """Stores faces and returns their ids."""
    with store.write() as writer:
        first = writer.gallery().next_face_id
        writer.add_faces(first, faces)
        files = ((face.path, number) for number, face in enumerate(faces, first))
        writer.add_files((path, number) for path, number in files if path is not None)
    return list(range(first, first + len(faces)))


def everything(
    store: Store,
) -> tuple[GalleryRow, list[Segment], dict[int, Face], list[tuple[str | None, int]]]:
    with store.read() as reader:
        row = reader.gallery()
        faces = reader.faces(range(row.next_face_id))
        assert reader.count() == len(faces)
        assert reader.file_count() == sum(len(face.paths) for face in faces.values())
        return row, reader.segments(), faces, reader.identities()


def revision(store: Store) -> int:
    with store.read() as reader:
        return reader.revision()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gallery.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """The database of an empty gallery."""
    opened = Store.create(path, fingerprint="f" * 64, dimension=2048)
    yield opened
    opened.close()


@pytest.fixture
def reopen(path: Path) -> Callable[[], Store]:
    """Opens the database of `store` once more."""
    return lambda: Store.open(path)


def identity_rows(store: Store) -> list[tuple[int, str]]:
    with store.read() as reader:
        return [(row["id"], row["name"]) for rows in reader.rows(identity_table) for row in rows]


def test_a_new_database_holds_the_gallerys_own_row_and_nothing_else(store: Store) -> None:
    row, segments, faces, identities = everything(store)
    assert row == GalleryRow(
        uuid=row.uuid,
        created_at=row.created_at,
        next_face_id=1,
        next_segment_id=1,
        generation_id=1,
        revision=1,
        next_identity_id=1,
        next_generation_id=2,
        unfinished=None,
        next_basis_id=1,
        folder_id=None,
    )
    with store.read() as reader:
        assert reader.generations() == {1: Generation(1, "f" * 64, 2048, "model", "", row.created_at)}
        assert (reader.receipts(), reader.audit_log(), reader.file_count()) == ([], [], 0)
    assert len(row.uuid) == 36
    assert datetime.fromisoformat(row.created_at).tzinfo == UTC
    assert (segments, faces, identities) == ([], {}, [])


def test_two_galleries_have_different_uuids(store: Store, tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other.db", fingerprint="f" * 64, dimension=2048)
    assert everything(store)[0].uuid != everything(other)[0].uuid
    other.close()


def test_faces_come_back_as_they_were_given(store: Store, reopen: Callable[[], Store]) -> None:
    """By id and by SHA-256, also after the database was closed; what does not exist is absent."""
    given = [new("Kim", 1), new(None, 2), NewFace("Kim", None, sha256(3)), NewFace(None, None, sha256(4))]
    expected = [("/photos/1.jpg",), ("/photos/2.jpg",), (), ()]
    assert add(store, *given) == [1, 2, 3, 4]
    store.close()
    with closing(reopen()) as opened, opened.read() as reader:
        faces = reader.faces([4, 3, 2, 1, 99])
        by_digest = reader.photos_by_sha256([*(face.sha256 for face in given), sha256("absent")])
    times = {face.enrolled_at for face in faces.values()}
    assert len(times) == 1
    assert datetime.fromisoformat(times.pop()).tzinfo == UTC
    assert faces == {
        number: Face(number, face.identity, paths, face.sha256, faces[1].enrolled_at)
        for number, (face, paths) in enumerate(zip(given, expected, strict=True), start=1)
    }
    assert [faces[number].path for number in (1, 2, 3, 4)] == ["/photos/1.jpg", "/photos/2.jpg", None, None]
    assert by_digest == {face.sha256: StoredPhoto(face.id, (face,)) for face in faces.values()}


NAMES = [
    "Güneş",
    "Gu\u0308nes\u0327",  # the same to the eye, other letters to a computer
    "ÁNH",
    "ánh",
    "小明",
    "مريم",
    "👩‍👩‍👧",
    "Robert'); DROP TABLE face;--",
    'a "quoted" name',
    " surrounded by spaces ",
    "",
    "%",
    "_",
    "two\nlines",
    "x" * 5000,
]


def test_names_and_paths_of_any_letters_come_back_as_they_were_given(store: Store) -> None:
    """Names that differ in case, in accents or in composition are different people."""
    ids = add(store, *(NewFace(name, f"/{name}/{name}.jpg", sha256(name)) for name in NAMES))
    _, _, faces, identities = everything(store)
    assert [(faces[number].identity, faces[number].path) for number in ids] == [
        (name, f"/{name}/{name}.jpg") for name in NAMES
    ]
    assert identities == [(name, 1) for name in sorted(NAMES, key=str.encode)]
    with store.read() as reader:
        assert [reader.face_ids_of(name) for name in NAMES] == [[number] for number in ids]


def test_sqlite_keeps_a_zero_in_a_name(store: Store) -> None:
    """PostgreSQL refuses it, and so does enrollment."""
    add(store, new("a\0b", 1))
    assert everything(store)[3] == [("a\0b", 1)]


@pytest.mark.parametrize(
    "name",
    ["plain", "two words", "Güneş", "what?x=1", "100%", "%41", "a#b", "a&b=c;d", "file:x", "'", "\udcff"],
)
def test_a_database_lies_exactly_where_it_was_asked_for(name: str, tmp_path: Path) -> None:
    """Whatever a folder is called, also in ways that mean something in a URL, or that are not UTF-8."""
    folder = tmp_path / name / "gallery"
    folder.mkdir(parents=True)
    Store.create(folder / "gallery.db", fingerprint="f", dimension=3).close()
    assert [path.name for path in folder.iterdir()] == ["gallery.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    store = Store.open(folder / "gallery.db")
    with store.read() as reader:
        assert reader.generations()[1].dimension == 3
    store.close()


def test_a_relative_path_keeps_meaning_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.create(Path("gallery.db"), fingerprint="f", dimension=3)
    assert Path("gallery.db").is_file()
    store.close()


def test_identities_are_counted_the_most_photographed_first_then_by_name(store: Store) -> None:
    names = ["Kim", "Adi", None, "Bao", "Kim", None, "Adi", "Kim", None, None]
    add(store, *(new(name, number) for number, name in enumerate(names)))
    assert everything(store)[3] == [(None, 4), ("Kim", 3), ("Adi", 2), ("Bao", 1)]


def test_an_identity_is_one_row_however_often_it_is_enrolled(store: Store) -> None:
    add(store, new("Kim", 1), new("Kim", 2))
    add(store, new("Adi", 3), new("Kim", 4))
    assert identity_rows(store) == [(1, "Kim"), (2, "Adi")]
    with store.read() as reader:
        assert reader.face_ids_of("Kim") == [1, 2, 4]
        assert reader.face_ids_of("Nobody") == []


def test_an_identity_leaves_with_its_last_face(store: Store) -> None:
    add(store, new("Kim", 1), new("Kim", 2), new("Adi", 3), new(None, 4))
    with store.write() as writer:
        writer.remove_faces([1, 4])
    assert identity_rows(store) == [(1, "Adi"), (2, "Kim")]
    with store.write() as writer:
        writer.remove_faces([2, 999])
    assert identity_rows(store) == [(1, "Adi")]
    assert list(everything(store)[2]) == [3]


def test_face_ids_are_never_used_again(store: Store, reopen: Callable[[], Store]) -> None:
    assert add(store, new("Kim", 1), new("Kim", 2)) == [1, 2]
    with store.write() as writer:
        writer.remove_faces([1, 2])
    assert add(store, new("Kim", 1)) == [3]
    store.close()
    with closing(reopen()) as opened:
        assert add(opened, new("Adi", 4)) == [4]


def test_segment_ids_are_never_used_again(store: Store) -> None:
    first, second, third = (Segment(number, 10 * number, 99, sha256(number), 1) for number in (1, 2, 3))
    with store.write() as writer:
        writer.replace_segments([], [first, second])
    assert everything(store)[1] == [first, second]
    with store.write() as writer:
        assert writer.gallery().next_segment_id == 3
        writer.replace_segments([1, 2], [])
        assert writer.gallery().next_segment_id == 3
        writer.replace_segments([], [third])
    row, segments, _, _ = everything(store)
    assert (row.next_segment_id, segments) == (4, [third])


def test_the_check_before_a_write_takes_as_long_for_any_number_of_faces(store: Store) -> None:
    taken = [0]

    def step() -> int:
        taken[0] += 1
        return 0

    def count(driver: sqlite3.Connection, *_: object) -> None:
        driver.set_progress_handler(step, 1)

    event.listen(store.file.sql, "checkout", count)
    found = []
    for numbers in (range(1, 10), range(10, 3000)):
        add(store, *(new(f"person {number % 100}", number) for number in numbers))
        taken[0] = 0
        with store.read() as reader:
            assert reader.counter_problems() == []
        found.append(taken[0])
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("table", ["face", "photo", "identity"])
def test_a_counter_that_is_behind_is_found_before_a_write(table: str, store: Store) -> None:
    add(store, new("Kim", 1))
    with store.file.driver() as driver:
        driver.execute("PRAGMA foreign_keys = OFF")
        driver.execute(f"UPDATE {table} SET id = 9")
    with store.read() as reader:
        assert reader.counter_problems() == [
            f"the next number of a {table} is 2, which is not above all that are there"
        ]


def test_more_values_than_one_statement_takes_are_found_and_removed(store: Store) -> None:
    """SQLite limits the values of a statement (250,000 at most; some builds 999)."""
    number = 3_500
    ids = add(store, *(new(f"person {n % 1_100}", n) for n in range(number)))
    with store.read() as reader:
        assert sorted(reader.faces(range(-5, 260_000))) == ids
        assert reader.photos_by_sha256(sha256(n) for n in range(2 * number)).keys() == {
            sha256(n) for n in range(number)
        }
    with store.write() as writer:
        writer.remove_faces(ids[5:])
    assert sorted(everything(store)[2]) == ids[:5]


def test_nothing_asked_for_is_nothing_found(store: Store) -> None:
    with store.write() as writer:
        assert (writer.faces([]), writer.photos_by_sha256(iter([])), writer.face_ids_of("")) == ({}, {}, [])
        writer.remove_faces([])
        writer.replace_segments([], [])


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_reader_sees_one_snapshot_whatever_others_commit(store: Store, reopen: Callable[[], Store]) -> None:
    """Another thread adds through the same Store, and removes through another one."""
    add(store, new("Kim", 1))
    before = everything(store)
    other = reopen()

    def change() -> None:
        add(store, new("Adi", 2))
        with other.write() as writer:
            writer.remove_faces([1])
            writer.replace_segments([], [Segment(1, 1, 1, sha256(1), 1)])

    with store.read() as reader:
        assert reader.count() == 1
        in_a_thread(change)
        seen = reader.gallery(), reader.segments(), reader.faces(range(9)), reader.identities()
    other.close()
    assert seen == before
    assert [face.identity for face in everything(store)[2].values()] == ["Adi"]


def test_readers_do_not_wait_for_a_writer_and_do_not_see_what_it_has_not_committed(store: Store) -> None:
    seen: list[int] = []

    def read() -> None:
        with store.read() as reader:
            seen.append(reader.count())

    with store.write() as writer:
        writer.add_faces(1, [new("Kim", 1)])
        in_a_thread(read)
    read()
    assert seen == [0, 1]


def test_a_second_writer_waits_for_the_first(store: Store) -> None:
    """The second sees everything that the first did; neither fails, nor do they share an id."""
    threads = [threading.Thread(target=add, args=(store, new("Kim", number))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(everything(store)[2]) == list(range(1, 9))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_write_that_raises_never_was(error: type[BaseException], store: Store) -> None:
    add(store, new("Kim", 1))
    before = everything(store)

    def fail() -> None:
        with store.write() as writer:
            writer.remove_faces([1])
            writer.add_faces(2, [new("Adi", 2)])
            writer.replace_segments([], [Segment(1, 1, 1, sha256(1), 1)])
            raise error

    with pytest.raises(error):
        fail()
    assert everything(store) == before
    assert add(store, new("Adi", 2)) == [2]


def test_two_faces_with_the_same_bytes_are_damage_and_neither_is_stored(store: Store) -> None:
    with pytest.raises(GalleryDamaged, match="would be stored a second time; run `faceprint verify`"):
        add(store, new("Kim", 1), new("Kim", 1))
    assert everything(store)[2:] == ({}, [])


def test_a_full_disk_is_a_storage_error_and_the_write_never_was(store: Store, path: Path) -> None:
    """A real limit of the operating system, which SQLite runs into."""
    add(store, new("Kim", 1))
    before, limits = everything(store), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.with_name("gallery.db-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"^The database .*gallery\.db cannot be used: "):
            add(store, *(new(f"person {number}", number) for number in range(2, 900)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything(store) == before
    assert add(store, new("Adi", 2)) == [2]


# What is not a gallery's database


def test_a_missing_database_is_no_gallery(tmp_path: Path) -> None:
    with pytest.raises(GalleryError) as caught:
        Store.open(tmp_path / "gallery.db")
    assert str(caught.value) == f"{tmp_path} is not a gallery: it has no gallery.db."
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_databases_place_is_no_gallery(path: Path) -> None:
    path.mkdir()
    with pytest.raises(GalleryError, match="is a folder, not a database"):
        Store.open(path)


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"hello world\n" * 999,
        bytes(8192),
        b"SQLite format 3\0",
        b"SQLite format 3\0" + b"\xff" * 9000,
    ],
    ids=["short text", "long text", "zeros", "head only", "broken head"],
)
def test_a_file_that_is_not_sqlite_is_damage(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(GalleryDamaged, match=r"gallery\.db is .*restore it from a backup"):
        Store.open(path)


@pytest.mark.parametrize("statement", ["", "CREATE TABLE photo (id INTEGER)", "CREATE TABLE face (x)"])
def test_another_programs_database_is_damage_and_keeps_its_tables(statement: str, path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(GalleryDamaged) as caught:
        Store.open(path)
    assert str(caught.value) == f"{path} is a database, but not a gallery's; restore it from a backup."
    connection = sqlite3.connect(path)
    assert [row for (row,) in connection.execute("SELECT sql FROM sqlite_master")] == [statement][
        : bool(statement)
    ]
    connection.close()


def test_an_empty_file_is_damage(path: Path) -> None:
    path.touch()
    with pytest.raises(GalleryDamaged):
        Store.open(path)


def test_a_database_that_was_cut_is_damage(store: Store, path: Path) -> None:
    add(store, *(new(f"person {number}", number) for number in range(2_000)))
    store.close()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(GalleryDamaged, match="database disk image is malformed"):
        everything(Store.open(path))


def test_a_database_without_its_own_row_is_damage(store: Store, path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM gallery")
    connection.commit()
    connection.close()
    with (
        pytest.raises(GalleryDamaged, match="has lost its own row; restore it from a backup"),
        store.read() as reader,
    ):
        reader.gallery()


def test_a_folder_that_does_not_exist_cannot_get_a_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be made: no such file or directory"):
        Store.create(tmp_path / "none" / "gallery.db", fingerprint="f", dimension=3)


# Traces


def vacuum(store: Store) -> None:
    """Writes the file anew, and empties its log."""
    store.file.vacuum()
    assert store.file.checkpoint(timeout=0)


def zero(store: Store) -> None:
    """Empties the log, and zeroes the bytes that no row uses."""
    assert store.file.checkpoint(timeout=0)
    with store.write() as writer:
        assert store.zero_unused(writer)
        writer.changed = True


@pytest.fixture(params=[vacuum, zero])
def erase_traces(request: pytest.FixtureRequest) -> Callable[[Store], None]:
    return request.param


def on_disk(path: Path) -> bytes:
    """The bytes of the database and of its log."""
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_removed_faces_leave_no_byte_in_the_database_or_its_log(
    erase_traces: Callable[[Store], None], store: Store, path: Path
) -> None:
    add(store, NewFace("Zephyr Kant", "/private/zephyr.jpg", sha256("z")), new("Kim", 1))
    needles = [b"Zephyr Kant", b"/private/zephyr.jpg", sha256("z").encode()]
    assert [needle in on_disk(path) for needle in needles] == [True] * 3
    with store.write() as writer:
        writer.remove_faces([1])
    assert [needle in on_disk(path) for needle in needles] == [True] * 3  # the log still has them
    erase_traces(store)
    assert [needle in on_disk(path) for needle in needles] == [False] * 3
    assert b"/photos/1.jpg" in on_disk(path)
    assert [face.identity for face in everything(store)[2].values()] == ["Kim"]


@pytest.mark.parametrize("seed", [0, 2])
def test_removed_faces_leave_no_byte_in_a_large_database_either(
    erase_traces: Callable[[Store], None], seed: int, tmp_path: Path
) -> None:
    """SQLite moves rows between pages as trees grow, and by itself forgets to zero where they were."""
    rng = random.Random(seed)
    path = tmp_path / "gallery.db"
    store = Store.create(path, fingerprint="f", dimension=4)
    people = [f"Person{number:03d}-{rng.random()}" for number in range(40)]
    for _ in range(60):
        names = [rng.choice(people) for _ in range(40)]
        add(
            store,
            *(
                NewFace(name, f"/data/{rng.random()}/{name}/{rng.random()}.jpg", sha256(rng.random()))
                for name in names
            ),
        )
    for victim in rng.sample(people, 15):
        with store.write() as writer:
            gone = writer.faces(writer.face_ids_of(victim))
            writer.remove_faces(gone)
        erase_traces(store)
        data = on_disk(path)
        needles = [victim, *(face.path or "" for face in gone.values()), *(f.sha256 for f in gone.values())]
        assert [needle for needle in needles if needle.encode() in data] == []
    assert everything(store)[3] != []
    store.close()


def test_traces_are_erased_under_the_eyes_of_an_idle_second_store(
    erase_traces: Callable[[Store], None], store: Store, path: Path
) -> None:
    """A service that has the gallery open, and is between two searches, keeps nothing alive."""
    add(store, NewFace("Zephyr Kant", None, sha256("z")))
    other = Store.open(path)
    assert everything(other)[3] == [("Zephyr Kant", 1)]
    with store.write() as writer:
        writer.remove_faces([1])
    erase_traces(store)
    assert b"Zephyr" not in on_disk(path)
    assert everything(other)[3] == []
    other.close()


def test_a_closed_database_is_one_file(store: Store, path: Path) -> None:
    """SQLite folds the log into it, so copying the folder of a closed gallery is a backup."""
    add(store, new("Kim", 1))
    assert sorted(os.listdir(path.parent)) == ["gallery.db", "gallery.db-shm", "gallery.db-wal"]
    store.close()
    assert os.listdir(path.parent) == ["gallery.db"]
