"""The types reach users: mypy checks a program that uses the library as it checks one of ours."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from retrieval import Gallery, Match, ModelBundle, PeopleResult, PersonMatch, ingest

def nearest(folder: str, photo: str) -> list[Match]:
    with Gallery.open(folder) as gallery:
        report = ingest(gallery, ["photos"])
        count: int = report.found
        return list(gallery.search(photo, k=5).matches)

def wrong(folder: str) -> str:
    return Gallery.open(folder)
"""


def test_mypy_sees_the_types_of_the_library_in_a_program_that_uses_it(tmp_path: Path) -> None:
    """Here with the cache of `make lint`; that the wheel says it has types, test_wheel.py holds."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", os.fspath(tmp_path / "program.py")]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.stdout.splitlines() == [
        f"{tmp_path}/program.py:11: error: Incompatible return value type "
        '(got "Gallery", expected "str")  [return-value]',
        "Found 1 error in 1 file (checked 1 source file)",
    ], ended.stdout + ended.stderr
