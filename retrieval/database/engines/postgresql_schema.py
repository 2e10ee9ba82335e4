"""The tables of a gallery in a PostgreSQL schema, as the server's catalog reports them, for `postgresql`.

Other programs may add indexes and tables of their own beside them. What would change the gallery's rows, run
code on them or lose them is reported: triggers, rules, row security, defaults, unlogged tables.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from sqlalchemy import JSON, Column, Connection, ForeignKeyConstraint, MetaData, Table, UniqueConstraint, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import BigInteger, Float, LargeBinary, String

from retrieval.database.schema import VERSION_TABLE
from retrieval.database.server_tables import server_metadata
from retrieval.database.tables import metadata, photo_table

_HERE: Final = "c.relnamespace = to_regnamespace(quote_ident(current_schema()))"

_TABLES: Final = f"""
    SELECT c.relname, c.relkind, c.relpersistence, c.relrowsecurity,
           EXISTS (SELECT 1 FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal),
           EXISTS (SELECT 1 FROM pg_rewrite r WHERE r.ev_class = c.oid),
           EXISTS (SELECT 1 FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent))
    FROM pg_class c WHERE {_HERE} AND c.relname = ANY(:names)
"""
_COLUMNS: Final = f"""
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), l.collname, a.attnotnull,
           a.atthasdef OR a.attidentity <> '' OR a.attgenerated <> ''
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    LEFT JOIN pg_collation l ON l.oid = a.attcollation
    WHERE {_HERE} AND c.relname = ANY(:names) AND a.attnum > 0 AND NOT a.attisdropped
"""
_CONSTRAINTS: Final = f"""
    SELECT c.relname, k.contype, k.convalidated AND NOT k.condeferrable, f.relname,
           ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY AS n(number, place)
                 JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = n.number ORDER BY n.place)
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
    LEFT JOIN pg_class f ON f.oid = k.confrelid
    WHERE {_HERE} AND c.relname = ANY(:names) AND k.contype IN ('p', 'u', 'f', 'c', 'x')
"""
_INDEXES: Final = f"""
    SELECT c.relname, i.relname, x.indisvalid AND x.indpred IS NULL
    FROM pg_index x JOIN pg_class c ON c.oid = x.indrelid JOIN pg_class i ON i.oid = x.indexrelid
    WHERE {_HERE} AND c.relname = ANY(:names)
"""


@cache
def server_tables() -> MetaData:
    """Returns the tables of a gallery on a server.

    Only statements give ids: see `Writer`. A photo is found by its SHA-256, which the server keeps unique: a
    writer that lost its lock without noticing it cannot store a photo twice.
    """
    plain = MetaData(naming_convention=metadata.naming_convention)
    for table in [*metadata.tables.values(), *server_metadata.tables.values()]:
        for column in table.to_metadata(plain).primary_key.columns:
            column.autoincrement = False
    photo = plain.tables[photo_table.name]
    photo.indexes.clear()
    photo.append_constraint(UniqueConstraint(photo.c.sha256))
    return plain


def size(connection: Connection) -> int:
    """Returns the bytes on the server's disk of a gallery's tables and their indexes."""
    query = f"SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c WHERE {_HERE}"
    found = connection.execute(text(f"{query} AND c.relname = ANY(:names)"), {"names": _names()})
    return int(found.scalar_one())


def current(connection: Connection) -> str | None:
    """Returns the name of the schema in which tables are made; None if it does not exist."""
    name: str | None = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
    return name


def tables(connection: Connection) -> list[str]:
    """Returns which names of a gallery's tables the schema has, as whatever."""
    found = connection.execute(text(_TABLES), {"names": _names()})
    return sorted(row[0] for row in found)


def version(connection: Connection) -> str | None:
    """Returns the schema version of a gallery; None if there is none."""
    if VERSION_TABLE not in tables(connection):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def number_of_gallery_table(connection: Connection) -> int:
    """Returns the number by which the database knows the gallery's table of its own row."""
    query = f"SELECT c.oid::bigint FROM pg_class c WHERE {_HERE} AND c.relname = 'gallery'"
    return int(connection.exec_driver_sql(query).scalar_one())


