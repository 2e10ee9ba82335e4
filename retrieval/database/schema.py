"""Schema: whether a gallery's database has exactly the tables that its migrations make, and nothing else.

A database may come from a stranger. A trigger, a view, a generated column or a CHECK in it would be executed
by whoever opens it, and an extra table or column could keep what is to be forgotten.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import Column, Connection, MetaData, String, Table, UniqueConstraint, insert
from sqlalchemy.dialects import sqlite

from retrieval.database.tables import metadata

# The temporary table that alembic leaves when its process is killed during a migration.
TEMPORARY: Final = "_alembic_tmp_"

VERSION_TABLE: Final = "alembic_version"

# What may stand in a CREATE TABLE of ours beside names and types. No CHECK, no GENERATED, no COLLATE, no
# DEFAULT: those could run something, or change what is compared.
_WORDS: Final = frozenset(
    ("create", "table", "not", "null", "constraint", "primary", "key", "foreign", "references", "unique")
).union(("integer", "varchar", "text", "json", "bigint", "float"))
_PIECES: Final = re.compile(r'"[^"]*"|\w+|\s+|[(),]|.', re.DOTALL)

_ENTRIES: Final = "SELECT type, name, tbl_name, sql FROM sqlite_master"
_COLUMNS: Final = """
    SELECT m.name, c.name, upper(c.type), c."notnull", c.dflt_value, c.pk, c.hidden
    FROM sqlite_master m JOIN pragma_table_xinfo(m.name) c WHERE m.type = 'table'
"""
_INDEXES: Final = """
    SELECT m.name, l.name, l."unique", l.origin, l.partial, x.seqno, x.name, x."desc", x.coll
    FROM sqlite_master m JOIN pragma_index_list(m.name) l JOIN pragma_index_xinfo(l.name) x
    WHERE m.type = 'table' AND x.key ORDER BY m.name, l.name, x.seqno
