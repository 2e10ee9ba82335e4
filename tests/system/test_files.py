"""A file is written whole or stays what it was."""

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from retrieval.system.files import (
    abandoned,
    copy_durably,
    create,
    is_free,
    make_folder,
    make_output_folder,
    open_or_create,
    remove,
    sync,
    temporary_folder,
    whole_folder,
    why,
    write_durably,
)
from tests.faults import FaultServer, Kind, Outcome, needs_shim, sweep

OLD, NEW = b"old", b"new" * 5000


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def no_room(_: pytest.MonkeyPatch) -> Iterator[None]:
    """The operating system itself refuses to make any file larger than a kilobyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextmanager
def no_rename(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        yield


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        yield


@pytest.mark.parametrize("data", [b"", b"x", NEW], ids=["nothing", "a byte", "more"])
@pytest.mark.parametrize("before", [None, OLD], ids=["a new file", "an old file"])
def test_a_file_is_made_or_replaced_with_exactly_these_bytes(
    before: bytes | None, data: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    if before is not None:
        path.write_bytes(before)
    write_durably(path, data)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.json": data}


@pytest.mark.parametrize(
    ("refusal", "error"),
    [(no_room, OSError), (no_sync, OSError), (no_rename, OSError), (interrupted, KeyboardInterrupt)],
)
@pytest.mark.parametrize("before", [{}, {"a.json": OLD}], ids=["a new file", "an old file"])
def test_a_refusal_leaves_what_was_there_and_nothing_else(
    before: dict[str, bytes],
    refusal: Callable[[pytest.MonkeyPatch], Any],
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error), refusal(monkeypatch):
        write_durably(tmp_path / "a.json", NEW)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a loss of power at any moment requires."""
    path, happened = tmp_path / "a.json", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        happened.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        happened.append(("rename", str(target), path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_durably(path, NEW)
    assert happened == [
        ("sync", str(tmp_path / ".a.json.part"), False),
        ("rename", str(path), False),
        ("sync", str(tmp_path), True),
    ]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, versions = tmp_path / "a.bin", [b"a" * 300_000, b"b" * 300_000]
    path.write_bytes(versions[0])
    done, seen = threading.Event(), set()

    def look() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(40):
        write_durably(path, versions[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(versions)
    assert seen


KILLED = """
import os, signal, sys
from pathlib import Path
from retrieval.system import files

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_durably(Path(sys.argv[1]), b"new")
"""


def test_a_crash_leaves_the_old_file_and_the_next_writing_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(OLD)
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert left == {"a.json": OLD, ".a.json.part": b"new"}
    write_durably(path, b"newer")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.json": b"newer"}


def test_a_folder_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "no" / "a.json", NEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "folder"])
def test_files_and_folders_can_be_synced_and_are_closed_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir("/proc/self/fd"))
    sync(tmp_path / name)
    assert sorted(os.listdir("/proc/self/fd")) == before
    with no_sync(monkeypatch), pytest.raises(OSError, match="No space left on device"):
        sync(tmp_path / name)
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "no such file or directory"),
        (OSError("Something Odd"), "something odd"),
    ],
)
def test_why_is_the_end_of_a_sentence(error: OSError, words: str) -> None:
    assert why(error) == words


# Links and whatever else may lie where a file is to be made


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def plant(kind: str, path: Path, victim: Path) -> None:
    """Puts something under a name that a careless program would write through, or wait for."""
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(victim.with_name("nothing"))
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(OLD)
        path.chmod(0o400)


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="It is a pipe or a device, not a file"):
            write_durably(tmp_path / name, NEW)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


PLANTED = ["link", "dangling link", "hard link", "pipe", "read-only file"]


def create_and_write(path: Path) -> None:
    with create(path) as file:
        file.write(NEW)


