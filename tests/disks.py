"""Full and read-only disks for tests, mounted for one process in its own mount namespace."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

Done = subprocess.CompletedProcess[str]

_SMALL = 'mount -t tmpfs -o size="$0" none "$1" || exit 77'
_READ_ONLY = (
    'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && ! touch "$1/x" 2>/dev/null || exit 77'
)


def on_small_disk(folder: Path, program: str, *, size: str, arguments: tuple[str, ...] = ()) -> Done:
    """Runs a Python program with an empty disk of the given size mounted over `folder`, its first argument.

    Skips the test if nothing can be mounted.
    """
    return _run(_SMALL, size, folder, program, arguments)


def on_read_only_media(folder: Path, program: str, *arguments: str) -> Done:
    """Runs a Python program with `folder`, its first argument, mounted read-only."""
    return _run(_READ_ONLY, "sh", folder, program, arguments)


@contextmanager
def filled(disk: Path, *, room: int) -> Iterator[None]:
    """Fills a disk up to `room` free bytes, for the length of a with statement."""
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass  # full
        ballast.truncate(max(0, ballast.tell() - room))
    try:
        yield
    finally:
        (disk / "ballast").unlink()


def _run(mount: str, name: str, folder: Path, program: str, arguments: tuple[str, ...]) -> Done:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a disk")
    shell = f'{mount}; python=$2; program=$3; folder=$1; shift 3; exec "$python" -c "$program" "$folder" "$@"'
    command = ["unshare", "-m", "sh", "-c", shell, name, str(folder), sys.executable, program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this container cannot mount anything")
    return done
