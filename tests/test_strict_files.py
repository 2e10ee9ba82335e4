"""Files of the wrong types end in a sentence that names the file: receipts, reports, checks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrieval.care import _read_receipt
from retrieval.errors import FaceprintError
from retrieval.photos import from_report
from training.data_check import read as read_check

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
