"""Manifests are read strictly; whatever is wrong is one sentence that names the file and the field."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from retrieval.errors import DataError
from retrieval.system.manifests import parse_tree, read_manifest


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Manifest:
    name: str
    inner: Inner
    files: dict[str, str]
    ratio: float = 1.0


def read(path: Path, text: bytes) -> Manifest:
    path.write_bytes(text)
    return read_manifest(path, Manifest, error=DataError, advice="make it again", max_bytes=100_000)


def test_a_manifest_is_read_as_its_type_and_fields_of_newer_versions_are_passed_over(tmp_path: Path) -> None:
    found = read(tmp_path / "a.json", b'{"name": "x", "inner": {"size": 1}, "files": {"a": "b"}, "new": [1]}')
    assert found == Manifest("x", Inner(1), {"a": "b"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"name": 1, "inner": {"size": 1}, "files": {}}', "the field name: expected str, got int"),
        (
            b'{"name": "x", "inner": {"size": "1"}, "files": {}}',
            "the field inner.size: expected int, got str",
        ),
        (b'{"name": "x", "inner": {"size": 1}, "files": []}', "the field files: expected object, got array"),
        (b'{"name": "x", "inner": {"size": 1}}', "object missing required field files"),
        (b'{"name": "x", "inner": null, "files": {}}', "the field inner: expected object, got null"),
        (b"[]", "expected object, got array"),
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b'{"name": "\xff"}', "it is not JSON"),
        (b'{"more": ' + b"[" * 50_000, "it is not JSON"),
        (b'{"name": "x", "inner": {"size": NaN}, "files": {}}', "it is not JSON"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_file_and_field(
    text: bytes, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", text)
    assert str(caught.value) == f"{tmp_path / 'a.json'} is damaged ({problem}); make it again."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"inner": {"size": %s}}', "the field inner.size: a number of too many digits"),
        ('{"inner": {"size": 1}, "new": [0, {"a": %s}]}', "the field new[1].a: a number of too many digits"),
        ("%s", "a number of too many digits"),
    ],
)
def test_an_integer_of_more_digits_than_python_reads_is_named(
    text: str, problem: str, tmp_path: Path
) -> None:
    digits = "9" * (sys.get_int_max_str_digits() + 1)
    with pytest.raises(DataError) as caught:
        parse_tree(text % digits, dict[str, Any], name="a.json", error=DataError, advice="make it again")
    assert str(caught.value) == f"a.json is damaged ({problem}); make it again."
    with pytest.raises(DataError, match=r"the field inner.size: integer value out of range\)"):
        read(tmp_path / "a.json", b'{"name": "x", "files": {}, "inner": {"size": %s}}' % digits.encode())


def test_a_manifest_that_is_missing_or_a_folder_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or directory\); make it again\.$"):
        read_manifest(tmp_path / "none.json", Manifest, error=DataError, advice="make it again")
    with pytest.raises(DataError, match=r"is a directory\); make it again\.$"):
        read_manifest(tmp_path, Manifest, error=DataError, advice="make it again")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"is a pipe or a device, not a file; make it again\.$"):
        read_manifest(tmp_path / "pipe.json", Manifest, error=DataError, advice="make it again")
    with pytest.raises(DataError, match=r"has 100,001 bytes and 100,000 is the limit; make it again\.$"):
        read(tmp_path / "a.json", b" " * 100_001)
