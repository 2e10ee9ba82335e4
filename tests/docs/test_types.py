"""The types reach users: mypy checks a program that uses the library as it checks one of ours."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from typing import Unpack

from retrieval import Gallery, Match, ModelBundle, PeopleResult, PersonMatch, PhotoSearchOptions, ingest

def nearest(folder: str, photo: str) -> list[Match]:
    with Gallery.open(folder) as gallery:
        report = ingest(gallery, ["photos"])
        count: int = report.found
        return list(gallery.search(photo, k=5).matches)

def near(gallery: Gallery, photo: str, **options: Unpack[PhotoSearchOptions]) -> tuple[Match, ...]:
    return gallery.search(photo, k=None, exclude_self=True, **options).matches

def wrong(folder: str) -> str:
    gallery = Gallery.open(folder)
    near(gallery, "who.jpg", within="2 km")
    gallery.search_people(["who.jpg"], within=2.0)
    gallery.search_by_face(7, mean_of=3)
    return gallery
"""


def test_mypy_sees_the_types_of_the_library_in_a_program_that_uses_it(tmp_path: Path) -> None:
    """Here with the cache of `make lint`; that the wheel says it has types, test_wheel.py holds."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", os.fspath(tmp_path / "program.py")]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    found = [line.partition(": ")[2] for line in ended.stdout.splitlines() if "note:" not in line]
    assert found == [
        'error: Argument "within" to "near" has incompatible type "str"; expected "float | None"  [arg-type]',
        'error: Unexpected keyword argument "within" for "search_people" of "GallerySearches"  [call-arg]',
        'error: Unexpected keyword argument "mean_of" for "search_by_face" of "GallerySearches"  [call-arg]',
        'error: Incompatible return value type (got "Gallery", expected "str")  [return-value]',
        "",
    ], ended.stdout + ended.stderr
    assert ended.stdout.endswith("Found 4 errors in 1 file (checked 1 source file)\n")
