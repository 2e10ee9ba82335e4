"""Migrations: reads the schema version of a database, and upgrades older ones, for `store`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, inspect, text

from retrieval.database import schema
from retrieval.errors import GalleryDamaged, GalleryError
from retrieval.system.forks import shared_lock

# The newest schema version. As a constant, it spares an up-to-date gallery the import of alembic (0.2 s).
# `tests/database/test_migrations.py` compares it with the scripts.
SCHEMA_VERSION: Final = "0011"

# alembic keeps state in module globals, so only one thread may migrate at a time.
_MIGRATION_LOCK: Final = shared_lock()


def runner(connection: Connection) -> Callable[[str], Sequence[Any]]:
    """Returns a function that runs a statement and returns its rows, as `schema.problems` expects."""
    return lambda statement: connection.exec_driver_sql(statement).all()


def check_schema(connection: Connection, path: Path, *, exact: bool, only: str | None = None) -> None:
    """Checks the tables of a database; see `schema.problems` for `exact` and `only`.

    Raises:
        GalleryDamaged: they are not as faceprint makes them.
    """
    if problems := schema.problems(runner(connection), exact=exact, only=only):
        raise GalleryDamaged(
            f"{path} is not a database as faceprint makes it: {problems[0]}; restore it from a backup."
        )


def stored_version(connection: Connection, path: Path) -> str | None:
    """Returns the schema version of a database; None if a migration was interrupted before it wrote one.

    Raises:
        GalleryDamaged: it is not the database of a gallery.
        GalleryError: a newer version of faceprint made it.
    """
    if not inspect(connection).has_table("alembic_version"):
        raise GalleryDamaged(f"{path} is a database, but not a gallery's; restore it from a backup.")
    check_schema(connection, path, exact=False, only=schema.VERSION_TABLE)
    version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    if version is not None and version > SCHEMA_VERSION:
        raise GalleryError(
            f"The gallery {path.parent} was made by a newer version of faceprint "
            f"(schema {version}, this one knows {SCHEMA_VERSION}); upgrade faceprint to open it."
        )
    return str(version) if version is not None else None


def migrations_folder() -> Path:
    """Returns the folder of the alembic scripts: in the installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent.parent / "migrations"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "migrations"


def migrate(connection: Connection, folder: Path | None = None) -> None:
    """Runs the pending migrations of a database, in the transaction of the connection.

    Args:
        connection: to the database.
        folder: the alembic scripts; None for those of `migrations_folder`.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.fspath(folder or migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _MIGRATION_LOCK:
        command.upgrade(config, "head")
