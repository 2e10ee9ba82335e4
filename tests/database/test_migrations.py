"""The alembic scripts give exactly the tables that `database.tables` declares, from every version before."""

import hashlib
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from numpy.typing import NDArray
from sqlalchemy import URL, Connection, Engine, create_engine, inspect, text

import retrieval.storage.vault
from retrieval.database.migrations import SCHEMA_VERSION, migrations_folder
from retrieval.database.photo_keys import key_of
from retrieval.database.records import Generation, NewFace, Segment
from retrieval.database.store import Store
from retrieval.database.tables import metadata
from retrieval.embedding.outcome import Status
from retrieval.errors import GalleryBusy, GalleryError, InputError, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from retrieval.gallery.repair import repair
from retrieval.models.bundle import ModelBundle
from retrieval.sources.photos import Photo
from retrieval.system import lock

ROOT = Path(__file__).parent.parent.parent


def config(connection: Connection | None = None) -> Config:
    made = Config()
    made.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def downgrade(path: Path, version: str) -> None:
    """Brings a database back to a schema version, with enforced foreign keys."""
    with engine(path).connect() as connection:
        connection.execute(text("PRAGMA foreign_keys = ON"))
        connection.commit()
        command.downgrade(config(connection), version)
        connection.commit()


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
    """The tables of an empty gallery, as the scripts make them."""
    with engine(tmp_path / "gallery.db").begin() as connection:
        command.upgrade(config(connection), "head")
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


def test_a_new_gallery_has_the_tables_that_the_scripts_make(path: Path, tmp_path: Path) -> None:
    Store.create(tmp_path / "new.db", fingerprint="f" * 64, dimension=8).close()
    with engine(path).begin() as migrated, engine(tmp_path / "new.db").begin() as new:
        assert schema(new) == schema(migrated)
        versions = [one.execute(text("SELECT * FROM alembic_version")).all() for one in (new, migrated)]
        assert versions == [[(SCHEMA_VERSION,)]] * 2


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


def test_a_database_with_faces_can_be_downgraded(tmp_path: Path) -> None:
    """Foreign keys are enforced, so the order of the tables matters."""
    path = tmp_path / "gallery.db"
    store = Store.create(path, fingerprint="f" * 64, dimension=8)
    with store.write() as writer:
        writer.add_faces(1, [NewFace("Kim", "/kim.jpg", "a" * 64)])
        writer.add_files([("/kim.jpg", 1)])
        writer.replace_segments([], [Segment(1, 1, 1, "b" * 64, 1)])
    store.close()
    with engine(path).connect() as connection:
        connection.execute(text("PRAGMA foreign_keys = ON"))
        connection.commit()
        command.downgrade(config(connection), "base")
        assert schema(connection) == {}


# Every table, those first that refer to others.
DROPPED = [table.name for table in reversed(metadata.sorted_tables)]


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
    execute(path, *(f"DROP TABLE {table}" for table in DROPPED), "DELETE FROM alembic_version")
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
        *(f"DROP TABLE {name}" for name in DROPPED if name != "identity"),
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


# Galleries of older versions

# One small gallery for each older schema, closed cleanly, without its model; `vector_of` gives its vectors.
# 0001: by the code of commit c9df638, which enrolled five faces, forgot face 4, enrolled 6 and 7, then 8.
DATA = Path(__file__).parent.parent / "data"

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["pytest", "retrieval.gallery.gallery", "alembic.command"])

# What the older version had, by id: identity, path.
OLD_FACES = {
    1: ("Kim", "/photos/kim/1.jpg"),
    2: ("Kim", "/photos/kim/2.jpg"),
    3: ("Adi", "/photos/adi/1.jpg"),
    5: (None, "/photos/unknown.jpg"),
    6: ("Zoë", None),
    7: ("Kim", "/photos/kim/1.jpg"),
    8: ("Adi", "/photos/adi/2.jpg"),
}


def old_sha256(number: int) -> str:
    return hashlib.sha256(f"photo {number}".encode()).hexdigest()


def vector_of(sha256: str) -> NDArray[np.float32]:
    return np.random.default_rng(int(sha256, 16)).standard_normal(2048).astype(np.float32)


def query(path: Path, statement: str) -> list[Any]:
    connection = sqlite3.connect(path)
    rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


