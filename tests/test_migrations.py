"""The alembic scripts give exactly the tables that `retrieval.store` declares, from every version before."""

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, inspect, text

from retrieval.errors import GalleryError
from retrieval.store import SCHEMA_VERSION, NewFace, Segment, Store, metadata, migrations_folder

ROOT = Path(__file__).parent.parent


def config(connection: Connection | None = None) -> Config:
    made = Config()
    made.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def engine(path: Path) -> Engine:
    return create_engine(URL.create("sqlite", database=str(path)))


def schema(connection: Connection) -> dict[str, Any]:
    """Tables with their columns, keys, constraints and indexes, names included."""
    inspector = inspect(connection)
    return {
        table: {
            "columns": [{**column, "type": str(column["type"])} for column in inspector.get_columns(table)],
            "primary key": inspector.get_pk_constraint(table),
            "unique": inspector.get_unique_constraints(table),
            "foreign keys": inspector.get_foreign_keys(table),
            "indexes": inspector.get_indexes(table),
        }
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The database of an empty gallery, as the scripts made it."""
    Store.create(tmp_path / "gallery.db", fingerprint="f" * 64, dimension=8).close()
    return tmp_path / "gallery.db"


def test_there_is_exactly_one_head_and_it_is_the_version_that_the_store_knows() -> None:
    assert ScriptDirectory.from_config(config()).get_heads() == [SCHEMA_VERSION]


def test_versions_are_numbered_without_a_gap() -> None:
    """`store` compares them as text to tell newer from older."""
    scripts = list(ScriptDirectory.from_config(config()).walk_revisions())
    assert sorted(script.revision for script in scripts) == [f"{n:04d}" for n in range(1, len(scripts) + 1)]


def test_upgrading_from_empty_gives_exactly_the_declared_tables(path: Path) -> None:
    """To alembic's eye, and in every name and type; `alembic check` agrees."""
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        migrated = schema(connection)
        command.check(config(connection))
    with create_engine("sqlite://").begin() as connection:
        metadata.create_all(connection)
        assert migrated == schema(connection)


def test_alembic_check_is_not_blind(path: Path) -> None:
    """A column more than declared is noticed."""
    with engine(path).begin() as connection:
        connection.execute(text("ALTER TABLE face ADD COLUMN age INTEGER"))
        with pytest.raises(Exception, match="New upgrade operations detected"):
            command.check(config(connection))


def test_downgrading_removes_every_table_and_upgrading_brings_them_back(path: Path) -> None:
    with engine(path).begin() as connection:
        before = schema(connection)
        command.downgrade(config(connection), "base")
        assert schema(connection) == {}
        command.upgrade(config(connection), "head")
        assert schema(connection) == before
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [
            (SCHEMA_VERSION,)
        ]


def test_a_database_with_faces_can_be_downgraded(path: Path) -> None:
    """Foreign keys are enforced, so the order of the tables matters."""
    store = Store.open(path)
    with store.write() as writer:
        writer.add_faces(1, [NewFace("Kim", "/kim.jpg", "a" * 64)])
        writer.replace_segments([], [Segment(1, 1, 1, "b" * 64)])
    store.close()
    with engine(path).connect() as connection:
        connection.execute(text("PRAGMA foreign_keys = ON"))
        connection.commit()
        command.downgrade(config(connection), "base")
        assert schema(connection) == {}


def execute(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("newer", [f"{int(SCHEMA_VERSION) + 1:04d}", "9999"])
def test_a_gallery_of_a_newer_version_is_refused_with_both_versions_named(newer: str, path: Path) -> None:
    execute(path, f"UPDATE alembic_version SET version_num = '{newer}'")
    with pytest.raises(GalleryError) as caught:
        Store.open(path)
    assert str(caught.value) == (
        f"The gallery {path.parent} was made by a newer version of faceprint "
        f"(schema {newer}, this one knows {SCHEMA_VERSION}); upgrade faceprint to open it."
    )


def test_a_database_without_a_version_is_upgraded_when_it_is_opened(path: Path) -> None:
    tables = ("segment", "face", "identity", "gallery")
    execute(path, *(f"DROP TABLE {table}" for table in tables), "DELETE FROM alembic_version")
    Store.open(path).close()
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [
            (SCHEMA_VERSION,)
        ]


def test_a_migration_that_fails_leaves_the_database_as_it_was(path: Path) -> None:
    """The second table of the script exists already: the first one must not stay."""
    execute(
        path,
        *(f"DROP TABLE {name}" for name in ("segment", "face", "gallery")),
        "DELETE FROM alembic_version",
    )
    with engine(path).begin() as connection:
        before = schema(connection)
    with pytest.raises(Exception, match="table identity already exists"):
        Store.open(path)
    with engine(path).begin() as connection:
        assert schema(connection) == before
    assert list(before) == ["identity"]


def test_the_alembic_command_works_on_a_gallery_named_by_its_folder(tmp_path: Path) -> None:
    """Also when the folder's name has letters that mean something in a URL."""
    folder = "50%?x=1"
    (tmp_path / folder).mkdir()
    Store.create(tmp_path / folder / "gallery.db", fingerprint="f" * 64, dimension=8).close()
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-x", f"gallery={tmp_path / folder}", "check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "No new upgrade operations detected."), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_the_alembic_command_asks_for_a_gallery_when_none_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "current"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (1, "name a gallery: alembic -x gallery=FOLDER ...")
