"""Parquet blocks: writes row groups and reads blocks of rows, for exports and vector files.

It needs pyarrow, which is optional. Vectors are stored as float32 in plain encoding, uncompressed, which any
reader supports. (Measured on 16,384 random vectors of 2048 numbers: lz4 saves nothing; zstd with byte stream
split saves 15% and takes 1.5 times as long to write.)
"""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np

from retrieval.database.metadata import Metadata, decoded
from retrieval.database.records import FaceRegion
from retrieval.errors import InputError
from retrieval.index.segments import Vectors
from retrieval.system.parquet import opened, pyarrow

# Rows of a block that is read: the rows of a segment of vectors with 2048 numbers.
BLOCK: Final = 8192
# Rows of a row group that is written: 32 MiB of vectors of 2048 numbers.
ROW_GROUP: Final = 4096
# Rows that pyarrow decodes at a time. Its buffers take a multiple of their size, which should fit the cache.
_DECODED_ROWS: Final = 1024
FINGERPRINT: Final = b"faceprint.fingerprint"


def vector_field(dimension: int) -> Any:
    """Returns the pyarrow field `vector`: a fixed-size list of float32, without nulls."""
    pa, _ = pyarrow()
    element = pa.field("element", pa.float32(), nullable=False)
    return pa.field("vector", pa.list_(element, dimension), nullable=False)


class _Hashed:
    """A file that computes the SHA-256 of the bytes written to it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.tell = file.tell
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def write_groups(file: BinaryIO, schema: Any, groups: Iterable[dict[str, Any]]) -> tuple[int, str]:
    """Writes row groups as Parquet; returns the number of rows, and the SHA-256 of the written bytes."""
    pa, pq = pyarrow()
    texts = [name for name in schema.names if name not in ("id", "vector")]
    rows, hashed = 0, _Hashed(file)
    options = {
        "use_dictionary": ["identity", "identity_metadata"],
        "compression": {
            "id": "snappy",
            "vector.list.element": "none",
            **{"paths.list.element" if name == "paths" else name: "snappy" for name in texts},
        },
        "write_statistics": ["id", "identity"],
        "write_page_checksum": True,
    }
    with pq.ParquetWriter(hashed, schema, **options) as writer:
        for columns in groups:
            arrays = [_array(columns[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            rows += len(columns["vector"])
    return rows, hashed.digest.hexdigest()


def _array(column: Any, kind: Any) -> Any:
    """Returns a column as a pyarrow array; vectors are not copied."""
    pa, _ = pyarrow()
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), type=kind)
    return pa.array(column, kind)


_Block: TypeAlias = tuple[dict[str, list[Any]], Vectors]  # columns by name, and vectors (n, d) float32


def read_blocks_ahead(path: Path, names: Sequence[str], dimension: int, size: int) -> Iterator[_Block]:
    """Yields the blocks of `_read_blocks`; a thread reads the next block while one is used."""
    with (
        closing(_read_blocks(path, names, dimension, size)) as blocks,
        ThreadPoolExecutor(1, thread_name_prefix="faceprint-read") as thread,
    ):
        upcoming = thread.submit(next, blocks, None)
        while (block := upcoming.result()) is not None:
            upcoming = thread.submit(next, blocks, None)
            yield block


def _read_blocks(
    path: Path, names: Sequence[str], dimension: int, size: int
) -> Generator[_Block, None, None]:
    """Yields some columns of a Parquet file and the vectors, (n, d) float32, of `size` rows at a time.

    Raises:
        InputError: the file is damaged, or a vector has another length or is not finite.
    """
    with opened(path) as parquet:
        batches = parquet.iter_batches(batch_size=min(_DECODED_ROWS, size), columns=[*names, "vector"])
        row, block, columns = 0, np.empty((size, dimension), np.float32), _empty(names)
        for batch in batches:
            start = 0
            while start < len(batch):
                filled = row % size
                part = batch.slice(start, size - filled)
                _fill(path, block[filled : filled + len(part)], part.column("vector"), row)
                for name in names:
                    columns[name] += part.column(name).to_pylist()
                row, start = row + len(part), start + len(part)
                if row % size == 0:
                    yield columns, block
                    block, columns = np.empty((size, dimension), np.float32), _empty(names)
        if row % size:
            yield columns, block[: row % size]


def _empty(names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [] for name in names}


def _fill(path: Path, block: Vectors, column: Any, row: int) -> None:
    """Copies a column of vectors into a block (n, d); the first vector is in row `row` of the file."""
    if column.null_count:
        first = row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"Row {first} of {path} has no vector.")
    values = column.flatten()
    if not pyarrow()[0].types.is_fixed_size_list(column.type):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        mismatched = np.flatnonzero(lengths != block.shape[1])
        if len(mismatched):
            raise InputError(
                f"The vector in row {row + mismatched[0]} of {path} has {lengths[mismatched[0]]:,} numbers; "
                f"the gallery's have {block.shape[1]:,}."
            )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused below
        block[:] = values.to_numpy(zero_copy_only=False).reshape(block.shape)  # a null becomes a NaN
    finite = np.isfinite(block)
    if not finite.all():
        first = row + int(np.argmin(finite.all(axis=1)))
        raise InputError(f"The vector in row {first} of {path} has a number that is null or not finite.")


def region_column(
    path: Path, texts: Sequence[str | None] | None, rows: int, first: int
) -> list[FaceRegion | None]:
    """Returns the region of each row from a column of JSON texts; None where there is none.

    Args:
        path, texts, rows, first: as of `metadata_column`.

    Raises:
        InputError: a text is no region.
    """
    return [
        None if not text else _region(path, text, number)
        for number, text in enumerate([None] * rows if texts is None else texts, first)
    ]


def _region(path: Path, text: str, row: int) -> FaceRegion:
    try:
        return FaceRegion.of_json(text)
    except (ValueError, TypeError) as error:
        raise InputError(f"Row {row} of {path} has a region that no face has.") from error


def metadata_column(path: Path, texts: Sequence[str | None] | None, rows: int, first: int) -> list[Metadata]:
    """Returns the metadata of each row from a column of JSON texts; empty objects without that column.

    Args:
        path: the file, for errors.
        texts: the column, or None.
        rows: the number of rows.
        first: the row number of the first text in the file.

    Raises:
        InputError: a text is not a JSON object, or cannot be stored.
    """
    if texts is None:
        return [{} for _ in range(rows)]
    return [decoded(text, f"row {number} of {path}") for number, text in enumerate(texts, first)]
