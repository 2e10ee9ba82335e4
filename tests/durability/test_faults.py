"""The harness that injects faults sees every call, and can tell a safe program from one that is not."""

import errno
import fcntl
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from retrieval.system.files import write_durably
from tests.faults import (
    Call,
    FaultServer,
    Kind,
    Op,
    Outcome,
    count,
    needs_shim,
    power_loss_images,
    sweep,
    trace,
)

pytestmark = needs_shim

OLD, NEW = b"old", b"new content"

Lost = tuple[int, str, tuple[str, ...]]  # calls, variant, rows


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FaultServer]]:
    preload = ["retrieval.system.files", "sqlite3"]
    with FaultServer(preload) as first, FaultServer(preload) as second:
        yield [first, second]


@pytest.fixture
def server(servers: list[FaultServer]) -> FaultServer:
    return servers[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one file of old content."""
    folder = tmp_path / "root"
    make(folder)
    return folder


def make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(OLD)


# What runs in a child


def eight(folder: Path) -> None:
    """Changes a folder in eight ways."""
    descriptor = os.open(folder / "a", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"hello")
    os.pwrite(descriptor, b"J", 0)
    os.fsync(descriptor)
    os.close(descriptor)
    os.rename(folder / "a", folder / "b")
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    os.mkdir(folder / "c")
    os.unlink(folder / "b")
    (folder / "file").read_bytes()


EIGHT = [Call.CREATE, Call.WRITE, Call.WRITE, Call.SYNC, Call.RENAME, Call.SYNC, Call.MKDIR, Call.UNLINK]


def every_way(folder: Path) -> None:
    """Changes a folder through every function that the shim stands before and that Python can call."""
    (folder / "log").write_bytes(b"one")
    with open(folder / "log", "ab", buffering=0) as log:
        log.write(b"two")
        os.writev(log.fileno(), [b"th", b"ree"])
    descriptor = os.open(folder / "file", os.O_RDWR)
    os.pwritev(descriptor, [b"N", b"E"], 1)
    os.ftruncate(descriptor, 5)
    os.posix_fallocate(descriptor, 0, 8)
    os.lseek(descriptor, 6, os.SEEK_SET)
    os.write(descriptor, b"x")
    shutil.copyfile(folder / "log", folder / "sent")
    copy = os.open(folder / "copied", os.O_WRONLY | os.O_CREAT)
    os.copy_file_range(descriptor, copy, 4, 2, 3)
    os.close(copy)
    os.unlink(folder / "file")
    os.write(descriptor, b"nobody sees this")
    os.close(descriptor)
    os.makedirs(folder / "x/y/")
    here = os.open(folder / "x", os.O_RDONLY)
    for name in ("relative", "gone"):
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=here))
    os.rename("relative", "y/moved", src_dir_fd=here, dst_dir_fd=here)
    os.unlink("gone", dir_fd=here)
    os.link("y/moved", "hard", src_dir_fd=here, dst_dir_fd=here)
    os.symlink("y", "soft", dir_fd=here)
    os.close(here)
    os.chdir(folder)
    Path("x/soft/through").write_bytes(b"a link")  # counts where the link leads
    os.rename("x", "z")
    os.truncate("log", 4)
    Path("empty").mkdir()
    Path("empty").rmdir()


def in_threads(folder: Path, threads: int, each: int) -> None:
    """Appends lines to one file and to many, all at once."""

    def work(name: str) -> None:
        with open(folder / "shared", "ab", buffering=0) as shared, open(folder / name, "wb") as own:
            for _ in range(each):
                shared.write(f"{name}\n".encode())
            own.write(name.encode())

    running = [threading.Thread(target=work, args=(str(number),)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def elsewhere(folder: Path) -> int:
    """Changes what is beside a folder, in it through a link that leads out, and in it once."""
    beside = folder.with_name("root beside")  # begins with the same letters
    beside.mkdir()
    (folder / "out").symlink_to(beside)
    (folder / "out" / "file").write_bytes(NEW)
    (beside / "other").write_bytes(NEW)
    return count()


def errors(folder: Path) -> list[int]:
    """The errno of each of five calls, 0 for those that succeed."""
    descriptor = os.open(folder / "file", os.O_WRONLY)
    found = []
    for call in (
        lambda: os.write(descriptor, NEW),
        lambda: os.fsync(descriptor),
        lambda: os.write(descriptor, NEW),
        lambda: os.rename(folder / "file", folder / "renamed"),
        lambda: os.mkdir(folder / "new"),
    ):
        try:
            call()
            found.append(0)
        except OSError as error:
            found.append(error.errno or -1)
    os.close(descriptor)
    return found


def durable(folder: Path) -> None:
    write_durably(folder / "file", NEW)


def naive(folder: Path) -> None:
    (folder / "file").write_bytes(NEW)


def never_synced(folder: Path) -> None:
    """Forgets the fsync before the rename."""
    (folder / "part").write_bytes(NEW)
    os.replace(folder / "part", folder / "file")
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def folder_never_synced(folder: Path) -> None:
    """Forgets the fsync of the folder."""
    with open(folder / "part", "wb") as file:
        file.write(NEW)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "part", folder / "file")


def insert(folder: Path, synchronous: str) -> int:
    """One row in one transaction; gives the number of calls before the connection was closed."""
    with closing(sqlite3.connect(folder / "db")) as connection:
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("INSERT INTO t VALUES ('new')")
        connection.commit()
        return count()


NOT_CLOSED: list[sqlite3.Connection] = []


def insert_and_die(folder: Path, synchronous: str) -> None:
    """The same, without the checkpoint that closing does."""
    connection = sqlite3.connect(folder / "db")
    connection.execute(f"PRAGMA synchronous={synchronous}")
    connection.execute("INSERT INTO t VALUES ('new')")
    connection.commit()
    NOT_CLOSED.append(connection)


def forever(folder: Path) -> None:
    time.sleep(1000)


def not_to_be_sent(folder: Path) -> Any:
    return lambda: None


# Counting


def calls(ops: list[Op]) -> list[Call]:
    return [op.call for op in ops]


def test_every_call_that_changes_the_folder_is_counted_and_no_other(server: FaultServer, root: Path) -> None:
    assert server.run(eight, (root,), root) == Outcome("done", len(EIGHT))


def test_a_trace_says_what_each_call_did(server: FaultServer, root: Path) -> None:
    ops = trace(server, eight, (root,), root)
    assert calls(ops) == EIGHT
    assert ops[1] == Op(Call.WRITE, "a", "", 0, 5, b"hello")
    assert ops[2] == Op(Call.WRITE, "a", "", 0, 1, b"J")
    assert (ops[4].path, ops[4].other, ops[5].path) == ("a", "b", "")


def tree(folder: Path) -> dict[str, bytes | str]:
    """What is under a folder: contents of files, texts of links."""
    return {
        os.fspath(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else ("folder" if path.is_dir() else path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_trace_rebuilds_what_was_done_in_every_way(server: FaultServer, root: Path, tmp_path: Path) -> None:
    initial, images = tmp_path / "initial", tmp_path / "images"
    shutil.copytree(root, initial)
    images.mkdir()
    ops = trace(server, every_way, (root,), root)
    assert Call.FAILED not in calls(ops)
    assert set(calls(ops)) == set(Call) - {Call.FAILED, Call.SYNC}
    (last,) = (
        tree(folder)
        for number, variant, folder in power_loss_images(initial, ops, images)
        if (number, variant) == (len(ops), "all")
    )
    assert last == tree(root)
    assert last["log"] == b"onet"
    assert last["sent"] == b"onetwothree"
    assert last["copied"] == b"\0\0\0E\0\0\0"
    assert last["z/y/through"] == b"a link"


def test_a_trace_of_threads_is_whole_and_in_order(server: FaultServer, root: Path, tmp_path: Path) -> None:
    initial, images = tmp_path / "initial", tmp_path / "images"
    shutil.copytree(root, initial)
    images.mkdir()
    ops = trace(server, in_threads, (root, 4, 50), root)
    assert len(ops) in range(4 * 50 + 4 + 4 + 1, 4 * 50 + 4 + 4 + 5)  # threads may meet in making one file
    last = [
        tree(folder) for _, variant, folder in power_loss_images(initial, ops, images) if variant == "all"
    ][-1]
    assert last == tree(root)
    assert sorted(last["shared"].split()) == sorted([b"0", b"1", b"2", b"3"] * 50)


def test_what_is_not_under_the_root_is_not_counted(server: FaultServer, root: Path) -> None:
    assert server.run(elsewhere, (root,), root) == Outcome("done", 1, 1)  # only the link itself


def test_the_same_calls_count_again_in_the_next_run(server: FaultServer, root: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        make(tmp_path / name)
        assert server.run(eight, (tmp_path / name,), tmp_path / name).count == len(EIGHT)


# Faults


def test_a_process_is_killed_before_its_nth_call(server: FaultServer, tmp_path: Path) -> None:
    made = []
    for number in range(1, 10):
        folder = tmp_path / str(number)
        make(folder)
        outcome = server.run(eight, (folder,), folder, at=number, kind=Kind.KILL)
        assert outcome == (Outcome("killed", number) if number < 9 else Outcome("done", 8))
        names = {path.name for path in folder.iterdir()} - {"file"}
        size = max((path.stat().st_size for path in folder.glob("[ab]")), default=None)
        made.append((names, size))
    assert made == [
        (set(), None),
        ({"a"}, 0),
        ({"a"}, 5),
        ({"a"}, 5),
        ({"a"}, 5),
        ({"b"}, 5),
        ({"b"}, 5),
        ({"b", "c"}, 5),
        ({"c"}, None),
    ]


@pytest.mark.parametrize(
    ("kind", "at", "expected"),
    [
        (Kind.COUNT, 1, [0, 0, 0, 0, 0]),
        (Kind.ENOSPC, 1, [28, 0, 0, 0, 0]),
        (Kind.ENOSPC, 5, [0, 0, 0, 0, 28]),
        (Kind.EIO, 2, [0, 5, 0, 0, 0]),
        (Kind.EIO, 4, [0, 0, 0, 5, 0]),
        (Kind.EIO, 6, [0, 0, 0, 0, 0]),
        (Kind.FULL, 1, [28, 0, 28, 0, 28]),
        (Kind.FULL, 2, [0, 0, 28, 0, 28]),
        (Kind.DEAD, 2, [0, 5, 5, 5, 5]),
    ],
)
def test_a_call_fails_once_or_all_do_that_follow(
    server: FaultServer, root: Path, kind: Kind, at: int, expected: list[int]
) -> None:
    assert server.run(errors, (root,), root, at=at, kind=kind) == Outcome("done", 5, expected)


def test_a_write_that_is_refused_leaves_nothing(server: FaultServer, root: Path) -> None:
    server.run(errors, (root,), root, at=1, kind=Kind.FULL)
    assert (root / "renamed").read_bytes() == OLD


def test_an_exception_in_a_child_comes_back_by_name(server: FaultServer, root: Path) -> None:
    outcome = server.run(naive, (root,), root, at=2, kind=Kind.ENOSPC)
    assert outcome == Outcome("error", 2, None, "OSError", "[Errno 28] No space left on device")


def test_a_child_that_hangs_is_killed_and_reported(server: FaultServer, root: Path) -> None:
    assert server.run(forever, (root,), root, timeout=0.2) == Outcome("hung", 0)
    assert server.run(eight, (root,), root).count == 8


def test_a_child_whose_result_cannot_be_sent_is_an_error(
    server: FaultServer, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert server.run(not_to_be_sent, (root,), root).error == "Died"


def lock_in_both_ways(folder: Path) -> list[int]:
    """The errno of flock and of a POSIX lock, 0 for those that succeed."""
    found = []
    with open(folder / "file", "r+b") as file:
        for call in (fcntl.flock, fcntl.lockf):
            try:
                call(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(0)
            except OSError as error:
                found.append(error.errno or -1)
    return found


@pytest.mark.parametrize(("kind", "expected"), [(Kind.COUNT, [0, 0]), (Kind.NO_LOCKS, [errno.ENOLCK] * 2)])
def test_a_file_system_may_have_no_locks(
    server: FaultServer, root: Path, kind: Kind, expected: list[int]
) -> None:
    outcome = server.run(lock_in_both_ways, (root,), root, kind=kind)
    assert (outcome.result, outcome.count) == (expected, 0)


# Sweeps


def whole(folder: Path, outcome: Outcome) -> None:
    assert (folder / "file").read_bytes() in (OLD, NEW)
    if outcome.state == "done":
        assert (folder / "file").read_bytes() == NEW


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.ENOSPC, Kind.EIO, Kind.FULL, Kind.DEAD])
def test_a_durable_write_passes_a_sweep(servers: list[FaultServer], tmp_path: Path, kind: Kind) -> None:
    swept = sweep(durable, make, whole, kind=kind, servers=servers, workspace=tmp_path)
    # Created, written, synced, renamed, the folder synced.
    assert (swept.points, swept.failures) == (5, [])
    assert swept.operation == "tests.durability.test_faults:durable"
    assert list(tmp_path.iterdir()) == []


def test_a_naive_write_fails_a_sweep_where_it_was_killed_between_two_calls(
    servers: list[FaultServer], tmp_path: Path
) -> None:
    swept = sweep(naive, make, whole, kind=Kind.KILL, servers=servers, workspace=tmp_path)
    assert swept.points == 2
    ((number, message),) = swept.failures
    assert number == 2
    assert message.startswith("AssertionError: ")


def test_a_sweep_may_be_sparse(servers: list[FaultServer], tmp_path: Path) -> None:
    swept = sweep(durable, make, whole, kind=Kind.KILL, servers=servers, workspace=tmp_path, step=2)
    assert (swept.points, swept.failures) == (3, [])


def test_a_hang_fails_a_sweep_and_ends_it(server: FaultServer, tmp_path: Path) -> None:
    swept = sweep(forever, make, whole, kind=Kind.KILL, servers=[server], workspace=tmp_path, timeout=0.1)
    assert swept.failures == [(1, "AssertionError: nothing came back in 0.1 s")]


# Power loss


def lost(server: FaultServer, tmp_path: Path, operation: Any) -> dict[str, set[bytes | None]]:
    """What the file holds in each variant after power loss at every prefix; None where it is gone."""
    initial, root, images = (tmp_path / name for name in ("initial", "root", "images"))
    make(initial)
    make(root)
    images.mkdir()
    ops = trace(server, operation, (root,), root)
    found: dict[str, set[bytes | None]] = {"lost": set(), "reordered": set(), "all": set(), "end": set()}
    for number, variant, folder in power_loss_images(initial, ops, images):
        path = folder / "file"
        content = path.read_bytes() if path.exists() else None
        found[variant].add(content)
        if number == len(ops):
            found["end"].add(content)
    assert list(images.iterdir()) == []
    return found


def test_a_durable_write_survives_every_loss_of_power(server: FaultServer, tmp_path: Path) -> None:
    found = lost(server, tmp_path, durable)
    both = {OLD, NEW}
    assert found == {"lost": both, "reordered": both, "all": both, "end": {NEW}}


def test_a_naive_write_can_lose_the_file(server: FaultServer, tmp_path: Path) -> None:
    """Old content even at the end, and an empty file where the truncation came first."""
    found = lost(server, tmp_path, naive)
    assert found == {"lost": {OLD}, "reordered": {OLD, b""}, "all": {OLD, b"", NEW}, "end": {OLD, b"", NEW}}


def test_a_rename_without_an_fsync_before_it_can_leave_an_empty_file(
    server: FaultServer, tmp_path: Path
) -> None:
    found = lost(server, tmp_path, never_synced)
    assert found == {"lost": {OLD, b""}, "reordered": {OLD, b""}, "all": {OLD, NEW}, "end": {b"", NEW}}


def test_a_rename_without_an_fsync_of_the_folder_can_be_undone(server: FaultServer, tmp_path: Path) -> None:
    found = lost(server, tmp_path, folder_never_synced)
    assert found == {"lost": {OLD}, "reordered": {OLD, NEW}, "all": {OLD, NEW}, "end": {OLD, NEW}}


def test_distinct_images_are_fewer_and_hold_the_same(server: FaultServer, root: Path, tmp_path: Path) -> None:
    initial, images = tmp_path / "initial", tmp_path / "images"
    shutil.copytree(root, initial)
    images.mkdir()
    ops = trace(server, eight, (root,), root)
    every = [tree(folder) for _, _, folder in power_loss_images(initial, ops, images)]
    few = [
        (number, variant, tree(folder))
        for number, variant, folder in power_loss_images(initial, ops, images, distinct=True)
    ]
    assert len(every) == 3 * 9 > len(few)
    assert all(content in [found[2] for found in few] for content in every)
    assert [found[1] for found in few if found[0] == 8] == ["lost", "reordered", "all"]


def test_images_may_be_sparse(server: FaultServer, root: Path, tmp_path: Path) -> None:
    initial, images = tmp_path / "initial", tmp_path / "images"
    shutil.copytree(root, initial)
    images.mkdir()
    ops = trace(server, eight, (root,), root)
    every = {found[:2]: tree(found[2]) for found in power_loss_images(initial, ops, images)}
    some = {found[:2]: tree(found[2]) for found in power_loss_images(initial, ops, images, step=3)}
    assert {number for number, _ in some} == {0, 3, 6}
    assert some == {key: every[key] for key in some}


# SQLite


def make_database(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with closing(sqlite3.connect(folder / "db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (value TEXT)")
        connection.execute("INSERT INTO t VALUES ('old')")
        connection.commit()


def rows(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [value for (value,) in connection.execute("SELECT value FROM t")]


def test_a_commit_of_sqlite_is_counted_call_by_call(server: FaultServer, tmp_path: Path) -> None:
    """The header of the WAL and a frame, each synced before the commit returns; then the checkpoint."""
    root = tmp_path / "root"
    make_database(root)
    ops = trace(server, insert, (root, "FULL"), root)
    seen = [(op.call, op.path, op.length) for op in ops if op.path != "db-shm"]
    assert seen == [
        (Call.CREATE, "db-wal", 0),
        (Call.WRITE, "db-wal", 32),
        (Call.SYNC, "db-wal", 0),
        (Call.SYNC, "", 0),
        (Call.WRITE, "db-wal", 24),
        (Call.WRITE, "db-wal", 4096),
        (Call.SYNC, "db-wal", 0),
        (Call.SYNC, "db-wal", 0),
        (Call.WRITE, "db", 4096),
        (Call.TRUNCATE, "db", 8192),
        (Call.SYNC, "db", 0),
        (Call.UNLINK, "db-wal", 0),
    ]


def sqlite_lost(server: FaultServer, tmp_path: Path, operation: Any, synchronous: str) -> list[Lost]:
    """Number of calls, variant and rows, after power loss at every prefix."""
    initial, root, images = (tmp_path / name for name in ("initial", "root", "images"))
    make_database(initial)
    shutil.copytree(initial, root)
    images.mkdir()
    ops = trace(server, operation, (root, synchronous), root)
    found = power_loss_images(initial, ops, images)
    return [(number, variant, tuple(rows(folder))) for number, variant, folder in found]


def test_a_commit_with_synchronous_full_survives_every_loss_of_power(
    server: FaultServer, tmp_path: Path
) -> None:
    make_database(tmp_path / "counted")
    committed = server.run(insert, (tmp_path / "counted", "FULL"), tmp_path / "counted").result
    found = sqlite_lost(server, tmp_path, insert, "FULL")
    assert {rows for number, _, rows in found if number >= committed} == {("old", "new")}
    assert {rows for number, _, rows in found if number < committed} == {("old",), ("old", "new")}
    assert found[0] == (0, "lost", ("old",))
    assert committed in range(8, found[-1][0])


def test_a_commit_with_synchronous_off_is_lost_with_the_power(server: FaultServer, tmp_path: Path) -> None:
    found = sqlite_lost(server, tmp_path, insert_and_die, "OFF")
    assert {rows for _, variant, rows in found if variant != "all"} == {("old",)}
    assert found[-1][1:] == ("all", ("old", "new"))


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.ENOSPC, Kind.EIO, Kind.FULL, Kind.DEAD])
def test_a_commit_of_sqlite_passes_a_sweep(servers: list[FaultServer], tmp_path: Path, kind: Kind) -> None:
    def check(folder: Path, outcome: Outcome) -> None:
        found = rows(folder)
        assert found in (["old"], ["old", "new"])
        if outcome.state == "done":
            assert found == ["old", "new"]

    swept = sweep(
        insert, make_database, check, kind=kind, servers=servers, workspace=tmp_path, args=("FULL",)
    )
    assert swept.failures == []
    assert swept.points >= 12
