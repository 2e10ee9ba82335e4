"""Schema: creates the tables, and checks that a database has exactly the tables of the migrations.

A database may be untrusted. A trigger, a view, a generated column or a CHECK would execute code of its author
when it is opened, and an extra table or column could keep data that must be erased.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, Final

from sqlalchemy import Column, Connection, MetaData, String, Table, UniqueConstraint, insert
from sqlalchemy.dialects import sqlite

from retrieval.database.tables import metadata

# The prefix of the temporary tables of alembic; one remains if its process is killed during a migration.
TEMPORARY: Final = "_alembic_tmp_"

VERSION_TABLE: Final = "alembic_version"

# The keywords and types allowed in a CREATE TABLE. CHECK, GENERATED, COLLATE and DEFAULT are not: they could
# execute code, or change comparisons.
_KEYWORDS: Final = frozenset(
    ("create", "table", "not", "null", "constraint", "primary", "key", "foreign", "references", "unique")
).union(("integer", "varchar", "text", "json", "bigint", "float"))
_TOKENS: Final = re.compile(r'"[^"]*"|\w+|\s+|[(),]|.', re.DOTALL)

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


def create(connection: Connection, version: str, tables: MetaData = metadata) -> None:
    """Creates the tables of the newest schema version, `version`, in an empty database.

    The result equals that of all migrations, in a tenth of the time. The caller holds the transaction.
    """
    tables.create_all(connection, checkfirst=False)
    constraint_names = {"pk": f"{VERSION_TABLE}_pkc"}
    table = Table(
        VERSION_TABLE,
        MetaData(naming_convention=constraint_names),
        Column("version_num", String(32), primary_key=True),
    )
    table.create(connection, checkfirst=False)
    connection.execute(insert(table).values(version_num=version))


def problems(execute: Any, *, exact: bool, only: str | None = None) -> list[str]:
    """Returns the deviations of a database from the schema.

    Args:
        execute: runs a statement and returns its rows, like `sqlite3.Connection.execute`.
        exact: compares with the newest version. Otherwise only entries that could execute code are
            reported, as before an older database is migrated.
        only: checks only the entry with this name.

    Returns:
        A clause for each deviation; empty without any.
    """
    entries = [row for row in execute(_ENTRIES) if only is None or row[1] == only]
    deviations = list(_unexpected_entries(entries))
    if deviations or not exact:
        return deviations
    tables, indexes = _expected()
    columns = set(map(tuple, _without_temporary(execute(_COLUMNS))))
    if differing := sorted({str(row[0]) for row in columns ^ tables}):
        deviations.append(f"the table {differing[0]!r} is not as faceprint makes it")
    rows = set(map(tuple, _without_temporary(execute(_INDEXES))))
    if not deviations and (differing := sorted({str(row[0]) for row in _comparable(rows) ^ indexes})):
        deviations.append(f"the indexes of the table {differing[0]!r} are not as faceprint makes them")
    return deviations


def leftovers(execute: Any) -> list[str]:
    """Returns the tables that an interrupted migration left."""
    return [name for kind, name, _, _ in execute(_ENTRIES) if kind == "table" and name.startswith(TEMPORARY)]


def _unexpected_entries(entries: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yields a clause for each entry that could execute code, or that faceprint does not create."""
    for kind, name, table, sql in entries:
        if kind not in ("table", "index"):
            yield f"it has a {kind} {name!r}, and no gallery has one"
        elif kind == "table" and not _is_plain(str(sql)):
            yield f"the table {name!r} is not as faceprint makes it"
        elif kind == "index" and not (sql is None or _is_index(str(sql))):
            yield f"the index {name!r} of {table!r} is not as faceprint makes it"


@lru_cache(maxsize=64)  # the tables of all galleries are alike
def _is_plain(sql: str) -> bool:
    """Returns whether a CREATE TABLE has only columns, keys and unique constraints."""
    tokens = _TOKENS.findall(sql)
    # A number is the length of a type; every other word must be a known keyword or name.
    words = [token.strip('"') for token in tokens if not token.isspace() and token not in "(),"]
    return [word.lower() for word in words[:2]] == ["create", "table"] and all(
        word.isdigit() or word.lower() in _KEYWORDS or word in _names() for word in words[2:]
    )


def _is_index(sql: str) -> bool:
    """Returns whether a CREATE INDEX has only plain columns, without expressions or conditions."""
    return (
        re.fullmatch(r'CREATE (UNIQUE )?INDEX "?\w+"? ON "?\w+"? \("?\w+"?(, ?"?\w+"?)*\)', sql) is not None
    )


@cache
def _names() -> frozenset[str]:
    """Returns the names of tables, columns and constraints of all schema versions."""
    names = {VERSION_TABLE, "alembic_version_pkc", "version_num"}
    # Columns of older versions.
    names |= {"fingerprint", "dimension", "path", "face_id", "fk_file_face_id_face"}
    names |= {"uq_face_sha256", "uq_photo_sha256"}
    for table in metadata.tables.values():
        names |= {table.name, TEMPORARY + table.name, *(column.name for column in table.columns)}
        names |= {str(one.name) for one in table.constraints}
    return frozenset(names)


@cache
def _expected() -> tuple[frozenset[tuple[Any, ...]], frozenset[tuple[Any, ...]]]:
    """Returns the columns and indexes of the newest version, as SQLite's pragmas report them."""
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


def _without_temporary(rows: Any) -> Iterator[Sequence[Any]]:
    """Returns the rows except those of tables that an interrupted migration left."""
    return (row for row in rows if not str(row[0]).startswith(TEMPORARY))


def _comparable(rows: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """Returns one row for each index, with its columns in order; automatic indexes of SQLite have no name."""
    indexes: dict[tuple[str, str], tuple[Any, ...]] = {}
    for table, name, unique, origin, partial, _, column, descending, collation in sorted(
        rows, key=lambda row: (row[0], row[1], row[5])
    ):
        head = (table, name if origin == "c" else None, unique, origin, partial)
        plain = column if (descending, collation) == (0, "BINARY") else None
        indexes[table, name] = (*indexes.get((table, name), head), plain)
    return set(indexes.values())


# The storage classes (`typeof`) that SQLite may use for a column type.
_STORAGE_CLASSES: Final = {"INTEGER": ("integer",), "BIGINT": ("integer",), "FLOAT": ("real", "integer")}


def type_problems(execute: Any) -> list[str]:
    """Returns a clause for each table that has a value of another type than its column; reads all rows.

    SQLite permits such values.
    """
    return [
        f"a value in the table {table} has another type than its column"
        for table, statement in _type_statements().items()
        if list(execute(statement))
    ]


@cache
def _type_statements() -> dict[str, str]:
    """Returns for each table the statement that selects a row if a value has another type than its column."""
    statements, dialect = {}, sqlite.dialect()
    for table in metadata.tables.values():
        violations = []
        for column in table.columns:
            kind = column.type.compile(dialect).upper()
            kinds = [*_STORAGE_CLASSES.get(kind, ("text",)), *(["null"] if column.nullable else [])]
            violations.append(f'typeof("{column.name}") NOT IN ({", ".join(map(repr, kinds))})')
            if kind == "JSON":
                is_object = f'json_valid("{column.name}") AND json_type("{column.name}") = \'object\''
                violations.append(f'("{column.name}" IS NOT NULL AND NOT coalesce({is_object}, 0))')
        statements[table.name] = f'SELECT 1 FROM "{table.name}" WHERE {" OR ".join(violations)} LIMIT 1'
    return statements
