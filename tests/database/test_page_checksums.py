"""Page sums: every flipped byte is found, and nothing that a crash can leave behind is called damage."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.database import page_checksums, unused_bytes
from retrieval.database.page_checksums import Damage, PageCheck, check_pages, checkpoint, discard, sums_path
from retrieval.database.unused_bytes import OwnDescriptor
from retrieval.errors import GalleryDamaged, StorageError

# As the migrations leave it: what stands before the revision has no fixed length.
TABLES = """
CREATE TABLE gallery (
    id INTEGER PRIMARY KEY, uuid VARCHAR(36) NOT NULL, next_face_id INTEGER NOT NULL,
    revision INTEGER NOT NULL, revision_check INTEGER NOT NULL, next_identity_id INTEGER NOT NULL,
    unfinished TEXT
);
CREATE TABLE face (id INTEGER PRIMARY KEY, name TEXT, sha256 TEXT UNIQUE);
CREATE INDEX ix_face_name ON face (name);
"""
UUID = "a6c5bb5e-55f8-4eb5-b2b6-0a1c2fd7ac3b"
RAISE = "UPDATE gallery SET revision = revision + 1, revision_check = -(revision + 1)"


# Hundreds of databases with a dozen fsyncs each; here those cost nothing, where there is such a place.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def connect(path: Path, page_size: int = 512, *, timeout: float = 0) -> sqlite3.Connection:
    driver = sqlite3.connect(path, isolation_level=None, timeout=timeout)
    driver.execute(f"PRAGMA page_size = {page_size}")
    driver.execute("PRAGMA journal_mode = WAL")
    driver.execute("PRAGMA wal_autocheckpoint = 0")
    driver.execute("PRAGMA secure_delete = ON")
    driver.execute("PRAGMA cache_size = 10")  # a long transaction has frames in the log before its commit
    driver.execute("PRAGMA synchronous = OFF")  # nothing here loses power
    return driver


def create(path: Path, page_size: int = 512) -> sqlite3.Connection:
    driver = connect(path, page_size)
    driver.executescript(TABLES)
    driver.execute(f"INSERT INTO gallery VALUES (1, '{UUID}', 1, 1, -1, 1, NULL)")
    return driver


@contextmanager
def transaction(driver: sqlite3.Connection, end: str = "COMMIT") -> Iterator[None]:
    driver.execute("BEGIN IMMEDIATE")
    yield
    driver.execute(RAISE)
    driver.execute(end)


def insert(driver: sqlite3.Connection, number: int, *, end: str = "COMMIT") -> None:
    with transaction(driver, end):
        driver.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO face (name, sha256) SELECT 'Zoë ' || i, hex(randomblob(16)) FROM n",
            (number,),
        )


def delete(driver: sqlite3.Connection, remainder: int) -> None:
    with transaction(driver):
        driver.execute("DELETE FROM face WHERE id % 3 = ?", (remainder,))


def update(driver: sqlite3.Connection, which: str = "max") -> None:
    with transaction(driver):
        driver.execute(f"UPDATE face SET name = 'Ann' WHERE id = (SELECT {which}(id) FROM face)")


def vacuum(driver: sqlite3.Connection, path: Path) -> None:
    discard(path)
    driver.execute("VACUUM")


def zero(driver: sqlite3.Connection, path: Path) -> bool:
    """Zeroes what no row uses, if no reader keeps an older snapshot; returns whether it did."""
    if not checkpoint(driver, path, mode="TRUNCATE"):
        return False
    with closing(OwnDescriptor(path)) as own, transaction(driver):
        assert unused_bytes.zero(driver, own)
    return True


def copy(path: Path, folder: Path) -> Path:
    """What a killed process leaves: the files as they are, and nobody who has them open."""
    folder.mkdir()
    for file in (path, Path(f"{path}-wal"), sums_path(path)):
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    return folder / path.name


def page_count(driver: sqlite3.Connection) -> int:
    return driver.execute("PRAGMA page_count").fetchall()[0][0]


@contextmanager
def flipped(file: Path, offset: int, mask: int = 0x01) -> Iterator[None]:
    """A file with one byte changed, for the length of a with statement. Nobody may have it open."""
    with open(file, "r+b", buffering=0) as raw:
        (byte,) = os.pread(raw.fileno(), 1, offset)
        os.pwrite(raw.fileno(), bytes([byte ^ mask]), offset)
        yield
        os.pwrite(raw.fileno(), bytes([byte]), offset)


def settled(path: Path, page_size: int) -> int:
    """A database that was written, thinned out and closed; returns its number of pages."""
    with closing(create(path, page_size)) as driver:
        insert(driver, 9)
        checkpoint(driver, path, mode="TRUNCATE")
        insert(driver, 6)
        delete(driver, 1)
        delete(driver, 2)
        assert checkpoint(driver, path, mode="TRUNCATE")
        count = page_count(driver)
    assert check_pages(path) == PageCheck((), count, out_of_date=False)
    assert path.stat().st_size == count * page_size
    return count


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # Letters that mean something in a URL.
    folder = tmp_path / "a b%20c?d#e&ü"
    folder.mkdir()
    return folder / "gallery.db"


# Every byte


@pytest.mark.parametrize(("page_size", "step"), [(512, 1), (4096, 11)])
def test_a_flip_in_any_byte_of_the_database_is_found_and_its_page_is_named(
    path: Path, page_size: int, step: int
) -> None:
    """One bit of each byte, in turns another one: a sum covers all bits of its page alike."""
    settled(path, page_size)
    for offset in range(0, path.stat().st_size, step):
        mask = 1 << offset % 8
        with flipped(path, offset, mask):
            found = check_pages(path)
        (damage,) = found.damage
        assert (damage.file, damage.pages) == (path, (offset // page_size + 1,)), (offset, mask)
        assert not found.out_of_date
    assert check_pages(path).damage == ()


def test_a_flip_in_any_byte_of_the_sums_is_found_and_the_sums_are_named(path: Path) -> None:
    settled(path, 512)
    for offset in range(sums_path(path).stat().st_size):
        for mask in (0x01, 0x80, 0xFF):
            with flipped(sums_path(path), offset, mask):
                (damage,) = check_pages(path).damage
            assert damage == Damage(sums_path(path), (), damage.problem), offset
    assert check_pages(path).damage == ()


@pytest.mark.parametrize("revision", [1, 127, 128, 255, 256, 511, 32767, 65535, 8388608])
def test_a_flip_in_the_gallerys_row_is_never_taken_for_a_newer_state(path: Path, revision: int) -> None:
    with closing(create(path)) as driver:
        driver.execute("UPDATE gallery SET revision = ?, revision_check = ?", (revision - 1, 1 - revision))
        update(driver)
        checkpoint(driver, path, mode="TRUNCATE")
        ((page,),) = driver.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'gallery'")
    content = path.read_bytes()
    row = content.index(b"a6c5bb5e") - 16
    parts = (range(page * 512 - 512, page * 512 - 500), range(row, row + 16), range(row + 52, page * 512))
    for offset in (offset for part in parts for offset in part):
        for mask in (*(1 << bit for bit in range(8)), 0xFF):
            with flipped(path, offset, mask):
                found = check_pages(path)
            assert [damage.pages for damage in found.damage] == [(page,)], (offset, mask)


@pytest.mark.parametrize("cut", [0, 1, 99, 511, 512, 1000, -512, -1])
def test_a_database_that_lost_its_end_is_damaged(path: Path, cut: int) -> None:
    count = settled(path, 512)
    os.truncate(path, cut if cut >= 0 else count * 512 + cut)
    (damage,) = check_pages(path).damage
    assert (damage.file, damage.pages[-1]) == (path, count)


@pytest.mark.parametrize("more", [1, 512, 5000])
def test_a_database_that_has_more_than_was_written_is_damaged(path: Path, more: int) -> None:
    count = settled(path, 512)
    os.truncate(path, count * 512 + more)
    (damage,) = check_pages(path).damage
    assert (damage.file, damage.pages[0]) == (path, count + 1)


def test_a_database_that_lost_its_end_is_damaged_also_while_a_log_stands(path: Path, tmp_path: Path) -> None:
    count = settled(path, 512)
    with closing(connect(path)) as driver:
        update(driver)
        left = copy(path, tmp_path / "left")
    unsettled = {number for number, _ in page_checksums._frames(left)}
    content = left.read_bytes()
    os.truncate(left, 1024)
    (damage,) = check_pages(left).damage
    # A page of zeros comes back with the file's length, which the next checkpoint sets.
    lost = {number for number in range(3, count + 1) if any(content[number * 512 - 512 : number * 512])}
    assert damage.pages == tuple(sorted(lost - unsettled)) != ()


def test_what_an_older_log_left_in_the_file_excepts_no_page(path: Path, tmp_path: Path) -> None:
    with closing(create(path)) as driver:
        insert(driver, 20)
        assert checkpoint(driver, path, mode="RESTART")
        update(driver)
        left = copy(path, tmp_path / "left")
        count = page_count(driver)
    assert Path(f"{left}-wal").stat().st_size > count * 512
    found = check_pages(left)
    assert count - 6 <= found.compared < count  # one row of each table, and of its indexes
    assert found == PageCheck((), found.compared, out_of_date=False)


def test_pages_that_changed_places_are_damaged(path: Path) -> None:
    count = settled(path, 512)
    content = path.read_bytes()
    path.write_bytes(content[:1024] + content[1536:2048] + content[1024:1536] + content[2048:])
    assert check_pages(path) == PageCheck(
        (Damage(path, (3, 4), check_pages(path).damage[0].problem),), count, False
    )


def test_what_is_found_is_one_sentence_that_says_what_to_do(path: Path) -> None:
    settled(path, 512)
    with flipped(path, 700):
        (damage,) = check_pages(path).damage
    assert damage.problem == (
        f"{path} is damaged: 1 of its pages (2) are not what was written; restore it from a backup."
    )
    with flipped(sums_path(path), 70):
        (damage,) = check_pages(path).damage
    assert damage.problem == (
        f"{sums_path(path)} is damaged; `faceprint compact {path.parent}` makes it anew."
    )


def test_a_file_that_is_no_database_is_damage_even_without_sums(path: Path) -> None:
    path.write_bytes(b"nothing of the kind" * 100)
    (damage,) = check_pages(path).damage
    assert (damage.file, damage.pages) == (path, ())


def test_a_checkpoint_does_not_bless_a_flip_in_a_page_that_it_does_not_write(path: Path) -> None:
    count = settled(path, 512)
    with flipped(path, count * 512 - 100):
        with closing(connect(path)) as driver:
            update(driver)
            assert checkpoint(driver, path, mode="TRUNCATE")
            update(driver)
            assert checkpoint(driver, path, mode="PASSIVE")
        (damage,) = check_pages(path).damage
    assert damage.pages == (count,)


def test_a_checkpoint_heals_damaged_sums(path: Path) -> None:
    count = settled(path, 512)
    sums_path(path).write_bytes(b"")
    assert check_pages(path).damage[0].file == sums_path(path)
    with closing(connect(path)) as driver:
        assert checkpoint(driver, path, mode="PASSIVE")
    assert check_pages(path) == PageCheck((), count, out_of_date=False)


def test_sums_of_another_version_are_out_of_date_and_are_made_anew(path: Path) -> None:
    count = settled(path, 512)
    sums = page_checksums._pack(page_checksums._Sums(512, 9, b"12345678"))
    body = sums[:-32].replace(b"sums 1", b"sums 2")
    sums_path(path).write_bytes(body + page_checksums.hashlib.sha256(body).digest())
    assert check_pages(path) == PageCheck((), 0, out_of_date=True)
    with closing(connect(path)) as driver:
        checkpoint(driver, path, mode="PASSIVE")
    assert check_pages(path) == PageCheck((), count, out_of_date=False)


# Crashes


def test_whatever_stands_on_disk_between_two_steps_is_never_called_damage(path: Path, tmp_path: Path) -> None:
    """Also where a process is killed between the copying, the sums and the emptying of the log."""
    moments: list[Path] = []

    def moment(_statement: str = "") -> None:
        moments.append(copy(path, tmp_path / f"moment {len(moments)}"))

    with closing(create(path)) as driver:
        driver.set_trace_callback(moment)
        for size in (3, 40, 1):
            insert(driver, size)
            checkpoint(driver, path, mode="PASSIVE")
            delete(driver, 1)
            insert(driver, 30, end="ROLLBACK")
            checkpoint(driver, path, mode="TRUNCATE")
            update(driver)
        insert(driver, 60)  # on pages that the vacuumed database has no more
        delete(driver, 1)
        delete(driver, 2)
        vacuum(driver, path)
        checkpoint(driver, path, mode="TRUNCATE")
        moment()
    for left in moments:
        assert check_pages(left).damage == (), left
        with closing(connect(left)) as driver:  # recovers, and copies the log at its close
            driver.execute("SELECT * FROM gallery").fetchall()
        assert check_pages(left).damage == (), left
        with closing(connect(left)) as driver:
            checkpoint(driver, left, mode="TRUNCATE")
            assert check_pages(left) == PageCheck((), page_count(driver), out_of_date=False)


def test_a_killed_writer_leaves_good_sums_while_its_log_stands(path: Path, tmp_path: Path) -> None:
    with closing(create(path)) as driver:
        insert(driver, 40)
        checkpoint(driver, path, mode="TRUNCATE")
        update(driver)
        left = copy(path, tmp_path / "left")
        count = page_count(driver)
    assert 0 < check_pages(left).compared < count
    assert check_pages(left) == PageCheck((), check_pages(left).compared, out_of_date=False)


def test_a_log_that_sqlite_copied_by_itself_makes_the_sums_out_of_date_and_no_more(path: Path) -> None:
    with closing(create(path)) as driver:
        insert(driver, 40)
        checkpoint(driver, path, mode="TRUNCATE")
        update(driver)
    assert check_pages(path) == PageCheck((), 0, out_of_date=True)
    with closing(connect(path)) as driver:
        checkpoint(driver, path, mode="PASSIVE")
        assert check_pages(path) == PageCheck((), page_count(driver), out_of_date=False)


def test_missing_sums_are_out_of_date_and_no_damage(path: Path) -> None:
    settled(path, 512)
    discard(path)
    discard(path)
    assert not sums_path(path).exists()
    assert check_pages(path) == PageCheck((), 0, out_of_date=True)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 60),
    copied=st.sets(st.integers(1, 60)),
    length=st.integers(0, 60),
    thinned=st.booleans(),
    out_of_date=st.booleans(),
)
def test_a_checkpoint_that_was_cut_after_any_of_its_pages_is_no_damage(
    rows: int, copied: set[int], length: int, thinned: bool, out_of_date: bool
) -> None:
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        path = Path(folder) / "gallery.db"
        with closing(create(path)) as driver:
            insert(driver, 20)
            checkpoint(driver, path, mode="TRUNCATE")
            if out_of_date:
                update(driver, "min")
        with closing(connect(path)) as driver:
            insert(driver, rows)
            if thinned:
                delete(driver, 1)
            left = copy(path, Path(folder) / "left")
            checkpoint(driver, path, mode="TRUNCATE")
        before, after = left.read_bytes(), path.read_bytes()
        end = max(len(before), min(len(after), length * 512))
        mixed = bytearray(before + bytes(end - len(before)))
        for start in (number * 512 - 512 for number in copied if number * 512 <= end):
            mixed[start : start + 512] = after[start : start + 512]
        left.write_bytes(mixed)
        assert check_pages(left).damage == ()
        with closing(connect(left)) as driver:
            checkpoint(driver, left, mode="TRUNCATE")
        assert left.read_bytes() == after
        assert check_pages(left).damage == ()
        assert check_pages(left).compared == len(after) // 512


def test_a_readers_old_snapshot_keeps_the_log_and_the_sums_are_good(path: Path) -> None:
    with closing(create(path)) as driver, closing(connect(path)) as reader:
        insert(driver, 20)
        checkpoint(driver, path, mode="TRUNCATE")
        insert(driver, 1)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM face").fetchall()
        delete(driver, 1)
        insert(driver, 40)
        for mode in ("PASSIVE", "FULL", "TRUNCATE"):
            assert not checkpoint(driver, path, mode=mode)
            assert check_pages(path).damage == ()
            assert not check_pages(path).out_of_date
        reader.execute("COMMIT")
        assert checkpoint(driver, path, mode="FULL")
        assert checkpoint(driver, path, mode="TRUNCATE")
        assert check_pages(path) == PageCheck((), page_count(driver), out_of_date=False)


def test_a_reader_who_keeps_a_vacuumed_database_long_is_no_damage_and_its_end_neither(path: Path) -> None:
    with closing(create(path)) as driver:
        insert(driver, 60)
        delete(driver, 1)
        delete(driver, 2)
        checkpoint(driver, path, mode="TRUNCATE")
        with closing(connect(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM face").fetchall()
            vacuum(driver, path)
            assert not checkpoint(driver, path, mode="PASSIVE")
            count = page_count(driver)
            assert path.stat().st_size > count * 512
            assert check_pages(path).damage == ()
            assert not check_pages(path).out_of_date
    assert path.stat().st_size == count * 512
    assert check_pages(path) == PageCheck((), count, out_of_date=False)


def test_a_log_that_was_removed_by_hand_is_not_written_into_the_sums(path: Path) -> None:
    with closing(create(path)) as driver:
        insert(driver, 5)
        checkpoint(driver, path, mode="TRUNCATE")
        before = sums_path(path).read_bytes()
        update(driver)
        os.unlink(f"{path}-wal")
        assert not checkpoint(driver, path, mode="TRUNCATE")
        assert sums_path(path).read_bytes() == before
    assert check_pages(path) == PageCheck((), 0, out_of_date=True)


def unused(path: Path, page_size: int) -> bytes:
    """The bytes that are not zero between the pointers and the cells of the pages of tables and indexes."""
    data, found = path.read_bytes(), b""
    for start in range(page_size, len(data), page_size):
        page = data[start : start + page_size]
        if page[0] in (2, 5, 10, 13):
            pointers = (8 if page[0] > 8 else 12) + 2 * int.from_bytes(page[3:5], "big")
            found += page[pointers : int.from_bytes(page[5:7], "big")].replace(b"\0", b"")
    return found


class Life:
    """A gallery's database and whatever happens to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "gallery.db"
        self.driver = create(self.path)
        self.readers: list[sqlite3.Connection] = []
        self.crashes = 0

    def step(self, name: str, number: int) -> None:
        match name:
            case "insert":
                insert(self.driver, number)
            case "rollback":
                insert(self.driver, 3 * number, end="ROLLBACK")
            case "delete":
                delete(self.driver, number % 3)
            case "update":
                update(self.driver)
            case "passive":
                checkpoint(self.driver, self.path, mode="PASSIVE")
            case "truncate":
                checkpoint(self.driver, self.path, mode="TRUNCATE")
            case "vacuum":
                vacuum(self.driver, self.path)
            case "zero":
                zero(self.driver, self.path)
            case "hold":
                self.readers.append(connect(self.path))
                self.readers[-1].execute("BEGIN")
                self.readers[-1].execute("SELECT count(*) FROM face").fetchall()
            case "release":
                self.release()
            case "close":
                self.close()
                self.driver = connect(self.path)
            case "crash":
                self.crash(copy(self.path, self.next_folder()))
            case "crash in a checkpoint":
                self.crash(self.killed_checkpoint(number))
            case "crash in a zeroing":
                self.crash(self.killed_zeroing(number))

    def killed_checkpoint(self, number: int) -> Path:
        left: list[Path] = []
        self.driver.set_trace_callback(lambda _: left.append(copy(self.path, self.next_folder())))
        checkpoint(self.driver, self.path, mode="TRUNCATE")
        self.driver.set_trace_callback(None)
        return left[number % len(left)]

    def killed_zeroing(self, number: int) -> Path:
        left = [copy(self.path, self.next_folder())]

        def write(descriptor: int, data: bytes, offset: int) -> int:
            left.append(copy(self.path, self.next_folder()))
            return pwrite(descriptor, data, offset)

        pwrite = os.pwrite
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "pwrite", write)
            zero(self.driver, self.path)
        return left[number % len(left)]

    def next_folder(self) -> Path:
        self.crashes += 1
        return self.folder / str(self.crashes)

    def crash(self, left: Path) -> None:
        self.close()
        self.path = left
        self.driver = connect(left)

    def release(self) -> None:
        while self.readers:
            self.readers.pop().close()

    def close(self) -> None:
        self.release()
        self.driver.close()


