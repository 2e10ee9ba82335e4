"""Unused bytes: no copy of a deleted row stays in the database, and nothing else of it changes."""

import errno
import os
import random
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from retrieval.database import unused_bytes
from retrieval.database.page_checksums import check_pages, checkpoint
from retrieval.database.unused_bytes import OwnDescriptor
from retrieval.errors import GalleryDamaged, StorageError
from tests.database.test_page_checksums import connect, create, flipped, transaction, unused, zero

PAGE = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database in which SQLite has left copies of rows: names in no order, half of them deleted again."""
    path = tmp_path / "gallery #1?.db"
    with closing(create(path)) as driver:
        numbers = random.Random(1)
        with transaction(driver):
            for number in numbers.sample(range(1000), 1000):
                name = f"person {number:03d}" + "." * numbers.randrange(40)
                driver.execute("INSERT INTO face (name, sha256) VALUES (?, ?)", (name, f"{number:032d}"))
        with transaction(driver):
            driver.execute("DELETE FROM face WHERE id % 2 = 0")
        assert checkpoint(driver, path, mode="TRUNCATE")
    assert b"person" in unused(path, PAGE)
    return path


@pytest.fixture
def driver(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect(path)) as driver:
        yield driver


def rows(driver: sqlite3.Connection) -> list[tuple[object, ...]]:
    return driver.execute("SELECT * FROM face ORDER BY name").fetchall()


def content(path: Path) -> bytes:
    """The bytes of the database and of its log."""
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def traces(path: Path) -> list[str]:
    """The names of deleted rows that are somewhere in the database or its log."""
    data = content(path)
    with closing(connect(path)) as driver:
        alive = {name[:10] for (name,) in driver.execute("SELECT name FROM face")}
    names = {f"person {number:03d}" for number in range(1000)}
    return sorted(name for name in names - alive if name.encode() in data)


def test_no_byte_of_a_deleted_row_is_left_and_all_others_are_as_before(
    path: Path, driver: sqlite3.Connection
) -> None:
    assert traces(path) != []
    before = rows(driver)
    assert zero(driver, path)
    assert checkpoint(driver, path, mode="TRUNCATE")
    assert traces(path) == []
    assert unused(path, PAGE) == b""
    assert rows(driver) == before
    assert driver.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert check_pages(path).damage == ()


def test_connections_that_had_pages_in_memory_do_not_write_them_back(
    path: Path, driver: sqlite3.Connection
) -> None:
    gone = traces(path)
    with closing(connect(path)) as other:
        for one in (driver, other):
            one.execute("PRAGMA cache_size = 10000")
        assert checkpoint(driver, path, mode="TRUNCATE")
        assert rows(driver) == rows(other)  # both have all pages in memory, as they are before
        with closing(OwnDescriptor(path)) as own, transaction(driver):
            assert unused_bytes.zero(driver, own)
            driver.execute("DELETE FROM face WHERE id % 5 = 0")
        with transaction(other):
            other.execute("DELETE FROM face WHERE id % 5 = 1")
        assert checkpoint(driver, path, mode="TRUNCATE")
        assert [name for name in gone if name.encode() in content(path)] == []


def test_a_damaged_page_stays_damaged_in_the_eyes_of_the_checksums(path: Path) -> None:
    """Its new checksum must not hide that somebody else changed the page before."""
    number = page_with_traces(path)
    # The last byte of a page is of a cell.
    with flipped(path, number * PAGE - 1):
        with closing(connect(path)) as driver:
            assert zero(driver, path)
            assert checkpoint(driver, path, mode="TRUNCATE")
            found = check_pages(path)
        assert [one.pages for one in found.damage] == [(number,)]


def unused_in(page: bytes) -> bool:
    start = 8 + 2 * int.from_bytes(page[3:5], "big")
    return any(page[start : int.from_bytes(page[5:7], "big")])


def page_with_traces(path: Path) -> int:
    """The number of a page of an index that has copies of deleted rows, and no deleted cell."""
    data = path.read_bytes()
    pages = enumerate((data[start : start + PAGE] for start in range(0, len(data), PAGE)), 1)
    return next(n for n, page in pages if page[:3] == b"\x0a\0\0" and unused_in(page))


@pytest.mark.parametrize("change", ["log", "auto_vacuum"])
def test_where_it_is_not_safe_nothing_is_changed(change: str, path: Path, tmp_path: Path) -> None:
    """Frames in the log, pages of other kinds."""
    if change == "auto_vacuum":
        with closing(sqlite3.connect(path)) as driver:
            driver.executescript("PRAGMA journal_mode = DELETE; PRAGMA auto_vacuum = FULL; VACUUM;")
    with closing(connect(path)) as driver, closing(OwnDescriptor(path)) as own:
        if change == "log":
            with transaction(driver):
                driver.execute("DELETE FROM face WHERE id = 1")
        before = path.read_bytes()
        driver.execute("BEGIN IMMEDIATE")
        assert not unused_bytes.zero(driver, own)
        driver.execute("ROLLBACK")
        assert path.read_bytes() == before


def test_its_descriptor_is_its_own_while_others_open_and_close_the_database(path: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            with unused_bytes.OPENING:
                one = sqlite3.connect(path, check_same_thread=False)
            one.execute("SELECT count(*) FROM face").fetchall()
            one.close()

    with closing(connect(path, timeout=30)) as driver:
        assert driver.execute("SELECT count(*) FROM face").fetchall() == [(500,)]
        threads = [threading.Thread(target=come_and_go) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                with closing(OwnDescriptor(path)) as own:
                    number = own.number()
                    assert number is not None
                    assert os.path.samestat(os.fstat(number), path.stat())
                    assert own.number() == number
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_there_is_one_descriptor_however_many_use_it_and_none_after_the_last(
    path: Path, driver: sqlite3.Connection
) -> None:
    before, seen = len(os.listdir("/dev/fd")), set()
    first: OwnDescriptor | None = unused_bytes.shared(path)
    assert first is not None
    assert first.number() is not None
    for _ in range(30):
        assert checkpoint(driver, path, mode="TRUNCATE")
        another = unused_bytes.shared(path)
        assert another is first
        with transaction(driver):
            assert unused_bytes.zero(driver, another)
        del another
        seen.add(len(os.listdir("/dev/fd")))
    assert len(seen) == 1
    driver.close()
    first = None
    assert len(os.listdir("/dev/fd")) < before


def test_a_write_that_the_disk_takes_in_part_is_an_error_and_the_next_zeroing_does_the_rest(
    path: Path, driver: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(descriptor: int, data: bytes, offset: int) -> int:
        return pwrite(descriptor, data[: len(data) // 2], offset)

    pwrite = os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", half)
        with pytest.raises(StorageError, match="no space left"):
            zero(driver, path)
    driver.execute("ROLLBACK")
    assert check_pages(path).damage == ()
    assert zero(driver, path)
    assert checkpoint(driver, path, mode="TRUNCATE")
    assert unused(path, PAGE) == b""
    assert check_pages(path).damage == ()
    assert check_pages(path).compared == driver.execute("PRAGMA page_count").fetchall()[0][0]


def test_a_process_that_is_forked_while_another_thread_opens_the_database_can_open_it(path: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            with unused_bytes.OPENING:
                sqlite3.connect(path).close()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends a child that waits for ever
                with unused_bytes.OPENING:
                    os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_a_file_that_took_the_place_of_the_database_gets_another_descriptor(
    path: Path, tmp_path: Path
) -> None:
    with closing(OwnDescriptor(path)) as own:
        assert own.number() is not None
        other = tmp_path / "other.db"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
        number = own.number()
        assert number is not None
        assert os.path.samestat(os.fstat(number), path.stat())


def test_the_share_of_unused_bytes_is_what_writing_anew_saves(path: Path, driver: sqlite3.Connection) -> None:
    for deletion in ("id % 4 = 1", "id > 300", "id > 0"):
        with transaction(driver):
            driver.execute(f"DELETE FROM face WHERE {deletion}")
        assert checkpoint(driver, path, mode="TRUNCATE")
        anew = path.parent / "anew"
        driver.execute("VACUUM INTO ?", (os.fspath(anew),))
        before, after = path.stat().st_size, anew.stat().st_size
        anew.unlink()
        assert unused_bytes.share(path) == pytest.approx(1 - after / before, abs=0.06)


@pytest.mark.parametrize("length", [0, 3 * PAGE + 1, 4 * PAGE - 1])
def test_the_share_of_a_database_that_was_cut_is_a_number_or_an_error(length: int, path: Path) -> None:
    os.truncate(path, length)
    with suppress(GalleryDamaged):
        assert 0 <= unused_bytes.share(path) <= 1


@pytest.mark.parametrize("wrong", ["count", "start", "deleted"])
def test_a_page_whose_unused_bytes_would_hold_rows_is_left_alone(wrong: str, path: Path) -> None:
    """A damaged page: a cell, or the first deleted one, lies before where the cells are said to begin."""
    data, number = path.read_bytes(), page_with_traces(path)
    page = bytearray(data[(number - 1) * PAGE : number * PAGE])
    if wrong == "count":
        page[3] ^= 0x80
    elif wrong == "start":
        page[5:7] = PAGE.to_bytes(2, "big")
    else:
        page[1:3] = (int.from_bytes(page[5:7], "big") - 2).to_bytes(2, "big")
    path.write_bytes(data[: (number - 1) * PAGE] + page + data[number * PAGE :])
    before = path.read_bytes()
    with closing(connect(path)) as driver:
        with pytest.raises(StorageError, match=f"page {number} of .* is damaged"):
            zero(driver, path)
        driver.execute("ROLLBACK")
    assert path.read_bytes() == before


def test_a_shared_descriptor_stays_with_its_file_when_a_link_leads_elsewhere(
    path: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(path.parent)
    by_link = unused_bytes.shared(link / path.name)
    link.unlink()
    assert unused_bytes.shared(path) is by_link
    with closing(sqlite3.connect(path)), closing(by_link):
        number = by_link.number()
        assert number is not None
        assert os.path.samestat(os.fstat(number), path.stat())


def refused(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_damaged_page_stays_damaged_when_a_zeroing_ends_early(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = page_with_traces(path)
    with flipped(path, number * PAGE - 1), closing(connect(path)) as driver:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refused)
            with pytest.raises(StorageError):
                zero(driver, path)
        driver.execute("ROLLBACK")
        assert zero(driver, path)
        assert checkpoint(driver, path, mode="TRUNCATE")
        assert [one.pages for one in check_pages(path).damage] == [(number,)]


def test_zeros_that_the_disk_may_not_have_are_written_again(
    path: Path, driver: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error of fsync the system has what was written in memory, as if it were on the disk."""
    written: list[list[tuple[int, int]]] = []

    def noted(descriptor: int, data: bytes, offset: int) -> int:
        written[-1].append((offset, len(data)))
        return pwrite(descriptor, data, offset)

    pwrite, fsync = os.pwrite, os.fsync

    def refused_for_pages(descriptor: int) -> None:
        (refused if written[-1] else fsync)(descriptor)

    monkeypatch.setattr(os, "pwrite", noted)
    written.append([])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused_for_pages)
        with pytest.raises(StorageError):
            zero(driver, path)
    driver.execute("ROLLBACK")
    written.append([])
    assert zero(driver, path)
    assert sum(size for _, size in written[0]) > 0
    assert sorted(written[1]) == sorted(written[0])
