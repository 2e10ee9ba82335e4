"""Parquet: the only module that imports pyarrow, which is optional."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from retrieval.errors import InputError, MissingDependency
from retrieval.system.files import other_than_file, path_in_utf8

# Bytes that pyarrow reads at a time. Otherwise it reads a whole column of a row group, however large.
_READ_BYTES: Final = 2**20


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and its module for Parquet.

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
    """A Parquet file; what pyarrow finds wrong with it, then or later, becomes an InputError."""
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
            # pyarrow's own words are a paragraph.
            raise InputError(f"{path} cannot be read: {os.strerror(error.errno).lower()}.") from error
        raise InputError(
            f"{path} is not a Parquet file, or it is damaged; make it or copy it again."
        ) from error
