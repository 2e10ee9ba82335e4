"""`Where` as SQL: the faces that meet its conditions.

JSON is asked in each database's own words, because it is there that they differ: SQLite reads keys, numbers
and truths out of a path with rules of its own (`true` comes out as 1, a quote in a key cannot be written), so
each step goes by `json_each`, which compares a key as it is. PostgreSQL's `->` does.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Numeric,
    and_,
    case,
    cast,
    exists,
    func,
    not_,
    or_,
    select,
    true,
)

from retrieval.database.filters import BEGINS, EXISTS, ORDER, Condition, Where, is_number
from retrieval.database.tables import alias_table, face_table, file_table, identity_table

# How many values one IN (...) lists: far below SQLite's limit, and PostgreSQL's.
LIST_LENGTH: Final = 1000

# The most folders in one statement: each is a branch of one expression, and its depth is limited.
_FOLDERS: Final = 100

# SQLAlchemy's columns take the same operators as Python's values.
_IN_ORDER: Final[Mapping[str, Callable[[Any, Any], Any]]] = ORDER

# No face has a number above this.
_MOST_ID: Final = 2**63 - 1


def parts(values: Iterable[Any], size: int = LIST_LENGTH) -> Iterator[list[Any]]:
    """Values in lists short enough for one statement."""
    values = list(values)
    return (values[start : start + size] for start in range(0, len(values), size))


def select_faces(connection: Connection, where: Where) -> NDArray[np.int64]:
    """The ids of the faces that are meant, ascending, each once."""
    dialect = connection.dialect.name
    always = [_on_metadata(face_table, condition, dialect) for condition in where.faces]
    if where.people:
        people = [_on_metadata(identity_table, condition, dialect) for condition in where.people]
        always.append(face_table.c.identity_id.in_(select(identity_table.c.id).where(*people)))
    # To the second and in UTC, both; so they are in order as texts.
    if where.enrolled_after is not None:
        always.append(_by_code_points(face_table.c.enrolled_at, dialect) >= where.enrolled_after)
    if where.enrolled_before is not None:
        always.append(_by_code_points(face_table.c.enrolled_at, dialect) < where.enrolled_before)
    wanted = (
        None
        if where.face_ids is None
        else np.array([i for i in where.face_ids if 0 < i <= _MOST_ID], np.int64)
    )
    if wanted is not None and len(wanted) <= LIST_LENGTH:
        always.append(face_table.c.id.in_(wanted.tolist()))
    found = [np.empty(0, np.int64)]
    # Any of many people, and any of many folders: a statement for some of each.
    for some in product(_of_people(connection, where), _below(where, dialect)):
        query = select(face_table.c.id).where(*always, *some)
        found.append(np.fromiter(connection.execute(query).scalars(), np.int64))
    ids = np.unique(np.concatenate(found))
    return ids if wanted is None else np.intersect1d(ids, wanted)


def _of_people(connection: Connection, where: Where) -> list[ColumnElement[bool]]:
    if not where.identities:
        return [true()]
    today = select(identity_table.c.id, identity_table.c.name)
    before = select(alias_table.c.identity_id, alias_table.c.name)
    numbers = {
        number
        for part in parts(set(where.identities))
        for query in (
            today.where(identity_table.c.name.in_(part)),
            before.where(alias_table.c.name.in_(part)),
        )
        for number, _ in connection.execute(query)
    }
    return [face_table.c.identity_id.in_(part) for part in parts(sorted(numbers))]


def _below(where: Where, dialect: str) -> list[ColumnElement[bool]]:
    if not where.path_prefixes:
        return [true()]
    path = _by_code_points(file_table.c.path, dialect)
    return [
        face_table.c.id.in_(select(file_table.c.face_id).where(or_(*(is_below(path, top) for top in part))))
        for part in parts(sorted(set(where.path_prefixes)), _FOLDERS)
    ]


def is_below(path: ColumnElement[str], top: str) -> ColumnElement[bool]:
    """That a path is `top` or lies below it: a range from `top/` to `top0`, for which there is an index."""
    inside = top.rstrip(os.sep) + os.sep
    behind = inside[:-1] + chr(ord(os.sep) + 1)
    return or_(path == top, and_(path >= inside, path < behind))


def _by_code_points(column: ColumnElement[Any], dialect: str) -> ColumnElement[Any]:
    """A text that is compared as Python compares; SQLite does so unless it is told otherwise."""
    return column.collate("C") if dialect == "postgresql" else column


def _on_metadata(table: Any, condition: Condition, dialect: str) -> ColumnElement[bool]:
    in_words = _in_sqlite if dialect == "sqlite" else _in_postgresql
    return in_words(table.c.metadata, condition)


def _in_sqlite(column: Column[Any], condition: Condition) -> ColumnElement[bool]:
    steps: list[Any] = []
    inside: ColumnElement[Any] = column
    for number in range(len(condition.key)):
        step = func.json_each(inside).table_valued(
            "key", "value", "type", name=f"step{number}", joins_implicitly=True
        )
        steps.append(step)
        # Other values than objects are no JSON text.
        inside = case((step.c.type == "object", step.c.value), else_="{}")
    leads = [step.c.key == name for step, name in zip(steps, condition.key, strict=True)]
    kind, value = steps[-1].c.type, steps[-1].c.value
    literal: Any = condition.value
    if isinstance(literal, float):
        # SQLite may read a fraction's last digit unlike Python: both sides are read by SQLite.
        literal = func.json_extract(json.dumps(literal), "$")
    if condition.value is None or isinstance(condition.value, bool):
        met = _compared(condition, kind == json.dumps(condition.value), None, literal)
    else:
        kinds = ("integer", "real") if is_number(condition.value) else ("text",)
        met = _compared(condition, kind.in_(kinds), value, literal)
    return exists(select(1).select_from(*steps).where(*leads, met).correlate(column.table))


def _in_postgresql(column: Column[Any], condition: Condition) -> ColumnElement[bool]:
    element: Any = column
    for name in condition.key:
        element = element[name]
    kind, text, value = func.json_typeof(element), element.as_string(), condition.value
    if value is None:
        met = _compared(condition, kind == "null", None, None)
    elif isinstance(value, bool):
        met = _compared(condition, kind == "boolean", text, json.dumps(value))
    elif isinstance(value, str):
        met = _compared(condition, kind == "string", text.collate("C"), value)
    else:
        # A CASE, because the sides of an AND are evaluated in any order, and not every text is a number.
        number = case((kind == "number", cast(text, Numeric)))
        met = _compared(condition, kind == "number", number, value)
    return and_(kind.is_not(None), met)


def _compared(condition: Condition, is_kind: Any, value: Any, literal: Any) -> ColumnElement[bool]:
    """The condition on a value that is there; `value` is None where its kind says everything."""
    if condition.operator == EXISTS:
        return true()
    if condition.operator in ("=", "!="):
        equal = is_kind if value is None else and_(is_kind, value == literal)
        return equal if condition.operator == "=" else not_(equal)
    if condition.operator == BEGINS:
        return and_(is_kind, func.substr(value, 1, len(literal)) == literal)
    ordered: ColumnElement[bool] = _IN_ORDER[condition.operator](value, literal)
    return and_(is_kind, ordered)
