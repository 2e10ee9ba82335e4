"""A file is written whole or stays what it was."""

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from retrieval.files import sync, why, write_durably

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
from retrieval import files

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
