"""A disk that is really full: a small one in memory, mounted for one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Fills the disk to the last byte at a different place each time, and looks what is left of the gallery.
PROGRAM = """
import os, shutil, sys
from pathlib import Path
from retrieval.errors import StorageError
from retrieval.gallery import Gallery
from retrieval.verification import Trouble, verify
from tests.operations import GONE, HARMLESS, add, contents, tiny_model

disk = Path(sys.argv[1])
with Gallery.create(disk / "gallery", tiny_model(disk / "model")) as gallery:
    add(gallery, range(30))
    enrolled, failures = 30, 0
    for room in range(0, 200_000, 5_000):
        # All of the disk, and then so much less.
        with open(disk / "ballast", "wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass  # full
            ballast.truncate(max(0, ballast.tell() - room))
        try:
            add(gallery, range(enrolled, enrolled + 3))
            enrolled += 3
        except StorageError as error:
            assert str(error).endswith("."), error
            failures += 1
        found = verify(gallery.folder).findings
        assert {finding.trouble for finding in found} <= HARMLESS, found
        assert len(contents(gallery.folder)) == enrolled
        (disk / "ballast").unlink()
    assert 0 < failures < 40, failures
    add(gallery, range(enrolled, enrolled + 3))
    assert verify(gallery.folder).whole
    assert gallery.forget(GONE).faces == (enrolled + 3) // 3
    assert verify(gallery.folder).whole
print("enrolled", enrolled, "failures", failures)
"""


def test_a_full_disk_stops_a_batch_with_a_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """Whatever of a batch still fits: the gallery is whole, and goes on when there is room again."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = 'mount -t tmpfs -o size=4m none "$1" || exit 77'
    command = ["unshare", "-m", "sh", "-c", f'{mount}; exec "$2" -c "$3" "$1"', "sh", str(tmp_path)]
    done = subprocess.run(
        [*command, sys.executable, PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this container cannot mount anything")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("enrolled ")
