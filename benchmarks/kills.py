"""Checks that an ingest killed at ten random moments ends as an undisturbed one; then erases a person.

    python -m benchmarks.kills --model MODEL --photos FOLDER --forget NAME [--kills 10]

`faceprint ingest` runs as a separate process. It is killed with SIGKILL repeatedly, then runs to its end.
Both galleries must hold the same (SHA-256, identity, paths) and the same vectors; `verify` must find no
damage after each step. Then `faceprint forget` is timed, and all files of the gallery's folder are searched
for the person's name, paths, SHA-256s and vectors, before and after. Prints one table and one JSON line.
"""

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from retrieval.gallery.integrity import Trouble, verify
from retrieval.system.cpu import usable_cores
from tests.operations import contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--forget", required=True, help="an identity of the photos")
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faceprint-kills-") as name:
        undisturbed, killed = Path(name) / "undisturbed", Path(name) / "killed"
        arguments = [options.photos, "--model", options.model]
        started = time.monotonic()
        _faceprint("ingest", undisturbed, *arguments)
        seconds = time.monotonic() - started
        within = seconds / options.kills
        moments = [_ingest_and_kill(killed, arguments, within) for _ in range(options.kills)]
        _faceprint("ingest", killed, *arguments)
        result = {
            "photos": len(contents(undisturbed)),
            "undisturbed_seconds": round(seconds, 1),
            "kills": options.kills,
            "faces_after_each_kill": moments,
            "same_as_undisturbed": contents(killed) == contents(undisturbed),
            "whole_after_all": verify(killed).whole and verify(undisturbed).whole,
        }
        shutil.rmtree(undisturbed)
        result |= _erase(killed, options.forget)
    for key, value in result.items():
        print(f"{key.replace('_', ' '):26} {value}")
    print(json.dumps({**result, "cores": usable_cores(), "python": platform.python_version()}))


def _ingest_and_kill(folder: Path, arguments: list[object], within: float) -> int:
    """Starts an ingest and kills it at a random moment; returns the number of faces then."""
    process = subprocess.Popen(_command("ingest", folder, *arguments), stdout=subprocess.DEVNULL)
    # The first batch is written after some seconds; the kill must happen during writes.
    time.sleep(3 + random.uniform(0, within))
    process.kill()
    process.wait()
    if not (folder / "gallery.db").is_file():
        return 0
    # Only leftovers of the batch in flight are allowed.
    found = [finding for finding in verify(folder).findings if finding.trouble is not Trouble.LEFTOVER]
    assert found == [], found
    return len(contents(folder))


def _erase(folder: Path, name: str) -> dict[str, object]:
    """Forgets a person, and searches the folder for traces of them, before and after."""
    person = {key: vector for key, vector in contents(folder).items() if key[1] == name}
    needles = [name.encode()]
    for (sha256, _, paths, *_), vector in person.items():
        # 32 bytes of a vector stand for all of it.
        needles += [sha256.encode(), *(path.encode() for path in paths), vector[1024:1056]]
    before = _found(folder, needles)
    started = time.monotonic()
    _faceprint("forget", folder, "--identity", name)
    seconds = time.monotonic() - started
    return {
        "forgotten_faces": len(person),
        "forget_seconds": round(seconds, 2),
        "traces_looked_for": len(needles),
        "traces_before": before,
        "traces_after": _found(folder, needles),
        "whole_after_forgetting": verify(folder).whole,
    }


def _found(folder: Path, needles: list[bytes]) -> int:
    """Counts the byte strings that occur in any file of a folder."""
    left = set(needles)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            left -= {needle for needle in left if needle in data}
    return len(set(needles)) - len(left)


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "retrieval.cli.app", *map(str, arguments)]


def _faceprint(*arguments: object) -> None:
    subprocess.run(_command(*arguments), check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
