"""Store: a gallery's database, and the one class that reads and writes its tables.

SQLite is the truth about which faces exist. A segment that no row names does not exist.
"""

import errno
import json
import math
import os
import re
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar, get_type_hints
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    Engine,
    Executable,
    Table,
    bindparam,
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
from sqlalchemy.pool import NullPool, QueuePool

from retrieval.database import page_checksums, schema
from retrieval.database.filter_sql import LIST_LENGTH, is_below, parts, select_faces
from retrieval.database.filters import Where
from retrieval.database.metadata import Metadata, to_json
from retrieval.database.tables import (
    alias_table,
    audit_table,
    basis_table,
    calibration_table,
    codes_table,
    erasure_table,
    face_table,
    file_table,
    gallery_table,
    generation_table,
    host_table,
    identity_table,
    merger_table,
    segment_table,
    suspect_table,
    tombstone_table,
)
from retrieval.errors import GalleryDamaged, GalleryError, InputError, StorageError
from retrieval.rates import Rate, Upcoming
from retrieval.system import lock
from retrieval.system.archive_paths import first_present
from retrieval.system.files import (
    Stamp,
    create,
    is_no_file,
    make_room,
    other_than_file,
    sync,
    why,
    why_not_written,
)
from retrieval.system.paths import host_of

# The newest migration, so that opening an up-to-date gallery need not import alembic (0.2 s).
# `tests/database/test_migrations.py` holds it to the scripts.
SCHEMA_VERSION: Final = "0008"

# The file that a writer locks, beside the database.
LOCK_NAME: Final = "writer.lock"

# alembic keeps its state in module globals; two threads that migrate at once would share it.
_MIGRATING: Final = threading.Lock()

_CACHE_KIB: Final = 256 * 1024

# Less room than this is none: what SQLite makes beside a database that is read.
_PAGE: Final = 32 * 1024

_NO_STAMPS: Final[Mapping[str, Stamp]] = MappingProxyType({})

_RESTORE: Final = "restore it from a backup"
_NO_ROW: Final = f"The gallery's database has lost its own row; {_RESTORE}."


# More than any network gives.
_MAX_DIMENSION: Final = 1 << 20

# What is a file's name, or a folder's, because a database says so: never anything that leads elsewhere.
MODEL_FOLDER: Final = re.compile(r"model(-[0-9]+)?")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Face:
    """A stored photo.

    Attributes:
        id: the vector's id too; never used again.
        identity: who is on it; None when nobody said.
        paths: the files that have its bytes, in the order in which they became known; none for bytes or
            arrays given by a library call. In the answer to a search below some paths, those that are there
            come first.
        sha256: of the file's bytes, in hex.
        enrolled_at: ISO 8601, UTC.
        metadata: what people said about it: a JSON object, empty where nobody said anything.
        meant: in such an answer, how many of its paths are those; 0 where none was asked for.
    """

    id: int
    identity: str | None
    paths: tuple[str, ...]
    sha256: str
    enrolled_at: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    meant: int = field(default=0, compare=False, repr=False)

    @property
    def path(self) -> str | None:
        """One of its files, to show: the first that exists where there are several (see `first_present`).

        Of those that a search was for, where it was for some; so it may be one that is gone.
        """
        return first_present(self.paths[: self.meant] or self.paths)


@dataclass(frozen=True, slots=True)
class NewFace:
    """A photo about to be stored: who, where, the SHA-256 of its bytes in hex, and what is said about it.

    `stamp` is what its file was when it was read; None where that says nothing about it later. `host` is from
    where the photo was fetched, as `paths.host_of` spells it; None for a photo that faceprint did not fetch.
    """

    identity: str | None
    path: str | None
    sha256: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    stamp: Stamp | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A path of a face: the face, who is on it and what is said about it, and what the file was when read."""

    face_id: int
    identity: str | None
    metadata: Metadata = field(hash=False)
    stamp: Stamp | None


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of vectors that exists: its id is its name; rows, bytes, SHA-256 in hex, whose generation's."""

    id: int
    rows: int
    bytes: int
    sha256: str
    generation: int

    def __post_init__(self) -> None:
        check_name(_SHA256, self.sha256)


@dataclass(frozen=True, slots=True)
class Generation:
    """A model and its vectors.

    Attributes:
        id: never used again.
        fingerprint: of the model.
        dimension: of its embeddings.
        folder: the name of the model's folder in the gallery.
        card_sha256: of the model's card in that folder, in hex.
        created_at: ISO 8601, UTC.
        checked_before: faces with lower ids were compared with their photos, or are suspects (see
            `Reader.suspects`); None where none was compared.
    """

    id: int
    fingerprint: str
    dimension: int
    folder: str
    card_sha256: str
    created_at: str
    checked_before: int | None = None

    def __post_init__(self) -> None:
        check_name(MODEL_FOLDER, self.folder)
        if self.card_sha256:  # of the first version's galleries that had lost their card it is empty
            check_name(_SHA256, self.card_sha256)


@dataclass(frozen=True, slots=True)
class BasisRow:
    """What was learned from a generation's vectors.

    Attributes:
        id: the name of its file; never used again.
        generation: whose vectors'.
        rows: how many there were.
        coordinates: bytes of a code; 0 where codes would not make searches cheaper, and there is no file.
        bytes, sha256: of the file.
        learned_at: ISO 8601, UTC.
        detail: what was measured.
    """

    id: int
    generation: int
    rows: int
    coordinates: int
    bytes: int
    sha256: str
    learned_at: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CodesRow:
    """A file of codes that exists: of a segment, in a basis; bytes, SHA-256 in hex, error of the codes."""

    segment: int
    basis: int
    bytes: int
    sha256: str
    error: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold, and what to expect of it.

    Attributes:
        fpir: the share of strangers' searches that may name somebody, as it was wanted.
        threshold: Euclidean distance; who is farther is named nobody.
        seen: the share of the strangers' searches that did name somebody.
        missed: FNIR, the share of enrolled faces that did not name their own person when searched for
            among all others; of no trial where nobody has two faces.
        upcoming: how many of as many further strangers' searches may name somebody; None where an older
            version calibrated, which did not say.
    """

    fpir: float
    threshold: float
    seen: Rate
    missed: Rate
    upcoming: Upcoming | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found out about the distances of a gallery, at the size and with the model that it had.

    Attributes:
        generation: whose vectors'.
        fingerprint: of the model.
        found_at: ISO 8601, UTC.
        strangers: "photos" of people who were not enrolled, or "gallery": the enrolled, each without their
            own faces.
        faces, identities: how many the gallery had.
        searches: how many strangers' searches there were.
        people: how many different strangers those were, as far as somebody said; 0 where nobody did.
        trained: of these people, how many the model was trained on.
        fpir: what was asked for; searches go by it unless they ask for another.
        points: by falling `fpir`.
    """

    generation: int
    fingerprint: str
    found_at: str
    strangers: str
    faces: int
    identities: int
    searches: int
    people: int
    trained: int
    fpir: float
    points: tuple[OperatingPoint, ...]

    def point(self, fpir: float | None = None) -> OperatingPoint | None:
        """The operating point of a rate, or the one that was asked for; None where there is none."""
        wanted = self.fpir if fpir is None else fpir
        return next((one for one in self.points if math.isclose(one.fpir, wanted, rel_tol=1e-9)), None)

    def fields(self) -> dict[str, Any]:
        """As JSON can say it; what could not be measured is None."""
        return {**asdict(self), "points": [_point_fields(point) for point in self.points]}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Calibration":
        """What `fields` gave."""
        return cls(**{**fields, "points": tuple(map(_point_of, fields["points"]))})


