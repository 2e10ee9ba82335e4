"""A data check as `faceprint check --json` wrote it, as far as a report shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.errors import InputError
from retrieval.system.manifests import read_manifest


@dataclass(frozen=True)
class ReportedFinding:
    """One kind of thing that was found: how serious ("harms", "look", "note"), how many, and what to do."""

    kind: str
    level: str
    count: int
    unit: str
    says: str
    advice: str


@dataclass(frozen=True)
class DataCheck:
    """What a check found in a data folder.

    Attributes:
        data: the folder, as it was given.
        photos, readable: files, and those that can be read.
        identities: people.
        findings: the most serious first.
    """

    data: str
    photos: int
    readable: int
    identities: int
    findings: tuple[ReportedFinding, ...]


def read(path: Path) -> DataCheck:
    """Reads a check.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    advice = f"make one with `faceprint check --json {path}`"
    found = read_manifest(path, _Check, error=InputError, advice=advice)
    return DataCheck(found.data, found.photos, found.readable, len(found.identities), found.findings)


@dataclass(frozen=True)
class _Check:
    """The file, as far as it is read."""

    data: str
    photos: int
    readable: int
    identities: list[Any] | dict[str, Any]
    findings: tuple[ReportedFinding, ...]
