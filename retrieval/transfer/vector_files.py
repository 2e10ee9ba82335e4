"""Vector files: Parquet files of embeddings from other programs, with data about their photos."""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.database.metadata import encoded
from retrieval.database.records import NewFace
from retrieval.errors import InputError, ModelMismatch, StorageError
from retrieval.index.segments import Vectors
from retrieval.system.files import replacing, why
from retrieval.system.parquet import opened, pyarrow
from retrieval.system.paths import absolute
from retrieval.transfer.manifest import SHA256
from retrieval.transfer.parquet_blocks import (
    BLOCK,
    FINGERPRINT,
    ROW_GROUP,
    metadata_column,
    read_blocks_ahead,
    vector_field,
    write_groups,
)


def read_embeddings(
    path: Path, *, fingerprint: str, dimension: int, trusted: bool, size: int = BLOCK
) -> Iterator[tuple[list[NewFace], Vectors]]:
    """The rows of a Parquet file of embeddings, or of a file of an export, for `Gallery.enroll_vectors`.

    Columns: `vector`, lists of `dimension` floats (of 16, 32 or 64 bits); and, all optional, `sha256` of the
    photo's bytes in hex; `identity`; `path`, relative to the current directory, or `paths`, of which the
    first is taken; `metadata`, a JSON object as text. What is null or empty is not there. A row without a
    SHA-256 is known by that of its vector, as little-endian float32. Other columns are passed over.

    Args:
        path: of the file.
        fingerprint, dimension: of the gallery's model.
        trusted: accepts a file that does not name its model: the caller asserts that this model made it.
        size: how many rows at a time, at most.

    Returns:
        Faces and their vectors (n, d), C order. The columns are checked before this returns.

    Raises:
        ModelMismatch: the file says that another model made it.
        InputError: it is not a Parquet file, does not say which model made it, or has columns that do not
            fit; while iterating, a vector of another length or not finite, a malformed SHA-256 or metadata.
        MissingDependency: pyarrow is not installed.
    """
    with opened(path) as parquet:
        _check_model(path, (parquet.metadata.metadata or {}).get(FINGERPRINT), fingerprint, trusted=trusted)
        _check_columns(path, parquet.schema_arrow, dimension)
        texts = ("sha256", "identity", "path", "metadata")
        names = [name for name in texts if name in parquet.schema_arrow.names]
        if "path" not in names and "paths" in parquet.schema_arrow.names:
            names.append("paths")
    return _embeddings(path, names, dimension, size)


def count_embeddings(path: Path) -> int:
    """Returns the number of rows of a Parquet file.

    Raises:
        InputError: it is not a Parquet file.
        MissingDependency: pyarrow is not installed.
    """
    with opened(path) as parquet:
        return int(parquet.metadata.num_rows)


def _embeddings(
    path: Path, names: Sequence[str], dimension: int, size: int
) -> Iterator[tuple[list[NewFace], Vectors]]:
    row = 0
    for columns, vectors in read_blocks_ahead(path, names, dimension, size):
        nothing = [None] * len(vectors)
        if "paths" in columns:
            columns["path"] = [paths[0] if paths else None for paths in columns["paths"]]
        digests = _digests(path, columns.get("sha256", nothing), vectors, row)
        identities = _composed(columns.get("identity", nothing))
        paths = [absolute(name) if name else None for name in columns.get("path", nothing)]
        said = metadata_column(path, columns.get("metadata"), len(vectors), row)
        yield list(map(NewFace, identities, paths, digests, said)), vectors
        row += len(vectors)


def _digests(path: Path, given: Sequence[str | None], vectors: Vectors, row: int) -> list[str]:
    digests = [
        digest.lower() if digest else hashlib.sha256(vector).hexdigest()
        for digest, vector in zip(given, vectors, strict=True)
    ]
    for offset, digest in enumerate(digests):
        if not SHA256.fullmatch(digest):
            raise InputError(f"Row {row + offset} of {path} has a sha256 that is not 64 hexadecimal digits.")
    return digests