def replace_temporary(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}.part"))
    write_durably(path, NEW)


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        *((kind, create_and_write) for kind in PLANTED),
        *((kind, replace_temporary) for kind in PLANTED),
        *((kind, lambda path: write_durably(path, NEW)) for kind in PLANTED if kind != "pipe"),
    ],
)
def test_what_lies_under_a_name_is_replaced_and_never_written_through(
    kind: str, work: Callable[[Path], None], tmp_path: Path
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(OLD)
    folder.mkdir()
    plant(kind, folder / "a.json", victim)
    work(folder / "a.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.json": NEW}
    assert not (folder / "a.json").is_symlink()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!f]*")} == {"victim": OLD}


def test_a_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    for work in (lambda path: create(path).close(), lambda path: write_durably(path, NEW)):
        with pytest.raises(OSError, match=r"directory|permitted"):
            work(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_refused_where_a_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / "link").symlink_to("victim")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        open_or_create(tmp_path / "link")
    assert (tmp_path / "victim").read_bytes() == OLD


def test_a_file_that_another_is_writing_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with create(tmp_path / ".a.json.part") as file:
        file.write(OLD)
        file.flush()
        with pytest.raises(BlockingIOError) as caught:
            write_durably(path, NEW)
        assert why(caught.value) == "another process is writing it"
        assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {".a.json.part": OLD}
    write_durably(path, NEW)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"a.json": NEW}


@pytest.mark.parametrize("what", ["file", "folder", "link to a file", "link to a folder", "nothing"])
def test_removing_goes_no_further_than_a_link(what: str, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "gone"
    victim.mkdir()
    (victim / "file").write_bytes(OLD)
    if what == "file":
        path.write_bytes(NEW)
    elif what == "folder":
        (path / "below").mkdir(parents=True)
        (path / "below" / "link").symlink_to(victim)
    elif what != "nothing":
        path.symlink_to(victim if what == "link to a folder" else victim / "file")
    remove(path)
    assert not os.path.lexists(path)
    assert (victim / "file").read_bytes() == OLD


# Who may read


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o277], ids=oct)
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_files_and_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    create_and_write(tmp_path / "created")
    write_durably(tmp_path / "written", NEW)
    copy_durably(tmp_path / "written", tmp_path / "copied")
    os.close(open_or_create(tmp_path / "opened"))
    make_folder(tmp_path / "made")
    make_output_folder(tmp_path / "output")
    with whole_folder(tmp_path / "whole") as made:
        assert mode(made.parent) == 0o700
    modes = {path.name: mode(path) for path in tmp_path.iterdir()}
    assert modes == {
        **dict.fromkeys(("created", "written", "copied", "opened"), 0o600),
        **dict.fromkeys(("made", "output", "whole"), 0o700),
    }


@pytest.mark.usefixtures("_umask")
@pytest.mark.parametrize(("above", "file"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o644), (0o2770, 0o660)])
def test_what_is_made_in_a_folder_of_ours_is_for_those_whose_the_folder_is(
    tmp_path: Path, above: int, file: int
) -> None:
    tmp_path.chmod(above)
    write_durably(tmp_path / "written", NEW, inherit=True)
    os.close(open_or_create(tmp_path / "opened", inherit=True))
    make_folder(tmp_path / "made", like=tmp_path)
    modes = {path.name: mode(path) for path in tmp_path.iterdir()}
    assert modes == {"written": file, "opened": file, "made": above}


@pytest.mark.usefixtures("_umask")
def test_a_shared_folder_is_its_groups_and_nobody_elses(tmp_path: Path) -> None:
    make_folder(tmp_path / "shared", shared=True)
    make_folder(tmp_path / "shared" / "below", like=tmp_path / "shared")
    write_durably(tmp_path / "shared" / "below" / "file", NEW, inherit=True)
    assert mode(tmp_path / "shared") == 0o2750
    assert mode(tmp_path / "shared" / "below") == 0o2750
    assert mode(tmp_path / "shared" / "below" / "file") == 0o640


