"""A database is opened only with the tables that the migrations make: nothing in it is run or kept apart."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.store import Store
from retrieval.errors import GalleryDamaged
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from tests.operations import GONE, add, contents, tiny_model

DATA = Path(__file__).parent.parent / "data"
VERSIONS = sorted(path.name.removeprefix("gallery-") for path in DATA.glob("gallery-*"))


@pytest.fixture(scope="session")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of eleven faces; no test changes it."""
    root = tmp_path_factory.mktemp("laid")
    with Gallery.create(root / "g", tiny_model(root / "model")) as gallery:
        add(gallery, range(11))
    return root / "g"


@pytest.fixture
def folder(laid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(laid, tmp_path / "g"))


def run(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def rewritten(path: Path, table: str, old: str, new: str) -> None:
    """Changes the text by which SQLite knows a table, as it can be done by hand."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        changed = connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ? AND instr(sql, ?)",
            (old, new, table, old),
        )
        assert changed.rowcount == 1
        connection.commit()


STRANGE = {
    "trigger": "CREATE TRIGGER keep AFTER DELETE ON face BEGIN INSERT INTO merger VALUES (old.id, 1); END",
    "view": "CREATE VIEW shadow AS SELECT name FROM identity",
    "table": "CREATE TABLE shadow (name TEXT)",
    "known column in another table": "ALTER TABLE identity ADD COLUMN path TEXT",
    "column": "ALTER TABLE identity ADD COLUMN shadow TEXT",
    "default": "ALTER TABLE identity ADD COLUMN path TEXT DEFAULT 'x'",
    "generated": "ALTER TABLE identity ADD COLUMN path TEXT GENERATED ALWAYS AS (upper(name))",
    "index": "CREATE INDEX shadow ON identity (metadata)",
    "expression index": "CREATE INDEX shadow ON identity (upper(name))",
    "partial index": "CREATE INDEX shadow ON identity (name) WHERE id > 1",
    "missing index": "DROP INDEX ix_face_identity_id",
    "missing table": "DROP TABLE codes",
    "virtual table": "CREATE VIRTUAL TABLE shadow USING fts5(name)",
    "statistics": "ANALYZE",
}

REWRITTEN = {
    "check": ("identity", "name TEXT NOT NULL", "name TEXT NOT NULL CHECK (length(name) > 0)"),
    "collation": ("identity", "name TEXT NOT NULL", "name TEXT COLLATE NOCASE NOT NULL"),
    "conflict": ("identity", "UNIQUE (name)", "UNIQUE (name) ON CONFLICT REPLACE"),
    "cascade": ("file", "REFERENCES photo (id)", "REFERENCES photo (id) ON DELETE CASCADE"),
    "hidden in a comment": ("identity", "name TEXT NOT NULL", "name /* a */ TEXT NOT NULL"),
}


def is_refused(folder: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(GalleryDamaged, match="is not a database as faceprint makes it"):
            Gallery.open(folder, read_only=read_only)
    assert {finding.trouble for finding in verify(folder).findings} == {Trouble.DATABASE_DAMAGED}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_database_with_anything_else_is_not_opened(kind: str, folder: Path) -> None:
    run(folder / "gallery.db", STRANGE[kind])
    is_refused(folder)


@pytest.mark.parametrize("kind", REWRITTEN)
def test_a_table_with_a_clause_that_no_table_of_ours_has_is_not_opened(kind: str, folder: Path) -> None:
    rewritten(folder / "gallery.db", *REWRITTEN[kind])
    is_refused(folder)


def test_a_trigger_that_would_keep_a_name_never_sees_an_erasure(folder: Path) -> None:
    """The receipt would say erased, and the name would stand in a table that nobody reads."""
    run(
        folder / "gallery.db",
        "CREATE TRIGGER keep BEFORE DELETE ON identity "
        "BEGIN INSERT INTO audit SELECT NULL, '', '', old.name, '', '', 0, '{}'; END",
    )
    with pytest.raises(GalleryDamaged, match="it has a trigger 'keep'"), Gallery.open(folder) as gallery:
        gallery.forget(GONE)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_gallery_of_every_older_version_is_brought_up_to_date(version: str, tmp_path: Path) -> None:
    """And one with something else is not, and stays as it is."""
    for name, strange in (("good", ()), ("bad", (STRANGE["trigger"],)), ("view", (STRANGE["view"],))):
        folder = Path(shutil.copytree(DATA / f"gallery-{version}", tmp_path / name))
        run(folder / "gallery.db", *strange)
        if not strange:
            Store.open(folder / "gallery.db").close()
            Store.open(folder / "gallery.db", read_only=True).close()
            continue
        with pytest.raises(GalleryDamaged, match="is not a database as faceprint makes it"):
            Store.open(folder / "gallery.db")
        with closing(sqlite3.connect(folder / "gallery.db")) as connection:
            ((found,),) = connection.execute("SELECT version_num FROM alembic_version")
        assert found == version


def test_what_an_interrupted_migration_left_is_removed_by_who_opens_for_writing(folder: Path) -> None:
    before = contents(folder)
    run(folder / "gallery.db", "CREATE TABLE _alembic_tmp_gallery (id INTEGER NOT NULL)")
    Gallery.open(folder, read_only=True).close()
    Gallery.open(folder).close()
    with closing(sqlite3.connect(folder / "gallery.db")) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name LIKE '_alembic%'").fetchall() == []
    with Gallery.open(folder) as gallery:
        add(gallery, range(20, 21))
    assert verify(folder).whole
    assert len(contents(folder)) == len(before) + 1


@pytest.mark.parametrize("version", [one for one in VERSIONS if one != SCHEMA_VERSION])
def test_an_older_gallery_with_an_interrupted_migration_is_brought_up_to_date(
    version: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(DATA / f"gallery-{version}", tmp_path / "g"))
    run(folder / "gallery.db", "CREATE TABLE _alembic_tmp_gallery (id INTEGER NOT NULL)")
    Store.open(folder / "gallery.db").close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE generation SET dimension = 'eight'",
        "UPDATE generation SET dimension = 0",
        "UPDATE generation SET dimension = 9223372036854775807",
        "UPDATE segment SET rows = 'many'",
        "UPDATE segment SET rows = -1",
        "UPDATE segment SET bytes = x'00'",
        "UPDATE gallery SET uuid = x'00'",
        "UPDATE gallery SET next_face_id = 'x'",
        "UPDATE gallery SET unfinished = '[1]'",
        "UPDATE gallery SET unfinished = '{\"erase\": 1}'",
        "UPDATE gallery SET unfinished = 'nothing'",
        "UPDATE gallery SET next_face_id = 1",
        "UPDATE gallery SET next_segment_id = 1",
        "UPDATE gallery SET next_identity_id = 1",
        "UPDATE gallery SET next_generation_id = 1",
        "UPDATE generation SET checked_before = (SELECT next_face_id + 1 FROM gallery)",
        "UPDATE generation SET checked_before = -1",
        "INSERT INTO suspect SELECT generation_id, 1, next_face_id + 1 FROM gallery",
        "INSERT INTO suspect SELECT generation_id, -1, 2 FROM gallery",
        "INSERT INTO suspect SELECT generation_id, 2, 2 FROM gallery",
        "INSERT INTO suspect SELECT generation_id, 3, 2 FROM gallery",
        "UPDATE gallery SET generation_id = 77",
        "DELETE FROM generation",
        "INSERT INTO calibration SELECT 1, '', '', 1, 1, 1, 1, 1, 0.1, '{}' FROM gallery",
        "INSERT INTO calibration SELECT 1, '', '', 1, 1, 1, 1, 1, 0.1, '[1]' FROM gallery",
        "INSERT INTO calibration SELECT 1, '', '', 1, 1, 1, 1, 1, 0.1, 'x' FROM gallery",
    ],
)
def test_a_row_with_a_value_that_no_row_has_is_one_sentence(statement: str, folder: Path) -> None:
    """And a finding of `verify`, never a traceback."""
    run(folder / "gallery.db", statement)
    with pytest.raises(GalleryDamaged) as caught, Gallery.open(folder) as gallery:
        add(gallery, range(20, 21))
    assert str(caught.value).endswith(".")
    assert Trouble.DATABASE_DAMAGED in {finding.trouble for finding in verify(folder).findings}
