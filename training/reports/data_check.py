"""Reads the file that `faceprint check --json` writes, with the fields that a report shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.errors import InputError
from retrieval.system.manifests import read_manifest


@dataclass(frozen=True)
class ReportedFinding:
    """One kind of finding: its severity ("harms", "look", "note"), its number, and what to do about it."""

    kind: str
    level: str
    count: int
    unit: str
    says: str
    advice: str


@dataclass(frozen=True)
class DataCheck:
    """The result of a check of a data folder.

    Attributes:
        data: the folder, as passed by the caller.
        photos, readable: number of files, and of those that can be read.
        identities: number of people.
        findings: the most serious first.
    """

    data: str
    photos: int
    readable: int
    identities: int
    findings: tuple[ReportedFinding, ...]


def read(path: Path) -> DataCheck:
    """Reads the result of a check.

    Raises:
        InputError: the file cannot be read, or it is not the result of a check.
    """
    advice = f"make one with `faceprint check --json {path}`"
    found = read_manifest(path, _Check, error=InputError, advice=advice)
    return DataCheck(found.data, found.photos, found.readable, len(found.identities), found.findings)


@dataclass(frozen=True)
class _Check:
    """The fields of the file that are read."""

    data: str
    photos: int
    readable: int
    identities: list[Any] | dict[str, Any]
    findings: tuple[ReportedFinding, ...]
