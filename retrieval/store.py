"""Store: the tables of a gallery, and the one class that reads and writes them.

SQLite is the truth about which faces exist. A segment that no row names does not exist.
"""

import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DatabaseError, OperationalError

from retrieval.errors import GalleryDamaged, GalleryError, StorageError

# The newest migration, so that opening an up-to-date gallery need not import alembic (0.2 s).
# `tests/test_migrations.py` holds it to the scripts.
SCHEMA_VERSION: Final = "0001"

# alembic keeps its state in module globals; two threads that migrate at once would share it.
_MIGRATING: Final = threading.Lock()

# How many values one IN (...) lists: far below SQLite's limit, and PostgreSQL's.
_LIST_LENGTH: Final = 1000

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)

# One row. The counters only rise, in the transaction that uses them, so no id is ever used again.
gallery_table = Table(
    "gallery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("uuid", String(36), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("next_face_id", Integer, nullable=False),
    Column("next_segment_id", Integer, nullable=False),
)

identity_table = Table(
    "identity",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
)

face_table = Table(
    "face",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("identity_id", Integer, ForeignKey("identity.id"), nullable=True, index=True),
    Column("path", Text, nullable=True, index=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("enrolled_at", String(32), nullable=False),
)

segment_table = Table(
    "segment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Face:
    """A stored photo.

    Attributes:
        id: the vector's id too; never used again.
        identity: who is on it; None when nobody said.
        path: the file it was enrolled from; None for bytes or arrays given by a library call.
        sha256: of the file's bytes, in hex.
        enrolled_at: ISO 8601, UTC.
    """

    id: int
    identity: str | None
    path: str | None
    sha256: str
    enrolled_at: str


@dataclass(frozen=True, slots=True)
class NewFace:
    """A photo about to be stored: who, where and the SHA-256 of its bytes in hex."""

    identity: str | None
    path: str | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of vectors that exists: its id is its name; rows, bytes and SHA-256 in hex."""

    id: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """What a gallery knows of itself."""

    uuid: str
    created_at: str
    fingerprint: str
    dimension: int
    next_face_id: int
    next_segment_id: int


class Reader:
    """One snapshot of the tables: whatever others commit meanwhile is not seen."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def gallery(self) -> GalleryRow:
        """The gallery's own row."""
        columns = [column for column in gallery_table.c if column.name != "id"]
        row = self._connection.execute(select(*columns)).one_or_none()
        if row is None:
            raise GalleryDamaged("The gallery's database has lost its own row; restore it from a backup.")
        return GalleryRow(*row)

    def segments(self) -> list[Segment]:
        """The segments that exist, oldest first."""
        rows = self._connection.execute(select(segment_table).order_by(segment_table.c.id))
        return [Segment(*row) for row in rows]

    def count(self) -> int:
        """How many faces there are."""
        return self._connection.execute(select(func.count()).select_from(face_table)).scalar_one()

    def faces(self, ids: Iterable[int]) -> dict[int, Face]:
        """Faces by id; an id that does not exist is absent."""
        return {face.id: face for face in self._faces(face_table.c.id, ids)}

    def faces_by_sha256(self, digests: Iterable[str]) -> dict[str, Face]:
        """Faces by the SHA-256 of their bytes; a digest that is not stored is absent."""
        return {face.sha256: face for face in self._faces(face_table.c.sha256, digests)}

    def face_ids_of(self, identity: str) -> list[int]:
        """The ids of an identity's faces, ascending."""
        rows = self._connection.execute(
            select(face_table.c.id)
            .join(identity_table)
            .where(identity_table.c.name == identity)
            .order_by(face_table.c.id)
        )
        return list(rows.scalars())

    def identities(self) -> list[tuple[str | None, int]]:
        """(identity, number of faces), the most photographed first, then by name."""
        number = func.count().label("number")
        rows = self._connection.execute(
            select(identity_table.c.name, number)
            .select_from(face_table.outerjoin(identity_table))
            .group_by(identity_table.c.name)
            .order_by(number.desc(), identity_table.c.name)
        )
        return [(name, count) for name, count in rows]

    def _faces(self, column: Column[Any], values: Iterable[Any]) -> Iterator[Face]:
        query = select(
            face_table.c.id,
            identity_table.c.name,
            face_table.c.path,
            face_table.c.sha256,
            face_table.c.enrolled_at,
        ).select_from(face_table.outerjoin(identity_table))
        for part in _parts(values):
            for row in self._connection.execute(query.where(column.in_(part))):
                yield Face(*row)


class Writer(Reader):
    """A Reader that changes the tables; everything it does is committed together or not at all."""

    def add_faces(self, first_id: int, faces: Sequence[NewFace]) -> None:
        """Inserts faces with consecutive ids from `first_id`, which `gallery().next_face_id` gave."""
        identities = self._identity_ids({face.identity for face in faces if face.identity is not None})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._connection.execute(
            insert(face_table),
            [
                {
                    "id": first_id + offset,
                    "identity_id": None if face.identity is None else identities[face.identity],
                    "path": face.path,
                    "sha256": face.sha256,
                    "enrolled_at": now,
                }
                for offset, face in enumerate(faces)
            ],
        )
        self._connection.execute(update(gallery_table).values(next_face_id=first_id + len(faces)))

    def remove_faces(self, ids: Iterable[int]) -> None:
        """Deletes faces, and identities that have none left."""
        for part in _parts(ids):
            self._connection.execute(delete(face_table).where(face_table.c.id.in_(part)))
        alive = select(face_table.c.id).where(face_table.c.identity_id == identity_table.c.id)
        self._connection.execute(delete(identity_table).where(~alive.exists()))

    def replace_segments(self, old: Iterable[int], new: Sequence[Segment]) -> None:
        """Makes `old` not exist and `new` exist; new ids begin at `gallery().next_segment_id`."""
        for part in _parts(old):
            self._connection.execute(delete(segment_table).where(segment_table.c.id.in_(part)))
        for segment in new:
            self._connection.execute(
                insert(segment_table).values(
                    id=segment.id, rows=segment.rows, bytes=segment.bytes, sha256=segment.sha256
                )
            )
            self._connection.execute(update(gallery_table).values(next_segment_id=segment.id + 1))

    def _identity_ids(self, names: set[str]) -> dict[str, int]:
        """The ids of identities, which are made where they are new."""
        found = self._find_identities(names)
        missing = sorted(names - found.keys())
        if missing:
            self._connection.execute(insert(identity_table), [{"name": name} for name in missing])
            found |= self._find_identities(missing)
        return found

    def _find_identities(self, names: Iterable[str]) -> dict[str, int]:
        query = select(identity_table.c.name, identity_table.c.id)
        return {
            name: number
            for part in _parts(names)
            for name, number in self._connection.execute(query.where(identity_table.c.name.in_(part)))
        }


class Store:
    """A gallery's database. Safe to share between threads."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self._path = path
        self._engine = engine

    @classmethod
    def create(cls, path: Path, *, fingerprint: str, dimension: int) -> "Store":
        """Makes the database of an empty gallery.

        Raises:
            StorageError: the disk refused.
        """
        store = cls(path, _engine(path))
        with store._translated(), store._engine.begin() as connection:
            _migrate(connection)
            connection.execute(
                insert(gallery_table).values(
                    id=1,
                    uuid=str(uuid.uuid4()),
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    fingerprint=fingerprint,
                    dimension=dimension,
                    next_face_id=1,
                    next_segment_id=1,
                )
            )
        return store

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Opens a database, and brings it up to date when an older version made it.

        Raises:
            GalleryError: there is none, or a newer version made it.
            GalleryDamaged: the file is not a gallery's database.
        """
        if not path.is_file():
            raise GalleryError(f"{path.parent} is not a gallery: it has no {path.name}.")
        store = cls(path, _engine(path))
        try:
            with store._translated():
                with store._engine.connect() as connection:
                    version = _version(connection, path)
                if version != SCHEMA_VERSION:
                    with store._engine.begin() as connection:
                        _migrate(connection)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """A snapshot, for the length of a with statement."""
        with self._translated(), self._engine.begin() as connection:
            yield Reader(connection)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """A transaction, committed durably at the end of the with statement unless it raises."""
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(faceprint_write=True)
            with connection.begin():
                yield Writer(connection)

    def erase_traces(self) -> None:
        """Writes the file anew and empties the log, so that deleted rows are on no page of either.

        `secure_delete` alone is not enough: SQLite leaves copies of a row behind when it moves rows
        between pages, and later zeros only the row where it last was.
        """
        with self._translated(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None  # a connection that is checked out always has one
            driver.execute("VACUUM")
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns SQLAlchemy's errors into ours."""
        try:
            yield
        except OperationalError as error:
            raise StorageError(f"The database {self._path} cannot be used: {error.orig}.") from error
        except DatabaseError as error:
            raise GalleryDamaged(
                f"{self._path} is not a gallery's database, or it is damaged ({error.orig}); "
                "restore it from a backup."
            ) from error


def _parts(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Values in lists short enough for one statement."""
    values = list(values)
    return (values[start : start + _LIST_LENGTH] for start in range(0, len(values), _LIST_LENGTH))


def _engine(path: Path) -> Engine:
    # Not a URL in one string: in that a ? or a % of the path has a meaning.
    engine = create_engine(URL.create("sqlite", database=os.fspath(path)), connect_args={"timeout": 30})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(driver: Any, _record: object) -> None:
    # The driver's own idea of transactions is older than WAL; SQLAlchemy's documentation says to
    # switch it off and to emit BEGIN oneself.
    driver.isolation_level = None
    driver.execute("PRAGMA journal_mode = WAL")
    driver.execute("PRAGMA synchronous = FULL")
    driver.execute("PRAGMA foreign_keys = ON")
    # Deleted rows are overwritten with zeros and do not linger on free pages.
    driver.execute("PRAGMA secure_delete = ON")


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("faceprint_write", False)
    # A reader's snapshot begins with its first SELECT; a writer takes its place at once.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _version(connection: Connection, path: Path) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        raise GalleryDamaged(f"{path} is a database, but not a gallery's; restore it from a backup.")
    version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    if version is not None and version > SCHEMA_VERSION:
        raise GalleryError(
            f"The gallery {path.parent} was made by a newer version of faceprint "
            f"(schema {version}, this one knows {SCHEMA_VERSION}); upgrade faceprint to open it."
        )
    return str(version) if version is not None else None


def migrations_folder() -> Path:
    """The alembic scripts: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "migrations"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "migrations"


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.fspath(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _MIGRATING:
        command.upgrade(config, "head")