def _point_fields(point: OperatingPoint) -> dict[str, Any]:
    rates = {name: asdict(getattr(point, name)) for name in ("seen", "missed")}
    for rate in rates.values():
        rate["value"] = rate["value"] if rate["n"] else None
    upcoming = None if point.upcoming is None else asdict(point.upcoming)
    return {"fpir": point.fpir, "threshold": point.threshold, **rates, "upcoming": upcoming}


def _point_of(fields: Mapping[str, Any]) -> OperatingPoint:
    rates = {
        name: Rate(**{**fields[name], "value": fields[name]["value"] if fields[name]["n"] else math.nan})
        for name in ("seen", "missed")
    }
    upcoming = fields.get("upcoming")
    upcoming = None if upcoming is None else Upcoming(**upcoming)
    return OperatingPoint(fields["fpir"], fields["threshold"], **rates, upcoming=upcoming)


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """What a gallery knows of itself."""

    uuid: str
    created_at: str
    next_face_id: int
    next_segment_id: int
    generation_id: int
    revision: int
    next_identity_id: int
    next_generation_id: int
    unfinished: str | None
    next_basis_id: int
    folder_id: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of an erasure, with nothing in it about the person.

    Attributes:
        id: a UUID.
        gallery: the gallery's UUID.
        at: ISO 8601, UTC.
        who: the user of the operating system who asked for it.
        what: "identity", "face" or "path".
        faces: how many were removed.
        face_ids, identity_ids: the numbers that a restored backup must not bring back.
    """

    id: str
    gallery: str
    at: str
    who: str
    what: str
    faces: int
    face_ids: tuple[int, ...]
    identity_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Something that was done to a gallery.

    Attributes:
        began_at, ended_at: ISO 8601, UTC; many small enrollments of one caller are one entry.
        who: the user of the operating system.
        via: the command, or "library".
        action: "enroll", "forget", "compact", ...
        faces: how many it concerned.
        detail: numbers; never a name, a path or an embedding.
    """

    began_at: str
    ended_at: str
    who: str
    via: str
    action: str
    faces: int
    detail: dict[str, Any]


# That a face is in a range of suspects.
_IS_SUSPECT: Final = (face_table.c.id >= suspect_table.c.first_id) & (
    face_table.c.id < suspect_table.c.end_id
)


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (first, end) in order, those that touch or overlap as one, without empty ones."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if first >= end:
            continue
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


