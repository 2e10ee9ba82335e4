"""Export reader for imports: checks every byte and every row of an export before it is used."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.database.metadata import Metadata
from retrieval.database.records import Face
from retrieval.errors import InputError
from retrieval.index.segments import Vectors
from retrieval.system.files import why
from retrieval.system.parquet import opened
from retrieval.system.paths import is_absolute
from retrieval.transfer.manifest import (
    MANIFEST,
    SHA256,
    Export,
    ExportedFile,
    export_schema,
    read_export_manifest,
)
from retrieval.transfer.parquet_blocks import BLOCK, metadata_column, read_blocks_ahead, region_column


@dataclass(frozen=True, slots=True)
class ExportBatch:
    """A batch of rows of an export: faces of the exported gallery, and their vectors (n, d), C order.

    Attributes:
        faces: with their metadata.
        vectors: in the same order.
        people: the metadata of their identities, by name; without identities that have none.
    """

    faces: list[Face]
    vectors: Vectors
    people: dict[str, Metadata]


def read_export(folder: Path) -> Export:
    """Returns an export after checking every byte of its files.

    Raises:
        InputError: there is no export, a newer version made it, or a file does not match the manifest.
        MissingDependency: pyarrow is not installed.
    """
    exported = read_export_manifest(folder)
    for file in exported.files:
        _verify(folder / file.name, file)
        with opened(folder / file.name) as parquet:
            _check_schema(folder / file.name, parquet, exported)
            rows = parquet.metadata.num_rows
        if rows != file.rows:
            raise InputError(f"{folder / file.name} has {rows:,} rows and should have {file.rows:,}.")
    if sum(file.rows for file in exported.files) != exported.faces:
        raise InputError(f"The files of {folder} do not have as many rows as {MANIFEST} says.")
    _check_rows(exported)
    return exported


def _verify(path: Path, file: ExportedFile) -> None:
    try:
        # Neither a link nor a pipe: a complete copy consists of plain files.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            is_whole = stat.S_ISREG(status.st_mode) and status.st_size == file.bytes
            found = hashlib.file_digest(opened, "sha256").hexdigest() if is_whole else ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({why(error)}); copy the export whole again.") from error
    if found != file.sha256:
        raise InputError(f"{path} is not the file that {MANIFEST} names; copy the export whole again.")


def _check_schema(path: Path, parquet: Any, exported: Export) -> None:
    schema = parquet.schema_arrow
    expected = export_schema(
        exported.fingerprint, exported.dimension, gallery=exported.gallery, version=exported.version
    )
    for field in expected:
        if schema.names.count(field.name) != 1 or schema.field(field.name).type != field.type:
            raise InputError(f"{path} has no column {field.name} of type {field.type}, as every export has.")


def _check_rows(exported: Export) -> None:
    """Checks all rows before the first is enrolled: no face may occur twice, and no path with other bytes.

    Raises:
        InputError: a row is invalid, or the number of rows or identities differs from the manifest.
    """
    ids, places, paths = [np.empty(0, np.int64)], [np.empty(0, "S32")], [np.empty(0, "S32")]
    names: set[str] = set()
    for batch in rows(exported):
        ids.append(np.array([face.id for face in batch.faces], np.int64))
        # Hashes of 16 bytes, to bound memory.
        boxes = ["" if face.region is None else face.region.box for face in batch.faces]
        pairs = zip((face.sha256 for face in batch.faces), boxes, strict=True)
        places.append(_hashes(pairs))
        paths.append(_hashes((path, face.sha256) for face in batch.faces for path in face.paths))
        names |= {face.identity for face in batch.faces if face.identity is not None}
    # The faces of a photo have the same paths.
    photos = np.unique(np.concatenate(paths))
    for what, values in (
        ("face id", np.concatenate(ids)),
        ("SHA-256", np.concatenate(places)),
        ("path", photos.astype("S16")),
    ):
        if len(np.unique(values)) != len(values):
            raise InputError(f"A {what} comes twice in the export {exported.folder}; export again.")
    if (len(np.concatenate(ids)), len(names)) != (exported.faces, exported.identities):
        raise InputError(
            f"The files of {exported.folder} do not have as many faces or identities as {MANIFEST} says."
        )


def _hashes(pairs: Iterable[tuple[str, str]]) -> NDArray[np.bytes_]:
    """Returns the hashes of the two texts of each pair, one after the other, (n,) of 32 bytes."""
    known = [_short(first) + _short(second) for first, second in pairs]
    return np.array(known, "V32").view("S32") if known else np.empty(0, "S32")


def _short(text: str) -> bytes:
    # No zero byte at the end, which numpy would not tell from a shorter text.
    return hashlib.blake2b(text.encode(), digest_size=15).digest() + b"."


def rows(exported: Export, *, size: int = BLOCK) -> Iterator[ExportBatch]:
    """Yields all rows of an export, at most `size` at a time and never from two files at once.

    Raises:
        InputError: a file cannot be read, a vector is not finite, or a row is invalid.
    """
    names = [name for name in exported.columns if name != "vector"]
    for file in exported.files:
        path, row = exported.folder / file.name, 0
        for columns, vectors in read_blocks_ahead(path, names, exported.dimension, size):
            _check_columns_of(path, columns, row)
            said = metadata_column(path, columns.pop("metadata", None), len(vectors), row)
            people = metadata_column(path, columns.pop("identity_metadata", None), len(vectors), row)
            regions = region_column(path, columns.pop("region", None), len(vectors), row)
            faces = [
                Face(number, identity, tuple(paths), sha256, enrolled_at, metadata, region=region)
                for number, identity, sha256, enrolled_at, paths, metadata, region in zip(
                    *columns.values(), said, regions, strict=True
                )
            ]
            named = zip((face.identity for face in faces), people, strict=True)
            yield ExportBatch(faces, vectors, {name: own for name, own in named if name is not None and own})
            row += len(vectors)


def _check_columns_of(path: Path, columns: dict[str, list[Any]], first: int) -> None:
    """Checks the values of rows of an export; the first is row number `first` of its file.

    Raises:
        InputError: a value cannot be stored; the message names the row and the column.
    """
    checks: dict[str, Callable[[Any], bool]] = {
        "id": lambda number: number is not None and number > 0,
        "identity": lambda name: name is None or "\0" not in name,
        "sha256": lambda digest: digest is not None and SHA256.fullmatch(digest) is not None,
        "enrolled_at": lambda when: when is not None,
        "paths": lambda paths: paths is not None and all(map(_is_path, paths)),
    }
    for name, check in checks.items():
        for row, value in enumerate(columns[name], first):
            if not check(value):
                raise InputError(f"Row {row} of {path} has a value of {name} that no export has.")


def _is_path(path: str | None) -> bool:
    return path is not None and "\0" not in path and is_absolute(path)
