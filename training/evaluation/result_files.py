"""Result files of an evaluation: `metrics.json`, `photos.csv` with a row for each photo, and the report."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict

from retrieval.errors import InputError, StorageError
from retrieval.system.files import make_output_folder, open_plain, why, write_durably
from retrieval.system.manifests import parse_tree
from training.evaluation.measurements import FORMAT, Comparison, Measured, as_json
from training.evaluation.searches import Rows

METRICS: Final = "metrics.json"
PHOTOS: Final = "photos.csv"
REPORT: Final = "report.html"


@dataclass(frozen=True)
class Results:
    """An evaluation as it is stored: the tree of `measurements.Measured` as JSON, and its rows."""

    name: str
    metrics: dict[str, Any]
    rows: Rows


def of(measured: Measured, rows: Rows) -> Results:
    """Returns the results of an evaluation that is still in memory."""
    return Results(measured.model.name, as_json(measured), rows)


def check_target(folder: Path) -> None:
    """Checks that results can be written to a folder; called before anything is measured.

    Raises:
        InputError: it is a file, a model, a gallery, or a folder with content other than results.
    """
    if (folder / "bundle.json").exists() or (folder / "gallery.db").exists():
        raise InputError(f"{folder} is a model or a gallery; choose another folder with `out`.")
    check_free(folder, METRICS, "evaluation")


def check_free(folder: Path, last: str, what: str) -> None:
    """Checks that a folder does not exist, is empty, or holds an earlier result of the same kind.

    Args:
        folder: to be written to.
        last: the file that is written last; a folder with it holds an earlier result.
        what: the kind of result, for the message.

    Raises:
        InputError: it is a file, or a folder with other content.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder with `out`.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / last).exists():
        raise InputError(f"{folder} is not empty and holds no {what}; choose another folder with `out`.")


def write(folder: Path, measured: Measured, rows: Rows, *, report: bytes | None = None) -> None:
    """Writes an evaluation into a folder; metrics.json last, so that a folder with it is complete.

    Raises:
        StorageError: the files cannot be written.
    """
    files = {PHOTOS: _table(rows).encode(), REPORT: report, METRICS: in_json(measured)}
    write_files(folder, files, what="evaluation")


def in_json(figures: Measured | Comparison) -> bytes:
    """Returns figures as the bytes of a JSON file."""
    return (json.dumps(as_json(figures), ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def write_files(folder: Path, files: Mapping[str, bytes | None], *, what: str) -> None:
    """Writes files in their order (None writes none), so that a folder with the last file is complete.

    The last file and the report of an earlier result are removed first.

    Raises:
        StorageError: the files cannot be written.
    """
    *_, last = files
    try:
        make_output_folder(folder)
        (folder / last).unlink(missing_ok=True)
        (folder / REPORT).unlink(missing_ok=True)
        for name, data in files.items():
            if data is not None:
                write_durably(folder / name, data)
    except OSError as error:
        raise StorageError(f"The {what} cannot be written to {folder}: {why(error)}.") from error


def _table(rows: Rows) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]) if rows else ["path"], lineterminator="\n")
    table.writeheader()
    # NaN is written as an empty field.
    table.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
    return file.getvalue()


def _text(path: Path) -> str:
    with open_plain(path) as file:
        return file.read().decode()


def read(folder: Path) -> Results:
    """Reads an evaluation that `write` wrote.

    Raises:
        InputError: there is no evaluation, it is damaged, or another version of faceprint wrote it.
    """
    path, advice = folder / METRICS, "make the evaluation again"
    try:
        text = _text(path)
        rows = list(csv.DictReader(io.StringIO(_text(folder / PHOTOS), newline="")))
    except OSError as error:
        raise InputError(
            f"{folder} holds no evaluation ({why(error)}); make one with `faceprint evaluate --out {folder}`."
        ) from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"The evaluation in {folder} is damaged; make it again.") from error
    if parse_tree(text, _Format, name=path, error=InputError, advice=advice)["format"] != FORMAT:
        raise InputError(
            f"The evaluation in {folder} was made by another version of faceprint; make it again."
        )
    metrics = parse_tree(text, _Metrics, name=path, error=InputError, advice=advice)
    protocol = metrics["protocol"]
    if protocol != "lfw-pairs" and metrics.get(protocol) is None:
        raise InputError(f"{path} is damaged (it has no field {protocol}); {advice}.")
    _check_rows(rows, protocol, folder / PHOTOS)
    return Results(
        str(folder), metrics, [{name: _value(value) for name, value in row.items()} for row in rows]
    )


class _Format(TypedDict):
    format: int


class _Data(TypedDict):
    split: str


class _Searched(TypedDict):
    enrolled: int


class _Metrics(_Format):
    """The fields of metrics.json that a comparison reads, with their types."""

    protocol: Literal["closed", "open", "lfw-pairs"]
    data: _Data
    closed: NotRequired[_Searched | None]
    open: NotRequired[_Searched | None]


# The columns that identify a row in a comparison.
_COLUMNS: Final = {
    "closed": ("path", "identity"),
    "open": ("path", "identity", "mated"),
    "lfw-pairs": ("first", "second", "identity"),
}


def _check_rows(rows: Sequence[Mapping[str | None, Any]], protocol: str, path: Path) -> None:
    """Checks the rows of photos.csv.

    Raises:
        InputError: a column is missing, or a value has the wrong type for its column.
    """
    for number, row in enumerate(rows, 2):
        lacking = [name for name in _COLUMNS[protocol] if not row.get(name)]
        if lacking or None in row:
            problem = f"has no {lacking[0]}" if lacking else "has more values than there are columns"
            raise InputError(f"Line {number} of {path} {problem}; make the evaluation again.")
        for name, value in row.items():
            if not _is_number(name or "", value or "0"):
                raise InputError(
                    f"Line {number} of {path} has {value[:40]!a} as {name}; make the evaluation again."
                )


def _is_number(column: str, value: str) -> bool:
    """Whether a value fits its column. Only columns that a comparison reads as numbers are checked."""
    if column == "mated":
        return value in ("0", "1")
    if "right" not in column and column != "average_precision":
        return True
    try:
        return float(value) >= 0
    except ValueError:
        return False


def _value(text: str | None) -> Any:
    return None if text in ("", None) else text
