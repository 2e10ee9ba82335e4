"""Selection: the database answers what plain Python does, for any metadata and any condition."""

import hashlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, update
from sqlalchemy.dialects import postgresql

from retrieval.database.filter_sql import _postgresql_condition
from retrieval.database.filters import Condition, Where
from retrieval.database.metadata import Metadata
from retrieval.database.records import NewFace
from retrieval.database.store import Store
from retrieval.database.tables import face_table, file_table, identity_table, photo_table


def new(number: int, identity: str | None = None) -> NewFace:
    return NewFace(identity, None, hashlib.sha256(str(number).encode()).hexdigest())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "gallery.db", fingerprint="f" * 64, dimension=8)
    yield made
    made.close()


def fill(store: Store, *faces: tuple[Metadata | None, str | None]) -> None:
    """Faces 1, 2, ... with these metadata and identities, instead of those that were there."""
    with store.write() as writer:
        for table in (file_table, face_table, photo_table, identity_table):
            writer.clear(table)
        writer.set_gallery(next_identity_id=1)
        writer.add_faces(1, [new(number, identity) for number, (_, identity) in enumerate(faces)])
        writer.set_metadata(face_table, dict(enumerate((metadata for metadata, _ in faces), 1)))


def found(store: Store, where: Where) -> list[int]:
    with store.read() as reader:
        ids = reader.face_ids_where(where)
    assert ids.dtype == np.int64
    return ids.tolist()  # type: ignore[no-any-return]


# Few of each, so that conditions are about what is there; and every letter that means something somewhere.
NAMES = st.sampled_from(
    [
        *(
            "a",
            "b",
            "A",
            "",
            "0",
            "a.b",
            'a"b',
            "a'b",
            "a\\b",
            "$",
            "[0]",
            "#",
            "*",
            "%",
            "_",
            "é",
            "e\u0301",
        ),
        *("日本", "🙂", "\n", "a b", "null", "$.a", "\\u0061", "\x01", "\ufffe"),
    ]
)
TEXTS = st.sampled_from(
    [
        *(
            "",
            "a",
            "A",
            "ab",
            "a%",
            "a_",
            "%",
            "_",
            "aé",
            "aẞ",
            "🙂",
            "\uffff",
            "\x7f",
            "1",
            "01",
            "1.0",
            "true",
        ),
        *("null", '"', "\\", "'", "{}", '{"a":1}', "\n"),
    ]
)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [
        *(0, 1, -1, 2, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 0.0, -0.0, 1.0, 0.1, 0.30000000000000004, 0.3),
        *(2.0**53, 9.223372036854775e18, 1e22, 1e-7, 5e-324, 1.7976931348623157e308, 2.5),
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
METADATA = st.dictionaries(NAMES, VALUES, max_size=4)
KEYS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)


@st.composite
def conditions(draw: st.DrawFn, metadata: list[Metadata]) -> Condition:
    """Mostly on a key and with a value that one of some metadata has."""
    key, value = draw(KEYS), draw(SCALARS)
    inside: Any = draw(st.sampled_from(metadata)) if draw(st.integers(0, 3)) else {}
    way: list[str] = []
    while isinstance(inside, dict) and inside:
        name = draw(st.sampled_from(sorted(inside)))
        way, inside = [*way, name], inside[name]
        key = tuple(way)
        if not isinstance(inside, dict | list) and draw(st.booleans()):
            value = inside
    operators = ["=", "!=", "?"]
    if value is not None and not isinstance(value, bool):
        operators += ["<", "<=", ">", ">="]
    if isinstance(value, str):
        operators.append("~")
    return Condition(key, draw(st.sampled_from(operators)), value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), metadata=st.lists(METADATA, min_size=1, max_size=6))
def test_the_database_finds_the_faces_of_which_the_conditions_hold(
    store: Store, data: st.DataObject, metadata: list[Metadata]
) -> None:
    fill(store, *((one, None) for one in metadata))
    for _ in range(8):
        chosen = data.draw(st.lists(conditions(metadata), min_size=1, max_size=2))
        expected = [n for n, one in enumerate(metadata, 1) if all(c.holds(one) for c in chosen)]
        assert found(store, Where(faces=tuple(chosen))) == expected, chosen


PEOPLE = ["Kim", "Adi", "Zoë", None]
TIMES = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=n) for n in range(4)]
FOLDERS = ["/p", "/p/a", "/p/a/1", "/p/a.b", "/p/a%b", "/pa", "/p/a_", "/P/a", "/é/x", "/p/a0"]