@pytest.fixture
def old(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0001 whose model is the tests'."""
    folder = tmp_path / "old.gallery"
    shutil.copytree(DATA / "gallery-0001", folder)
    shutil.copytree(bundle.folder, folder / "model")
    execute(folder / "gallery.db", f"UPDATE gallery SET fingerprint = '{bundle.fingerprint}'")
    return folder


def old_rows(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0001."""
    tables = ("alembic_version", "gallery", "identity", "face", "segment")
    return {table: query(path, f"SELECT * FROM {table} ORDER BY 1") for table in tables}


def everything(folder: Path) -> dict[int, tuple[str | None, tuple[str, ...], str]]:
    with Gallery.open(folder) as gallery, gallery.vault.store.read() as reader:
        return {f.id: (f.identity, f.paths, f.sha256) for faces in reader.all_faces() for f in faces}


# Of two faces with one path the newer one keeps it; the older one keeps everything else.
UPGRADED = {
    number: (identity, () if path is None or number == 1 else (path,), old_sha256(number))
    for number, (identity, path) in OLD_FACES.items()
}


def test_an_older_gallery_is_brought_up_to_date_when_it_is_opened(old: Path) -> None:
    """Every face is there, with its identity, and its path unless a newer face has that."""
    assert everything(old) == UPGRADED
    assert query(old / "gallery.db", "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    with engine(old / "gallery.db").begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert everything(old) == UPGRADED


def test_the_faces_of_an_older_gallery_are_found(old: Path) -> None:
    """Its segments are IndexIDMap2; the newest faces merge with them."""
    assert {path.read_bytes()[:4] for path in (old / "vectors").iterdir()} == {b"IxM2"}
    with Gallery.open(old) as gallery:
        for number in OLD_FACES:
            first, *others = gallery.search_by_vector(vector_of(old_sha256(number)), 99)
            assert (first.face.id, first.distance, len(others)) == (number, 0.0, 6)
        digest = old_sha256(9)
        (outcome,) = gallery.enroll_vectors([NewFace("Kim", "/9.jpg", digest)], vector_of(digest)[None])
        assert (outcome.status, outcome.face_id) == (Status.ENROLLED, 9)
        gallery.compact()
        assert [path.read_bytes()[:4] for path in (old / "vectors").glob("*.faiss")] == [b"IxMp"]
        for number in (*OLD_FACES, 9):
            (first,) = gallery.search_by_vector(vector_of(old_sha256(number)), 1)
            assert (first.face.id, first.distance) == (number, 0.0)


def test_an_older_gallery_knows_itself_and_its_model(old: Path, bundle: ModelBundle) -> None:
    ((uuid, created_at),) = query(old / "gallery.db", "SELECT uuid, created_at FROM gallery")
    with Gallery.open(old) as gallery, gallery.vault.store.read() as reader:
        row = reader.gallery()
        assert (row.uuid, row.created_at) == (uuid, created_at)
        assert (row.next_face_id, row.next_segment_id, row.next_identity_id) == (9, 5, 5)
        assert (row.generation_id, row.next_generation_id, row.unfinished) == (1, 2, None)
        generation = Generation(1, bundle.fingerprint, 2048, "model", bundle.card_sha256(), created_at)
        assert reader.generations() == {1: generation}
        assert [(one.id, one.rows, one.generation_id) for one in reader.segments()] == [
            (2, 4, 1),
            (3, 2, 1),
            (4, 1, 1),
        ]
        assert (reader.receipts(), reader.audit_log()) == ([], [])


def test_the_ids_of_an_older_gallerys_people_are_not_used_again(old: Path) -> None:
    """Identity 4, the newest, is forgotten first; a tombstone of it must never hit somebody else."""
    with Gallery.open(old) as gallery:
        receipt = gallery.forget("Zoë")
        assert (receipt.face_ids, receipt.identity_ids) == ((6,), (4,))
        gallery.enroll_vectors([NewFace("Ida", None, old_sha256(9))], vector_of(old_sha256(9))[None])
    assert query(old / "gallery.db", "SELECT id FROM identity WHERE name = 'Ida'") == [(5,)]


def test_a_copy_of_an_older_database_is_taken_before_it_is_brought_up_to_date(old: Path) -> None:
    """The copy has exactly the rows that the database had, and is kept when the gallery is opened again."""
    before = old_rows(old / "gallery.db")
    Gallery.open(old).close()
    copy = old / "gallery-0001.db"
    assert old_rows(copy) == before
    assert query(copy, "PRAGMA integrity_check") == [("ok",)]
    data = copy.read_bytes()
    Gallery.open(old).close()
    assert copy.read_bytes() == data
    assert not list(old.glob("*.part*"))


def test_forgetting_somebody_removes_the_copy_that_has_the_name(old: Path) -> None:
    with Gallery.open(old) as gallery:
        assert (old / "gallery-0001.db").exists()
        assert "Zoë".encode() in (old / "gallery-0001.db").read_bytes()
        gallery.forget("Zoë")
        files = [path for path in old.rglob("*") if path.is_file()]
        assert [path.name for path in files if "Zoë".encode() in path.read_bytes()] == []
        assert not (old / "gallery-0001.db").exists()


def test_an_older_gallery_is_not_opened_for_reading_only_and_is_not_changed(old: Path) -> None:
    before = old_rows(old / "gallery.db")
    with pytest.raises(GalleryError) as caught:
        Gallery.open(old, read_only=True)
    assert str(caught.value) == (
        f"The gallery {old} was made by an older version of faceprint (schema 0001, this one knows "
        f"{SCHEMA_VERSION}); open it once for writing, with `faceprint compact`."
    )
    assert old_rows(old / "gallery.db") == before
    assert not (old / "gallery-0001.db").exists()


def test_an_older_gallery_that_somebody_writes_to_is_not_brought_up_to_date(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval.storage.vault, "LOCK_TIMEOUT", 0.05)
    before = old_rows(old / "gallery.db")
    with (
        lock.exclusive(old / "writer.lock", timeout=0),
        pytest.raises(GalleryBusy, match=f"^Process {os.getpid()} is writing to "),
    ):
        Gallery.open(old)
    assert old_rows(old / "gallery.db") == before


def open_together(folder: Path, start: Any, results: Any) -> None:
    """Opens a gallery as soon as everybody is there. Runs in a child."""
    start.wait()
    results.put(everything(folder))


def test_an_older_gallery_may_be_opened_by_several_processes_at_the_same_moment(old: Path) -> None:
    """One of them brings it up to date, the others wait; all of them see every face."""
    before = old_rows(old / "gallery.db")
    start, results = CHILDREN.Barrier(4), CHILDREN.Queue()
    children = [CHILDREN.Process(target=open_together, args=(old, start, results)) for _ in range(4)]
    for child in children:
        child.start()
    assert [results.get(timeout=600) for _ in children] == [UPGRADED] * 4
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert old_rows(old / "gallery-0001.db") == before


@pytest.mark.parametrize(
    "obstacle",
    [
        "CREATE TABLE audit (id INTEGER)",  # its last table
        "CREATE TABLE generation (id INTEGER)",  # its first
        "CREATE TABLE file (id INTEGER)",
    ],
)
def test_an_upgrade_that_fails_half_way_leaves_the_older_gallery(obstacle: str, old: Path) -> None:
    """When what was in the way is gone, opening it again succeeds."""
    path = old / "gallery.db"
    execute(path, obstacle)
    with engine(path).begin() as connection:
        tables = schema(connection)
    before = old_rows(path)
    with pytest.raises(StorageError, match=r"already (exists|a table named|another)"):
        Gallery.open(old)
    with engine(path).begin() as connection:
        assert schema(connection) == tables
    assert old_rows(path) == before
    execute(path, f"DROP TABLE {obstacle.split()[2]}")
    assert everything(old) == UPGRADED


def test_faces_survive_going_back_to_an_older_version_and_forth_again(old: Path) -> None:
    """What the older version has no place for is lost: further paths, aliases, logs."""
    with Gallery.open(old) as gallery:
        gallery.enroll_vectors(
            [NewFace("Kim", "/photos/kim/copy.jpg", old_sha256(7))], np.zeros((1, 2048), np.float32)
        )
        gallery.rename_identity("Adi", "Adriana")
    path = old / "gallery.db"
    downgrade(path, "0001")
    renamed = {
        number: ("Adriana" if identity == "Adi" else identity, () if number == 1 else (path,) if path else ())
        for number, (identity, path) in OLD_FACES.items()
    }
    names = "SELECT f.id, name, path FROM face f LEFT JOIN identity i ON i.id = identity_id ORDER BY f.id"
    assert {number: (name, (path,) if path else ()) for number, name, path in query(path, names)} == renamed
    assert query(path, "SELECT dimension, next_face_id, next_segment_id FROM gallery") == [(2048, 9, 5)]
    (old / "gallery-0001.db").unlink()
    (old / "gallery.sums").unlink()
    assert {n: (identity, paths) for n, (identity, paths, _) in everything(old).items()} == renamed
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(old) as gallery:
        for number in OLD_FACES:
            assert gallery.search_by_vector(vector_of(old_sha256(number)), 1)[0].face.id == number


TABLES_OF_0009 = {
    table.name for table in metadata.sorted_tables if not table.name.startswith(("merge_", "doubt"))
} - {"merge"}

# The columns that these tables had up to schema 0006, as far back as they go.
GALLERY_OF_0006 = (
    "id, uuid, created_at, next_face_id, next_segment_id, generation_id, revision, revision_check, "
    "next_identity_id, next_generation_id, unfinished, next_basis_id"
)
GENERATION_OF_0006 = "id, fingerprint, dimension, folder, card_sha256, created_at"

# The tables up to schema 0008, in which a photo is a face: as they are, and by the tables of a newer schema.
BEFORE_PHOTOS = {
    "face": "SELECT id, identity_id, sha256, enrolled_at{metadata} FROM face",
    "file": "SELECT * FROM file",
}
SINCE_PHOTOS = {
    "face": "SELECT f.id, identity_id, sha256, enrolled_at{metadata} FROM face f "
    "JOIN photo p ON p.id = photo_id",
    "file": "SELECT id, photo_id AS face_id, path, size, mtime_ns, inode FROM file",
}


def rows_before_photos(path: Path, tables: dict[str, str]) -> dict[str, list[Any]]:
    """The rows of some tables as a schema before 0009 has them, with the named columns of each, or all."""
    known = SINCE_PHOTOS if query(path, "SELECT 1 FROM sqlite_schema WHERE name = 'photo'") else BEFORE_PHOTOS
    has_metadata = query(path, "SELECT 1 FROM pragma_table_info('face') WHERE name = 'metadata'")
    views = {
        name: f"({view.format(metadata=', metadata' * bool(has_metadata))})" for name, view in known.items()
    }
    return {
        table: query(path, f"SELECT {names} FROM {views.get(table, table)} ORDER BY 1")
        for table, names in tables.items()
    }


# A gallery of schema 0002

# By the code of commit 52f4131, which enrolled faces 1 to 5, forgot face 4 with its person, enrolled 6 and 7,
# a copy of 1, renamed Adi to Adriana, merged Ana (face 7) into Kim, and enrolled 8 as Adi.
FACES_OF_0002 = {
    1: ("Kim", ("/photos/kim/1.jpg", "/photos/kim/copy.jpg")),
    2: ("Kim", ("/photos/kim/2.jpg",)),
    3: ("Adriana", ("/photos/adi/1.jpg",)),
    5: (None, ("/photos/unknown.jpg",)),
    6: ("Zoë", ()),
    7: ("Kim", ("/photos/ana/1.jpg",)),
    8: ("Adriana", ("/photos/adi/2.jpg",)),
}


def gallery_of(schema: str, bundle: ModelBundle, folder: Path) -> Path:
    """A copy of the gallery of an older schema, from 0002 on, whose model is the tests'."""
    copy = folder / f"{schema}.gallery"
    shutil.copytree(DATA / f"gallery-{schema}", copy)
    shutil.copytree(bundle.folder, copy / "model")
    known = f"fingerprint = '{bundle.fingerprint}', card_sha256 = '{bundle.card_sha256()}'"
    execute(copy / "gallery.db", f"UPDATE generation SET {known}")
    return copy


@pytest.fixture
def second(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0002 whose model is the tests'."""
    return gallery_of("0002", bundle, tmp_path)


def rows_of_0002(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0002, or of a newer one as far as that schema knows its columns."""
    tables = {
        "gallery": "id, uuid, created_at, next_face_id, next_segment_id, generation_id, revision, "
        "revision_check, next_identity_id, next_generation_id, unfinished",
        "generation": GENERATION_OF_0006,
        **dict.fromkeys(("alias", "merger", "segment"), "*"),
        "file": "id, face_id, path",
        **dict.fromkeys(("erasure", "tombstone", "audit"), "*"),
        "identity": "id, name",
        "face": "id, identity_id, sha256, enrolled_at",
    }
    return rows_before_photos(path, tables)


def test_a_gallery_of_schema_0002_keeps_every_row_and_nobody_has_metadata(second: Path) -> None:
    path = second / "gallery.db"
    before = rows_of_0002(path)
    found = everything(second)
    assert {number: (identity, paths) for number, (identity, paths, _) in found.items()} == FACES_OF_0002
    assert {sha256 for _, _, sha256 in found.values()} == {old_sha256(number) for number in FACES_OF_0002}
    assert rows_of_0002(path) == before == rows_of_0002(second / "gallery-0002.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    for table in ("face", "identity"):
        assert query(path, f"SELECT DISTINCT metadata FROM {table}") == [(None,)]
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(second) as gallery:
        for number in FACES_OF_0002:
            assert gallery.search_by_vector(vector_of(old_sha256(number)), 1)[0].face.id == number


def test_a_gallery_goes_back_to_schema_0002_and_loses_only_metadata(second: Path) -> None:
    path = second / "gallery.db"
    Gallery.open(second).close()
    before = rows_of_0002(path)
    execute(path, """UPDATE face SET metadata = '{"year":2020}'""")
    downgrade(path, "0002")
    assert rows_of_0002(path) == before
    assert query(path, "SELECT name FROM pragma_table_info('face') WHERE name = 'metadata'") == []
    (second / "gallery-0002.db").unlink()
    assert {number: faces[:2] for number, faces in everything(second).items()} == FACES_OF_0002


# A gallery of schema 0004

# By the code of commit ee8d185, which enrolled faces 1 to 4, a copy of 1, forgot face 4 with its person,
# enrolled 5 and 6, renamed Adi to Adriana, and learned that codes do not pay. Metadata: 1, 5 and Kim.
FACES_OF_0004 = {
    1: ("Kim", ("/photos/kim/1.jpg", "/photos/kim/copy.jpg")),
    2: ("Kim", ("/photos/kim/2.jpg",)),
    3: ("Adriana", ("/photos/adi/1.jpg",)),
    5: (None, ("/photos/unknown.jpg",)),
    6: ("Zoë", ()),
}


@pytest.fixture
def fourth(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0004 whose model is the tests'."""
    return gallery_of("0004", bundle, tmp_path)


def rows_of_0004(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0004, or of a newer one as far as that schema knows its columns."""
    tables = dict.fromkeys(TABLES_OF_0009 - {"photo"}, "*")
    tables |= {"file": "id, face_id, path", "gallery": GALLERY_OF_0006, "generation": GENERATION_OF_0006}
    del tables["calibration"], tables["host"], tables["suspect"]
    return rows_before_photos(path, tables)


def test_a_gallery_of_schema_0004_keeps_every_row_and_no_file_is_taken_for_unchanged(fourth: Path) -> None:
    path = fourth / "gallery.db"
    before = rows_of_0004(path)
    found = everything(fourth)
    assert {number: (identity, paths) for number, (identity, paths, _) in found.items()} == FACES_OF_0004
    assert rows_of_0004(path) == before == rows_of_0004(fourth / "gallery-0004.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    assert query(path, "SELECT DISTINCT size, mtime_ns, inode FROM file") == [(None, None, None)]
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(fourth) as gallery:
        for number in FACES_OF_0004:
            assert gallery.search_by_vector(vector_of(old_sha256(number)), 1)[0].face.id == number
        assert gallery.recognize([Photo(p, None) for _, paths in FACES_OF_0004.values() for p in paths]) == (
            [None] * 5
        )


def test_a_gallery_goes_back_to_schema_0004_and_loses_only_stamps(fourth: Path) -> None:
    path = fourth / "gallery.db"
    Gallery.open(fourth).close()
    before = rows_of_0004(path)
    execute(path, "UPDATE file SET size = 1, mtime_ns = 2, inode = 3")
    downgrade(path, "0004")
    assert rows_of_0004(path) == before
    assert query(path, "SELECT * FROM file LIMIT 1") == [(1, 1, "/photos/kim/1.jpg")]
    (fourth / "gallery-0004.db").unlink()
    assert {number: faces[:2] for number, faces in everything(fourth).items()} == FACES_OF_0004


# A gallery of schema 0005

# By the code of commit 384b2bb, which did what made the one of schema 0004, with stamps of the files.
FACES_OF_0005 = FACES_OF_0004


@pytest.fixture
def fifth(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0005 whose model is the tests'."""
    return gallery_of("0005", bundle, tmp_path)


def rows_of_0005(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0005, or of a newer one as far as that schema knows its tables."""
    return rows_of_0006(path, without="calibration")


def test_a_gallery_of_schema_0005_keeps_every_row_and_decides_nothing(fifth: Path) -> None:
    path = fifth / "gallery.db"
    before = rows_of_0005(path)
    assert len(before["file"]) == 5
    assert [row[3:] for row in before["file"]].count((None, None, None)) == 1
    found = everything(fifth)
    assert {number: (identity, paths) for number, (identity, paths, _) in found.items()} == FACES_OF_0005
    assert rows_of_0005(path) == before == rows_of_0005(fifth / "gallery-0005.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    assert query(path, "SELECT * FROM calibration") == []
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(fifth) as gallery:
        assert gallery.calibration() is None
        for number in FACES_OF_0005:
            matches = gallery.search_by_vector(vector_of(old_sha256(number)), 1)
            assert (matches[0].face.id, matches.decision) == (number, None)


def test_a_gallery_goes_back_to_schema_0005_and_loses_only_its_calibration(fifth: Path) -> None:
    """Also while it has one, and the way forth again."""
    path = fifth / "gallery.db"
    with Gallery.open(fifth) as gallery:
        gallery.calibrate(0.5)
        assert gallery.search_by_vector(vector_of(old_sha256(1)), 1).decision is not None
    before = rows_of_0005(path)
    downgrade(path, "0005")
    assert rows_of_0005(path) == before
    assert query(path, "SELECT name FROM sqlite_schema WHERE name = 'calibration'") == []
    (fifth / "gallery-0005.db").unlink()
    assert {number: faces[:2] for number, faces in everything(fifth).items()} == FACES_OF_0005


# A gallery of schema 0006

# By the code of commit d2015e2, which did what made the one of schema 0005 (metadata: 1, 5), and calibrated.
FACES_OF_0006 = FACES_OF_0005


@pytest.fixture
def sixth(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0006 whose model is the tests'."""
    return gallery_of("0006", bundle, tmp_path)


def rows_of_0006(path: Path, without: str = "") -> dict[str, list[Any]]:
    """Every row of a database of schema 0006, or of a newer one as far as that schema knows its columns."""
    tables = dict.fromkeys(TABLES_OF_0009 - {"host", "suspect", "photo", without}, "*")
    tables |= {"gallery": GALLERY_OF_0006, "generation": GENERATION_OF_0006}
    return rows_before_photos(path, tables)


def test_a_gallery_of_schema_0006_keeps_every_row_and_no_host_is_known(sixth: Path) -> None:
    path = sixth / "gallery.db"
    before = rows_of_0006(path)
    found = everything(sixth)
    assert {number: (identity, paths) for number, (identity, paths, _) in found.items()} == FACES_OF_0006
    assert rows_of_0006(path) == before == rows_of_0006(sixth / "gallery-0006.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    assert query(path, "SELECT * FROM host") == []
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(sixth) as gallery:
        assert gallery.calibration() is not None
        for number in FACES_OF_0006:
            assert gallery.search_by_vector(vector_of(old_sha256(number)), 1)[0].face.id == number


def test_a_gallery_goes_back_to_schema_0006_and_loses_only_its_hosts(sixth: Path) -> None:
    """Also while it has some, and the way forth again."""
    path = sixth / "gallery.db"
    Gallery.open(sixth).close()
    before = rows_of_0006(path)
    execute(
        path, "INSERT INTO host VALUES ('https://example.org')", "UPDATE generation SET checked_before = 3"
    )
    downgrade(path, "0006")
    assert rows_of_0006(path) == before
    assert query(path, "SELECT name FROM sqlite_schema WHERE name = 'host'") == []
    (sixth / "gallery-0006.db").unlink()
    assert {number: faces[:2] for number, faces in everything(sixth).items()} == FACES_OF_0006


# A gallery of schema 0007

# By the code of commit 6c4fe64, which opened the one of schema 0006 and wrote a host and how far its model is
# proven.
FACES_OF_0007 = FACES_OF_0006


@pytest.fixture
def seventh(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0007 whose model is the tests'."""
    folder = tmp_path / "seventh.gallery"
    shutil.copytree(DATA / "gallery-0007", folder)
    shutil.copytree(bundle.folder, folder / "model")
    execute(
        folder / "gallery.db",
        f"UPDATE generation SET fingerprint = '{bundle.fingerprint}', card_sha256 = '{bundle.card_sha256()}'",
    )
    return folder


def rows_of_0007(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0007, or of a newer one as far as that schema knows its tables."""
    return rows_before_photos(path, dict.fromkeys(TABLES_OF_0009 - {"suspect", "photo"}, "*"))


def test_a_gallery_of_schema_0007_keeps_every_row_and_has_no_suspects(seventh: Path) -> None:
    path = seventh / "gallery.db"
    before = rows_of_0007(path)
    assert before["host"] == [("https://example.org",)]
    found = everything(seventh)
    assert {number: (identity, paths) for number, (identity, paths, _) in found.items()} == FACES_OF_0007
    assert rows_of_0007(path) == before == rows_of_0007(seventh / "gallery-0007.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    assert query(path, "SELECT checked_before FROM generation") == [(3,)]
    assert query(path, "SELECT * FROM suspect") == []
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_gallery_with_suspects_goes_back_to_schema_0007_with_a_model_that_is_not_proven(
    seventh: Path,
) -> None:
    """One without keeps what is proven."""
    path = seventh / "gallery.db"
    Gallery.open(seventh).close()

    def downgraded() -> list[Any]:
        with engine(path).connect() as connection:
            connection.execute(text("PRAGMA foreign_keys = ON"))
            connection.commit()
            command.downgrade(config(connection), "0007")
            connection.commit()
            proven = query(path, "SELECT checked_before FROM generation")
            command.upgrade(config(connection), "0008")
            connection.commit()
        return proven

    assert downgraded() == [(3,)]
    execute(path, "INSERT INTO suspect VALUES (1, 1, 2)")
    assert downgraded() == [(None,)]
    assert {number: faces[:2] for number, faces in everything(seventh).items()} == FACES_OF_0007


# A gallery of schema 0008

# By the code of commit d1bb841, which opened the one of schema 0007, made faces 3 to 5 suspects, and added a
# path of face 6.
FACES_OF_0008 = {**FACES_OF_0007, 6: ("Zoë", ("/photos/zoe/1.jpg",))}


@pytest.fixture
def eighth(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0008 whose model is the tests'."""
    return gallery_of("0008", bundle, tmp_path)


def rows_of_0008(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0008, or of a newer one as far as that schema knows its tables."""
    return rows_before_photos(path, dict.fromkeys(TABLES_OF_0009 - {"photo"}, "*"))


def test_a_gallery_of_schema_0008_keeps_every_row_and_each_photo_has_one_face(eighth: Path) -> None:
    path = eighth / "gallery.db"
    before = rows_of_0008(path)
    assert before["suspect"] == [(1, 3, 6)]
    found = everything(eighth)
    assert {number: faces[:2] for number, faces in found.items()} == FACES_OF_0008
    assert rows_of_0008(path) == before == rows_of_0008(eighth / "gallery-0008.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    assert query(path, "SELECT id, sha256 FROM photo") == [(n, old_sha256(n)) for n in FACES_OF_0008]
    places = "SELECT DISTINCT id = photo_id, box, landmarks, score, sharpness, yaw FROM face"
    assert query(path, places) == [(1, "", None, None, None, None)]
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(eighth) as gallery:
        with gallery.vault.store.read() as reader:
            assert {face.region for face in reader.faces(FACES_OF_0008).values()} == {None}
        for number in FACES_OF_0008:
            assert gallery.search_by_vector(vector_of(old_sha256(number)), 1)[0].face.id == number


def test_a_gallery_goes_back_to_schema_0008_and_loses_only_further_faces_of_photos(eighth: Path) -> None:
    """Also the first face of a photo, if it was forgotten: the next one has the photo's files then."""
    path = eighth / "gallery.db"
    Gallery.open(eighth).close()
    before = rows_of_0008(path)
    execute(
        path,
        "INSERT INTO face SELECT 7, NULL, enrolled_at, NULL, 1, '[1.0, 2.0, 3.0, 4.0]', '[]', 1, 1, 0 "
        "FROM face WHERE id = 1",
        "UPDATE face SET id = 8 WHERE id = 6",
    )
    downgrade(path, "0008")
    before["face"] = [(8 if row[0] == 6 else row[0], *row[1:]) for row in before["face"]]
    before["file"] = [(row[0], 8 if row[1] == 6 else row[1], *row[2:]) for row in before["file"]]
    assert rows_of_0008(path) == before
    assert query(path, "SELECT name FROM sqlite_schema WHERE name = 'photo'") == []


# A gallery of schema 0009

# By the code of commit 253b683, which opened the one of schema 0008, enrolled a photo of three people, forgot
# the second of them, and merged Zoë into Kim.
FACES_OF_0009 = {
    **FACES_OF_0008,
    6: ("Kim", ("/photos/zoe/1.jpg",)),
    7: (None, ("/photos/group.jpg",)),
    9: (None, ("/photos/group.jpg",)),
}


@pytest.fixture
def ninth(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0009 whose model is the tests'."""
    return gallery_of("0009", bundle, tmp_path)


def rows_of_0009(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0009, or of a newer one as far as that schema knows its columns."""
    return rows_since_photos(path, TABLES_OF_0009)


def rows_since_photos(path: Path, tables: Iterable[str]) -> dict[str, list[Any]]:
    """The rows of some tables as a schema before 0011 has them, in which photos have no keys."""
    columns = {**dict.fromkeys(tables, "*"), "photo": "id, sha256, closed"}
    return {table: query(path, f"SELECT {columns[table]} FROM {table} ORDER BY 1") for table in tables}


def test_a_gallery_of_schema_0009_keeps_every_row_and_its_mergers_stay(ninth: Path) -> None:
    """What it would take to undo them was not kept then."""
    path = ninth / "gallery.db"
    before = rows_of_0009(path)
    assert before["merger"] == [(4, 3)]
    with Gallery.open(ninth) as gallery:
        assert gallery.merges() == []
        with pytest.raises(InputError, match="no merge that can be undone"):
            gallery.undo_merge()
    assert {number: faces[:2] for number, faces in everything(ninth).items()} == FACES_OF_0009
    assert rows_of_0009(path) == before == rows_of_0009(ninth / "gallery-0009.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_gallery_goes_back_to_schema_0009_and_only_undoes_no_earlier_merge(ninth: Path) -> None:
    path = ninth / "gallery.db"
    with Gallery.open(ninth) as gallery:
        gallery.merge_identities("Adriana", "Kim")
        assert [merge.name for merge in gallery.merges()] == ["Adriana"]
    before = rows_of_0009(path)
    downgrade(path, "0009")
    assert rows_of_0009(path) == before
    with Gallery.open(ninth) as gallery:
        assert gallery.merges() == []
    assert rows_of_0009(path) == before


# A gallery of schema 0010

# By the code of commit 3f697b1, which opened the one of schema 0009, merged Adriana into Kim, and enrolled a
# photo of Ida.
FACES_OF_0010 = {
    **FACES_OF_0009,
    3: ("Kim", ("/photos/adi/1.jpg",)),
    10: ("Ida", ("/photos/ida/1.jpg",)),
}
PHOTOS = "SELECT id, sha256, sha256_key FROM photo ORDER BY id"


@pytest.fixture
def tenth(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A gallery of schema 0010 whose model is the tests'."""
    return gallery_of("0010", bundle, tmp_path)


def rows_of_0010(path: Path) -> dict[str, list[Any]]:
    """Every row of a database of schema 0010, or of a newer one as far as that schema knows its columns."""
    return rows_since_photos(path, DROPPED)


def test_a_gallery_of_schema_0010_keeps_every_row_and_each_photo_has_its_key(tenth: Path) -> None:
    path = tenth / "gallery.db"
    before = rows_of_0010(path)
    found = everything(tenth)
    assert {number: faces[:2] for number, faces in found.items()} == FACES_OF_0010
    assert rows_of_0010(path) == before == rows_of_0010(tenth / "gallery-0010.db")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA_VERSION,)]
    assert all(key == key_of(number, sha256) for number, sha256, key in query(path, PHOTOS))
    assert query(path, "PRAGMA foreign_key_check") == []
    with engine(path).begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    with Gallery.open(tenth) as gallery:
        with gallery.vault.store.read() as reader:
            digests = {sha256 for _, _, sha256 in found.values()}
            assert reader.photos_by_sha256(digests).keys() == digests
        for number in (*FACES_OF_0008, 10):
            assert gallery.search_by_vector(vector_of(found[number][2]), 1)[0].face.id == number
        gallery.undo_merge()
    assert everything(tenth)[3][:2] == ("Adriana", ("/photos/adi/1.jpg",))
    assert {finding.trouble for finding in verify(tenth).findings} == {Trouble.SUSPECT_VECTOR}


def test_a_gallery_goes_back_to_schema_0010_and_forth_and_loses_nothing(tenth: Path) -> None:
    """With enforced foreign keys: faces and files refer to the table that is made anew."""
    path = tenth / "gallery.db"
    Gallery.open(tenth).close()
    before, photos = rows_of_0010(path), query(path, PHOTOS)
    downgrade(path, "0010")
    assert rows_of_0010(path) == before
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: photo\.sha256"):
        execute(path, "INSERT INTO photo SELECT 99, sha256, 0 FROM photo WHERE id = 1")
    Gallery.open(tenth).close()
    assert rows_of_0010(path) == before
    assert query(path, PHOTOS) == photos


def test_keys_of_a_migration_are_those_of_new_photos(tenth: Path) -> None:
    """Also of a text that is no SHA-256, which a damaged database may have."""
    path = tenth / "gallery.db"
    texts = ["f" * 64, "", "not hexadecimal", "-fffffff", "FFFFFFFF0", "0x1234567", "1_2_3_4_"]
    ids = [11, 2**19 - 1, 2**19, 3 * 2**19 + 5, 2**45, 2**62, 2**63 - 1]
    execute(path, *(f"INSERT INTO photo VALUES ({n}, '{one}', 0)" for n, one in zip(ids, texts, strict=True)))
    Store.open(path).close()
    assert [row[:2] for row in query(path, PHOTOS)][-7:] == list(zip(ids, texts, strict=True))
    assert all(key == key_of(number, sha256) for number, sha256, key in query(path, PHOTOS))


def test_an_older_gallery_whose_face_refers_to_no_photo_is_still_damaged_when_it_is_up_to_date(
    tenth: Path,
) -> None:
    """The migration neither fails, which would leave no way to repair it, nor hides the damage."""
    path = tenth / "gallery.db"
    execute(path, "DELETE FROM photo WHERE id = 2")
    before = rows_of_0010(path)
    Store.open(path).close()
    assert rows_of_0010(path) == before
    assert sorted(row[0] for row in query(path, "PRAGMA foreign_key_check")) == ["face", "file"]
    lines = {finding.detail for finding in verify(tenth).findings}
    assert {"a row of face refers to nothing", "a row of file refers to nothing"} <= lines


def test_an_older_gallery_with_a_sha256_that_is_no_text_is_brought_up_to_date(tenth: Path) -> None:
    """Only a damaged one has such; its other photos are found."""
    path = tenth / "gallery.db"
    digests = [row[0] for row in query(path, "SELECT sha256 FROM photo WHERE id NOT IN (2, 3) ORDER BY id")]
    execute(
        path,
        "UPDATE photo SET sha256 = CAST(x'ff41' AS TEXT) WHERE id = 2",
        "UPDATE photo SET sha256 = x'3132333435363738ff' WHERE id = 3",
    )
    store = Store.open(path)
    with store.read() as reader:
        assert reader.photo_ids_by_sha256(digests).keys() == set(digests)
    store.close()
    assert query(path, "SELECT id, hex(sha256) FROM photo WHERE sha256_key = 0") == [
        (2, "FF41"),
        (3, "3132333435363738FF"),
    ]
    assert [finding.trouble for finding in verify(tenth).findings] == [Trouble.DATABASE_DAMAGED]


@pytest.mark.parametrize("name", ["gallery-0007.db", "gallery-0007.part", "gallery-0007.part-journal"])
def test_what_is_in_the_way_of_the_copy_is_named_and_is_no_damage(name: str, seventh: Path) -> None:
    """A folder with files in it, which may be somebody's; an empty one, or a pipe, makes room."""
    (seventh / name).mkdir()
    (seventh / name / "theirs").touch()
    before = (seventh / "gallery.db").read_bytes()
    for act in (Gallery.open, verify, repair):
        with pytest.raises(StorageError) as caught:
            act(seventh)
        assert str(caught.value) == (
            f"{seventh / 'gallery.db'} has to be brought up to date and cannot be copied to {seventh / name} "
            "before: it is a folder with files in it, which has to be moved away."
        )
    assert (seventh / "gallery.db").read_bytes() == before
    (seventh / name / "theirs").unlink()
    Gallery.open(seventh).close()
    assert (seventh / "gallery-0007.db").is_file()
