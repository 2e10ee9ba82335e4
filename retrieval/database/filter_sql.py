"""`Where` as SQL: selects the faces that match a filter.

JSON functions differ between databases. SQLite's JSON paths convert values (`true` becomes 1) and cannot
express a key with a quote, so each step of a key uses `json_each`, which compares keys literally. On
PostgreSQL the operator `->` does that.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Double,
    Numeric,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    not_,
    or_,
    select,
    true,
)

from retrieval.database.filters import BEGINS, EXISTS, ORDER, Condition, Where, is_number
from retrieval.database.tables import alias_table, face_table, file_table, identity_table

# The most values in one IN (...), far below the limits of SQLite and PostgreSQL.
LIST_LENGTH: Final = 1000

# The most path prefixes in one statement: each is a branch of one expression, and its depth is limited.
_MAX_PREFIXES: Final = 100

# SQLAlchemy's columns accept the same comparison operators as Python's values.
_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = ORDER

# The largest id that SQLite can store.
_MAX_ID: Final = 2**63 - 1


def parts(values: Iterable[Any], size: int = LIST_LENGTH) -> Iterator[list[Any]]:
    """Yields the values in lists of at most `size`, short enough for one statement."""
    values = list(values)
    return (values[start : start + size] for start in range(0, len(values), size))


def select_faces(connection: Connection, where: Where) -> NDArray[np.int64]:
    """Returns the ids of the faces that match a filter, ascending, each once: (n,) int64."""
    dialect = connection.dialect.name
    common = [_on_metadata(face_table, condition, dialect) for condition in where.faces]
    if where.people:
        people = [_on_metadata(identity_table, condition, dialect) for condition in where.people]
        common.append(face_table.c.identity_id.in_(select(identity_table.c.id).where(*people)))
    # All times are in UTC with whole seconds, so their text order is their time order.
    if where.enrolled_after is not None:
        common.append(_by_code_points(face_table.c.enrolled_at, dialect) >= where.enrolled_after)
    if where.enrolled_before is not None:
        common.append(_by_code_points(face_table.c.enrolled_at, dialect) < where.enrolled_before)
    wanted = (
        None
        if where.face_ids is None
        else np.array([i for i in where.face_ids if 0 < i <= _MAX_ID], np.int64)
    )
    if wanted is not None and len(wanted) <= LIST_LENGTH:
        common.append(face_table.c.id.in_(wanted.tolist()))
    selected = [np.empty(0, np.int64)]
    # Identities and path prefixes may be many: one statement for each combination of their parts.
    for conditions in product(_has_identity(connection, where), _has_path_below(where, dialect)):
        query = select(face_table.c.id).where(*common, *conditions)
        selected.append(np.fromiter(connection.execute(query).scalars(), np.int64))
    ids = np.unique(np.concatenate(selected))
    return ids if wanted is None else np.intersect1d(ids, wanted)


def _has_identity(connection: Connection, where: Where) -> list[ColumnElement[bool]]:
    if not where.identities:
        return [true()]
    current = select(identity_table.c.id, identity_table.c.name)
    former = select(alias_table.c.identity_id, alias_table.c.name)
    numbers = {
        number
        for part in parts(set(where.identities))
        for query in (
            current.where(identity_table.c.name.in_(part)),
            former.where(alias_table.c.name.in_(part)),
        )
        for number, _ in connection.execute(query)
    }
    return [face_table.c.identity_id.in_(part) for part in parts(sorted(numbers))]


def _has_path_below(where: Where, dialect: str) -> list[ColumnElement[bool]]:
    if not where.path_prefixes:
        return [true()]
    path = _by_code_points(file_table.c.path, dialect)
    return [
        face_table.c.photo_id.in_(
            select(file_table.c.photo_id).where(or_(*(is_below(path, top) for top in part)))
        )
        for part in parts(sorted(set(where.path_prefixes)), _MAX_PREFIXES)
    ]


def is_below(path: ColumnElement[str], top: str) -> ColumnElement[bool]:
    """Returns the condition that a path is `top` or below it: an indexed range from `top/` to `top0`."""
    inside = top.rstrip(os.sep) + os.sep
    end = inside[:-1] + chr(ord(os.sep) + 1)
    return or_(path == top, and_(path >= inside, path < end))


def _by_code_points(column: ColumnElement[Any], dialect: str) -> ColumnElement[Any]:
    """Returns a text column in code point order, as Python compares; this is the default of SQLite."""
    return column.collate("C") if dialect == "postgresql" else column


def _on_metadata(table: Any, condition: Condition, dialect: str) -> ColumnElement[bool]:
    json_condition = _sqlite_condition if dialect == "sqlite" else _postgresql_condition
    return json_condition(table.c.metadata, condition)


def _sqlite_condition(column: Column[Any], condition: Condition) -> ColumnElement[bool]:
    steps: list[Any] = []
    inside: ColumnElement[Any] = column
    for number in range(len(condition.key)):
        step = func.json_each(inside).table_valued(
            "key", "value", "type", name=f"step{number}", joins_implicitly=True
        )
        steps.append(step)
        # `value` is JSON text only for objects and arrays; only objects have further keys.
        inside = case((step.c.type == "object", step.c.value), else_="{}")
    keys_match = [step.c.key == name for step, name in zip(steps, condition.key, strict=True)]
    kind, value = steps[-1].c.type, steps[-1].c.value
    literal: Any = condition.value
    if isinstance(literal, float):
        # SQLite may round a decimal fraction differently from Python, so SQLite parses both sides.
        literal = func.json_extract(json.dumps(literal), "$")
    if condition.value is None or isinstance(condition.value, bool):
        matches = _compared(condition, kind == json.dumps(condition.value), None, literal)
    else:
        kinds = ("integer", "real") if is_number(condition.value) else ("text",)
        matches = _compared(condition, kind.in_(kinds), value, literal)
    return exists(select(1).select_from(*steps).where(*keys_match, matches).correlate(column.table))


def _postgresql_condition(column: Column[Any], condition: Condition) -> ColumnElement[bool]:
    element: Any = column
    for name in condition.key:
        element = element[name]
    kind, text, value = func.json_typeof(element), element.as_string(), condition.value
    if value is None:
        matches = _compared(condition, kind == "null", None, None)
    elif isinstance(value, bool):
        matches = _compared(condition, kind == "boolean", text, json.dumps(value))
    elif isinstance(value, str):
        matches = _compared(condition, kind == "string", text.collate("C"), value)
    else:
        # A CASE, because AND does not guarantee an order of evaluation, and not every text is a number.
        number = case((kind == "number", text))
        if condition.operator == EXISTS:
            matches = true()
        elif condition.operator == "!=":
            matches = not_(and_(kind == "number", _postgresql_number(number, "=", value)))
        else:
            matches = and_(kind == "number", _postgresql_number(number, condition.operator, value))
    return and_(kind.is_not(None), matches)


def _postgresql_number(text: Any, operator: str, value: int | float) -> ColumnElement[bool]:
    """Returns the comparison of a JSON number with a value, exact as in Python.

    PostgreSQL would round one of both: a float to 15 digits as NUMERIC, an integer to 53 bits as a float. So
    floats are compared with the nearest float, and integers with the nearest integer.

    Args:
        text: the number as `metadata.to_json` wrote it; NULL for what is none. Only floats have `.` or `e`.
        operator: "=", "<", "<=", ">" or ">=".
        value: finite.
    """
    near = float(value)
    floats, integers = cast(text, Double), cast(text, Numeric)
    low, high = Decimal(math.floor(value)), Decimal(math.ceil(value))
    as_float: ColumnElement[bool]
    as_integer: ColumnElement[bool]
    match operator:
        case "=":
            as_float = floats == near if near == value else false()
            as_integer = integers == low if low == high else false()
        case "<":
            as_float = floats <= near if near < value else floats < near
            as_integer = integers < high
        case "<=":
            as_float = floats <= near if near <= value else floats < near
            as_integer = integers <= low
        case ">":
            as_float = floats >= near if near > value else floats > near
            as_integer = integers > low
        case _:
            as_float = floats >= near if near >= value else floats > near
            as_integer = integers >= high
    return case((text.regexp_match("[.e]"), as_float), else_=as_integer)


def _compared(condition: Condition, is_kind: Any, value: Any, literal: Any) -> ColumnElement[bool]:
    """Returns the condition on an existing value; `value` is None if its type decides (null, true, false)."""
    if condition.operator == EXISTS:
        return true()
    if condition.operator in ("=", "!="):
        equal = is_kind if value is None else and_(is_kind, value == literal)
        return equal if condition.operator == "=" else not_(equal)
    if condition.operator == BEGINS:
        return and_(is_kind, func.substr(value, 1, len(literal)) == literal)
    ordered: ColumnElement[bool] = _COMPARISONS[condition.operator](value, literal)
    return and_(is_kind, ordered)
