"""A real gallery killed at ten random moments equals an undisturbed one; then a person is erased from it.

    python -m benchmarks.kills --model MODEL --photos FOLDER --forget NAME [--kills 10]

`faceprint ingest` runs as a process of its own and is killed with SIGKILL, again and again, then left to
finish. Both galleries must hold the same (SHA-256, identity, paths) and the same vectors; `verify` must find
them whole after each step. Then `faceprint forget` is timed, and every byte of the gallery's folder is
searched for the person's name, paths, SHA-256s and vectors, before and after. Prints one table and one JSON
line.
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
    """Starts an ingest and kills it at a random moment; returns how many faces there are then."""
    process = subprocess.Popen(_command("ingest", folder, *arguments), stdout=subprocess.DEVNULL)
    # It takes some seconds until the first batch; what matters is a moment in the middle of writing.
    time.sleep(3 + random.uniform(0, within))
    process.kill()
    process.wait()
    if not (folder / "gallery.db").is_file():
        return 0
    # Leftovers of the batch in flight are all that may be found.
    found = [finding for finding in verify(folder).findings if finding.trouble is not Trouble.LEFTOVER]
    assert found == [], found
    return len(contents(folder))


def _erase(folder: Path, name: str) -> dict[str, object]:
    """Forgets a person, and searches the folder for what is known of them."""
    person = {key: vector for key, vector in contents(folder).items() if key[1] == name}
    needles = [name.encode()]
    for (sha256, _, paths), vector in person.items():
        # Any 32 bytes of a vector are as good as all of it: who finds none of these finds nothing.
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
    """How many of some byte strings stand in any file of a folder."""
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