class Reader:
    """One snapshot of the tables: whatever others commit meanwhile is not seen."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def revision(self) -> int:
        """A number that rises with every transaction that changes anything."""
        found = self._connection.execute(_REVISION).scalar_one_or_none()
        if found is None:
            raise GalleryDamaged(_NO_ROW)
        return int(found)

    def gallery(self) -> GalleryRow:
        """The gallery's own row."""
        left_out = ("id", "revision_check")
        columns = [column for column in gallery_table.c if column.name not in left_out]
        row = self._connection.execute(select(*columns)).one_or_none()
        if row is None:
            raise GalleryDamaged(_NO_ROW)
        return _checked(GalleryRow(*row))

    def serving_generation(self) -> Generation:
        """The generation that answers searches.

        Raises:
            GalleryDamaged: there is none.
        """
        found = self.generations().get(self.gallery().generation_id)
        if found is None:
            raise GalleryDamaged(f"The gallery's database lacks the row of its model; {_RESTORE}.")
        return found

    def counter_problems(self) -> list[str]:
        """Which counters cannot be right, as sentences without their ends.

        They would give out a number that is in use, or cover ids that were never given out: the vectors of
        later faces with these ids would count as proven, or as suspect.
        """
        row = self.gallery()
        counters = {
            face_table: row.next_face_id,
            identity_table: row.next_identity_id,
            segment_table: row.next_segment_id,
            generation_table: row.next_generation_id,
            basis_table: row.next_basis_id,
        }
        behind = [
            f"the next number of a {table.name} is {following}, which is not above all that are there"
            for table, following in counters.items()
            if (self._connection.execute(select(func.max(table.c.id))).scalar_one() or 0) >= following
        ]
        return [*behind, *self._astray(row.next_face_id)]

    def _astray(self, end: int) -> list[str]:
        """What is said of the models' faces and is about none that there can have been; `end` is the next."""
        checked = generation_table.c.checked_before
        wrong = select(generation_table.c.id, checked).where((checked < 0) | (checked > end))
        found = [
            f"the faces of model {number} are compared up to number {before}, and the next face is {end}"
            for number, before in self._connection.execute(wrong.order_by("id"))
        ]
        first, last = suspect_table.c.first_id, suspect_table.c.end_id
        outside = (first < 0) | (first >= last) | (last > end)
        suspects = select(suspect_table.c.generation_id, first, last).where(outside)
        return found + [
            f"the suspects of model {number} are from number {a} up to {b}, and the next face is {end}"
            for number, a, b in self._connection.execute(suspects.order_by("generation_id", "first_id"))
        ]

    def generations(self) -> dict[int, Generation]:
        """Every generation by its id."""
        rows = self._connection.execute(select(generation_table).order_by(generation_table.c.id))
        found = {row[0]: _checked(Generation(*row)) for row in rows}
        for generation in found.values():
            if not 1 <= generation.dimension <= _MAX_DIMENSION:
                raise GalleryDamaged(
                    f"The gallery's database states a model of {generation.dimension} dimensions; {_RESTORE}."
                )
        return found

    def suspects(self, generation: int) -> list[tuple[int, int]]:
        """Ranges (first, end) of ids of faces that a model may have embedded while damaged, in order."""
        query = select(suspect_table.c.first_id, suspect_table.c.end_id)
        query = query.where(suspect_table.c.generation_id == generation)
        return [(first, end) for first, end in self._connection.execute(query.order_by("first_id"))]

    def suspect_ids(self, generation: int) -> list[int]:
        """The faces in `suspects`, as far as they exist."""
        query = select(face_table.c.id).join(suspect_table, _IS_SUSPECT).distinct().order_by(face_table.c.id)
        query = query.where(suspect_table.c.generation_id == generation)
        return list(self._connection.execute(query).scalars())

    def segments(self, generation: int | None = None) -> list[Segment]:
        """The segments that exist, of one generation or of all, oldest first."""
        query = select(segment_table).order_by(segment_table.c.id)
        if generation is not None:
            query = query.where(segment_table.c.generation_id == generation)
        return [_checked(Segment(*row)) for row in self._connection.execute(query)]

    def bases(self, generation: int | None = None) -> dict[int, BasisRow]:
        """The bases of one generation or of all, by id, oldest first."""
        query = select(basis_table).order_by(basis_table.c.id)
        if generation is not None:
            query = query.where(basis_table.c.generation_id == generation)
        found = {}
        for row in self._connection.execute(query).mappings():
            fields = {name: value for name, value in row.items() if name != "generation_id"}
            fields |= {"generation": row["generation_id"], "detail": json.loads(row["detail"])}
            found[row["id"]] = _checked(BasisRow(**fields))
        return found

    def codes(self) -> dict[int, CodesRow]:
        """The files of codes by their segment."""
        return {row[0]: _checked(CodesRow(*row)) for row in self._connection.execute(select(codes_table))}

    def calibration(self, generation: Generation) -> Calibration | None:
        """What was found out about a generation's distances; None where nobody has looked."""
        query = select(calibration_table).where(calibration_table.c.generation_id == generation.id)
        row = self._connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        fields = {name: value for name, value in row.items() if name != "generation_id"}
        fields |= {"generation": generation.id, "fingerprint": generation.fingerprint}
        try:
            points = json.loads(row["points"])
            if not isinstance(points, list):
                raise TypeError("points are a list")
            return _checked(Calibration.of({**fields, "points": points}))
        except (TypeError, KeyError, AttributeError) as error:
            raise GalleryDamaged(f"The gallery's calibration cannot be read; {_RESTORE}.") from error

    def count(self) -> int:
        """How many faces there are."""
        return self._connection.execute(select(func.count()).select_from(face_table)).scalar_one()

    def file_count(self) -> int:
        """How many paths there are."""
        return self._connection.execute(select(func.count()).select_from(file_table)).scalar_one()

    def faces(self, ids: Iterable[int]) -> dict[int, Face]:
        """Faces by id; an id that does not exist is absent."""
        return {face.id: face for face in self._faces(face_table.c.id, ids)}

    def faces_by_sha256(self, digests: Iterable[str]) -> dict[str, Face]:
        """Faces by the SHA-256 of their bytes; a digest that is not stored is absent."""
        return {face.sha256: face for face in self._faces(face_table.c.sha256, digests)}

    def all_faces(self, size: int = 4096) -> Iterator[list[Face]]:
        """Every face, by id, in lists of at most `size`."""
        last = 0
        while True:
            query = select(face_table.c.id).where(face_table.c.id > last).order_by(face_table.c.id)
            ids = list(self._connection.execute(query.limit(size)).scalars())
            if not ids:
                return
            yield list(self.faces(ids).values())
            last = ids[-1]

    def face_ids(self) -> Iterator[int]:
        """Every face's id, ascending."""
        yield from self._connection.execute(select(face_table.c.id).order_by(face_table.c.id)).scalars()

    def face_ids_of(self, identity: str) -> list[int]:
        """The ids of an identity's faces, ascending."""
        rows = self._connection.execute(
            select(face_table.c.id)
            .join(identity_table)
            .where(identity_table.c.name == identity)
            .order_by(face_table.c.id)
        )
        return list(rows.scalars())

    def face_ids_of_identities(self, identity_ids: Iterable[int]) -> list[int]:
        """The ids of the faces of some identities, by number."""
        query = select(face_table.c.id)
        return [
            number
            for part in parts(identity_ids)
            for number in self._connection.execute(query.where(face_table.c.identity_id.in_(part))).scalars()
        ]

    def identities_of_faces(self, face_ids: Iterable[int]) -> dict[int, int]:
        """The number of the person on each of some faces; a face that has no identity is absent."""
        query = select(face_table.c.id, face_table.c.identity_id).where(face_table.c.identity_id.is_not(None))
        return {
            number: person
            for part in parts(face_ids)
            for number, person in self._connection.execute(query.where(face_table.c.id.in_(part)))
        }

    def identity_of_every_face(self) -> NDArray[np.int64]:
        """(n, 2): the number of each face that has an identity, ascending, and that of the person."""
        query = select(face_table.c.id, face_table.c.identity_id).where(face_table.c.identity_id.is_not(None))
        rows = self._connection.execute(query.order_by(face_table.c.id)).all()
        return np.array([tuple(row) for row in rows], np.int64).reshape(-1, 2)

    def names_of_identities(self, identity_ids: Iterable[int]) -> dict[int, str]:
        """What some people are called today, by number."""
        query = select(identity_table.c.id, identity_table.c.name)
        return {
            number: name
            for part in parts(identity_ids)
            for number, name in self._connection.execute(query.where(identity_table.c.id.in_(part)))
        }

    def face_ids_where(self, where: Where) -> NDArray[np.int64]:
        """The ids of the faces that are meant, ascending."""
        return select_faces(self._connection, where)

    def identity_metadata(self, names: Iterable[str]) -> dict[str, Metadata]:
        """What is said about people, by the names that were asked for, today's or former.

        Unknown names are absent; of whom nothing is said, the metadata are empty.
        """
        return {name: metadata for name, (_, metadata) in self.identities_named(names).items()}

    def identities_named(self, names: Iterable[str]) -> dict[str, tuple[int, Metadata]]:
        """Numbers and metadata of people, by the names that were asked for, today's or former."""
        today = select(identity_table.c.name, identity_table.c.id, identity_table.c.metadata)
        before = select(alias_table.c.name, identity_table.c.id, identity_table.c.metadata).select_from(
            alias_table.join(identity_table)
        )
        return {
            name: (number, said or {})
            for part in parts(names)
            for query in (
                before.where(alias_table.c.name.in_(part)),
                today.where(identity_table.c.name.in_(part)),
            )
            for name, number, said in self._connection.execute(query)
        }

    def names_of(self, identity_ids: Iterable[int]) -> set[str]:
        """Every name that some identities have or had, by number."""
        today = select(identity_table.c.name)
        before = select(alias_table.c.name)
        return {
            name
            for part in parts(identity_ids)
            for query in (
                today.where(identity_table.c.id.in_(part)),
                before.where(alias_table.c.identity_id.in_(part)),
            )
            for name in self._connection.execute(query).scalars()
        }

    def identity_id(self, name: str) -> int | None:
        """An identity's number; None when there is nobody of that name."""
        query = select(identity_table.c.id).where(identity_table.c.name == name)
        return self._connection.execute(query).scalar_one_or_none()

    def identity_names(self) -> list[str]:
        """What people are called today, in the order in which they became known."""
        query = select(identity_table.c.name).order_by(identity_table.c.id)
        return list(self._connection.execute(query).scalars())

    def current_names(self, names: Iterable[str]) -> dict[str, str]:
        """What those are called today who were once called so; nobody else is in it."""
        query = select(alias_table.c.name, identity_table.c.name).select_from(
            alias_table.join(identity_table)
        )
        return {
            old: new
            for part in parts(names)
            for old, new in self._connection.execute(query.where(alias_table.c.name.in_(part)))
        }

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

    def files(self, paths: Iterable[str]) -> dict[str, int]:
        """The face of each path; a path that is not known is absent."""
        query = select(file_table.c.path, file_table.c.face_id)
        return {
            path: number
            for part in parts(paths)
            for path, number in self._connection.execute(query.where(file_table.c.path.in_(part)))
        }

    def known_files(self, paths: Iterable[str]) -> dict[str, KnownFile]:
        """What is known of each path; one that is not known is absent."""
        joined = file_table.join(face_table).outerjoin(identity_table)
        stamp = (file_table.c.size, file_table.c.mtime_ns, file_table.c.inode)
        query = select(
            file_table.c.path, face_table.c.id, identity_table.c.name, face_table.c.metadata, *stamp
        ).select_from(joined)
        return {
            path: KnownFile(number, name, said or {}, None if size is None else Stamp(size, mtime_ns, inode))
            for part in parts(paths)
            for path, number, name, said, size, mtime_ns, inode in self._connection.execute(
                query.where(file_table.c.path.in_(part))
            )
        }

    def all_files(self) -> Iterator[tuple[str, int, Stamp | None]]:
        """Every known path, its face, and the stamp of its file where there is one."""
        stamp = (file_table.c.size, file_table.c.mtime_ns, file_table.c.inode)
        rows = self._connection.execute(select(file_table.c.path, file_table.c.face_id, *stamp))
        for path, number, size, mtime_ns, inode in rows:
            yield path, number, None if size is None else Stamp(size, mtime_ns, inode)

    def files_below(self, root: str) -> dict[str, tuple[int, Stamp | None]]:
        """Faces and stamps of known paths that are a file or folder, or lie below it, oldest first."""
        stamp = (file_table.c.size, file_table.c.mtime_ns, file_table.c.inode)
        query = select(file_table.c.path, file_table.c.face_id, *stamp).order_by(file_table.c.id)
        rows = self._connection.execute(query.where(is_below(file_table.c.path, root)))
        return {
            path: (number, None if size is None else Stamp(size, mtime_ns, inode))
            for path, number, size, mtime_ns, inode in rows
        }

    def hosts(self) -> frozenset[str]:
        """The hosts that photos were enrolled from, as `paths.host_of` spells them."""
        return frozenset(self._connection.execute(select(host_table.c.name)).scalars())

    def without_files(self, ids: Iterable[int]) -> list[int]:
        """Those of some faces that no path leads to."""
        query = select(face_table.c.id).outerjoin(file_table).where(file_table.c.id.is_(None))
        return [
            number
            for part in parts(ids)
            for number in self._connection.execute(query.where(face_table.c.id.in_(part))).scalars()
        ]

    def merged_into(self, identity_id: int) -> list[int]:
        """The identities that became part of one, directly or not."""
        found, waiting = [], [identity_id]
        while waiting:
            query = select(merger_table.c.identity_id).where(merger_table.c.into_id == waiting.pop())
            before = list(self._connection.execute(query).scalars())
            found += before
            waiting += before
        return sorted(found)

    def receipts(self) -> list[Receipt]:
        """Every erasure, oldest first."""
        gallery = self.gallery().uuid
        rows = self._connection.execute(
            select(erasure_table).order_by(erasure_table.c.at, erasure_table.c.id)
        )
        targets: dict[tuple[str, str], list[int]] = {}
        tombstones = select(tombstone_table.c.erasure_id, tombstone_table.c.kind, tombstone_table.c.target)
        for erasure, kind, target in self._connection.execute(tombstones.order_by(tombstone_table.c.id)):
            targets.setdefault((erasure, kind), []).append(target)
        return [
            Receipt(
                number,
                gallery,
                at,
                who,
                what,
                faces,
                tuple(targets.get((number, "face"), ())),
                tuple(targets.get((number, "identity"), ())),
            )
            for number, at, who, what, faces in rows
        ]

    def audit_log(self) -> list[AuditEntry]:
        """What was done, oldest first."""
        entries = self._connection.execute(select(audit_table).order_by(audit_table.c.id)).mappings()
        return [
            AuditEntry(**{**entry, "detail": json.loads(entry["detail"])})
            for entry in ({name: row[name] for name in row if name != "id"} for row in entries)
        ]

    def rows(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        """A table as it stands, in lists of dictionaries: what a restored gallery is made of."""
        found = self._connection.execute(select(table).order_by(*table.primary_key.columns))
        for part in found.mappings().partitions(LIST_LENGTH):
            yield [dict(row) for row in part]

    def _faces(self, column: Column[Any], values: Iterable[Any]) -> Iterator[Face]:
        query = select(
            face_table.c.id,
            identity_table.c.name,
            face_table.c.sha256,
            face_table.c.enrolled_at,
            face_table.c.metadata,
        ).select_from(face_table.outerjoin(identity_table))
        for part in parts(values):
            rows = self._connection.execute(query.where(column.in_(part))).all()
            paths = self._paths([row[0] for row in rows])
            for number, identity, sha256, enrolled_at, said in rows:
                yield Face(number, identity, tuple(paths.get(number, ())), sha256, enrolled_at, said or {})

    def _paths(self, ids: list[int]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        if ids:
            query = select(file_table.c.face_id, file_table.c.path).order_by(file_table.c.id)
            for number, path in self._connection.execute(query.where(file_table.c.face_id.in_(ids))):
                found.setdefault(number, []).append(path)
        return found


class Writer(Reader):
    """A Reader that changes the tables; everything it does is committed together or not at all.

    Attributes:
        changed: whether it has changed anything yet.
        owes: whether something has to be done once it is committed.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.changed = False
        self.owes = False

    def add_faces(self, first_id: int, faces: Sequence[NewFace]) -> None:
        """Inserts faces with consecutive ids from `first_id`, which `gallery().next_face_id` gave.

        Their paths are another call, `add_files`: one path may belong to one face after the other.
        """
        identities = self._identity_ids({face.identity for face in faces if face.identity is not None})
        now = utc_now()
        self._insert(
            face_table,
            [
                {
                    "id": first_id + offset,
                    "identity_id": None if face.identity is None else identities[face.identity],
                    "sha256": face.sha256,
                    "enrolled_at": now,
                    "metadata": face.metadata or None,
                }
                for offset, face in enumerate(faces)
            ],
        )
        self.set_gallery(next_face_id=first_id + len(faces))

    def remove_faces(self, ids: Iterable[int]) -> None:
        """Deletes faces with their paths; identities, hosts and ranges of suspects that have none left go."""
        ids = list(ids)
        hosts = self._hosts_of(ids)
        for part in parts(ids):
            self._change(delete(file_table).where(file_table.c.face_id.in_(part)))
            self._change(delete(face_table).where(face_table.c.id.in_(part)))
        if ids:
            self.remove_lonely()
            self._change(delete(suspect_table).where(~select(face_table.c.id).where(_IS_SUSPECT).exists()))
        self._remove_unused(hosts)

    def remove_lonely(self) -> None:
        """Deletes identities that have no faces, with their older names."""
        alive = select(face_table.c.id)
        lonely = alive.where(face_table.c.identity_id == alias_table.c.identity_id)
        self._change(delete(alias_table).where(~lonely.exists()))
        lonely = alive.where(face_table.c.identity_id == identity_table.c.id)
        self._change(delete(identity_table).where(~lonely.exists()))

    def remove_files(self, paths: Iterable[str]) -> None:
        """Makes paths unknown; their faces stay."""
        for part in parts(paths):
            self._change(delete(file_table).where(file_table.c.path.in_(part)))

    def add_files(self, files: Iterable[tuple[str, int]], stamps: Mapping[str, Stamp] = _NO_STAMPS) -> None:
        """Adds paths, each to a face; of some it is known what the file was when it was read."""
        self._insert(
            file_table,
            [{"path": path, "face_id": number, **_stamped(stamps.get(path))} for path, number in files],
        )

    def set_stamps(self, stamps: Mapping[str, Stamp]) -> None:
        """Says of known paths what the file was when it was read."""
        rows = [{"known": path, **_stamped(stamp)} for path, stamp in stamps.items()]
        if rows:
            changed = update(file_table).where(file_table.c.path == bindparam("known"))
            self._change(changed.values({name: bindparam(name) for name in _stamped(None)}), rows)

    def add_hosts(self, hosts: Iterable[str]) -> None:
        """Says that photos were enrolled from some hosts, so that they may be fetched from there again."""
        self._insert(host_table, [{"name": name} for name in sorted(set(hosts) - self.hosts())])

    def name_face(self, face_id: int, identity: str | None) -> None:
        """Says who is on a face; identities that nobody has then go with `remove_lonely`."""
        number = None if identity is None else self._identity_ids({identity})[identity]
        self._change(update(face_table).where(face_table.c.id == face_id).values(identity_id=number))

    def set_metadata(self, table: Table, metadata: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Replaces what is said about faces (`face_table`) or identities (`identity_table`), by number."""
        rows = [{"number": number, "said": said or None} for number, said in metadata.items()]
        if rows:
            changed = update(table).where(table.c.id == bindparam("number"))
            self._change(changed.values(metadata=bindparam("said")), rows)

    def rename_identity(self, identity_id: int, name: str) -> None:
        """Gives an identity another name, which nobody has."""
        self._change(update(identity_table).where(identity_table.c.id == identity_id).values(name=name))

    def add_alias(self, name: str, identity_id: int) -> None:
        """Makes a name, which nobody has, mean an identity of another name."""
        self.remove_alias(name)
        self._insert(alias_table, [{"name": name, "identity_id": identity_id}])

    def remove_alias(self, name: str) -> None:
        """Makes a name mean nobody but who is called so."""
        self._change(delete(alias_table).where(alias_table.c.name == name))

    def merge_identities(self, identity_id: int, into_id: int) -> None:
        """Makes an identity's faces another one's, and the identity not exist."""
        faces = update(face_table).where(face_table.c.identity_id == identity_id)
        self._change(faces.values(identity_id=into_id))
        aliases = update(alias_table).where(alias_table.c.identity_id == identity_id)
        self._change(aliases.values(identity_id=into_id))
        self._insert(merger_table, [{"identity_id": identity_id, "into_id": into_id}])
        self._change(delete(identity_table).where(identity_table.c.id == identity_id))

    def replace_segments(self, old: Iterable[int], new: Sequence[Segment]) -> None:
        """Makes `old` not exist and `new` exist; new ids begin at `gallery().next_segment_id`."""
        for part in parts(old):
            self.remove_codes(part)
            self._change(delete(segment_table).where(segment_table.c.id.in_(part)))
        for segment in new:
            values = {**asdict(segment), "generation_id": segment.generation}
            del values["generation"]
            self._insert(segment_table, [values])
            self.set_gallery(next_segment_id=segment.id + 1)

    def set_codes(self, codes: CodesRow) -> None:
        """Makes a file of codes exist, in place of another of the same segment."""
        self.remove_codes([codes.segment])
        values = asdict(codes)
        self._insert(
            codes_table, [{f"{n}_id" if n in ("segment", "basis") else n: v for n, v in values.items()}]
        )

    def remove_codes(self, segments: Iterable[int]) -> None:
        """Makes the files of codes of some segments not exist."""
        for part in parts(segments):
            self._change(delete(codes_table).where(codes_table.c.segment_id.in_(part)))

    def add_basis(self, basis: BasisRow) -> None:
        """Adds a basis; its id is `gallery().next_basis_id`."""
        values = {**asdict(basis), "generation_id": basis.generation, "detail": json.dumps(basis.detail)}
        del values["generation"]
        self._insert(basis_table, [values])
        self.set_gallery(next_basis_id=basis.id + 1)

    def remove_bases(self, ids: Iterable[int]) -> None:
        """Makes bases not exist, with the codes in them."""
        for part in parts(ids):
            self._change(delete(codes_table).where(codes_table.c.basis_id.in_(part)))
            self._change(delete(basis_table).where(basis_table.c.id.in_(part)))

    def set_calibration(self, calibration: Calibration) -> None:
        """Stores what was found out about a generation's distances, in place of what was known of them."""
        self.remove_calibration(calibration.generation)
        fields = calibration.fields()
        left_out = ("generation", "fingerprint", "points")
        row = {name: value for name, value in fields.items() if name not in left_out}
        row |= {"generation_id": calibration.generation, "points": json.dumps(fields["points"])}
        self._insert(calibration_table, [row])

    def remove_calibration(self, generation: int) -> None:
        """Forgets what was found out about a generation's distances."""
        self._change(delete(calibration_table).where(calibration_table.c.generation_id == generation))

    def add_generation(self, generation: Generation) -> None:
        """Adds a model that has no vectors yet."""
        self._insert(generation_table, [asdict(generation)])
        self.set_gallery(next_generation_id=generation.id + 1)

    def remove_generation(self, generation: int) -> None:
        """Makes a generation that has no segments, and does not serve, not exist."""
        self.remove_bases(self.bases(generation))
        self.remove_calibration(generation)
        self.set_suspects(generation, [])
        self._change(delete(generation_table).where(generation_table.c.id == generation))

    def set_card(self, generation: int, card_sha256: str) -> None:
        """Says what a generation's card is from now on."""
        changed = update(generation_table).where(generation_table.c.id == generation)
        self._change(changed.values(card_sha256=card_sha256))

    def set_suspects(self, generation: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Says which faces a model may have embedded while it was damaged, in place of what was said.

        Args:
            generation: the model's.
            ranges: of ids, (first, end); they may overlap, and empty ones count for nothing.
        """
        self._change(delete(suspect_table).where(suspect_table.c.generation_id == generation))
        rows = [{"generation_id": generation, "first_id": a, "end_id": b} for a, b in merged(ranges)]
        self._insert(suspect_table, rows)

    def set_checked_before(self, generation: int, face_id: int | None) -> None:
        """Says that the faces below an id, but the suspects, were compared with their photos."""
        changed = update(generation_table).where(generation_table.c.id == generation)
        self._change(changed.values(checked_before=face_id))

    def set_gallery(self, **values: Any) -> None:
        """Changes the gallery's own row."""
        self._change(update(gallery_table).values(**values))

    def add_receipt(self, receipt: Receipt) -> None:
        """Stores a receipt and its tombstones, unless it is stored already."""
        known = select(erasure_table.c.id).where(erasure_table.c.id == receipt.id)
        if self._connection.execute(known).first() is not None:
            return
        fields = {column.name: getattr(receipt, column.name) for column in erasure_table.c}
        self._insert(erasure_table, [fields])
        targets = {"face": receipt.face_ids, "identity": receipt.identity_ids}
        self._insert(
            tombstone_table,
            [
                {"erasure_id": receipt.id, "kind": kind, "target": target}
                for kind, numbers in targets.items()
                for target in numbers
            ],
        )

    def add_audit(self, entry: AuditEntry) -> int:
        """Writes an entry of the audit log; returns its number."""
        values = {**asdict(entry), "detail": json.dumps(entry.detail, sort_keys=True)}
        self._insert(audit_table, [values])
        return int(self._connection.execute(select(func.max(audit_table.c.id))).scalar_one())

    def extend_audit(self, number: int, faces: int) -> bool:
        """Adds to the newest entry, if that is still `number`; says whether it was."""
        if self._connection.execute(select(func.max(audit_table.c.id))).scalar_one() != number:
            return False
        grown = update(audit_table).where(audit_table.c.id == number)
        self._change(grown.values(faces=audit_table.c.faces + faces, ended_at=utc_now()))
        return True

    def clear(self, table: Table) -> None:
        """Empties a table."""
        self._change(delete(table))

    def fill(self, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows to a table as they stand in another gallery's."""
        self._insert(table, rows)

    def finish(self) -> None:
        """Counts the transaction, if it has changed anything: readers see by it that there is news."""
        if self.changed:
            self.set_gallery(
                revision=gallery_table.c.revision + 1, revision_check=-(gallery_table.c.revision + 1)
            )

    def _change(self, statement: Executable, rows: Sequence[dict[str, Any]] | None = None) -> None:
        self._connection.execute(statement, rows)
        self.changed = True

    def _insert(self, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        self.changed = True
        compiled = insert(table).compile(dialect=self._connection.dialect, column_keys=list(rows[0]))
        if compiled.positiontup is None:  # a driver that wants names
            self._connection.execute(insert(table), list(rows))
            return
        # SQLAlchemy would look at each value of each row: twice the time, and only JSON needs it.
        for name in [column.name for column in table.c if isinstance(column.type, JSON)]:
            if name in rows[0]:
                rows = [row if row[name] is None else {**row, name: to_json(row[name])} for row in rows]
        values = map(itemgetter(*compiled.positiontup), rows)
        several = len(compiled.positiontup) > 1
        self._connection.exec_driver_sql(str(compiled), [v if several else (v,) for v in values])

    def _hosts_of(self, ids: Iterable[int]) -> set[str]:
        """The known hosts that paths of some faces lie at."""
        known = self.hosts()
        if not known:
            return set()
        query = select(file_table.c.path)
        paths = (
            path
            for part in parts(ids)
            for path in self._connection.execute(query.where(file_table.c.face_id.in_(part))).scalars()
        )
        return {host for path in paths if (host := host_of(path)) in known}

    def _remove_unused(self, hosts: set[str]) -> None:
        """Makes those of some hosts unknown at which no path lies any more."""
        if not hosts:
            return
        unused = set(hosts)
        # By the index of paths; those of files on this machine begin with a slash.
        addresses = select(file_table.c.path).where(file_table.c.path >= "A").order_by(file_table.c.path)
        for path in self._connection.execute(addresses).yield_per(LIST_LENGTH).scalars():
            unused.discard(host_of(path) or "")
            if not unused:
                return
        self._change(delete(host_table).where(host_table.c.name.in_(sorted(unused))))

    def _identity_ids(self, names: set[str]) -> dict[str, int]:
        """The ids of identities, which are made where they are new."""
        found = self._find_identities(names)
        missing = sorted(names - found.keys())
        if missing:
            first = self.gallery().next_identity_id
            made = {name: first + offset for offset, name in enumerate(missing)}
            self._insert(identity_table, [{"id": number, "name": name} for name, number in made.items()])
            self.set_gallery(next_identity_id=first + len(made))
            found |= made
        return found

    def _find_identities(self, names: Iterable[str]) -> dict[str, int]:
        query = select(identity_table.c.name, identity_table.c.id)
        return {
            name: number
            for part in parts(names)
            for name, number in self._connection.execute(query.where(identity_table.c.name.in_(part)))
        }


_REVISION: Final = select(gallery_table.c.revision)

_Row = TypeVar("_Row")


def _checked(row: _Row) -> _Row:
    """A row whose values have the types of its fields, which SQLite does not ensure; none is negative."""
    for name, kinds in _kinds(type(row)).items():  # type: ignore[arg-type]
        value = getattr(row, name)
        if not isinstance(value, kinds) or (isinstance(value, int) and value < 0 and name != "revision"):
            raise GalleryDamaged(
                f"The gallery's database has {value!r:.40} as {name} of a {type(row).__name__}; {_RESTORE}."
            )
    return row


@cache
def _kinds(kind: type[Any]) -> dict[str, tuple[type, ...]]:
    """What each field may be, of those that are plain values."""
    plain: dict[Any, tuple[type, ...]] = {
        int: (int,),
        str: (str,),
        float: (float, int),
        int | None: (int, type(None)),
        str | None: (str, type(None)),
        dict[str, Any]: (dict,),
    }
    hints = get_type_hints(kind)
    return {name: plain[hint] for name, hint in hints.items() if hint in plain}


def _stamped(stamp: Stamp | None) -> dict[str, int | None]:
    """The columns of a file's stamp."""
    if stamp is None:
        return {"size": None, "mtime_ns": None, "inode": None}
    return {"size": stamp.size, "mtime_ns": stamp.mtime_ns, "inode": stamp.inode}


class SnapshotLost(StorageError):
    """Somebody wrote to a database that could only be read without a lock."""


class Store:
    """A gallery's database. Safe to share between threads."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine
        self.closed = False

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        fingerprint: str,
        dimension: int,
        folder: str = "model",
        card_sha256: str = "",
        folder_id: str | None = None,
    ) -> "Store":
        """Makes the database of an empty gallery, whose first generation is the given model.

        `folder_id` is that of its folder of vectors (see `retrieval.storage.ownership`).

        Raises:
            StorageError: the disk refused.
        """
        try:
            # Before SQLite does, which would make it as the umask says; its log takes the mode of this file.
            create(path, inherit=True).close()
        except OSError as error:
            raise StorageError(f"The database {path} cannot be made: {why(error)}.") from error
        store = cls(path, _engine(path))
        now = utc_now()
        with store._translated(), store._engine.begin() as connection:
            schema.create(connection, SCHEMA_VERSION)
            connection.execute(
                insert(generation_table),
                asdict(Generation(1, fingerprint, dimension, folder, card_sha256, now)),
            )
            connection.execute(
                insert(gallery_table).values(
                    id=1,
                    uuid=str(uuid.uuid4()),
                    created_at=now,
                    next_face_id=1,
                    next_segment_id=1,
                    generation_id=1,
                    revision=1,
                    revision_check=-1,
                    next_identity_id=1,
                    next_generation_id=2,
                    next_basis_id=1,
                    folder_id=folder_id,
                )
            )
        return store

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, timeout: float = 30.0) -> "Store":
        """Opens a database, and brings it up to date when an older version made it, after taking a copy.

        Args:
            path: of the database.
            read_only: changes nothing, not even the version; works where nothing can be written.
            timeout: seconds to wait for another writer when it has to be brought up to date.

        Raises:
            GalleryError: there is none, a newer version made it, or an older one and `read_only` is asked.
            GalleryDamaged: the file is not a gallery's database.
            GalleryBusy: somebody else is writing while it has to be brought up to date.
            StorageError: the file system cannot lock files, or cannot be written to.
        """
        if (other := other_than_file(path)) is not None:
            raise GalleryError(f"{path} is {other}, not a database; restore the gallery from a backup.")
        if not path.is_file():
            raise GalleryError(f"{path.parent} is not a gallery: it has no {path.name}.")
        if not read_only:
            check_no_link(path)
            if (reason := why_not_written(path.parent)) is not None:
                raise StorageError(f"{path.parent} cannot be written to: {reason}.")
        _check_beside(path)
        # SQLite would say that the database is locked, after 30 s.
        lock.check_existing(path.with_name(LOCK_NAME))
        store = cls(path, _engine(path, read_only=read_only))
        try:
            version = store._version()
            if version == SCHEMA_VERSION:
                store._check_schema(exact=True)
                if not read_only and store._leftovers():
                    with lock.exclusive(path.with_name(LOCK_NAME), timeout=timeout):
                        store._drop_leftovers()
            if version != SCHEMA_VERSION and read_only:
                raise GalleryError(
                    f"The gallery {path.parent} was made by an older version of faceprint (schema {version}, "
                    f"this one knows {SCHEMA_VERSION}); open it once for writing, with `faceprint compact`."
                )
            if version != SCHEMA_VERSION:
                with lock.exclusive(path.with_name(LOCK_NAME), timeout=timeout):
                    store._upgrade()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Closes every connection; nothing is read or written afterwards."""
        self.closed = True
        self._engine.dispose()

    def check_open(self) -> None:
        """Checks that the database has not been closed: SQLAlchemy would open it again by itself.

        Raises:
            InputError: it has.
        """
        if self.closed:
            raise InputError(f"The gallery {self.path.parent} is closed; open it again with Gallery.open.")

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """A snapshot, for the length of a with statement.

        Raises:
            SnapshotLost: at its end, where SQLite could not keep others from writing: what was read is void.
        """
        self.check_open()
        before = self._stamp()
        with self._translated(), self._engine.begin() as connection:
            yield Reader(connection)
        if before != self._stamp():
            raise SnapshotLost(f"{self.path} was changed by somebody while it was read; ask again.")

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """A transaction, committed durably at the end of the with statement unless it raises."""
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(faceprint_write=True)
            with connection.begin():
                writer = Writer(connection)
                yield writer
                writer.finish()

    @contextmanager
    def driver(self) -> Iterator[Any]:
        """SQLite's own connection, outside of any transaction."""
        with self._translated(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None  # a connection that is checked out always has one
            try:
                yield driver
            except sqlite3.OperationalError as error:
                raise OperationalError(None, None, error) from error
            except sqlite3.DatabaseError as error:
                raise DatabaseError(None, None, error) from error

    def vacuum(self) -> None:
        """Writes the file anew, into the log, so that deleted rows are on no page of it.

        `secure_delete` alone is not enough: SQLite leaves copies of a row behind when it moves rows
        between pages, and later zeros only the row where it last was.
        """
        with self.driver() as driver:
            driver.execute("VACUUM")

    def copy(self, target: Path) -> None:
        """Copies one snapshot of the database to a new file, durably; writers are not disturbed.

        The copy has no log beside it, so it is one file, also while it is read.

        Raises:
            StorageError: it cannot be copied.
            OSError: the copy cannot be made durable.
        """
        # A journal that an interrupted copy left would be played back into this one.
        for suffix in ("-journal", "-wal", "-shm"):
            journal = target.with_name(target.name + suffix)
            make_room(journal)
            journal.unlink(missing_ok=True)
        make_room(target)
        create(target, inherit=True).close()
        with self.driver() as driver:
            try:
                with closing(sqlite3.connect(target)) as copied:
                    driver.backup(copied)
                    copied.execute("PRAGMA journal_mode = DELETE")
            except sqlite3.Error as error:
                raise StorageError(f"{self.path} cannot be copied to {target}: {error}.") from error
        sync(target)

    def problems(self) -> list[str]:
        """What SQLite itself finds wrong with the file."""
        try:
            with self.driver() as driver:
                lines = [str(row[0]) for row in driver.execute("PRAGMA integrity_check")]
                astray = driver.execute("PRAGMA foreign_key_check").fetchall()
                lines += schema.misplaced(driver.execute)
        except (GalleryDamaged, StorageError) as error:
            if blames_machine(error):
                raise
            return [str(error)]
        problems = [line for line in lines if line != "ok"]
        return problems + [f"a row of {row[0]} refers to nothing" for row in astray]

    def upgrade_copies(self) -> list[Path]:
        """Copies that were taken of the database before it was brought up to date."""
        return sorted(self.path.parent.glob(f"{self.path.stem}-[0-9][0-9][0-9][0-9]{self.path.suffix}"))

    def _stamp(self) -> tuple[int, int] | None:
        """Changes when somebody writes; None where SQLite itself takes care of that."""
        if not _is_still(self.path):
            return None
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size

    def _version(self) -> str | None:
        with self._translated(), self._engine.connect() as connection:
            return _version(connection, self.path)

    def _check_schema(self, *, exact: bool) -> None:
        """Whether the database has the tables of a gallery and nothing else; see `database.schema`."""
        with self._translated(), self._engine.connect() as connection:
            _check_schema(connection, self.path, exact=exact)

    def _leftovers(self) -> list[str]:
        with self._translated(), self._engine.connect() as connection:
            return schema.leftovers(_execute(connection))

    def _drop_leftovers(self) -> None:
        """Removes what a migration left whose command was killed."""
        if names := self._leftovers():
            page_checksums.discard(self.path)
            with self._translated(), self._engine.begin() as connection:
                for name in names:
                    connection.exec_driver_sql(f'DROP TABLE "{name}"')

    def _upgrade(self) -> None:
        version = self._version()  # another process may have been quicker
        if version == SCHEMA_VERSION:
            return
        self._check_schema(exact=False)
        copy = self.path.with_name(f"{self.path.stem}-{version or '0000'}{self.path.suffix}")
        part = copy.with_suffix(".part")
        try:
            make_room(copy)  # before the database is read for nothing
            self.copy(part)
            os.replace(part, copy)
            sync(copy.parent)
        except OSError as error:
            raise StorageError(
                f"{self.path} has to be brought up to date and cannot be copied to "
                f"{error.filename2 or error.filename or copy} before: {why(error)}."
            ) from error
        # Migrations change pages and leave the revision as it is.
        page_checksums.discard(self.path)
        self._drop_leftovers()
        with self._translated(), self._engine.begin() as connection:
            _migrate(connection)
            _check_schema(connection, self.path, exact=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns SQLAlchemy's errors into ours."""
        self.check_open()
        try:
            yield
        except MemoryError as error:
            raise StorageError(f"The database {self.path} cannot be used: out of memory.") from error
        except OperationalError as error:
            if "locked" in str(error.orig):
                lock.check(self.path.parent)
            raise StorageError(
                f"The database {self.path} cannot be used: {error.orig}{_no_space(self.path)}."
            ) from error
        except (DatabaseError, UnicodeDecodeError, json.JSONDecodeError) as error:
            # The second where SQLite's own message quotes damaged bytes, the last where metadata are damaged.
            reason = error.orig if isinstance(error, DatabaseError) else error
            raise GalleryDamaged(
                f"{self.path} is not a gallery's database, or it is damaged ({reason}); "
                "restore it from a backup."
            ) from error


# https://www.sqlite.org/rescode.html: what the machine is to blame for, and not what is in the file ...
_MACHINE: Final = frozenset(
    (
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    )
)
# ... and the exceptions: a page that is cut off, or that the file system or a checksum says is not the same.
_NOT_MACHINE: Final = frozenset(
    (sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS, sqlite3.SQLITE_IOERR_DATA)
)


def blames_machine(error: BaseException | None) -> bool:
    """Whether an error was caused by the machine (disk full, no permission, too many open files, no memory).

    Such an error says nothing about what is in a file, so it is no finding of damage. A file that is missing,
    or a folder in its place, is one.
    """
    while error is not None:
        cause = error.orig if isinstance(error, DatabaseError) else error
        if isinstance(cause, sqlite3.Error):
            code = int(getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR))
            return code & 0xFF in _MACHINE and code not in _NOT_MACHINE
        if isinstance(error, OSError):
            return error.errno is not None and not is_no_file(error)
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def _no_space(path: Path) -> str:
    """Says that the disk is full where it is: SQLite calls that an I/O error in some places."""
    try:
        free = os.statvfs(path.parent)
    except OSError:
        return ""
    return f" ({os.strerror(errno.ENOSPC).lower()})" if free.f_bavail * free.f_frsize < _PAGE else ""


def check_no_link(path: Path) -> None:
    """Checks that a part of a gallery lies in it: others may write, and lock, what a link leads to.

    Raises:
        GalleryError: it is a symbolic link.
    """
    if path.is_symlink():
        raise GalleryError(
            f"{path} is a symbolic link, and a gallery that is written to must hold all its files itself; "
            f"put what it leads to in its place."
        )


def _check_beside(path: Path) -> None:
    """Checks the files that SQLite has beside a database: of others it says only that it cannot open one.

    Raises:
        GalleryError: one is a symbolic link, or no file.
    """
    for suffix in ("-wal", "-shm", "-journal"):
        beside = path.with_name(path.name + suffix)
        check_no_link(beside)
        if (other := other_than_file(beside)) is not None:
            raise GalleryError(
                f"{beside} is {other}, and SQLite keeps a file of its own there; move it away."
            )


def check_name(known: re.Pattern[str], name: object) -> None:
    """Checks a name of a file or a folder that a database states.

    Raises:
        GalleryDamaged: faceprint never writes such a name.
    """
    if not isinstance(name, str) or not known.fullmatch(name):
        raise GalleryDamaged(
            f"The gallery's database names a file {str(name)[:80]!r}, as faceprint never does; "
            "restore it from a backup that you trust."
        )


def utc_now() -> str:
    """ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _engine(path: Path, *, read_only: bool = False) -> Engine:
    if read_only:
        # Where it was decided that nobody can write, the next connection has to decide again.
        pool = QueuePool if os.access(path.parent, os.W_OK) else NullPool
        engine = create_engine("sqlite://", creator=lambda: _connect_to_read(path), poolclass=pool)
    else:
        # Not a URL in one string: in that a ? or a % of the path has a meaning.
        url = URL.create("sqlite", database=os.fspath(path))
        engine = create_engine(url, connect_args={"timeout": 30}, json_serializer=to_json)
    event.listen(engine, "connect", _prepare_to_read if read_only else _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _connect_to_read(path: Path) -> sqlite3.Connection:
    # Not merely `query_only`: the last of such connections to close would still copy the log.
    options = "mode=ro&immutable=1" if _is_still(path) else "mode=ro"
    uri = f"file:{quote(os.fsencode(path.absolute()))}?{options}"
    return sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)


def _is_still(path: Path) -> bool:
    """Whether a database lies where this user cannot write, and nobody else has it open for writing.

    WAL needs a file beside the database even for reading. Where it is not there and cannot be made, SQLite
    reads the database only when it is told that nobody changes it.
    """
    log = path.with_name(f"{path.name}-wal")
    return not os.access(path.parent, os.W_OK) and not (log.exists() and log.stat().st_size > 0)


def _prepare(driver: Any, _record: object) -> None:
    # The driver's own idea of transactions is older than WAL; SQLAlchemy's documentation says to
    # switch it off and to emit BEGIN oneself.
    driver.isolation_level = None
    _distrust(driver)
    driver.execute("PRAGMA journal_mode = WAL")
    driver.execute("PRAGMA synchronous = FULL")
    driver.execute("PRAGMA foreign_keys = ON")
    # Deleted rows are overwritten with zeros and do not linger on free pages.
    driver.execute("PRAGMA secure_delete = ON")
    # The log is copied into the database by `page_checksums.checkpoint`, which writes down the pages.
    driver.execute("PRAGMA wal_autocheckpoint = 0")
    # The index of SHA-256 is met at random: of a million faces it has 90 MB. Taken only as it is needed.
    driver.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")


def _prepare_to_read(driver: Any, _record: object) -> None:
    driver.isolation_level = None
    _distrust(driver)
    driver.execute("PRAGMA query_only = ON")


def _distrust(driver: Any) -> None:
    """Whoever made the database may have been anybody: nothing in it is run, and broken cells are noticed."""
    driver.execute("PRAGMA trusted_schema = OFF")
    driver.execute("PRAGMA cell_size_check = ON")


def _execute(connection: Connection) -> Callable[[str], Sequence[Any]]:
    return lambda statement: connection.exec_driver_sql(statement).all()


def _check_schema(connection: Connection, path: Path, *, exact: bool, only: str | None = None) -> None:
    if found := schema.problems(_execute(connection), exact=exact, only=only):
        raise GalleryDamaged(
            f"{path} is not a database as faceprint makes it: {found[0]}; restore it from a backup."
        )


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("faceprint_write", False)
    # A reader's snapshot begins with its first SELECT; a writer takes its place at once.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _version(connection: Connection, path: Path) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        raise GalleryDamaged(f"{path} is a database, but not a gallery's; restore it from a backup.")
    _check_schema(connection, path, exact=False, only=schema.VERSION_TABLE)
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


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.fspath(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _MIGRATING:
        command.upgrade(config, "head")
