"""Where and its conditions: what a text says, what holds, and what is refused; without a database."""

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.database.filters import Condition, Where, parse_condition
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery


@pytest.mark.parametrize(
    ("text", "subject", "condition"),
    [
        ("camera=north", "faces", Condition(("camera",), "=", "north")),
        ("camera!=north", "faces", Condition(("camera",), "!=", "north")),
        ("year>=2020", "faces", Condition(("year",), ">=", 2020)),
        (" year <= 2020 ", "faces", Condition(("year",), "<=", 2020)),
        ("year>-1.5e3", "faces", Condition(("year",), ">", -1500.0)),
        ("year<99999999999999999999", "faces", Condition(("year",), "<", 1e20)),
        ("zip=007", "faces", Condition(("zip",), "=", "007")),
        ('zip="7"', "faces", Condition(("zip",), "=", "7")),
        ("on=true", "faces", Condition(("on",), "=", True)),
        ("on=True", "faces", Condition(("on",), "=", "True")),
        ("on!=null", "faces", Condition(("on",), "!=", None)),
        ("a=", "faces", Condition(("a",), "=", "")),
        ('a=" "', "faces", Condition(("a",), "=", " ")),
        ("a=NaN", "faces", Condition(("a",), "=", "NaN")),
        ("a=1e999", "faces", Condition(("a",), "=", "1e999")),
        ('a=["x"]', "faces", Condition(("a",), "=", '["x"]')),
        ("a=b=c", "faces", Condition(("a",), "=", "b=c")),
        ("a<=b?", "faces", Condition(("a",), "<=", "b?")),
        ('a="', "faces", Condition(("a",), "=", '"')),
        ("name~North", "faces", Condition(("name",), "~", "North")),
        ("name~20", "faces", Condition(("name",), "~", "20")),
        ("badge?", "faces", Condition(("badge",), "?")),
        ("address.city=Rome", "faces", Condition(("address", "city"), "=", "Rome")),
        ('"a.b".c=1', "faces", Condition(("a.b", "c"), "=", 1)),
        (r'"a\"=\\".""=1', "faces", Condition(('a"=\\', ""), "=", 1)),
        ("日本 x.%_$[0]*=1", "faces", Condition(("日本 x", "%_$[0]*"), "=", 1)),
        ("person.country=FR", "people", Condition(("country",), "=", "FR")),
        ("person.a.b?", "people", Condition(("a", "b"), "?")),
        ('"person".a=1', "faces", Condition(("person", "a"), "=", 1)),
        ("person=Kim", "faces", Condition(("person",), "=", "Kim")),
        ("identity=12", "identities", Condition(("identity",), "=", "12")),
        ("identity=Zoe\u0308", "identities", Condition(("identity",), "=", "Zoë")),
        ('"identity"=12', "faces", Condition(("identity",), "=", 12)),
        ("identity.x=1", "faces", Condition(("identity", "x"), "=", 1)),
        ("path=a b/c", "path_prefixes", Condition(("path",), "=", "a b/c")),
        ("face=12", "face_ids", Condition(("face",), "=", 12)),
        ("enrolled>=2024-01-01", "enrolled_after", Condition(("enrolled",), ">=", "2024-01-01")),
        ("enrolled<2025-01-01T12:00", "enrolled_before", Condition(("enrolled",), "<", "2025-01-01T12:00")),
    ],
)
def test_a_text_says_what_it_looks_like(text: str, subject: str, condition: Condition) -> None:
    found = parse_condition(text)
    assert found == (subject, condition)
    assert type(found[1].value) is type(condition.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "=1", "a.=1", ".a=1", "a..b=1", " =1", "a . =1", "a?b", "a!b", "a!", "a~=?"[:2] + "\0"),
        *('"a=1', '"a"b=1', r'"\x"=1', "?", "a\0=1", "a=\ud800"),
        *("identity!=Kim", "identity?", "identity=", "path~a", "path=", "face=x", "face>=1", "face=-1"),
        *("enrolled=2024-01-01", "enrolled>2024-01-01", "enrolled<=2024-01-01", "enrolled<"),
        *("a<true", "a>=null"),
    ],
)
def test_a_text_that_is_no_condition_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+\.$"):
        parse_condition(text)


def test_several_texts_are_one_where() -> None:
    texts = [
        "identity=Kim",
        "identity=Adi",
        "path=x",
        "face=3",
        "face=1",
        "year>=2020",
        "person.on=true",
        "a?",
    ]
    assert Where.parse([*texts, "enrolled>=2024-01-01", "enrolled<2025-01-01T12:00+02:00"]) == Where(
        identities=("Kim", "Adi"),
        face_ids=[3, 1],
        path_prefixes=(os.path.abspath("x"),),
        enrolled_after="2024-01-01T00:00:00+00:00",
        enrolled_before="2025-01-01T10:00:00+00:00",
        faces=(Condition(("year",), ">=", 2020), Condition(("a",), "?")),
        people=(Condition(("on",), "=", True),),
    )
    assert Where.parse([]) == Where()
    with pytest.raises(InputError, match=r"^Say enrolled< once\.$"):
        Where.parse(["enrolled<2024", "enrolled<2025"])


