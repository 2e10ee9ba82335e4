"""Vector files: reads and writes Parquet files of embeddings, with the metadata of their photos."""

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
    region_column,
    vector_field,
    write_groups,
)


def read_embeddings(
    path: Path, *, fingerprint: str, dimension: int, trusted: bool, size: int = BLOCK
) -> Iterator[tuple[list[NewFace], Vectors]]:
    """Returns the rows of a vector file, or of a file of an export, for `Gallery.enroll_vectors`.

    Columns: `vector`, lists of `dimension` floats (16, 32 or 64 bits); and, all optional, `sha256` of the
    photo's bytes in hex; `identity`; `path`, relative to the current directory, or `paths`, of which only the
    first is used; `metadata`, a JSON object as text; `region`, the place of the face in the photo, as
    `write_embeddings` writes it: rows of one photo with different regions are its faces. Null and empty
    values count as absent. A row without a SHA-256 gets that of its vector, as little-endian float32. Other
    columns are ignored.

    Args:
        path: the file.
        fingerprint, dimension: of the gallery's model.
        trusted: accepts a file that does not name its model: the caller asserts that this model made it.
        size: the most rows of a batch.

    Returns:
        Batches of faces and their vectors, (n, d) float32, C order. Columns are checked before this returns.

    Raises:
        ModelMismatch: the file names another model.
        InputError: it is not a Parquet file, does not name its model, or has columns of other types; while
            iterating, a vector of another length or not finite, a malformed SHA-256 or metadata.
        MissingDependency: pyarrow is not installed.
    """
    with opened(path) as parquet:
        _check_model(path, (parquet.metadata.metadata or {}).get(FINGERPRINT), fingerprint, trusted=trusted)
        _check_columns(path, parquet.schema_arrow, dimension)
        texts = ("sha256", "identity", "path", "metadata", "region")
        names = [name for name in texts if name in parquet.schema_arrow.names]
        if "path" not in names and "paths" in parquet.schema_arrow.names:
            names.append("paths")
    return _batches(path, names, dimension, size)


def count_embeddings(path: Path) -> int:
    """Returns the number of rows of a Parquet file.

    Raises:
        InputError: it is not a Parquet file.
        MissingDependency: pyarrow is not installed.
    """
    with opened(path) as parquet:
        return int(parquet.metadata.num_rows)


def _batches(
    path: Path, names: Sequence[str], dimension: int, size: int
) -> Iterator[tuple[list[NewFace], Vectors]]:
    row = 0
    for columns, vectors in read_blocks_ahead(path, names, dimension, size):
        absent = [None] * len(vectors)
        if "paths" in columns:
            columns["path"] = [paths[0] if paths else None for paths in columns["paths"]]
        digests = _digests(path, columns.get("sha256", absent), vectors, row)
        identities = _normalized(columns.get("identity", absent))
        paths = [absolute(name) if name else None for name in columns.get("path", absent)]
        metadata = metadata_column(path, columns.get("metadata"), len(vectors), row)
        regions = region_column(path, columns.get("region"), len(vectors), row)
        faces = [
            NewFace(identity, name, digest, said, region=region)
            for identity, name, digest, said, region in zip(
                identities, paths, digests, metadata, regions, strict=True
            )
        ]
        yield faces, vectors
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


def _normalized(names: Sequence[str | None]) -> list[str | None]:
    """Returns names in Unicode normalization form C, like names of folders; "" becomes None."""
    normalized = {name: unicodedata.normalize("NFC", name) if name else None for name in set(names)}
    return [normalized[name] for name in names]


def _check_model(path: Path, stated: bytes | None, fingerprint: str, *, trusted: bool) -> None:
    if stated is None and not trusted:
        raise InputError(
            f"{path} does not say which model made its vectors; pass `trusted=True` to assert "
            "that the gallery's model did."
        )
    if stated not in (None, fingerprint.encode()):
        shown = (stated or b"").decode(errors="backslashreplace")[:12]
        raise ModelMismatch(
            f"The vectors of {path} were made by another model (fingerprint {shown}, not "
            f"{fingerprint[:12]}); embed the photos with this gallery's model, or enroll elsewhere."
        )


def _check_columns(path: Path, schema: Any, dimension: int) -> None:
    types = {field.name: field.type for field in schema}
    vector = types.get("vector")
    if vector is None:
        raise InputError(f"{path} has no column `vector`; its columns are {', '.join(types) or 'none'}.")
    arrow_types = pyarrow()[0].types
    if not (_is_list(vector) and arrow_types.is_floating(vector.value_type)):
        raise InputError(f"The column `vector` of {path} holds {vector}; lists of floats are needed.")
    if arrow_types.is_fixed_size_list(vector) and vector.list_size != dimension:
        raise InputError(
            f"The vectors of {path} have {vector.list_size:,} numbers; the gallery's have {dimension:,}."
        )
    for name in ("sha256", "identity", "path", "metadata", "region"):
        if name in types and not _is_text(types[name]):
            raise InputError(f"The column `{name}` of {path} holds {types[name]}; texts are needed.")
    paths = types.get("paths")
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
    regions: bool = False,
) -> int:
    """Writes a vector file as `read_embeddings` reads it, atomically; an existing file is replaced.

    Args:
        path: the file.
        batches: faces and their vectors, (n, dimension).
        fingerprint, dimension: of the model that made the vectors.
        regions: write where the faces are in their photos, as a column `region` of JSON objects: `box` (left,
            top, width, height), `landmarks` (five x, y), `score` and `sharpness`, or nulls for a picture
            that was taken as it is.

    Returns:
        The number of rows.

    Raises:
        InputError: the shape of a batch of vectors is not (number of faces, dimension).
        StorageError: the file cannot be written.
        MissingDependency: pyarrow is not installed.
    """
    pa, _ = pyarrow()
    schema = pa.schema(
        [
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("path", pa.string()),
            pa.field("metadata", pa.string()),
            *([pa.field("region", pa.string())] if regions else []),
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
                "region": [None if face.region is None else face.region.as_json() for face in part],
                "vector": vectors[start : start + ROW_GROUP],
            }
