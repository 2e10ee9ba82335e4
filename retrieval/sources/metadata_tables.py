"""Tables of metadata (CSV, Parquet) about faces or identities, for `ingest --metadata` and for lists."""

import csv
import math
import os
import re
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, Final, TextIO, TypeAlias

from retrieval.database.metadata import INTEGERS, Metadata, checked_text, encoded
from retrieval.errors import InputError
from retrieval.system.files import open_plain, why
from retrieval.system.parquet import opened, pyarrow
from retrieval.system.paths import absolute, is_url

# Rows of a file that are read at a time.
_ROWS_PER_READ: Final = 4096

# The syntax of numbers in JSON: 007 and +1 are texts.
_INTEGER: Final = re.compile(r"-?[1-9][0-9]*|0")
_FLOAT: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+([eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)")


@dataclass(frozen=True, slots=True)
class Annotations:
    """A table of metadata in which every row has been checked once.

    Attributes:
        path: of the file.
        about: "path" where the rows are about the faces of these paths, "identity" where about people.
        rows: how many there are.
    """

    path: Path
    about: str
    rows: int

    def batches(self) -> Iterator[dict[str, Metadata]]:
        """Returns metadata by absolute path, or by name, in batches of at most 4,096 rows.

        Raises:
            InputError: the file has changed since it was checked, and is not valid any more.
        """
        for _, batch in _batches(self.path):
            yield dict(batch)


def read_annotations(path: Path) -> Annotations:
    """Returns a table of metadata, after reading it once to check every row.

    The file is Parquet where its suffix is .parquet or .pq, and CSV otherwise. With a column `path`, a row is
    about the face of that file. Relative paths start at the folder of the table; where only the current
    folder has the file, at that. Without such a column, a row is about the person in the column `identity`.
    Every other column is a key; a column `identity` beside `path` is ignored.

    The type of a value in CSV follows from its text: an integer, a number with a point or an exponent, true
    or false; an empty value is no metadata; any other is a text, also one with a leading zero or plus.
    Parquet keeps its types; dates and times become texts in ISO 8601, a null or NaN is no metadata.

    Raises:
        InputError: the file does not exist or is not such a table, a row has no path or name or has metadata
            that cannot be stored, or two rows are about the same face or person.
        MissingDependency: the file is Parquet, and pyarrow is not installed.
    """
    rows, about = 0, "path"
    first: dict[str, int] = {}
    for kind, batch in _batches(path):
        about = kind
        for target, _ in batch:
            rows += 1
            if target in first:
                raise InputError(f"Rows {first[target]:,} and {rows:,} of {path} are both about {target!a}.")
            first[target] = rows
    return Annotations(path, about, rows)


def _batches(path: Path) -> Iterator[tuple[str, list[tuple[str, Metadata]]]]:
    """Returns what the rows are about, and batches of them: (absolute path or name, checked metadata)."""
    with closing(tables(path)) as read:
        row = 0
        for names, part in read:
            about = what_about(path, names)
            place = names.index(about)
            keys = [(n, name) for n, name in enumerate(names) if name not in (about, "identity")]
            find = paths_beside(path) if about == "path" else _composed
            found: list[tuple[str, Metadata]] = []
            for values in part:
                if isinstance(values, InputError):
                    raise values
                row += 1
                of = f"row {row:,} of {path}"
                target = values[place]
                if not isinstance(target, str) or not target:
                    raise InputError(f"Row {row:,} of {path} has no {about}.")
                checked_text(target, of)
                metadata = {name: values[n] for n, name in keys if not is_nothing(values[n])}
                encoded(metadata, of)
                found.append((find(target), metadata))
            yield about, found


def what_about(path: Path, names: Sequence[str]) -> str:
    """Returns what the rows of a table with these columns are about: "path" or "identity".

    Raises:
        InputError: the table has neither column, or two columns of one name, or a column without a name.
    """
    for name in ("path", "identity"):
        if name in names:
            if len(set(names)) < len(names) or "" in names:
                raise InputError(
                    f"{path} has two columns of one name, or one without; name each differently."
                )
            return name
    raise InputError(
        f"{path} has neither a column `path` nor a column `identity`; its columns are "
        f"{', '.join(names) or 'none'}."
    )


def paths_beside(table: Path) -> Callable[[str], str]:
    """Returns a function that makes a path in a table absolute.

    Relative paths start at the folder of the table; where only the current folder has the file, at that.
    """
    folder = table.absolute().parent

    def find(name: str) -> str:
        if is_url(name):
            return absolute(name)
        if "\\" in name and not os.path.lexists(folder / name) and not os.path.lexists(name):
            name = name.replace("\\", "/")  # a path written on Windows
        beside = os.path.abspath(folder / name)
        here = os.path.abspath(name)
        return here if not os.path.lexists(beside) and os.path.lexists(here) else beside

    return find


def _composed(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC), as identities of folders are."""
    return unicodedata.normalize("NFC", name)


def is_nothing(value: object) -> bool:
    """Returns whether a value of a table is missing: a null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


# Names of columns, and rows: a value for each column, or the error of an invalid line.
Table: TypeAlias = tuple[list[str], Iterable[Sequence[Any] | InputError]]


def tables(path: Path, *, encoding_errors: str = "strict") -> Generator[Table, None, None]:
    """Returns the parts of a CSV or Parquet file: first the columns alone, then up to 4,096 rows at a time.

    Args:
        path: of the file; it is Parquet where its suffix is .parquet or .pq.
        encoding_errors: "surrogateescape" accepts CSV that is not UTF-8; `is_utf8` is False for such values.

    Raises:
        InputError: the file cannot be read, or is not valid CSV or Parquet.
        MissingDependency: the file is Parquet, and pyarrow is not installed.
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    return _read_csv(path, encoding_errors)


def _read_csv(path: Path, encoding_errors: str) -> Generator[Table, None, None]:
    try:
        with _opened(path, encoding_errors) as file:
            head = file.readline()
            rest = chain([head] if head else [], file)
            lines = csv.reader(rest, delimiter=_separator(head), strict=True)
            names = next(lines, [])
            part: list[Sequence[Any] | InputError] = []
            yield names, part
            while (values := _next_line(lines, path, names)) is not None:
                if values == []:
                    continue  # an empty line
                part.append(values)
                if len(part) == _ROWS_PER_READ:
                    yield names, part
                    part = []
            if part:
                yield names, part
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8; save it as CSV in UTF-8.") from error
    except csv.Error as error:
        raise InputError(f"{path} is not CSV as we read it: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {why(error)}.") from error


def separator_of(path: Path) -> str:
    """Returns the separator of a CSV file's columns, a comma or a semicolon.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with _opened(path, "replace") as file:
            return _separator(file.readline())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {why(error)}.") from error


def _opened(path: Path, encoding_errors: str) -> TextIO:
    # utf-8-sig: Excel writes a byte order mark first, which is not part of the first column's name.
    # open_plain refuses a pipe, since tables are read twice, and /dev/zero, which has no end.
    return TextIOWrapper(open_plain(path), "utf-8-sig", encoding_errors, newline="")


def _separator(head: str) -> str:
    """Returns the separator by the first line: spreadsheets write semicolons where numbers have commas."""
    return ";" if ";" in head and "," not in head else ","


def _next_line(lines: Any, path: Path, names: Sequence[str]) -> list[Any] | InputError | None:
    """Returns the values of a csv.reader's next row, or its error; [] for an empty line, None at the end."""
    try:
        values = next(lines, None)
    except csv.Error as error:
        if "field limit" in str(error):
            most = csv.field_size_limit()
            return InputError(f"Line {lines.line_num:,} of {path} has a value of more than {most:,} letters.")
        return InputError(f"Line {lines.line_num:,} of {path} is not CSV as we read it: {error}.")
    if not values:
        return values
    if len(values) != len(names):
        return InputError(
            f"Line {lines.line_num:,} of {path} has {len(values)} values; there are {len(names)} columns."
        )
    return [_typed(value, name) for value, name in zip(values, names, strict=True)]


def _typed(text: str, column: str) -> Any:
    """Returns a CSV value with the type that its text has; paths and identities are always texts."""
    if column in ("path", "identity"):
        return text
    if not text:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text) and len(text) < 20 and int(text) in INTEGERS:
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def _read_parquet(path: Path) -> Generator[Table, None, None]:
    pa, _ = pyarrow()
    with opened(path) as parquet:
        names = list(parquet.schema_arrow.names)
        yield names, []
        for piece in parquet.iter_batches(batch_size=_ROWS_PER_READ):
            columns = []
            for column in piece.columns:
                if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
                    # Python's times have a resolution of microseconds.
                    column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
                columns.append([_plain(value) for value in column.to_pylist()])
            yield names, zip(*columns, strict=True)


def _plain(value: Any) -> Any:
    """Returns a value of Parquet as a JSON value where possible, and unchanged otherwise."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
