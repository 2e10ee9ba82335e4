"""A store in PostgreSQL and its server: killed processes, refused connections, changed tables."""

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import event, inspect

from retrieval.database.engines.postgresql import Postgresql
from retrieval.database.migrations import SCHEMA_VERSION, migrate, migrations_folder
from retrieval.database.store import Store
from retrieval.database.writer import Writer
from retrieval.errors import (
    FaceprintError,
    GalleryBusy,
    GalleryDamaged,
    GalleryError,
    InputError,
    ServerUnavailable,
    StorageError,
)
from tests.database.test_store import add, everything, new
from tests.engines.postgresql_server import PostgresqlServer, programs


def create(address: str) -> Store:
    return Store.create_at(address, fingerprint="f" * 64, dimension=8)


def schema_of(address: str) -> str:
    return address.rpartition("schema=")[2]


def refusal(work: Callable[[], object]) -> FaceprintError:
    """The error of some work, which is one sentence without the password."""
    with pytest.raises(FaceprintError) as caught:
        work()
    message = str(caught.value)
    assert "secret-word" not in message
    assert "\n" not in message
    assert message.endswith(".")
    return caught.value


# Addresses


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("postgresql://u:secret-word@h", InputError, "postgresql://u@h names no database"),
        ("mysql://u:secret-word@h/d", InputError, "mysql://u@h/d is no address of PostgreSQL"),
        ("postgres:/u:secret-word@h/d", InputError, "This is no address of a PostgreSQL database"),
        ("postgresql://u:secret@word@h/d", InputError, "postgresql://u@h/d has an @ as it is; write %40"),
        ("postgresql://u:secret-word@h/d?schema=", InputError, "cannot be chosen so"),
        (
            "postgresql://u:secret-word@127.0.0.1:1/d?shema=a",
            InputError,
            'invalid connection option "shema"; correct',
        ),
        ("postgres://u:secret-word@127.0.0.1:1/d", ServerUnavailable, "Connection refused"),
        ("POSTGRESQL://u:secret-word@127.0.0.1:1/d", ServerUnavailable, "Connection refused"),
        ("postgresql+asyncpg://u:secret-word@h/d", InputError, "is no address of PostgreSQL"),
        ("postgresql://u:secret-word@h:port/d", InputError, "This is no address of a PostgreSQL database"),
        ("postgresql://u:secret-word@h/d?schema=A b", InputError, "d?schema=A b cannot be chosen so"),
        ("postgresql://u@h/d?schema=a&options=-cx=1", InputError, "cannot be chosen so"),
        ("postgresql://u:secret-word@127.0.0.1:1/d", ServerUnavailable, "Connection refused"),
        ("postgresql://u:secret-word@host.invalid/d?password=secret-word", ServerUnavailable, "host.invalid"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_sentence(
    address: str, kind: type[Exception], said: str, postgresql_server: PostgresqlServer
) -> None:
    for work in (lambda: Store.open_at(address), lambda: create(address)):
        error = refusal(work)
        assert type(error) is kind
        assert said in str(error)


def test_what_is_not_there_is_one_sentence(postgresql_server: PostgresqlServer, schema_address: str) -> None:
    absent = postgresql_server.address(schema="absent")
    assert "There is no gallery in" in str(refusal(lambda: Store.open_at(schema_address)))
    assert "There is no gallery in" in str(refusal(lambda: Store.open_at(absent)))
    assert "CREATE SCHEMA" in str(refusal(lambda: create(absent)))
    assert '"nothing" does not exist' in str(
        refusal(lambda: create(postgresql_server.address("nothing", schema="s")))
    )


def test_a_database_that_cannot_hold_every_name_is_refused(postgresql_server: PostgresqlServer) -> None:
    postgresql_server.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    error = refusal(lambda: create(postgresql_server.address("latin")))
    assert "stores texts as LATIN1" in str(error)
    assert "ENCODING 'UTF8'" in str(error)


def test_a_schema_gets_one_gallery_however_many_create_it_at_once(schema_address: str) -> None:
    made: list[Store] = []
    refused: list[FaceprintError] = []

    def work() -> None:
        try:
            made.append(create(schema_address))
        except FaceprintError as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert [type(one) for one in refused] == [GalleryError] * 3
    assert all("There is a gallery in" in str(one) for one in refused)
    [store] = made
    with closing(store):
        assert store.problems() == []


def test_a_folder_needs_neither_psycopg_nor_pymilvus() -> None:
    """Opening and searching a gallery in a folder imports nothing of other engines."""
    code = (
        "import sys, retrieval, retrieval.gallery.gallery, retrieval.database.store, retrieval.cli.app\n"
        "others = ('psycopg', 'pymilvus', 'engines.postgresql')\n"
        "print([name for name in sys.modules if any(one in name for one in others)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Rows that the server has not counted yet


def test_the_check_of_photos_looks_at_few_rows_for_each_photo_of_a_new_gallery(
    schema_address: str,
) -> None:
    """PostgreSQL counts the rows of a table a minute after they came; until then it guesses."""
    asked: list[tuple[str, Any]] = []
    with closing(create(schema_address)) as store:
        add(store, *(new(None, number) for number in range(20_000)))
        assert isinstance(store.engine, Postgresql)
        event.listen(
            store.engine.sql,
            "before_cursor_execute",
            lambda connection, cursor, statement, values, *_: asked.append((statement, values)),
        )
        with store.read() as reader:
            assert reader.row_problems() == []
        [(statement, values)] = [one for one in asked if "FROM photo" in one[0] and "EXISTS" in one[0]]
        with store.engine.reading() as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN {statement}", values).scalars().all()
    assert not [line for line in plan if "Scan using pk_face" in line], plan


def test_the_rows_of_a_gallery_are_counted_when_it_is_made(
    postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    def fill(writer: Writer) -> None:
        writer.add_faces(1, [new("Kim", number) for number in range(30)])

    Store.create_at(schema_address, fingerprint="f" * 64, dimension=8, fill=fill).close()
    [(rows,)] = postgresql_server.execute(
        f"SELECT reltuples FROM pg_class WHERE oid = '{schema_of(schema_address)}.face'::regclass"
    )
    assert rows == 30


# Writers


def test_a_writer_that_does_not_end_is_named(schema_address: str) -> None:
    with (
        closing(create(schema_address)) as store,
        closing(Store.open_at(schema_address, timeout=0.05)) as other,
    ):
        with store.write() as writer:
            writer.add_faces(1, [new("Kim", 1)])
            assert type(refusal(lambda: add(other, new("Adi", 2)))) is GalleryBusy
        assert add(other, new("Adi", 2)) == [2]
        assert list(everything(store)[2]) == [1, 2]


def test_galleries_beside_each_other_do_not_wait_for_each_other(
    postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    postgresql_server.execute(f"CREATE SCHEMA {schema_of(schema_address)}_b")
    beside = f"{schema_address}_b"
    with closing(create(schema_address)) as store, closing(create(beside)) as other:
        with store.write(), closing(Store.open_at(beside, timeout=0.05)) as quick:
            assert add(quick, new("Adi", 2)) == [1]
        assert everything(store)[2] == {}
        assert list(everything(other)[2]) == [1]


CHILD = """
import os, sys
from retrieval.database.records import NewFace
from retrieval.database.store import Store
from retrieval.database.writer import Writer
store = Store.open_at(sys.argv[1])
with store.write() as writer:
    writer.add_faces(2, [NewFace("Adi", "/adi.jpg", "a" * 64)])
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_neither_rows_nor_a_lock(schema_address: str) -> None:
    with closing(create(schema_address)) as store:
        add(store, new("Kim", 1))
        before = everything(store)
        command = [sys.executable, "-c", CHILD, schema_address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"written\n"
            assert everything(store) == before
            child.kill()
        assert add(store, new("Ida", 3)) == [2]
        assert [face.identity for face in everything(store)[2].values()] == ["Kim", "Ida"]


def test_a_store_that_is_opened_for_reading_refuses_to_write(schema_address: str) -> None:
    create(schema_address).close()
    with closing(Store.open_at(schema_address, read_only=True)) as store:
        error = refusal(lambda: add(store, new("Kim", 1)))
        assert type(error) is InputError
        assert everything(store)[2] == {}


def test_a_user_who_may_only_read_reads_and_is_told_when_writing(
    postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    name = schema_of(schema_address)
    with closing(create(schema_address)) as store:
        add(store, new("Kim", 1))
    postgresql_server.execute(
        f"CREATE ROLE reader_{name} LOGIN",
        f"GRANT USAGE ON SCHEMA {name} TO reader_{name}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {name} TO reader_{name}",
    )
    address = postgresql_server.address(schema=name, user=f"reader_{name}")
    with closing(Store.open_at(address)) as store:
        assert list(everything(store)[2]) == [1]
        assert store.problems() == []
        error = refusal(lambda: add(store, new("Adi", 2)))
        assert type(error) is StorageError
        assert "permission denied for table" in str(error)


def test_a_text_that_no_index_takes_is_refused_and_nothing_is_stored(schema_address: str) -> None:
    """PostgreSQL's indexes hold texts of at most 2,704 bytes, after compression."""
    rng = random.Random(0)
    long = "/" + "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(1365))
    with closing(create(schema_address)) as store:

        def work() -> None:
            with store.write() as writer:
                writer.add_faces(1, [new("Kim", 1)])
                writer.add_files([(long, 1)])

        error = refusal(work)
        assert type(error) is InputError
        assert "shorten it" in str(error)
        assert everything(store)[2] == {}
        assert type(refusal(lambda: add(store, new("a\0b", 1)))) is InputError


# The server


@pytest.fixture
def own_server(postgresql_server: PostgresqlServer) -> Iterator[PostgresqlServer]:
    """A server that the test may kill."""
    found = programs()
    assert found is not None
    server = PostgresqlServer(found)
    server.start()
    yield server
    server.close()


def test_a_server_that_was_killed_has_all_that_was_committed(own_server: PostgresqlServer) -> None:
    """Even where its default is not to wait for the disk; a store goes on with the server that follows."""
    own_server.execute("ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")
    address = own_server.address()
    with closing(create(address)) as store:
        for number in range(1, 30):
            add(store, new(f"person {number}", number))
        before = everything(store)

        def work() -> None:
            with store.write() as writer:
                writer.add_faces(30, [new("Adi", 30)])
                own_server.kill()

        assert type(refusal(work)) is ServerUnavailable
        assert type(refusal(lambda: everything(store))) is ServerUnavailable
        own_server.start()
        assert everything(store) == before
        assert add(store, new("Adi", 30)) == [30]
        assert store.problems() == []


def test_a_commit_waits_for_the_disk_whatever_the_default(
    postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    create(schema_address).close()
    for default, expected in (("off", "on"), ("remote_apply", "remote_apply")):
        postgresql_server.execute(f"ALTER ROLE faceprint SET synchronous_commit = {default}")
        with closing(Postgresql(schema_address)) as engine, engine.writing() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == expected
    postgresql_server.execute("ALTER ROLE faceprint RESET synchronous_commit")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("ALTER TABLE face ADD COLUMN age INTEGER", "'face' does not have exactly the columns"),
        ("ALTER TABLE face DROP COLUMN yaw", "'face' does not have exactly the columns"),
        ("ALTER TABLE face ALTER COLUMN yaw SET DEFAULT 1", "'face' does not have exactly the columns"),
        ("ALTER TABLE photo DROP CONSTRAINT uq_photo_sha256", "'photo' does not have exactly the columns"),
        ("ALTER TABLE photo ADD CHECK (closed < 2)", "'photo' does not have exactly the columns"),
        ('ALTER TABLE identity ALTER COLUMN name TYPE text COLLATE "POSIX"', "'identity' does not have"),
        ("ALTER TABLE audit SET UNLOGGED", "'audit' is unlogged"),
        ("ALTER TABLE face ENABLE ROW LEVEL SECURITY", "'face' has row security"),
        ("CREATE RULE r AS ON DELETE TO face DO INSTEAD NOTHING", "'face' has a rule"),
        (
            "CREATE TRIGGER t BEFORE DELETE ON face EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "'face' has a trigger",
        ),
        ("CREATE TABLE more () INHERITS (face)", "'face' inherits"),
        ("DROP INDEX ix_face_identity_id", "'face' has lost its index 'ix_face_identity_id'"),
        ("DROP TABLE host", "'host' is missing"),
        ("ALTER TABLE host RENAME TO host_2; CREATE VIEW host AS SELECT * FROM host_2", "'host' is no plain"),
    ],
)
def test_tables_that_someone_changed_are_found(
    statement: str, said: str, postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    with closing(create(schema_address)) as store:
        postgresql_server.execute(f"SET search_path = {schema_of(schema_address)}; {statement}")
        assert any(said in one for one in store.problems())
        error = refusal(lambda: Store.open_at(schema_address))
        assert type(error) is GalleryDamaged
        assert said in str(error)


def test_tables_and_indexes_of_others_beside_them_are_left_alone(
    postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    with closing(create(schema_address)) as store:
        postgresql_server.execute(
            f"SET search_path = {schema_of(schema_address)}; CREATE TABLE mine (x int); "
            "CREATE INDEX more ON face (enrolled_at)"
        )
        assert store.problems() == []
    Store.open_at(schema_address).close()


def test_a_servers_setting_that_loses_commits_is_a_problem(own_server: PostgresqlServer) -> None:
    own_server.execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
    with closing(create(own_server.address())) as store:
        assert store.problems() == [
            "the server runs with fsync off, so a power cut may damage what was committed"
        ]


# Versions


@pytest.mark.parametrize(
    ("version", "kind", "said"),
    [
        ("9999", GalleryError, "upgrade faceprint to open it"),
        ("0009", GalleryDamaged, "no gallery in PostgreSQL ever had it"),
    ],
)
def test_another_version_is_refused(
    version: str, kind: type[Exception], said: str, postgresql_server: PostgresqlServer, schema_address: str
) -> None:
    create(schema_address).close()
    name = schema_of(schema_address)
    postgresql_server.execute(f"UPDATE {name}.alembic_version SET version_num = '{version}'")
    error = refusal(lambda: Store.open_at(schema_address))
    assert type(error) is kind
    assert said in str(error)


def test_a_gallery_of_schema_0010_is_brought_up_to_date_and_its_photos_are_found(
    schema_address: str, tmp_path: Path
) -> None:
    """In PostgreSQL a photo is found by its SHA-256, which has a unique index."""
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    faces = [new("Kim", number) for number in range(1, 9)]
    with closing(create(schema_address)) as store:
        add(store, *faces)
        before = everything(store)[2]
        with store.engine.writing() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "0010")
            names = [column["name"] for column in inspect(connection).get_columns("photo")]
            assert names == ["id", "sha256", "closed"]
    error = refusal(lambda: Store.open_at(schema_address, read_only=True))
    assert f"schema 0010, this one knows {SCHEMA_VERSION}" in str(error)
    with closing(Store.open_at(schema_address)) as store:
        assert store.problems() == []
        assert everything(store)[2] == before
        with store.read() as reader:
            assert reader.row_problems() == []
            photos = reader.photos_by_sha256([*(face.sha256 for face in faces), "0" * 64])
            assert {digest: photo.id for digest, photo in photos.items()} == {
                face.sha256: number for number, face in before.items()
            }
        with pytest.raises(GalleryDamaged, match="would be stored a second time"):
            add(store, faces[0])


SCRIPT = """
import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("face", sa.Column("later", sa.Integer(), nullable=True))
"""


def test_alembics_scripts_run_in_the_schema_of_the_address(schema_address: str, tmp_path: Path) -> None:
    """With one more script than there is yet, in one transaction, which a failure undoes."""
    assert SCHEMA_VERSION == "0011", "give SCRIPT the next number"
    folder = tmp_path / "migrations"
    shutil.copytree(migrations_folder(), folder)
    (folder / "versions" / "0012_later.py").write_text(SCRIPT)
    with closing(create(schema_address)) as store:
        add(store, new("Kim", 1))

        def interrupted() -> None:
            with store.engine.writing() as connection:
                migrate(connection, folder)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(everything(store)[2]) == [1]
        with store.engine.writing() as connection:
            migrate(connection, folder)
            names = [column["name"] for column in inspect(connection).get_columns("face")]
            assert names[-1] == "later"
    error = refusal(lambda: Store.open_at(schema_address))
    assert "schema 0012, this one knows 0011" in str(error)