METADATA = {
    "n": 2020,
    "f": 2020.5,
    "t": "2020",
    "name": "Northwind",
    "true": True,
    "one": 1,
    "null": None,
    "list": [1],
    "object": {"n": 1, "deep": {"x": "y"}},
    "": 0,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        *[("n=2020", True), ("n=2020.0", True), ('n="2020"', False), ("t=2020", False), ('t="2020"', True)],
        *[("n>=2020", True), ("n>2020", False), ("f>2020", True), ("t>=2020", False), ('t>="2"', True)],
        *[("n>A", False), ("name>=A", True), ("name<M", False), ("true>=1", False), ("one>=1", True)],
        *[("true=true", True), ("true=1", False), ("one=true", False), ("true!=1", True)],
        *[
            ("null=null", True),
            ("null?", True),
            ("null!=null", False),
            ("null=0", False),
            ("gone=null", False),
        ],
        *[("n!=2021", True), ("n!=2020", False), ("n!=x", True), ("gone!=x", False), ("gone?", False)],
        *[("name~North", True), ("name~north", False), ("name~", True), ("n~2", False), ("t~2", True)],
        *[("list?", True), ("list=1", False), ("list!=1", True), ("object?", True), ("object~{", False)],
        *[("object.n=1", True), ("object.deep.x=y", True), ("object.n.x?", False), ("n.x?", False)],
        *[('""=0', True), ('"0"?', False), ('list."0"?', False)],
    ],
)
def test_a_condition_holds_by_value_and_type(text: str, holds: bool) -> None:
    _, condition = parse_condition(text)
    assert condition.holds(METADATA) is holds


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)


@given(
    st.lists(KEYS, min_size=1, max_size=3).map(tuple), st.none() | st.booleans() | st.integers(0, 9) | KEYS
)
def test_a_condition_that_is_written_down_is_read_again(key: tuple[str, ...], value: Any) -> None:
    condition = Condition(("x", *key), "=", value)
    assert parse_condition(str(condition)) == ("faces", condition)


@pytest.mark.parametrize(
    "arguments",
    [
        ((), "=", 1),
        (("a",), "==", 1),
        (("a",), "~", 1),
        (("a",), "=", [1]),
        (("a",), "<", True),
        (("a",), "<", None),
        (("a",), "=", 2**63),
        (("a",), "=", float("nan")),
        (("a",), "=", "\0"),
        ((1,), "=", 1),
    ],
)
def test_a_condition_that_cannot_be_is_refused(arguments: Any) -> None:
    with pytest.raises(InputError, match=r"\.$"):
        Condition(*arguments)


def test_a_where_is_made_of_what_callers_have(tmp_path: Path) -> None:
    where = Where(
        identities="Kim",  # type: ignore[arg-type]
        face_ids=np.array([3, 1]),
        path_prefixes=[tmp_path / "a" / ".."],  # type: ignore[arg-type]
        enrolled_after=datetime(2024, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
        enrolled_before=datetime(2024, 1, 1, 0, 0, 0, 1),
        faces=Condition("a", "?"),  # type: ignore[arg-type]
    )
    assert where == Where(
        identities=("Kim",),
        face_ids=(3, 1),
        path_prefixes=(str(tmp_path),),
        enrolled_after="2024-01-01",
        enrolled_before=datetime(2024, 1, 1, 0, 0, 1, tzinfo=UTC),
        faces=(Condition(("a",), "?"),),
    )
    assert hash(where) == hash(where)


@pytest.mark.parametrize(
    "arguments",
    [
        {"identities": [1]},
        {"identities": [""]},
        {"identities": ["\ud800"]},
        {"face_ids": [1.5]},
        {"face_ids": ["1"]},
        {"face_ids": 7},
        {"path_prefixes": [7]},
        {"path_prefixes": [""]},
        {"enrolled_after": "yesterday"},
        {"enrolled_after": 2024},
        {"enrolled_before": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))},
        {"faces": ["a=1"]},
        {"people": [None]},
    ],
)
def test_a_where_of_other_types_is_refused(arguments: Any) -> None:
    with pytest.raises(InputError, match=r"\.$"):
        Where(**arguments)


def test_a_key_or_conditions_beyond_what_is_stored_or_asked_are_refused_with_our_own_limit() -> None:
    with pytest.raises(InputError, match="has 5,001 names; metadata lie at most 64 levels deep"):
        Where.parse([".".join(["a"] * 5001) + "=1"])
    with pytest.raises(InputError, match="have 2,000 names together; at most 400"):
        Where.parse([f"a{number}=1" for number in range(2000)])


def test_as_many_conditions_and_levels_as_are_allowed_can_be_asked(gallery: Gallery) -> None:
    deep, many = [".".join(["a"] * 64) + "?"] * 6, [f"a{number}=1" for number in range(400)]
    with gallery.vault.store.read() as reader:
        assert reader.face_ids_where(Where.parse(deep)).tolist() == []
        assert reader.face_ids_where(Where.parse(many)).tolist() == []
