"""A full disk or too many open files are the machine's fault, and are never called damage of a gallery."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.gallery.gallery import Gallery
from tests.disks import ROOT, on_read_only_media, on_small_disk
from tests.operations import add, tiny_model, write_photos

# Each number of files that may be open, from too few to enough: every place that opens one fails once.
FEW_FILES = """
import gc, json, os, resource, sys
from pathlib import Path
import numpy as np
from retrieval.storage import backup, backup_integrity
from retrieval.errors import FaceprintError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.repair import repair
from retrieval.gallery.integrity import verify

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
    "check": lambda: backup_integrity.check_backup(target) == [],
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


FULL = """
import json, sys
from pathlib import Path
from retrieval.errors import FaceprintError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.repair import repair
from retrieval.gallery.integrity import verify
from tests.disks import filled
from tests.operations import add, tiny_model

disk = Path(sys.argv[1])
with Gallery.create(disk / "gallery", tiny_model(disk / "model")) as gallery:
    add(gallery, range(30))
said = []
for room in range(0, 120_000, 4096):
    with filled(disk, room=room):
        for work in (verify, lambda folder: repair(folder).before):
            try:
                found = work(disk / "gallery")
                said.append([finding.trouble for finding in found.findings])
            except FaceprintError as error:
                said.append(f"{type(error).__name__} {error}")
assert verify(disk / "gallery").whole
print(json.dumps(said))
"""


def test_a_gallery_on_a_full_disk_is_not_called_damaged(tmp_path: Path) -> None:
    """Whether there is no room at all or a little; the sentence says what the system says."""
    done = on_small_disk(tmp_path, FULL, size="1m")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert [] in said
    sentences = {one for one in said if one != []}
    assert sentences
    for sentence in sentences:
        assert sentence.startswith("StorageError "), sentence
        assert "no space left on device" in sentence, sentence


COMMANDS = """
import contextlib, io, json, sys
from retrieval.cli import app as cli

said = []
for command in json.loads(sys.argv[2]):
    sys.argv = ["faceprint", *command]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code
    said.append([status, err.getvalue()])
print(json.dumps(said))
"""


def test_who_would_write_to_a_read_only_disk_gets_one_sentence_that_names_it(folder: Path) -> None:
    """It is the environment and no misuse, so the status is 1."""
    with Gallery.open(folder) as gallery:
        gallery.backup(folder.with_name("backup"))
        model = folder.with_name("model")
    photos = folder.with_name("photos")
    write_photos(photos, range(3))
    where = str(folder)
    commands = [
        ["compact", where],
        ["optimize", where, "--anew"],
        ["forget", where, "--face", "1"],
        ["rename-identity", where, "Kim", "Ida"],
        ["merge-identities", where, "Kim", "Adi"],
        ["relocate", where, "/photos", "/pictures"],
        ["ingest", where, str(photos)],
        ["ingest", where, str(photos), "--model", str(model)],
        ["restore", str(folder.with_name("backup")), where],
        ["repair", where],
        ["ingest", f"{where}/new", str(photos), "--model", str(model)],
        ["restore", str(folder.with_name("backup")), f"{where}/new"],
    ]
    (folder / "model" / ".x.part").write_bytes(b"")  # something to repair
    done = on_read_only_media(folder, COMMANDS, json.dumps(commands))
    assert (done.returncode, done.stderr) == (0, "")
    for command, (status, sentence) in zip(commands, json.loads(done.stdout), strict=True):
        assert (status, sentence.count("\n")) == (1, 1), (command, sentence)
        assert "read-only file system" in sentence, (command, sentence)
        assert where in sentence, (command, sentence)


NO_ROOM = """
import json, shutil, sys
from pathlib import Path
from retrieval.errors import StorageError
from retrieval.gallery.gallery import Gallery
from tests.disks import filled

disk, backup = Path(sys.argv[1]), Path(sys.argv[2])
said = []
for room in range(0, 200_000, 8192):
    with filled(disk, room=room):
        try:
            Gallery.restore(backup, disk / "restored")
            shutil.rmtree(disk / "restored")
        except StorageError as error:
            said.append(str(error))
print(json.dumps(said))
"""


def test_a_restore_to_a_full_disk_names_the_folder_that_was_asked_for(folder: Path) -> None:
    """And not the hidden one in which a gallery is made; wherever the room ends."""
    backup = folder.with_name("backup")
    with Gallery.open(folder) as gallery:
        gallery.backup(backup)
    disk = folder.with_name("disk")
    disk.mkdir()
    done = on_small_disk(disk, NO_ROOM, size="1m", arguments=(str(backup),))
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert len(set(said)) > 2
    for sentence in said:
        assert f"{disk}/restored" in sentence, sentence
        assert "/.restored-" not in sentence, sentence
        assert "no space left" in sentence or "disk is full" in sentence, sentence
