"""A data check as `faceprint check --json` wrote it, as far as a report shows it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.errors import InputError
from retrieval.files import why


@dataclass(frozen=True)
class Finding:
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
    findings: tuple[Finding, ...]


def read(path: Path) -> DataCheck:
    """Reads a check.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        tree = json.loads(path.read_text("utf-8"))
        return DataCheck(
            str(tree["data"]),
            int(tree["photos"]),
            int(tree["readable"]),
            len(tree["identities"]),
            tuple(_finding(one) for one in tree["findings"]),
        )
    except OSError as error:
        raise InputError(
            f"The check {path} cannot be read ({why(error)}); make it with `faceprint check --json {path}`."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no data check; make one with `faceprint check --json {path}`."
        ) from error


def _finding(tree: Any) -> Finding:
    return Finding(
        kind=str(tree["kind"]),
        level=str(tree["level"]),
        count=int(tree["count"]),
        unit=str(tree["unit"]),
        says=str(tree["says"]),
        advice=str(tree["advice"]),
    )