"""


def create(connection: Connection, version: str) -> None:
    """Makes the tables of the newest version, which is `version`, in an empty database, in one transaction.

    They are those that the migrations make one after the other, at a tenth of the time.
    """
    metadata.create_all(connection, checkfirst=False)
    constraint_names = {"pk": f"{VERSION_TABLE}_pkc"}
    table = Table(
        VERSION_TABLE,
        MetaData(naming_convention=constraint_names),
        Column("version_num", String(32), primary_key=True),
    )
    table.create(connection, checkfirst=False)
    connection.execute(insert(table).values(version_num=version))


def problems(execute: Any, *, exact: bool, only: str | None = None) -> list[str]:
    """What a database has that no gallery has, or lacks.

    Args:
        execute: runs a statement and gives its rows: `sqlite3.Connection.execute`, or the like.
        exact: compare with the newest version. Otherwise only what could run something is looked for, as
            before an older database is brought up to date.
        only: look at nothing but what has this name.

    Returns:
        A few words each; none where all is as it should be.
    """
    entries = [row for row in execute(_ENTRIES) if only is None or row[1] == only]
    found = list(_strange(entries))
    if found or not exact:
        return found
    tables, indexes = _expected()
    if differing := sorted({str(row[0]) for row in set(map(tuple, _shown(execute(_COLUMNS)))) ^ tables}):
        found.append(f"the table {differing[0]!r} is not as faceprint makes it")
    named = set(map(tuple, _shown(execute(_INDEXES))))
    if not found and (other := sorted({str(row[0]) for row in _unnamed(named) ^ indexes})):
        found.append(f"the indexes of the table {other[0]!r} are not as faceprint makes them")
    return found


def leftovers(execute: Any) -> list[str]:
    """Returns the tables that an interrupted migration left."""
    return [name for kind, name, _, _ in execute(_ENTRIES) if kind == "table" and name.startswith(TEMPORARY)]


def _strange(entries: Sequence[Sequence[Any]]) -> Iterator[str]:
    for kind, name, table, sql in entries:
        if kind not in ("table", "index"):
            yield f"it has a {kind} {name!r}, and no gallery has one"
        elif kind == "table" and not _is_plain(str(sql)):
            yield f"the table {name!r} is not as faceprint makes it"
        elif kind == "index" and not (sql is None or _is_index(str(sql))):
            yield f"the index {name!r} of {table!r} is not as faceprint makes it"


def _is_plain(sql: str) -> bool:
    """Returns whether a CREATE TABLE has only columns, keys and unique constraints."""
    pieces = _PIECES.findall(sql)
    # Behind a type may stand its length; every other word is a keyword that is known, or a name of ours.
    words = [piece.strip('"') for piece in pieces if not piece.isspace() and piece not in "(),"]
    return [word.lower() for word in words[:2]] == ["create", "table"] and all(
        word.isdigit() or word.lower() in _WORDS or word in _names() for word in words[2:]
    )


def _is_index(sql: str) -> bool:
    """Returns whether a CREATE INDEX has only plain columns."""
    return (
        re.fullmatch(r'CREATE (UNIQUE )?INDEX "?\w+"? ON "?\w+"? \("?\w+"?(, ?"?\w+"?)*\)', sql) is not None
    )


@cache
def _names() -> frozenset[str]:
    """Returns all names in any schema version: of tables, columns and constraints."""
    names = {VERSION_TABLE, "alembic_version_pkc", "version_num"}
    # Columns and their indexes that older versions had.
    names |= {"fingerprint", "dimension", "path"}
    for table in metadata.tables.values():
        names |= {table.name, TEMPORARY + table.name, *(column.name for column in table.columns)}
        names |= {str(one.name) for one in table.constraints}
    return frozenset(names)


@cache
def _expected() -> tuple[frozenset[tuple[Any, ...]], frozenset[tuple[Any, ...]]]:
    """Returns the columns and the indexes of the newest version, as SQLite states them."""
    dialect = sqlite.dialect()
    columns: set[tuple[Any, ...]] = {(VERSION_TABLE, "version_num", "VARCHAR(32)", 1, None, 1, 0)}
    indexes: set[tuple[Any, ...]] = {(VERSION_TABLE, None, 1, "pk", 0, "version_num")}
    for table in metadata.tables.values():
        keys = [column.name for column in table.primary_key.columns]
        for column in table.columns:
            kind = column.type.compile(dialect).upper()
            key = keys.index(column.name) + 1 if column.name in keys else 0
            columns.add((table.name, column.name, kind, int(not column.nullable), None, key, 0))
        if [column.type.compile(dialect) for column in table.primary_key.columns] != ["INTEGER"]:
            indexes.add((table.name, None, 1, "pk", 0, *keys))
        for constraint in table.constraints:
            if isinstance(constraint, UniqueConstraint):
                names = [column.name for column in constraint.columns]
                indexes.add((table.name, None, 1, "u", 0, *names))
        for index in table.indexes:
            names = [column.name for column in index.columns]
            indexes.add((table.name, index.name, int(bool(index.unique)), "c", 0, *names))
    return frozenset(columns), frozenset(indexes)


def _shown(rows: Any) -> Iterator[Sequence[Any]]:
    """Returns rows without those of tables that an interrupted migration left."""
    return (row for row in rows if not str(row[0]).startswith(TEMPORARY))


def _unnamed(rows: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """Returns indexes with their columns in order, without the names of SQLite's automatic indexes."""
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for table, name, unique, origin, partial, _, column, descending, collation in sorted(
        rows, key=lambda row: (row[0], row[1], row[5])
    ):
        head = (table, name if origin == "c" else None, unique, origin, partial)
        plain = column if (descending, collation) == (0, "BINARY") else None
        found[table, name] = (*found.get((table, name), head), plain)
    return set(found.values())


# What SQLite may say of a value of a column; NULL where that is allowed.
_KINDS: Final = {"INTEGER": ("integer",), "BIGINT": ("integer",), "FLOAT": ("real", "integer")}


def misplaced(execute: Any) -> list[str]:
    """Returns tables with a value of another type than its column, which SQLite permits; reads all rows."""
    found, dialect = [], sqlite.dialect()
    for table in metadata.tables.values():
        wrong = []
        for column in table.columns:
            kind = column.type.compile(dialect).upper()
            kinds = [*_KINDS.get(kind, ("text",)), *(["null"] if column.nullable else [])]
            wrong.append(f'typeof("{column.name}") NOT IN ({", ".join(map(repr, kinds))})')
            if kind == "JSON":
                is_object = f'json_valid("{column.name}") AND json_type("{column.name}") = \'object\''
                wrong.append(f'("{column.name}" IS NOT NULL AND NOT coalesce({is_object}, 0))')
        if list(execute(f'SELECT 1 FROM "{table.name}" WHERE {" OR ".join(wrong)} LIMIT 1')):
            found.append(f"a value in the table {table.name} has another type than its column")
    return found