def test_a_folder_that_is_there_is_taken_as_it_is_and_a_link_is_not(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    make_folder(tmp_path / "there", exist_ok=True)
    assert mode(tmp_path / "there") == 0o755
    make_output_folder(tmp_path / "there")
    assert mode(tmp_path / "there") == 0o700  # nobody has put anything into it yet
    (tmp_path / "full" / "something").mkdir(parents=True)
    (tmp_path / "full").chmod(0o755)
    make_output_folder(tmp_path / "full")
    assert mode(tmp_path / "full") == 0o755
    (tmp_path / "link").symlink_to("there")
    for name, exist_ok in (("there", False), ("link", True)):
        with pytest.raises(FileExistsError):
            make_folder(tmp_path / name, exist_ok=exist_ok)


# What a killed process leaves behind


def make_whole(folder: Path) -> None:
    """A folder with a file in it, unless it is there."""
    if is_free(folder / "target"):
        with whole_folder(folder / "target") as made:
            write_durably(made / "file", NEW)


def make_nothing(folder: Path) -> None:
    pass


def again_and_nothing_is_left(folder: Path, outcome: Outcome) -> None:
    killed = [path for path in folder.iterdir() if path.name != "target"]
    assert killed == abandoned(folder, ".target-")
    if not is_free(folder / "target"):
        (folder / "target" / "file").unlink()
    make_whole(folder)
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))] == [
        "target",
        "target/file",
    ]
    assert (folder / "target" / "file").read_bytes() == NEW


@needs_shim
@pytest.mark.parametrize("kind", [Kind.KILL, Kind.ENOSPC, Kind.EIO, Kind.FULL, Kind.DEAD])
def test_what_a_killed_process_left_of_a_folder_goes_when_it_is_made_again(
    kind: Kind, tmp_path: Path
) -> None:
    with FaultServer(["retrieval.system.files"]) as server:
        swept = sweep(
            make_whole,
            make_nothing,
            again_and_nothing_is_left,
            kind=kind,
            servers=[server],
            workspace=tmp_path,
        )
    assert swept.failures == []
    assert swept.points > 10


def test_the_folder_of_a_living_process_stays(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, ".target-") as first:
        (first / "file").write_bytes(OLD)
        with temporary_folder(tmp_path, ".target-") as second:
            assert abandoned(tmp_path, ".target-") == []
            assert sorted(tmp_path.iterdir()) == sorted([first, second])
        assert list(tmp_path.iterdir()) == [first]
        assert (first / "file").read_bytes() == OLD
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, taken = os.mkdir, []

    def make_and_lose(path: Path, mode: int) -> None:
        make(path, mode)
        if not taken:
            taken.append(path)
            path.rmdir()

    monkeypatch.setattr(os, "mkdir", make_and_lose)
    with temporary_folder(tmp_path, ".target-") as folder:
        assert taken != [folder]
        assert list(tmp_path.iterdir()) == [folder]


def test_no_temporary_folder_is_made_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), temporary_folder(tmp_path / "none", ".target-"):
        pass


def test_what_is_only_named_like_a_temporary_folder_stays(tmp_path: Path) -> None:
    (tmp_path / ".target-photos01").mkdir()
    (tmp_path / ".target-photos01" / "ada.jpg").write_bytes(OLD)
    (tmp_path / ".target-afile000").write_bytes(OLD)
    (tmp_path / "elsewhere" / "whole").mkdir(parents=True)
    (tmp_path / ".target-linked00").symlink_to("elsewhere")
    (tmp_path / ".target-long-12345678" / "whole").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert abandoned(tmp_path, ".target-") == []
    with temporary_folder(tmp_path, ".target-"):
        pass
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["whole", "bundle"])
def test_what_an_older_version_left_goes_too(name: str, tmp_path: Path) -> None:
    (tmp_path / ".target-ab_cd123" / name / "model").mkdir(parents=True)
    assert [path.name for path in abandoned(tmp_path, ".target-")] == [".target-ab_cd123"]
    with temporary_folder(tmp_path, ".target-") as folder:
        assert list(tmp_path.iterdir()) == [folder]


@needs_shim
def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path) -> None:
    (tmp_path / ".target-12345678").mkdir()
    with FaultServer(["retrieval.system.files"]) as server:
        outcome = server.run(make_whole, (tmp_path,), tmp_path, kind=Kind.NO_LOCKS)
    assert outcome.state == "done", outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target-12345678", "target"]
