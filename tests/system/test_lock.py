"""One writer at a time, among processes and among threads, however a writer ends."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retrieval.errors import GalleryBusy, StorageError
from retrieval.system.lock import check_lockable, exclusive
from tests.faults import FaultServer, Kind, needs_shim

HOLD = """
import sys
from pathlib import Path
from retrieval.system.lock import exclusive

with exclusive(Path(sys.argv[1]), timeout=600):
    print("held", flush=True)
    sys.stdin.read()
"""

# Without the lock, most of these additions would be lost: each reads, waits and writes.
ADD = """
import sys, time
from pathlib import Path
from retrieval.system.lock import exclusive

path, number = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(int(sys.argv[3])):
    with exclusive(path, timeout=600):
        before = int(number.read_text())
        time.sleep(0.002)
        number.write_text(str(before + 1))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "write.lock"


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock until its standard input is closed, or until it dies."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def busy(pid: int | str, folder: Path, seconds: str) -> str:
    return (
        f"Process {pid} is writing to {folder} and did not finish within {seconds} s; "
        "wait for it, or stop it, and run the command again."
    )


def refusal(path: Path, timeout: float) -> str:
    with pytest.raises(GalleryBusy) as caught, exclusive(path, timeout=timeout):
        pass
    return str(caught.value)