@st.composite
def wheres(draw: st.DrawFn) -> Where:
    some = st.lists(conditions([{"a": 1}, {"a": "x"}]), max_size=1).map(tuple)
    ids = st.none() | st.lists(st.integers(-1, 9) | st.just(2**70), max_size=6)
    times = st.none() | st.sampled_from(TIMES)
    return Where(
        identities=tuple(draw(st.lists(st.sampled_from(["Kim", "Kimmy", "Adi", "Nobody"]), max_size=2))),
        face_ids=draw(ids),
        path_prefixes=tuple(draw(st.lists(st.sampled_from([*FOLDERS, "/", "/p/a/1/1"]), max_size=2))),
        enrolled_after=draw(times),
        enrolled_before=draw(times),
        faces=draw(some),
        people=draw(some),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faces=st.lists(
        st.tuples(
            st.sampled_from([{"a": 1}, {"a": "x"}, {}]),
            st.sampled_from(PEOPLE),
            st.sampled_from(TIMES),
            st.sets(st.sampled_from(FOLDERS), max_size=2),
        ),
        max_size=7,
    ),
    where=wheres(),
)
def test_everything_that_is_said_holds_of_the_faces_that_are_found(
    store: Store, faces: list[Any], where: Where
) -> None:
    people = {"Kim": {"a": 1}, "Adi": {"a": "x"}, "Zoë": {}, None: {}}
    with store.write() as writer:
        writer.remove_alias("Kimmy")
    fill(store, *((metadata, person) for metadata, person, _, _ in faces))
    with store.write() as writer:
        # A path leads to one face, so each has its own below the folder.
        for number, (_, _, at, folders) in enumerate(faces, 1):
            writer.add_files((f"{folder}/{number}", number) for folder in sorted(folders))
            changed = update(face_table).where(face_table.c.id == number)
            writer._change(changed.values(enrolled_at=at.isoformat()))
        numbers = {name: writer.identity_id(name) for name in people if name is not None}
        said = {number: people[name] for name, number in numbers.items() if number is not None}
        writer.set_metadata(identity_table, said)
        if numbers["Kim"] is not None:
            writer.add_alias("Kimmy", numbers["Kim"])

    def holds(number: int, metadata: Metadata, person: str | None, at: datetime, folders: set[str]) -> bool:
        names = {person, "Kimmy"} if person == "Kim" else {person}
        paths = [f"{folder}/{number}" for folder in folders]
        tops = [(top, top.rstrip("/") + "/") for top in where.path_prefixes]
        return all(
            [
                not where.identities or names & set(where.identities),
                where.face_ids is None or number in where.face_ids,
                not tops
                or any(path == top or path.startswith(below) for top, below in tops for path in paths),
                where.enrolled_after is None or at.isoformat() >= str(where.enrolled_after),
                where.enrolled_before is None or at.isoformat() < str(where.enrolled_before),
                all(condition.holds(metadata) for condition in where.faces),
                not where.people
                or (person is not None and all(one.holds(people[person]) for one in where.people)),
            ]
        )

    assert found(store, where) == [number for number, one in enumerate(faces, 1) if holds(number, *one)]


# Pairs that are equal, or change their order, where a database rounds one of both.
CLOSE = [
    *(
        0.3,
        0.30000000000000004,
        0.8,
        0.1 + 0.7,
        1,
        1.0,
        0,
        -0.0,
        -1,
        2.5,
        1e22,
        5e-324,
        1.7976931348623157e308,
    ),
    *(2**53, 2**53 + 1, 2.0**53, 9.223372036854775e18, 9223372036854774784, 9223372036854774785, 2**63 - 1),
]


@pytest.mark.parametrize("operator", ["=", "!=", "<", "<=", ">", ">="])
def test_numbers_compare_exactly_whatever_their_kind(operator: str, store: Store) -> None:
    fill(store, *(({"n": number}, None) for number in CLOSE))
    for value in CLOSE:
        condition = Condition(("n",), operator, value)
        expected = [n for n, one in enumerate(CLOSE, 1) if condition.holds({"n": one})]
        assert found(store, Where(faces=(condition,))) == expected, condition


def test_lists_of_any_length_are_taken(store: Store) -> None:
    """A hundred thousand numbers, names and folders, more than one statement can list."""
    fill(store, *(({"n": n}, f"person {n % 3000}") for n in range(6000)))
    with store.write() as writer:
        writer.add_files((f"/{n}/x.jpg", n) for n in range(1, 6001))
    half = Condition(("n",), "<", 3000)
    assert found(store, Where(face_ids=range(2, 100_000))) == list(range(2, 6001))
    assert found(store, Where(face_ids=range(-(10**5), 5001), faces=(half,))) == list(range(1, 3001))
    names = tuple(f"person {n}" for n in range(1, 100_000))
    assert found(store, Where(identities=names)) == [n for n in range(1, 6001) if n % 3000 != 1]
    folders = tuple(f"/{n}" for n in range(2000, 7000))
    assert found(store, Where(path_prefixes=folders, faces=(half,))) == list(range(2000, 3001))
    assert found(store, Where(face_ids=())) == []


def test_ten_thousand_faces_are_asked_in_one_pass_over_them(store: Store) -> None:
    """SQLite takes a few dozen steps for each face, and not more of them where there are more faces."""
    fill(store, *(({"camera": "north", "year": 1900 + n % 200}, None) for n in range(10_000)))
    taken = [0]

    def step() -> int:
        taken[0] += 1
        return 0

    @event.listens_for(store.file.sql, "checkout")
    def count(driver: sqlite3.Connection, *_: object) -> None:
        driver.set_progress_handler(step, 1)

    assert len(found(store, Where(faces=(Condition(("year",), ">=", 2000),)))) == 5_000
    assert 10_000 < taken[0] < 100 * 10_000


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "x"])
def test_postgresql_has_words_for_every_condition(value: Any) -> None:
    """They are only spelled here: no PostgreSQL is asked."""
    ordered = ("<", ">=") if value is not None and not isinstance(value, bool) else ()
    for operator in ("=", "!=", "?", *ordered, *(["~"] if isinstance(value, str) else [])):
        clause = _postgresql_condition(face_table.c.metadata, Condition(("a", 'b"c'), operator, value))
        assert "json_typeof" in str(clause.compile(dialect=postgresql.dialect()))