def analyze(connection: Connection) -> None:
    """Counts the rows of a new gallery for the planner, which the server itself does after a minute only."""
    for name in (table.name for table in _every_table()):
        connection.exec_driver_sql(f'ANALYZE "{name}"')


def read_all(connection: Connection) -> None:
    """Reads every value of every table, which fails on pages and values that the server finds damaged."""
    for name in (table.name for table in _every_table()):
        connection.exec_driver_sql(f'SELECT count("{name}"::text) FROM "{name}"')


def problems(connection: Connection) -> list[str]:
    """Returns a clause for each table that is not as faceprint makes it."""
    names = {"names": _names()}
    found = {row[0]: tuple(row[1:]) for row in connection.execute(text(_TABLES), names)}
    deviations = [f"the table {name!r} is missing" for name in _names() if name not in found]
    deviations += [clause for name in sorted(found) for clause in _table_problems(name, *found[name])]
    columns = {tuple(row) for row in connection.execute(text(_COLUMNS), names)}
    constraints = {(*row[:4], tuple(row[4])) for row in connection.execute(text(_CONSTRAINTS), names)}
    wrong = {row[0] for row in (columns ^ _columns()) | (constraints ^ _constraints())}
    deviations += [
        f"the table {name!r} does not have exactly the columns, keys and constraints that faceprint makes"
        for name in sorted(wrong & found.keys())
    ]
    usable = {tuple(row[:2]) for row in connection.execute(text(_INDEXES), names) if row[2]}
    deviations += [
        f"the table {table!r} has lost its index {index!r}" for table, index in sorted(_indexes() - usable)
    ]
    return deviations


def _table_problems(
    name: str, kind: str, persistence: str, secured: bool, triggers: bool, rules: bool, inherits: bool
) -> Iterator[str]:
    if kind != "r":
        yield f"{name!r} is no plain table"
    if persistence != "p":
        yield f"the table {name!r} is unlogged or temporary, so a crash would empty it"
    if secured:
        yield f"the table {name!r} has row security, which hides rows"
    if triggers:
        yield f"the table {name!r} has a trigger"
    if rules:
        yield f"the table {name!r} has a rule"
    if inherits:
        yield f"the table {name!r} inherits from another table, or is inherited from"


def _every_table() -> list[Table]:
    return list(server_tables().tables.values())


@cache
def _names() -> list[str]:
    return sorted([VERSION_TABLE, *(table.name for table in _every_table())])


@cache
def _columns() -> frozenset[tuple[Any, ...]]:
    found = {
        (table.name, column.name, *_type_of(column), not column.nullable, False)
        for table in _every_table()
        for column in table.columns
    }
    return frozenset(
        {*found, (VERSION_TABLE, "version_num", "character varying(32)", "default", True, False)}
    )


def _type_of(column: Column[Any]) -> tuple[str, str | None]:
    """Returns the type and the collation of a column, as the catalog names them."""
    kind = column.type.dialect_impl(postgresql.dialect())  # type: ignore[no-untyped-call]
    if isinstance(kind, BigInteger):
        return "bigint", None
    if isinstance(kind, Float):
        return "double precision", None
    if isinstance(kind, JSON):
        return "json", None
    if isinstance(kind, LargeBinary):
        return "bytea", None
    assert isinstance(kind, String)  # no other type is in `tables`
    return "text", "C"


@cache
def _constraints() -> frozenset[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = {(VERSION_TABLE, "p", True, None, ("version_num",))}
    for table in _every_table():
        found.add((table.name, "p", True, None, tuple(table.primary_key.columns.keys())))
        found |= {_constraint(table, one) for one in table.constraints if one is not table.primary_key}
    return frozenset(found)


def _constraint(table: Table, one: Any) -> tuple[Any, ...]:
    assert isinstance(one, UniqueConstraint | ForeignKeyConstraint)  # `tables` has no others
    names = tuple(column.name for column in one.columns)
    if isinstance(one, UniqueConstraint):
        return table.name, "u", True, None, names
    return table.name, "f", True, one.referred_table.name, names


@cache
def _indexes() -> frozenset[tuple[str, str]]:
    return frozenset((table.name, str(index.name)) for table in _every_table() for index in table.indexes)
