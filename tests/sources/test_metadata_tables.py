"""Annotations: what is stored is what was said, and a file that cannot be stored is refused before it is."""

import csv
import json
import math
import os
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.database.metadata import MOST_BYTES, Metadata, decoded, encoded, filled
from retrieval.errors import InputError
from retrieval.sources.metadata_tables import read_annotations

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_metadata_come_back_as_they_were_given_with_their_types(metadata: Metadata) -> None:
    text = encoded(metadata, "it")
    assert (text is None) == (metadata == {})
    assert repr(decoded(text, "it")) == repr(decoded(json.dumps(metadata), "it"))
    assert decoded(text, "it") == metadata


def test_the_same_metadata_are_the_same_text_whatever_the_order_of_their_keys() -> None:
    assert encoded({"b": (1, 2), "a": "é"}, "it") == encoded({"a": "é", "b": [1, 2]}, "it")
    assert encoded({"a": 1}, "it") != encoded({"a": 1.0}, "it")


def nested(levels: int) -> Metadata:
    return {"a": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"a": math.nan}, "The metadata of face 7 have the number nan, which JSON does not know."),
        ({"a": [{"b": -math.inf}]}, "The metadata of face 7 have the number -inf, which JSON does not know."),
        ({1: 2}, "The metadata of face 7 have the key 1; keys must be texts."),
        ({"a": {None: 2}}, "The metadata of face 7 have the key None; keys must be texts."),
        (
            ["a"],
            "The metadata of face 7 are a value of the type list; "
            "they must be an object, with a value for each key.",
        ),
        ({"a": b"x"}, "The metadata of face 7 have a value of the type bytes, which JSON does not know."),
        ({"a": 2**63}, "The metadata of face 7 have an integer beyond 64 bits; give it as text."),
        ({"a": "\ud800"}, "The metadata of face 7 have the text '\\ud800', not valid Unicode."),
        ({"a\0": 1}, "The metadata of face 7 have a text with a zero character; leave it out."),
        (nested(65), "The metadata of face 7 lie more than 64 levels deep; flatten them."),
        (
            {"a": "é" * (MOST_BYTES // 2)},
            "The metadata of face 7 take 65,544 bytes as JSON; 65,536 are allowed. Shorten them.",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_sentence(metadata: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        encoded(metadata, "face 7")
    assert str(caught.value) == sentence


@pytest.mark.parametrize("text", ["{", "[1]", "1", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^The metadata of row 3 (are|have) "):
        decoded(text, "row 3")


def test_what_is_filled_in_never_changes_what_is_there() -> None:
    assert filled({"a": 1, "b": None}, {"a": 2, "b": 3, "c": 4}) == {"a": 1, "b": None, "c": 4}


# Files


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def read(path: Path) -> dict[str, Metadata]:
    return {
        target: metadata for batch in read_annotations(path).batches() for target, metadata in batch.items()
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-12", -12),
        ("0", 0),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", "9223372036854775808"),
        ("1" * 5000, "1" * 5000),
        ("007", "007"),
        ("+49", "+49"),
        ("-0", "-0"),
        ("1_000", "1_000"),
        ("١", "١"),
        ("1.50", 1.5),
        ("1e3", 1000.0),
        ("-2.5E-3", -0.0025),
        ("1.", "1."),
        (".5", ".5"),
        ("1e999", "1e999"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("true", True),
        ("FALSE", False),
        ("null", "null"),
        (" 7", " 7"),
        ("2020-01-31", "2020-01-31"),
        ('["a"]', '["a"]'),
        ("two\nlines", "two\nlines"),
    ],
)
def test_a_value_of_csv_is_what_it_looks_like(text: str, value: object, tmp_path: Path) -> None:
    with open(tmp_path / "m.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "key", "empty"], ["/a.jpg", text, ""]])
    found = read(tmp_path / "m.csv")
    assert repr(found) == repr({"/a.jpg": {"key": value}})


def test_paths_begin_in_the_folder_of_the_table_or_else_in_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("there/a.jpg", "here/a.jpg", "here/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    table = write(tmp_path / "there" / "m.csv", "n,path", "1,a.jpg", "2,b.jpg", "3,gone/../c.jpg", "4,/d.jpg")
    assert read(table) == {
        f"{tmp_path}/there/a.jpg": {"n": 1},
        f"{tmp_path}/here/b.jpg": {"n": 2},
        f"{tmp_path}/there/c.jpg": {"n": 3},
        "/d.jpg": {"n": 4},
    }


def test_without_paths_a_table_is_about_people_and_beside_paths_identity_is_passed_over(
    tmp_path: Path,
) -> None:
    people = write(tmp_path / "p.csv", "identity,badge", "Zoe\u0308,007", "1234,8", encoding="utf-8-sig")
    assert read_annotations(people).about == "identity"
    assert read(people) == {"Zoë": {"badge": "007"}, "1234": {"badge": 8}}
    faces = write(tmp_path / "f.csv", "identity,path,n", "Kim,/a.jpg,1", "", "Adi,/b.jpg,")
    assert read_annotations(faces).about == "path"
    assert read(faces) == {"/a.jpg": {"n": 1}, "/b.jpg": {}}


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    at = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)
    table = pa.table(
        {
            "path": ["/a.jpg", "/b.jpg"],
            "number": pa.array([1, None], pa.int8()),
            "float": pa.array([0.5, math.nan], pa.float64()),
            "text": ["007", None],
            "flag": [True, None],
            "at": pa.array([at, None], pa.timestamp("ns", "UTC")),
            "day": pa.array([date(2024, 2, 29), None]),
            "price": pa.array([Decimal("12.50"), None], pa.decimal128(6, 2)),
            "list": [["x", None], None],
            "object": [{"day": date(2024, 3, 1)}, None],
            "colour": pa.array(["red", None]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet") == {
        "/a.jpg": {
            "number": 1,
            "float": 0.5,
            "text": "007",
            "flag": True,
            "at": "2024-02-29T12:30:00+00:00",
            "day": "2024-02-29",
            "price": 12.5,
            "list": ["x", None],
            "object": {"day": "2024-03-01"},
            "colour": "red",
        },
        "/b.jpg": {},
    }


def test_a_long_table_comes_in_batches_and_every_row_once(tmp_path: Path) -> None:
    table = write(tmp_path / "m.csv", "path,n", *(f"/{n}.jpg,{n}" for n in range(10_000)))
    found = read_annotations(table)
    batches = list(found.batches())
    assert (found.rows, found.about) == (10_000, "path")
    assert max(map(len, batches)) < 5000
    assert {path: one["n"] for batch in batches for path, one in batch.items()} == {
        f"/{n}.jpg": n for n in range(10_000)
    }


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "{} has neither a column `path` nor a column `identity`; its columns are none."),
        (["a,b"], "{} has neither a column `path` nor a column `identity`; its columns are a, b."),
        (["path,a,a"], "{} has two columns of one name, or one without; name each differently."),
        (["path,", "/a,1"], "{} has two columns of one name, or one without; name each differently."),
        (["path,a", "/a,1,2"], "Line 2 of {} has 3 values; there are 2 columns."),
        (["path,a", "/a"], "Line 2 of {} has 1 values; there are 2 columns."),
        (["path,a", "/a,1", ",2"], "Row 2 of {} has no path."),
        (["identity,a", ",2"], "Row 1 of {} has no identity."),
        (["path,a", "/a,1", "/b,1", "/a,2"], "Rows 1 and 3 of {} are both about '/a'."),
        (["path,a", '/a,"1'], "Line 2 of {} is not CSV as we read it: unexpected end of data."),
        (
            ["path,a", f"/a,{'x' * MOST_BYTES}"],
            "The metadata of row 1 of {} take 65,544 bytes as JSON; 65,536 are allowed. Shorten them.",
        ),
    ],
)
def test_a_malformed_table_is_refused_in_one_sentence(
    lines: list[str], sentence: str, tmp_path: Path
) -> None:
    table = tmp_path / "m.csv"
    table.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_annotations(table)
    assert str(caught.value) == sentence.format(table)


def test_a_table_that_is_missing_or_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("path,a\n/é,1\n".encode("latin-1"))
    (tmp_path / "m.parquet").write_bytes(b"path,a\n/a,1\n")
    pq.write_table(pa.table({"path": [1], "a": [2]}), tmp_path / "n.parquet")
    for name, sentence in {
        "gone.csv": "{} cannot be read: no such file or directory.",
        "gone.parquet": "{} cannot be read: no such file or directory.",
        "latin.csv": "{} is not a text in UTF-8; save it as CSV in UTF-8.",
        "m.parquet": "{} is not a Parquet file, or it is damaged; make it or copy it again.",
        "n.parquet": "Row 1 of {} has no path.",
    }.items():
        with pytest.raises(InputError) as caught:
            read_annotations(tmp_path / name)
        assert str(caught.value) == sentence.format(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t"])
def test_a_table_is_a_plain_file_since_it_is_read_twice_and_a_device_has_no_end(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"is a device\b.*\.$"):
        read_annotations(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"is a pipe\b.*\.$"):
        read_annotations(path)
