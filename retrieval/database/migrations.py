"""Migrations for the store: reads the schema version of a database, and upgrades older ones."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, inspect, text

from retrieval.database import schema
from retrieval.errors import GalleryDamaged, GalleryError

# The newest migration, so that opening an up-to-date gallery need not import alembic (0.2 s).
# `tests/database/test_migrations.py` holds it to the scripts.
SCHEMA_VERSION: Final = "0008"

# alembic keeps its state in module globals; two threads that migrate at once would share it.
_MIGRATING: Final = threading.Lock()


def runner(connection: Connection) -> Callable[[str], Sequence[Any]]:
    """A function that runs a statement and returns its rows, as `schema` takes it."""
    return lambda statement: connection.exec_driver_sql(statement).all()


def check_schema(connection: Connection, path: Path, *, exact: bool, only: str | None = None) -> None:
    """Checks the tables; see `schema.problems`.

    Raises:
        GalleryDamaged: they are not those that faceprint makes.
    """
    if found := schema.problems(runner(connection), exact=exact, only=only):
        raise GalleryDamaged(
            f"{path} is not a database as faceprint makes it: {found[0]}; restore it from a backup."
        )


def stored_version(connection: Connection, path: Path) -> str | None:
    """The version of a database's tables; None where a migration was interrupted before it wrote one.

    Raises:
        GalleryDamaged: it is not a gallery's.
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
    """The alembic scripts: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent.parent / "migrations"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "migrations"


def migrate(connection: Connection) -> None:
    """Runs the migrations that a database lacks, in the transaction of the connection."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.fspath(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _MIGRATING:
        command.upgrade(config, "head")
