"""Parquet files: the only module that imports pyarrow, an optional dependency."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from retrieval.errors import InputError, MissingDependency
from retrieval.system.files import other_than_file, path_in_utf8

# Bytes that pyarrow reads at a time. By default it reads a whole column of a row group, however large.
_READ_BYTES: Final = 2**20


def pyarrow() -> tuple[Any, Any]:
    """Returns pyarrow and its Parquet module.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(
            "Reading and writing Parquet needs pyarrow; install it with pip install 'faceprint[parquet]'."
        ) from error
    return pyarrow, pyarrow.parquet


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yields an open Parquet file; an error of pyarrow in the with statement becomes an InputError."""
    pa, pq = pyarrow()
    if (other := other_than_file(path)) is not None:
        raise InputError(f"{path} is {other}; name a Parquet file.")
    try:
        with (
            path_in_utf8(path) as name,
            pq.ParquetFile(
                Path(name), pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
            ) as parquet,
        ):
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # The message of pyarrow is a paragraph.
            raise InputError(f"{path} cannot be read: {os.strerror(error.errno).lower()}.") from error
        raise InputError(
            f"{path} is not a Parquet file, or it is damaged; make it or copy it again."
        ) from error