STEPS = [
    *("insert", "update", "passive", "truncate") * 2,
    *("rollback", "delete", "vacuum", "zero", "hold", "release", "close"),
    *("crash", "crash in a checkpoint", "crash in a zeroing"),
]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 30)), max_size=20),
    where=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_no_life_of_a_database_is_called_damage_and_a_flip_at_its_end_is(
    steps: list[tuple[str, int]], where: float, mask: int
) -> None:
    with TemporaryDirectory(dir=IN_MEMORY) as folder:
        life = Life(Path(folder))
        try:
            for name, number in steps:
                life.step(name, number)
                assert check_pages(life.path).damage == (), name
            life.release()
            assert zero(life.driver, life.path)
            assert checkpoint(life.driver, life.path, mode="TRUNCATE")
            assert unused(life.path, 512) == b""
            count = page_count(life.driver)
        finally:
            life.close()
        assert check_pages(life.path) == PageCheck((), count, out_of_date=False)
        offset = int(where * count * 512)
        with flipped(life.path, offset, mask):
            assert [damage.pages for damage in check_pages(life.path).damage] == [(offset // 512 + 1,)]


# What they leave alone


VISIT = """
import sqlite3, sys

visitor = sqlite3.connect(sys.argv[1])
visitor.execute("SELECT * FROM face").fetchall()
visitor.close()
"""


def test_neither_a_check_nor_a_full_reading_lets_go_of_this_process_locks(path: Path) -> None:
    """If they did, the other process would be the last one, and would delete the log that is written here."""
    with closing(create(path)) as driver:
        insert(driver, 5)
        checkpoint(driver, path, mode="PASSIVE")
        discard(path)
        checkpoint(driver, path, mode="PASSIVE")
        update(driver)
        check_pages(path)
        subprocess.run([sys.executable, "-c", VISIT, os.fspath(path)], check=True)
        assert Path(f"{path}-wal").stat().st_size > 0
        assert checkpoint(driver, path, mode="TRUNCATE")
        assert not check_pages(path).out_of_date


def test_sums_that_already_say_it_are_not_written_again(path: Path) -> None:
    with closing(create(path)) as driver:
        checkpoint(driver, path, mode="TRUNCATE")
        before = sums_path(path).stat()
        assert checkpoint(driver, path, mode="TRUNCATE")
        assert sums_path(path).stat() == before


def test_a_check_leaves_no_descriptor_open(path: Path) -> None:
    settled(path, 512)
    before = os.listdir("/dev/fd")
    check_pages(path)
    with flipped(path, 20):
        check_pages(path)
    assert os.listdir("/dev/fd") == before


def test_a_check_beside_threads_that_open_and_close_the_database_reads_the_right_file(path: Path) -> None:
    count = settled(path, 512)
    done = threading.Event()

    def visit() -> None:
        while not done.is_set():
            with closing(sqlite3.connect(path, timeout=600)) as other:
                other.execute("SELECT * FROM face").fetchall()
            with open(__file__, "rb"):  # takes the number of the descriptor that was closed
                pass

    threads = [threading.Thread(target=visit) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        found = {check_pages(path) for _ in range(200)}
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert found == {PageCheck((), count, out_of_date=False)}


def test_a_number_that_becomes_another_files_while_it_is_looked_at_is_not_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = settled(path, 512)
    looked_at = os.open(path, os.O_RDWR)  # its number is below that of the check's own connection
    another = os.open(__file__, os.O_RDONLY)
    fcntl_of = page_checksums.fcntl.fcntl

    def exchanged(descriptor: int, command: int) -> int:
        if descriptor == looked_at and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.dup2(another, looked_at)
        return int(fcntl_of(descriptor, command))

    monkeypatch.setattr(page_checksums.fcntl, "fcntl", exchanged)
    try:
        assert check_pages(path) == PageCheck((), count, out_of_date=False)
        assert os.path.samestat(os.fstat(looked_at), os.fstat(another))  # it was exchanged
    finally:
        os.close(looked_at)
        os.close(another)


# Errors


def test_a_missing_database_is_a_storage_error(path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be used"):
        check_pages(path)


def test_sums_that_cannot_be_written_are_a_storage_error(path: Path) -> None:
    with closing(create(path)) as driver:
        (sums_path(path) / "notes").mkdir(parents=True)
        with pytest.raises(StorageError, match=r"gallery\.sums cannot be used"):
            checkpoint(driver, path, mode="TRUNCATE")
        (damage,) = check_pages(path).damage
        assert "gallery.sums is damaged (it is a folder, not a file)" in damage.problem
        with pytest.raises(StorageError, match=r"gallery\.sums cannot be used"):
            discard(path)


def test_a_checkpoint_of_a_database_that_contradicts_itself_says_so(path: Path) -> None:
    with closing(create(path)) as driver:
        driver.execute("UPDATE gallery SET revision_check = 7")
        with pytest.raises(GalleryDamaged, match="contradicts itself"):
            checkpoint(driver, path, mode="TRUNCATE")


def test_a_checkpoint_of_any_database_with_a_flip_in_its_tables_names_works_or_says_so(path: Path) -> None:
    """Also where SQLite's own message is no UTF-8."""
    settled(path, 512)
    start = path.read_bytes().index(b"CREATE TABLE gallery")
    refused = 0
    for offset in range(start, start + 60):
        with flipped(path, offset, 0x80):
            with closing(sqlite3.connect(path, isolation_level=None)) as driver:
                try:
                    checkpoint(driver, path, mode="PASSIVE")
                except GalleryDamaged:
                    refused += 1
            assert check_pages(path).damage[0].file == path
    assert 0 < refused <= 60


@pytest.mark.parametrize("content", [b"nothing of the kind" * 100, b""])
def test_a_checkpoint_of_what_is_no_gallerys_database_says_so(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as driver,
        pytest.raises((GalleryDamaged, StorageError)),
    ):
        checkpoint(driver, path, mode="TRUNCATE")
