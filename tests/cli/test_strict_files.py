"""Files of the wrong types end in a sentence that names the file: receipts, reports, checks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrieval.cli.transfer import _read_receipt
from retrieval.errors import FaceprintError
from retrieval.sources.photos import from_report
from training.evaluation import comparison, result_files
from training.evaluation.measurements import FORMAT
from training.reports.data_check import read as read_check

WRONG = (None, True, -1, 1.5, "text", [], [None], {}, {"a": None}, [[1]])

RECEIPT = {
    "id": "a",
    "gallery": "b",
    "at": "2026-01-01",
    "who": "me",
    "what": "face",
    "faces": 1,
    "face_ids": [1],
    "identity_ids": [],
}
LINE = {"status": "rejected", "path": "/a.jpg", "identity": None, "reason": "missing", "detail": None}
FINDING = {"kind": "k", "level": "look", "count": 1, "unit": "photo", "says": "s", "advice": "a"}
CHECK = {"data": "d", "photos": 1, "readable": 1, "identities": [], "findings": [FINDING]}


@pytest.mark.parametrize(
    ("read", "whole"),
    [(_read_receipt, RECEIPT), (from_report, LINE), (read_check, CHECK)],
    ids=["receipt", "report", "check"],
)
def test_a_field_of_another_type_is_a_sentence_about_the_file(
    read: Callable[[Path], object], whole: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(whole))
    read(path)
    for name in whole:
        for text in (
            *(json.dumps({**whole, name: value}) for value in WRONG),
            json.dumps({other: value for other, value in whole.items() if other != name}),
            '{"%s": %s' % (name, "[" * 100_000),  # noqa: UP031 (braces)
            "null",
            "\x00",
        ):
            path.write_text(text)
            try:
                read(path)
            except FaceprintError as error:
                told = str(error)
            else:
                told = str(path)
            assert str(path) in told


METRICS = {"format": FORMAT, "protocol": "open", "data": {"split": "seed 0"}, "open": {"enrolled": 3}}
ROWS = "path,identity,mated,closest_right,right_at_0.01\na.jpg,Ada,1,1,1\nb.jpg,Bob,1,0,\nc.jpg,Cy,0,,\n"


def compared(folder: Path, metrics: str, rows: str) -> str:
    """What a comparison of an evaluation with itself says: its error, or nothing."""
    (folder / "metrics.json").write_text(metrics)
    (folder / "photos.csv").write_text(rows)
    try:
        read = result_files.read(folder)
        comparison.compare(read, read)
    except FaceprintError as error:
        return str(error)
    return ""


def test_an_evaluation_with_a_field_of_another_type_is_compared_or_refused_by_name(tmp_path: Path) -> None:
    assert compared(tmp_path, json.dumps(METRICS), ROWS) == ""
    for name in METRICS:
        for value in WRONG:
            told = compared(tmp_path, json.dumps({**METRICS, name: value}), ROWS)
            assert str(tmp_path) in told
        told = compared(tmp_path, json.dumps({key: METRICS[key] for key in METRICS if key != name}), ROWS)
        assert str(tmp_path / "metrics.json") in told


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("identity", "who", "Line 2 of {} has no identity"),
        ("mated", "known", "Line 2 of {} has no mated"),
        ("Bob,1,", "Bob,yes,", "Line 3 of {} has 'yes' as mated"),
        ("Ada,1,1", "Ada,1,one", "Line 2 of {} has 'one' as closest_right"),
        ("Ada,1,1,1", "Ada,1,1,nan", "Line 2 of {} has 'nan' as right_at_0.01"),
        ("Ada,1,1,1", "Ada,1,1,1,1", "Line 2 of {} has more values than there are columns"),
        ("a.jpg", "", "Line 2 of {} has no path"),
    ],
)
def test_a_row_of_an_evaluation_that_cannot_be_compared_is_named(
    before: str, after: str, problem: str, tmp_path: Path
) -> None:
    told = compared(tmp_path, json.dumps(METRICS), ROWS.replace(before, after, 1))
    assert told == f"{problem.format(tmp_path / 'photos.csv')}; make the evaluation again."
