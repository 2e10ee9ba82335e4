"""A full disk or too many open files are the machine's fault, and are never called damage of a gallery."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.gallery import Gallery
from tests.operations import add, tiny_model

ROOT = Path(__file__).parent.parent

# Each number of files that may be open, from too few to enough: every place that opens one fails once.
FEW_FILES = """
import gc, json, os, resource, sys
from pathlib import Path
import numpy as np
from retrieval import backup
from retrieval.errors import FaceprintError
from retrieval.gallery import Gallery, repair
from retrieval.verification import verify

folder, target = Path(sys.argv[1]), Path(sys.argv[2])

def search():
    with Gallery.open(folder) as gallery:
        return len(gallery.search_by_vector(np.zeros(8, np.float32), 3)) == 3

def back_up():
    with Gallery.open(folder, read_only=True) as gallery:
        backup.back_up(gallery.vault, target)
    return True

works = {
    "verify": lambda: verify(folder).whole,
    "repair": lambda: repair(folder).before.whole,
    "search": search,
    "backup": back_up,
    "check": lambda: backup.check(target) == [],
}
for work in works.values():
    assert work()
said = {}
for name, work in works.items():
    gc.collect()
    there = len(os.listdir("/dev/fd"))
    for number in range(there - 1, there + 40):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
        try:
            outcome = "whole" if work() else "DAMAGED"
        except FaceprintError as error:
            outcome = f"{type(error).__name__} {error}"
        except BaseException as error:
            outcome = f"ESCAPED {type(error).__name__} {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        said.setdefault(name, []).append(outcome)
print(json.dumps(said))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Gallery.create(tmp_path / "g", tiny_model(tmp_path / "model")) as gallery:
        add(gallery, range(8))
        add(gallery, range(8, 11))
    return tmp_path / "g"


def test_too_many_open_files_are_never_damage(folder: Path) -> None:
    """Of verify, repair, search, backup and the check of a backup, at each file that they open."""
    command = [sys.executable, "-c", FEW_FILES, str(folder), str(folder.with_name("backup"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, outcomes in json.loads(done.stdout).items():
        assert outcomes[-1] == "whole", (name, outcomes)
        kinds = {outcome.split()[0] for outcome in outcomes}
        assert kinds == {"StorageError", "whole"}, (name, sorted(set(outcomes)))


UNREADABLE = """
import os, sys
from pathlib import Path
from retrieval import cli
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.argv = ["faceprint", *sys.argv[1:]]
cli.main()
"""


FULL = """
import json, os, sys
from pathlib import Path
from retrieval.errors import FaceprintError
from retrieval.gallery import Gallery, repair
from retrieval.verification import verify
from tests.operations import add, tiny_model

disk = Path(sys.argv[1])
with Gallery.create(disk / "gallery", tiny_model(disk / "model")) as gallery:
    add(gallery, range(30))
said = []
for room in range(0, 120_000, 4096):
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass  # full
        ballast.truncate(max(0, ballast.tell() - room))
    for work in (verify, lambda folder: repair(folder).before):
        try:
            found = work(disk / "gallery")
            said.append([finding.trouble for finding in found.findings])
        except FaceprintError as error:
            said.append(f"{type(error).__name__} {error}")
    (disk / "ballast").unlink()
assert verify(disk / "gallery").whole
print(json.dumps(said))
"""


def test_a_gallery_on_a_full_disk_is_not_called_damaged(tmp_path: Path) -> None:
    """Whether there is no room at all or a little; the sentence says what the system says."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = 'mount -t tmpfs -o size=1m none "$1" || exit 77'
    command = ["unshare", "-m", "sh", "-c", f'{mount}; exec "$2" -c "$3" "$1"', "sh", str(tmp_path)]
    done = subprocess.run(
        [*command, sys.executable, FULL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this container cannot mount anything")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert [] in said
    sentences = {one for one in said if one != []}
    assert sentences
    for sentence in sentences:
        assert sentence.startswith("StorageError "), sentence
        assert "no space left on device" in sentence, sentence
