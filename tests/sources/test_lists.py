"""Lists: each row is a photo or a line that says what is wrong with it."""

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.errors import DataError, Reason
from retrieval.sources import lists
from retrieval.sources.lists import ListRow, names
from retrieval.system.paths import parent_name


def rows(path: Path) -> list[ListRow]:
    lists.check_list(path)
    return list(lists.rows(path, parent_name))


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class Slowly(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self.data, self.step = data, step

    def read1(self, size: int) -> bytes:
        part, self.data = self.data[: self.step], self.data[self.step :]
        return part


# Texts


def test_a_text_has_a_path_a_line_as_it_is(tmp_path: Path) -> None:
    """Relative ones begin in its folder; empty lines are nothing, and nothing is a comment."""
    text = b"\xef\xbb\xbfAnn/1.jpg\r\n\n# 2.jpg\n/abs/Bea/ 3.jpg \nhttps://host/Cl%C3%A9o/4.jpg?x=1\n/5.jpg"
    assert rows(written(tmp_path / "list.txt", text)) == [
        ListRow(f"{tmp_path}/Ann/1.jpg", "Ann"),
        ListRow(f"{tmp_path}/# 2.jpg", tmp_path.name),
        ListRow("/abs/Bea/ 3.jpg ", "Bea"),
        ListRow("https://host/Cl%C3%A9o/4.jpg?x=1", "Cléo"),
        ListRow("/5.jpg", None),
    ]


def test_what_only_the_current_folder_has_is_meant_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "Ann").mkdir(parents=True)
    (tmp_path / "here" / "Ann" / "1.jpg").touch()
    monkeypatch.chdir(tmp_path / "here")
    found = rows(written(tmp_path / "list.txt", "Ann/1.jpg\nAnn/2.jpg\n"))
    assert [row.path for row in found] == [f"{tmp_path}/here/Ann/1.jpg", f"{tmp_path}/Ann/2.jpg"]


NAMES = st.lists(st.binary(min_size=1, max_size=12).filter(lambda b: not {0, 10, 13} & set(b)))


@given(NAMES, st.integers(1, 20), st.booleans())
def test_names_come_out_as_they_went_in_however_the_pipe_cuts_them(
    given_names: list[bytes], step: int, zeros: bool
) -> None:
    given_names = [name for name in given_names if not name.startswith(b"\xef\xbb\xbf")]
    end = b"\0" if zeros else b"\n"
    data = end.join(given_names) + end * bool(given_names)
    assert list(names(Slowly(data, step))) == [os.fsdecode(name) for name in given_names]  # type: ignore[arg-type]
    assert list(names(io.BytesIO(data))) == [os.fsdecode(name) for name in given_names]


def test_a_zero_byte_ends_names_that_have_ends_of_lines_in_them() -> None:
    assert list(names(io.BytesIO(b"a\nb.jpg\0c.jpg\0"))) == ["a\nb.jpg", "c.jpg"]


def test_a_name_is_given_before_the_next_one_is_there() -> None:
    pipe = os.pipe()
    with open(pipe[0], "rb") as reader, open(pipe[1], "wb", buffering=0) as writer:
        found = names(reader)
        for number in range(3):
            writer.write(f"{number}.jpg\n".encode())
            assert next(found) == f"{number}.jpg"


def test_what_has_no_ends_of_lines_is_no_list_and_is_not_kept_in_memory() -> None:
    with open("/dev/zero", "rb") as zeros, pytest.raises(DataError, match="no ends of lines"):
        next(names(_Instead(zeros)))  # type: ignore[arg-type]


class _Instead(io.RawIOBase):
    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file

    def read1(self, size: int) -> bytes:
        return self.file.read1(size).replace(b"\0", b"x")


# Tables


def test_a_table_has_identities_and_what_else_is_said(tmp_path: Path) -> None:
    """Typed as `ingest --metadata` types them; the column `metadata` is an object of its own."""
    table = (
        "path,identity,year,zip,metadata,note\n"
        'a.jpg,Zoe\u0308,2020,007,"{""camera"": ""north"", ""year"": 1}",\n'
        "b.jpg,,1.5,,,true\n"
    )
    assert rows(written(tmp_path / "l.csv", table)) == [
        ListRow(f"{tmp_path}/a.jpg", "Zoë", {"camera": "north", "year": 2020, "zip": "007"}),
        ListRow(f"{tmp_path}/b.jpg", None, {"year": 1.5, "note": True}),
    ]