def test_two_processes_never_hold_it_together(path: Path, tmp_path: Path) -> None:
    number, times = tmp_path / "number", 40
    number.write_text("0")
    command = [sys.executable, "-c", ADD, str(path), str(number), str(times)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert number.read_text() == str(2 * times)


@pytest.mark.parametrize(("timeout", "seconds"), [(0, "0"), (0.25, "0.25")])
def test_the_refusal_names_the_process_that_holds_it(path: Path, timeout: float, seconds: str) -> None:
    with held_by_another_process(path) as process:
        assert refusal(path, timeout) == busy(process.pid, path.parent, seconds)


def test_the_death_of_its_holder_releases_it(path: Path) -> None:
    with held_by_another_process(path) as process:
        process.kill()
        process.wait()
        with exclusive(path, timeout=0):
            assert path.read_text() == str(os.getpid())


def test_one_who_waits_gets_it_when_it_is_released_and_not_before(path: Path) -> None:
    with held_by_another_process(path) as process:
        assert process.stdin is not None
        started = time.monotonic()
        threading.Timer(0.3, process.stdin.close).start()
        with exclusive(path, timeout=600):
            waited = time.monotonic() - started
    assert waited >= 0.3


def test_one_who_waits_gives_up_after_the_time_given_and_not_before(path: Path) -> None:
    with exclusive(path, timeout=0):
        started = time.monotonic()
        refusal(path, 0.4)
        waited = time.monotonic() - started
    assert waited >= 0.4


def test_two_threads_of_one_process_exclude_each_other(path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(10):
            with exclusive(path, timeout=600):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_a_thread_that_holds_it_refuses_it_to_the_same_thread_too(path: Path) -> None:
    with exclusive(path, timeout=0):
        assert refusal(path, 0) == busy(os.getpid(), path.parent, "0")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_releases_it_and_passes_through(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), exclusive(path, timeout=0):
        raise error
    with exclusive(path, timeout=0):
        pass


def test_a_refusal_does_not_disturb_the_holder(path: Path) -> None:
    with held_by_another_process(path) as process:
        for _ in range(2):
            assert refusal(path, 0) == busy(process.pid, path.parent, "0")


def test_a_program_that_the_holder_started_does_not_go_on_holding_it(path: Path) -> None:
    with exclusive(path, timeout=0):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with child, exclusive(path, timeout=0):
        assert child.poll() is None
        child.kill()


@pytest.mark.parametrize("text", ["", "\n"])
def test_a_holder_that_left_no_name_is_unknown(path: Path, text: str) -> None:
    path.write_text(text)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refusal(path, 0) == busy("unknown", path.parent, "0")


def test_a_shorter_process_id_leaves_no_digits_of_a_longer_one(path: Path) -> None:
    path.write_text("9" * 20)
    with exclusive(path, timeout=0):
        assert path.read_text() == str(os.getpid())


def test_nobody_is_named_when_nobody_holds_it(path: Path) -> None:
    """Also after a holder that failed; one that was killed leaves its name, which the next one replaces."""
    with exclusive(path, timeout=0):
        assert path.read_text() == str(os.getpid())
    assert path.read_text() == ""
    with pytest.raises(ValueError, match="nothing"), exclusive(path, timeout=0):
        raise ValueError("nothing")
    assert path.read_text() == ""
    with held_by_another_process(path) as process:
        pass
    assert path.read_text() == str(process.pid)
    with exclusive(path, timeout=0):
        assert path.read_text() == str(os.getpid())


def test_a_disk_that_refuses_the_holders_name_does_not_refuse_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk one must still be able to delete."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with exclusive(path, timeout=0):
        assert refusal(path, 0) == busy("unknown", path.parent, "0")


def test_nothing_stays_open(path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with exclusive(path, timeout=0):
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
        refusal(path, 0)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError), exclusive(tmp_path / "no" / "write.lock", timeout=0):
        pass
    assert list(tmp_path.iterdir()) == []


# What may lie where the lock file should


def test_a_link_in_its_place_is_refused_and_what_it_leads_to_stays(path: Path, tmp_path: Path) -> None:
    for target in ("victim", "nothing"):
        (tmp_path / "victim").write_text("precious")
        path.symlink_to(target)
        with pytest.raises(StorageError) as caught, exclusive(path, timeout=0):
            pass
        assert str(caught.value) == f"{path} is a symbolic link, not a lock file; remove it."
        assert {one.name for one in tmp_path.iterdir()} == {"victim", path.name}
        assert (tmp_path / "victim").read_text() == "precious"
        path.unlink()


def test_a_pipe_in_its_place_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(StorageError) as caught, exclusive(path, timeout=0):
        pass
    assert str(caught.value) == f"{path} is a pipe, not a lock file; remove it."


@pytest.mark.parametrize("text", ["precious", "1234 precious", "7" * 40])
def test_another_file_under_its_name_locks_and_is_not_written_to(
    path: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "victim").write_text(text)
    path.hardlink_to(tmp_path / "victim")
    with exclusive(path, timeout=0):
        assert refusal(path, 0) == busy("unknown", path.parent, "0")
    assert (tmp_path / "victim").read_text() == text


def test_it_is_its_owners_unless_the_folder_is_others_too(tmp_path: Path) -> None:
    for folder, file in ((0o700, 0o600), (0o2750, 0o640)):
        made = tmp_path / oct(folder)
        made.mkdir()
        made.chmod(folder)
        with exclusive(made / "write.lock", timeout=0):
            assert stat.S_IMODE((made / "write.lock").stat().st_mode) == file


# File systems without locks


def ask(folder: Path) -> None:
    check_lockable(folder)


def hold(folder: Path) -> None:
    with exclusive(folder / "write.lock", timeout=0):
        pass


@needs_shim
@pytest.mark.parametrize("work", [ask, hold])
@pytest.mark.parametrize(("kind", "state"), [(Kind.COUNT, "done"), (Kind.NO_LOCKS, "error")])
def test_a_file_system_without_locks_is_named(
    work: Callable[[Path], None], kind: Kind, state: str, tmp_path: Path
) -> None:
    with FaultServer(["retrieval.system.lock"]) as server:
        outcome = server.run(work, (tmp_path,), tmp_path, kind=kind)
    assert outcome.state == state
    if state == "error":
        assert outcome.message == (
            f"{tmp_path} lies on a file system that cannot lock files (no locks available); use a local disk."
        )


@pytest.mark.parametrize("work", [ask, hold])
def test_a_failing_disk_is_not_called_a_file_system_without_locks(
    work: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StorageError) as caught:
        work(tmp_path)
    assert str(caught.value) == f"No file can be locked in {tmp_path}: input/output error."


def test_asking_leaves_nothing_and_takes_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    check_lockable(tmp_path / "not" / "there")
    check_lockable(tmp_path)
    assert list(tmp_path.iterdir()) == []