def _composed(names: Sequence[str | None]) -> list[str | None]:
    """Returns names in Unicode normalization form C, like those of folders."""
    known = {name: unicodedata.normalize("NFC", name) if name else None for name in set(names)}
    return [known[name] for name in names]


def _check_model(path: Path, found: bytes | None, fingerprint: str, *, trusted: bool) -> None:
    if found is None and not trusted:
        raise InputError(
            f"{path} does not say which model made its vectors; pass `trusted=True` to assert "
            "that the gallery's model did."
        )
    if found not in (None, fingerprint.encode()):
        shown = (found or b"").decode(errors="backslashreplace")[:12]
        raise ModelMismatch(
            f"The vectors of {path} were made by another model (fingerprint {shown}, not "
            f"{fingerprint[:12]}); embed the photos with this gallery's model, or enroll elsewhere."
        )


def _check_columns(path: Path, schema: Any, dimension: int) -> None:
    found = {field.name: field.type for field in schema}
    vector = found.get("vector")
    if vector is None:
        raise InputError(f"{path} has no column `vector`; its columns are {', '.join(found) or 'none'}.")
    kinds = pyarrow()[0].types
    if not (_is_list(vector) and kinds.is_floating(vector.value_type)):
        raise InputError(f"The column `vector` of {path} holds {vector}; lists of floats are needed.")
    if kinds.is_fixed_size_list(vector) and vector.list_size != dimension:
        raise InputError(
            f"The vectors of {path} have {vector.list_size:,} numbers; the gallery's have {dimension:,}."
        )
    for name in ("sha256", "identity", "path", "metadata"):
        if name in found and not _is_text(found[name]):
            raise InputError(f"The column `{name}` of {path} holds {found[name]}; texts are needed.")
    paths = found.get("paths")
    if paths is not None and not (_is_list(paths) and _is_text(paths.value_type)):
        raise InputError(f"The column `paths` of {path} holds {paths}; lists of texts are needed.")


def _is_list(kind: Any) -> bool:
    kinds = pyarrow()[0].types
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    kinds = pyarrow()[0].types
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_null(kind))


def write_embeddings(
    path: Path,
    batches: Iterable[tuple[Sequence[NewFace], NDArray[Any]]],
    *,
    fingerprint: str,
    dimension: int,
) -> int:
    """Writes embeddings as `read_embeddings` reads them, whole or not at all; an older file is replaced.

    Args:
        path: of the file.
        batches: faces and their vectors (n, dimension).
        fingerprint, dimension: of the model that made them.

    Returns:
        How many rows there are.

    Raises:
        InputError: not as many vectors as faces, or of another length.
        StorageError: the disk refused.
        MissingDependency: pyarrow is not installed.
    """
    pa, _ = pyarrow()
    schema = pa.schema(
        [
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("path", pa.string()),
            pa.field("metadata", pa.string()),
            vector_field(dimension),
        ],
        metadata={FINGERPRINT: fingerprint.encode()},
    )
    try:
        with replacing(path) as file:
            rows, _ = write_groups(file, schema, _embedding_columns(batches, dimension))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {why(error)}.") from error
    return rows


def _embedding_columns(
    batches: Iterable[tuple[Sequence[NewFace], NDArray[Any]]], dimension: int
) -> Iterator[dict[str, Any]]:
    for faces, vectors in batches:
        if np.shape(vectors) != (len(faces), dimension):
            raise InputError(
                f"{len(faces):,} faces need vectors of shape ({len(faces)}, {dimension}), "
                f"not {np.shape(vectors)}."
            )
        vectors = np.ascontiguousarray(vectors, np.float32)
        for start in range(0, len(faces), ROW_GROUP):
            part = faces[start : start + ROW_GROUP]
            yield {
                "sha256": [face.sha256 for face in part],
                "identity": [face.identity for face in part],
                "path": [face.path for face in part],
                "metadata": [encoded(face.metadata, face.path or face.sha256) for face in part],
                "vector": vectors[start : start + ROW_GROUP],
            }