def test_without_a_column_for_it_the_folder_is_the_identity(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "l.csv", "path\nAnn/1.jpg\n")) == [ListRow(f"{tmp_path}/Ann/1.jpg", "Ann")]


def test_parquet_is_a_list_too(tmp_path: Path) -> None:
    columns = {
        "path": ["Ann/1.jpg", None, "b.jpg"],
        "identity": ["Kim", "Kim", None],
        "metadata": [{"a": 1}, None, None],
        "seen": [[1, 2], None, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    path = tmp_path / "l.parquet"
    assert rows(path) == [
        ListRow(f"{tmp_path}/Ann/1.jpg", "Kim", {"a": 1, "seen": [1, 2]}),
        ListRow(None, problem=Reason.BAD_ROW, detail=f"row 2 of {path} has no path"),
        ListRow(f"{tmp_path}/b.jpg", None),
    ]


def test_identities_may_be_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.jpg"], "identity": [7]}), tmp_path / "l.parquet")
    assert rows(tmp_path / "l.parquet") == [ListRow(f"{tmp_path}/a.jpg", "7")]


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_row_with_a_huge_value_or_a_name_of_spaces_is_said_to_be_which(quote: str, tmp_path: Path) -> None:
    huge = f"{quote}{'A' * 5_000_000}{quote}"
    path = written(tmp_path / "l.csv", f"path,identity\n1.jpg,Ann\n2.jpg,{huge}\n3.jpg,  \n4.jpg,\n")
    found = rows(path)
    assert [(os.path.basename(row.path or ""), row.identity, row.problem) for row in found] == [
        ("1.jpg", "Ann", None),
        ("", None, Reason.BAD_ROW),
        ("3.jpg", None, Reason.BAD_ROW),
        ("4.jpg", None, None),
    ]
    assert found[1].detail == f"line 3 of {path} has a value of more than 131,072 letters"
    assert found[2].detail == (
        f"row 3 of {path} has an identity that cannot be stored: it has nothing but spaces"
    )


def test_a_bad_row_is_a_line_and_the_next_one_is_read(tmp_path: Path) -> None:
    table = (
        b"path,identity,metadata,n\n"
        b"1.jpg,Ann,,1\n"
        b",Ann,,\n"
        b"2.jpg,Ann\n"
        b"3.jpg,Ann,not json,\n"
        b'4.jpg,Ann,"[1]",\n'
        b"5.jpg,Ren\xe9,,\n"
        b'6.jpg,Ann,"{""a"": NaN}",\n'
        b'7.jpg,"An"n,,\n'
        b"8.jpg,Ann,,8\n"
        b"Ren\xe9.jpg,Ann,,\n"
        b'9.jpg,"Ann,,9\n'
    )
    path = written(tmp_path / "l.csv", table)
    found = rows(path)
    assert [(os.path.basename(row.path or ""), row.problem) for row in found] == [
        ("1.jpg", None),
        ("", Reason.BAD_ROW),
        ("", Reason.BAD_ROW),
        ("3.jpg", Reason.BAD_METADATA),
        ("4.jpg", Reason.BAD_METADATA),
        ("5.jpg", Reason.BAD_ROW),
        ("6.jpg", Reason.BAD_METADATA),
        ("", Reason.BAD_ROW),
        ("8.jpg", None),
        ("Ren\udce9.jpg", None),
        ("", Reason.BAD_ROW),
    ]
    assert [row.detail for row in found[1:4]] == [
        f"row 2 of {path} has no path",
        f"line 4 of {path} has 2 values; there are 4 columns",
        f"the metadata of row 4 of {path} are not JSON",
    ]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("l.csv", b"identity,age\n", "no column `path`; its columns are identity, age"),
        ("l.csv", b"", "no column `path`; its columns are none"),
        ("l.csv", b"path,path\n", "two columns of one name"),
        ("l.csv", b"path,caf\xe9\n", "not a text in UTF-8"),
        ("l.csv", b'path,"a"b\n', "not CSV as we read it"),
        ("l.parquet", b"nonsense", "is not a Parquet file"),
        ("l.txt", "a.jpg".encode("utf-16"), "is in UTF-16; save it in UTF-8"),
    ],
)
def test_a_list_that_is_none_is_one_sentence(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        lists.check_list(written(tmp_path / name, data))


def test_a_list_must_be_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "l.csv")
    with pytest.raises(DataError, match="on standard input"):
        lists.check_list(tmp_path / "l.csv")
