"""The contents of a backup: the names of its files, and the card that states them.

my.backup/
  backup.json                     the card; written last, so it names only complete files
  gallery-<SHA-256>.db            the database, one snapshot
  vectors/<SHA-256>.faiss         segments by their content: a second backup copies only new ones
  models/<SHA-256 of the card>/   the bundles
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.records import Generation, Segment
from retrieval.errors import DataError, StorageError
from retrieval.models.bundle import FILE_NAMES
from retrieval.storage.layout import BACKUP_CARD, VECTORS
from retrieval.storage.leftovers import is_unfinished_backup, unfinished_backup
from retrieval.system.files import is_no_file, other_than_file, why
from retrieval.system.manifests import parse_manifest

_T = TypeVar("_T")

MODELS: Final = "models"
_FORMAT: Final = 1
_ADVICE: Final = "back up again, or use another backup"

# The files of a model. Its card states the SHA-256 of the others, but not of the description, which is for
# people and may be missing.
MODEL_CARD: Final = "bundle.json"
MODEL_DESCRIPTION: Final = "MODELCARD.md"

# The file names that a card may contain: none outside the folder of the backup.
_NAME: Final = re.compile(
    r"gallery-[0-9a-f]{16}\.db|vectors/[0-9a-f]{64}\.faiss"
    rf"|models/[0-9a-f]{{64}}/({'|'.join(map(re.escape, sorted(FILE_NAMES)))})"
)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class CardDamaged(DataError):
    """The card of a backup is not what was written."""


@dataclass(frozen=True)
class Backup:
    """The content of a backup, as its card states it."""

    folder: Path
    gallery: str
    taken_at: str
    schema: str
    database: str
    files: dict[str, str]  # SHA-256 by path, relative to the folder
    faces: int
    revision: int

    def vectors(self, segment: Segment) -> Path:
        """Returns the path of a segment's vectors."""
        return self.folder / VECTORS / f"{segment.sha256}.faiss"

    def model(self, generation: Generation) -> Path:
        """Returns the folder of a generation's model."""
        return self.folder / MODELS / generation.card_sha256


def vectors_name(segment: Segment) -> str:
    """Returns the name of a segment's file, relative to the folder of the backup."""
    return f"{VECTORS}/{segment.sha256}.faiss"


def database_name(sha256: str | None) -> str:
    """Returns the name of a database with this SHA-256; None, of a missing file, gives no file's name."""
    return f"gallery-{str(sha256)[:16]}.db"


def files_by_sha256(folder: Path) -> dict[str, Path]:
    """Returns the files of a backup by the SHA-256 that its card states.

    Raises:
        DataError: there is no backup.
    """
    return {digest: folder / name for name, digest in read_backup(folder).files.items()}


def card_text(backup: Backup) -> bytes:
    """Returns the text of backup.json."""
    fields = {"format": _FORMAT, **asdict(backup)}
    del fields["folder"]
    return (json.dumps({**fields, "sha256": _card_checksum(fields)}, indent=1) + "\n").encode()


def _card_checksum(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the fields of a card, without the checksum itself."""
    said = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Stated:
    """The fields of a card in every version, which identify a newer version."""

    format: int
    schema: str


@dataclass(frozen=True)
class _Fields(_Stated):
    gallery: str
    taken_at: str
    database: str
    files: dict[str, str]
    faces: int
    revision: int


def read_backup(folder: Path) -> Backup:
    """Returns the content of a backup's card.

    Raises:
        DataError: there is no card, or a newer version wrote it.
        CardDamaged: it is damaged.
        StorageError: it cannot be read.
    """
    fields = _fields_of(_read_card(folder), folder)
    path = folder / BACKUP_CARD
    strange = [
        name
        for name, digest in [*fields.files.items(), (fields.database, "0" * 64)]
        if not (_NAME.fullmatch(name) and _SHA256.fullmatch(digest))
    ]
    if strange or fields.database not in fields.files or "/" in fields.database:
        name = strange[0] if strange else fields.database
        raise CardDamaged(f"{path} is damaged: it names {name!r}, which is no file of a backup; {_ADVICE}.")
    try:
        datetime.fromisoformat(fields.taken_at)
    except ValueError as error:
        raise CardDamaged(f"{path} is damaged (the field taken_at: it is no time); {_ADVICE}.") from error
    facts = {name: value for name, value in vars(fields).items() if name != "format"}
    return Backup(folder=folder, **facts)


def _read_card(folder: Path) -> bytes:
    """Returns the bytes of a backup's card; errors as of `read_backup`."""
    path = folder / BACKUP_CARD
    try:
        if path.is_symlink():
            raise CardDamaged(f"{path} is a symbolic link; {_ADVICE}.")
        # Reading a pipe would block.
        if (other := other_than_file(path)) is not None:
            raise CardDamaged(f"{path} is {other}, not a file; {_ADVICE}.")
        return path.read_bytes()
    except OSError as error:
        if not is_no_file(error):
            raise StorageError(f"{path} cannot be read: {why(error)}.") from error
        if is_unfinished_backup(folder):
            raise DataError(unfinished_backup(folder)) from error
        raise DataError(
            f"{folder} is not a backup: it has no {BACKUP_CARD}; make one with `faceprint backup`."
        ) from error


def _fields_of(card: bytes, folder: Path) -> _Fields:
    """Returns the fields of a backup's card; errors as of `read_backup`."""
    path = folder / BACKUP_CARD

    def parsed(kind: type[_T]) -> _T:
        return parse_manifest(card, kind, name=path, error=CardDamaged, advice=_ADVICE)

    said = parsed(dict[str, Any])
    if "sha256" in said and said["sha256"] != _card_checksum(said):
        raise CardDamaged(f"{path} is damaged: it is not what was written; {_ADVICE}.")
    stated = parsed(_Stated)
    if stated.format > _FORMAT or stated.schema > SCHEMA_VERSION:
        raise DataError(f"The backup {folder} was made by a newer version of faceprint; upgrade faceprint.")
    return parsed(_Fields)


def sha256_in(folder: Path, name: str) -> str | None:
    """Returns the SHA-256 of a file of a backup, in hex; None if it or its folder is missing or a link."""
    path = folder / name
    if any((folder / parent).is_symlink() for parent in Path(name).parents if parent.name):
        return None
    return sha256_of(path)


def sha256_of(path: Path) -> str | None:
    """Returns the SHA-256 of a file, in hex; None if it does not exist or is not a plain file.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        # Opening a FIFO must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        # Something else than a plain file counts as damaged; all other errors are of the disk.
        if is_no_file(error):
            return None
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error
