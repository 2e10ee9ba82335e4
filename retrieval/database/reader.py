"""Reader: typed queries on one snapshot of a gallery's tables."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Column, ColumnElement, Connection, Select, Table, func, select

from retrieval.database.filter_sql import LIST_LENGTH, is_below, parts, select_faces
from retrieval.database.filters import Where
from retrieval.database.metadata import Metadata
from retrieval.database.photo_keys import EPOCH_SPAN, PREFIX_BITS, key_of, prefix_of
from retrieval.database.records import (
    RESTORE,
    AuditEntry,
    BasisRow,
    Calibration,
    CodesRow,
    DoubtKey,
    DoubtState,
    Face,
    FaceRegion,
    GalleryRow,
    Generation,
    KnownFile,
    Merge,
    MergedLabel,
    Person,
    Receipt,
    Remains,
    Segment,
    StoredDoubt,
    StoredPhoto,
    checked,
)
from retrieval.database.server_tables import model_file_table, vectors_table
from retrieval.database.tables import (
    alias_table,
    audit_table,
    basis_table,
    calibration_table,
    codes_table,
    doubt_face_table,
    doubt_identity_table,
    doubt_table,
    erasure_table,
    face_table,
    file_table,
    gallery_table,
    generation_table,
    host_table,
    identity_table,
    merge_face_table,
    merge_label_table,
    merge_name_table,
    merge_table,
    merger_table,
    photo_table,
    segment_table,
    suspect_table,
    tombstone_table,
)
from retrieval.errors import GalleryDamaged
from retrieval.system.files import Stamp

_NO_ROW: Final = f"The gallery's database has lost its own row; {RESTORE}."

# An upper bound on a model's dimension: a larger value is damage.
_MAX_DIMENSION: Final = 1 << 20

# Join condition: the face is in a range of suspects.
IS_SUSPECT: Final = (face_table.c.id >= suspect_table.c.first_id) & (face_table.c.id < suspect_table.c.end_id)

_REVISION: Final = select(gallery_table.c.revision)

_FILES: Final = select(
    file_table.c.path, file_table.c.photo_id, file_table.c.size, file_table.c.mtime_ns, file_table.c.inode
)

# The faces at each path; those of a path follow each other, by id.
_KNOWN_FILES: Final = (
    select(
        file_table.c.path,
        file_table.c.photo_id,
        face_table.c.id,
        identity_table.c.name,
        face_table.c.metadata,
        file_table.c.size,
        file_table.c.mtime_ns,
        file_table.c.inode,
    )
    .select_from(
        file_table.join(face_table, face_table.c.photo_id == file_table.c.photo_id).outerjoin(identity_table)
    )
    .order_by(file_table.c.path, face_table.c.id)
)

# Faces with what is known of them; those of a photo follow each other, by id.
_FACES: Final = (
    select(
        photo_table.c.id,
        photo_table.c.closed,
        photo_table.c.sha256,
        face_table.c.id,
        identity_table.c.name,
        face_table.c.enrolled_at,
        face_table.c.metadata,
        face_table.c.box,
        face_table.c.landmarks,
        face_table.c.score,
        face_table.c.sharpness,
    )
    .select_from(face_table.join(photo_table).outerjoin(identity_table))
    .order_by(photo_table.c.id, face_table.c.id)
)

# The photos with one of some prefixes, looked up in one epoch after the other: see `photo_keys`.
# UNION and not UNION ALL: in a damaged database, keys that are no integers lead back to an earlier epoch.
_BY_KEY: Final = f"""
    WITH RECURSIVE epoch (first) AS (
        SELECT min(sha256_key) >> {PREFIX_BITS} << {PREFIX_BITS} FROM photo
        UNION
        SELECT (SELECT min(sha256_key) FROM photo WHERE sha256_key >= first + {EPOCH_SPAN})
               >> {PREFIX_BITS} << {PREFIX_BITS}
        FROM epoch WHERE first IS NOT NULL
    )
    SELECT photo.id, photo.sha256
    FROM epoch CROSS JOIN json_each(?) AS prefix
    CROSS JOIN photo ON photo.sha256_key = epoch.first + prefix.value
    WHERE epoch.first IS NOT NULL
"""


class Reader:
    """One snapshot of the tables: later commits are not seen."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # Rows that a change asks for several times: there are some hundreds of them at ten million faces.
        self._kept_segments: tuple[Segment, ...] | None = None
        self._kept_codes: tuple[CodesRow, ...] | None = None

    def revision(self) -> int:
        """Returns the revision, which rises with every transaction that changes anything."""
        revision = self._connection.execute(_REVISION).scalar_one_or_none()
        if revision is None:
            raise GalleryDamaged(_NO_ROW)
        return int(revision)

    def gallery(self) -> GalleryRow:
        """Returns the gallery's own row."""
        excluded = ("id", "revision_check")
        columns = [column for column in gallery_table.c if column.name not in excluded]
        row = self._connection.execute(select(*columns)).one_or_none()
        if row is None:
            raise GalleryDamaged(_NO_ROW)
        return checked(GalleryRow(*row))

    def serving_generation(self) -> Generation:
        """Returns the generation that answers searches.

        Raises:
            GalleryDamaged: its row is missing.
        """
        serving = self.generations().get(self.gallery().generation_id)
        if serving is None:
            raise GalleryDamaged(f"The gallery's database lacks the row of its model; {RESTORE}.")
        return serving

    def counter_problems(self) -> list[str]:
        """Returns the problems of the counters and id ranges, each as a sentence without its full stop.

        A wrong counter would assign an id that is in use. A range beyond the last assigned id would mark the
        vectors of later faces as checked, or as suspect. It takes as long for any number of faces.
        """
        row = self.gallery()
        counters = {
            face_table: row.next_face_id,
            photo_table: row.next_face_id,
            identity_table: row.next_identity_id,
            segment_table: row.next_segment_id,
            generation_table: row.next_generation_id,
            basis_table: row.next_basis_id,
        }
        too_low = [
            f"the next number of a {table.name} is {following}, which is not above all that are there"
            for table, following in counters.items()
            if (self._connection.execute(select(func.max(table.c.id))).scalar_one() or 0) >= following
        ]
        return [
            *too_low,
            *self._merge_problems(row.next_identity_id),
            *self._out_of_range(row.next_face_id),
        ]

    def row_problems(self) -> list[str]:
        """Returns the problems of photos and of faces' places in them, as `counter_problems` does.

        It reads all of them, and sorts all photos.
        """
        return [*self._faceless_photos(), *self._region_problems(), *self._key_problems()]

    def _faceless_photos(self) -> list[str]:
        """Returns a clause for each photo without a face, or with an id that is not of its first face."""
        alive = select(face_table.c.id).where(face_table.c.photo_id == photo_table.c.id)
        # No `min`: PostgreSQL would look for it among all faces, until it has counted those of a new gallery.
        earlier = alive.where(face_table.c.id < photo_table.c.id)
        wrong = select(photo_table.c.id).where(~alive.exists() | earlier.exists())
        numbers = self._connection.execute(wrong.order_by(photo_table.c.id)).scalars()
        return [
            f"the photo with number {number} has no face, or a number that is not that of its first face"
            for number in numbers
        ]

    def _key_problems(self) -> list[str]:
        """Returns a clause for each photo that is not found by its SHA-256, or that is stored twice."""
        columns = (photo_table.c.id, photo_table.c.sha256, photo_table.c.sha256_key)
        rows = self._connection.execute(select(*columns).order_by(photo_table.c.id))
        wrong = [number for number, sha256, key in rows if key != key_of(number, sha256)]
        return [
            *(
                f"the photo with number {number} has the key of another SHA-256, or of another number"
                for number in wrong
            ),
            *self.photo_duplicates(),
        ]

    def photo_duplicates(self) -> list[str]:
        """Returns a clause for each SHA-256 that several photos have; sorts all of them."""
        several = (
            select(photo_table.c.sha256).group_by(photo_table.c.sha256).having(func.count() > 1).subquery()
        )
        query = select(photo_table.c.sha256, photo_table.c.id).join(
            several, several.c.sha256 == photo_table.c.sha256
        )
        found: dict[str, list[int]] = {}
        for sha256, number in self._connection.execute(query.order_by(photo_table.c.id)):
            found.setdefault(sha256, []).append(number)
        return [
            f"the photos with numbers {', '.join(map(str, numbers))} have the same SHA-256"
            for numbers in found.values()
        ]

    def _region_problems(self) -> list[str]:
        columns = (face_table.c.box, face_table.c.landmarks, face_table.c.score, face_table.c.sharpness)
        query = select(face_table.c.id, *columns).where(face_table.c.box != "").order_by(face_table.c.id)
        return [
            f"the place of face {number} in its photo is not one that faceprint writes"
            for number, *region in self._connection.execute(query)
            if not _is_region(*region)
        ]

    def _merge_problems(self, end: int) -> list[str]:
        """Returns the problems of merges that can be undone: of identities that exist, or never existed."""
        alive = select(identity_table.c.id).where(identity_table.c.id == merge_table.c.identity_id)
        merged = select(merger_table.c.identity_id).where(
            merger_table.c.identity_id == merge_table.c.identity_id
        )
        faces = select(merge_face_table.c.face_id).where(merge_face_table.c.merge_id == merge_table.c.id)
        wrong = select(merge_table.c.id).where(
            alive.exists()
            | ~merged.exists()
            | ~faces.exists()
            | (merge_table.c.identity_id >= end)
            | (merge_table.c.into_id >= end)
        )
        return [
            f"merge {number} has no faces, or not the identities of a merge"
            for number in self._connection.execute(wrong.order_by(merge_table.c.id)).scalars()
        ]

    def _out_of_range(self, end: int) -> list[str]:
        """Returns the problems of `checked_before` and `suspects`: ids outside 0 to `end`, the next id."""
        checked = generation_table.c.checked_before
        invalid = select(generation_table.c.id, checked).where((checked < 0) | (checked > end))
        problems = [
            f"the faces of model {number} are compared up to number {before}, and the next face is {end}"
            for number, before in self._connection.execute(invalid.order_by("id"))
        ]
        first, last = suspect_table.c.first_id, suspect_table.c.end_id
        outside = (first < 0) | (first >= last) | (last > end)
        suspects = select(suspect_table.c.generation_id, first, last).where(outside)
        return problems + [
            f"the suspects of model {number} are from number {a} up to {b}, and the next face is {end}"
            for number, a, b in self._connection.execute(suspects.order_by("generation_id", "first_id"))
        ]

    def generations(self) -> dict[int, Generation]:
        """Returns all generations by id."""
        rows = self._connection.execute(select(generation_table).order_by(generation_table.c.id))
        generations = {row[0]: checked(Generation(*row)) for row in rows}
        for generation in generations.values():
            if not 1 <= generation.dimension <= _MAX_DIMENSION:
                raise GalleryDamaged(
                    f"The gallery's database states a model of {generation.dimension} dimensions; {RESTORE}."
                )
        return generations

    def vectors_address(self, generation: int) -> str:
        """Returns where the vectors of a generation are; only in a database on a server.

        Raises:
            GalleryDamaged: it is not stored.
        """
        query = select(vectors_table.c.address).where(vectors_table.c.generation_id == generation)
        found: str | None = self._connection.execute(query).scalar_one_or_none()
        if found is None:
            raise GalleryDamaged(f"The gallery's database does not say where its vectors are; {RESTORE}.")
        return found

    def model_files(self, generation: int) -> list[str]:
        """Returns the names of the files of a generation's model; only in a database on a server."""
        names = select(model_file_table.c.name).where(model_file_table.c.generation_id == generation)
        return list(self._connection.execute(names.distinct().order_by(model_file_table.c.name)).scalars())

    def model_file(self, generation: int, name: str) -> Iterator[bytes]:
        """Yields a file of a generation's model, in parts."""
        table = model_file_table.c
        this = select(table.data).where(table.generation_id == generation, table.name == name)
        for number in itertools.count():
            part = self._connection.execute(this.where(table.part == number)).scalar_one_or_none()
            if part is None:
                return
            yield part

    def suspects(self, generation: int) -> list[tuple[int, int]]:
        """Returns the id ranges (first, end) of faces that a damaged model may have embedded, ascending."""
        query = select(suspect_table.c.first_id, suspect_table.c.end_id)
        query = query.where(suspect_table.c.generation_id == generation)
        return [(first, end) for first, end in self._connection.execute(query.order_by("first_id"))]

    def suspect_ids(self, generation: int) -> list[int]:
        """Returns the ids of the existing faces in `suspects`, ascending."""
        query = select(face_table.c.id).join(suspect_table, IS_SUSPECT).distinct().order_by(face_table.c.id)
        query = query.where(suspect_table.c.generation_id == generation)
        return list(self._connection.execute(query).scalars())

    def segments(self, generation: int | None = None) -> list[Segment]:
        """Returns the segments of one generation or of all, oldest first."""
        if self._kept_segments is None:
            query = select(segment_table).order_by(segment_table.c.id)
            self._kept_segments = tuple(checked(Segment(*row)) for row in self._connection.execute(query))
        return [one for one in self._kept_segments if generation in (None, one.generation_id)]

    def bases(self, generation: int | None = None) -> dict[int, BasisRow]:
        """Returns the bases of one generation or of all, by id, oldest first."""
        query = select(basis_table).order_by(basis_table.c.id)
        if generation is not None:
            query = query.where(basis_table.c.generation_id == generation)
        return {
            row["id"]: checked(BasisRow(**{**row, "detail": json.loads(row["detail"])}))
            for row in self._connection.execute(query).mappings()
        }

    def codes(self) -> dict[int, CodesRow]:
        """Returns the rows of code files, by segment id."""
        if self._kept_codes is None:
            rows = self._connection.execute(select(codes_table))
            self._kept_codes = tuple(checked(CodesRow(*row)) for row in rows)
        return {one.segment_id: one for one in self._kept_codes}

    def calibration(self, generation: Generation) -> Calibration | None:
        """Returns the calibration of a generation; None if it is not calibrated."""
        query = select(calibration_table).where(calibration_table.c.generation_id == generation.id)
        row = self._connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        fields = {name: value for name, value in row.items() if name != "generation_id"}
        fields |= {"generation": generation.id, "fingerprint": generation.fingerprint}
        try:
            points = json.loads(row["points"])
            if not isinstance(points, list):
                raise TypeError("points must be a list")
            return checked(Calibration.of({**fields, "points": points}))
        except (TypeError, KeyError, AttributeError) as error:
            raise GalleryDamaged(f"The gallery's calibration cannot be read; {RESTORE}.") from error

    def count(self) -> int:
        """Returns the number of faces."""
        return self._connection.execute(select(func.count()).select_from(face_table)).scalar_one()

    def count_of_photos(self, photo_ids: Iterable[int]) -> int:
        """Returns the number of faces of some photos."""
        count = select(func.count()).select_from(face_table)
        return sum(
            self._connection.execute(count.where(face_table.c.photo_id.in_(part))).scalar_one()
            for part in parts(photo_ids)
        )

    def file_count(self) -> int:
        """Returns the number of stored paths."""
        return self._connection.execute(select(func.count()).select_from(file_table)).scalar_one()

    def faces(self, ids: Iterable[int]) -> dict[int, Face]:
        """Returns faces by id, ascending; unknown ids are absent."""
        found = {
            face.id: face
            for part in parts(ids)
            for photo in self._photos_where(face_table.c.id.in_(part))
            for face in photo.faces
        }
        return dict(sorted(found.items()))

    def photos_by_sha256(self, digests: Iterable[str]) -> dict[str, StoredPhoto]:
        """Returns photos by the SHA-256 of their bytes; unknown digests are absent."""
        ids = self.photo_ids_by_sha256(digests)
        return {photo.sha256: photo for photo in self.photos(ids.values()).values()}

    def photo_ids_by_sha256(self, digests: Iterable[str]) -> dict[str, int]:
        """Returns the ids of photos by the SHA-256 of their bytes; unknown digests are absent."""
        wanted = set(digests)
        if not wanted:
            return {}
        if self._connection.dialect.name == "sqlite":
            prefixes = json.dumps(sorted(set(map(prefix_of, wanted))))
            rows = self._connection.exec_driver_sql(_BY_KEY, (prefixes,))
            return {sha256: number for number, sha256 in rows if sha256 in wanted}
        query = select(photo_table.c.id, photo_table.c.sha256)
        return {
            sha256: number
            for part in parts(wanted)
            for number, sha256 in self._connection.execute(query.where(photo_table.c.sha256.in_(part)))
        }

    def photos(self, ids: Iterable[int]) -> dict[int, StoredPhoto]:
        """Returns photos by id; unknown ids are absent."""
        return {photo.id: photo for photo in self._photos(photo_table.c.id, ids)}

    def all_faces(self, size: int = 4096) -> Iterator[list[Face]]:
        """Yields all faces, ascending by id, in lists of at most `size`."""
        last = 0
        while True:
            query = select(face_table.c.id).where(face_table.c.id > last).order_by(face_table.c.id)
            ids = list(self._connection.execute(query.limit(size)).scalars())
            if not ids:
                return
            yield list(self.faces(ids).values())
            last = ids[-1]

    def face_measures(self) -> NDArray[np.float64]:
        """Returns (n, 4) float64 by face id: id, shorter side in pixels, sharpness and yaw to either side.

        Faces without a place in their photo, or without a sharpness, are left out.
        """
        columns = (face_table.c.id, face_table.c.box, face_table.c.sharpness, face_table.c.yaw)
        query = select(*columns).where(face_table.c.landmarks.is_not(None)).order_by(face_table.c.id)
        query = query.where(face_table.c.sharpness.is_not(None), face_table.c.yaw.is_not(None))
        rows = [
            (number, min(json.loads(box)[2:]), sharpness, abs(yaw))
            for number, box, sharpness, yaw in self._connection.execute(query)
        ]
        return np.array(rows, np.float64).reshape(-1, 4)

    def has_regions(self) -> bool:
        """Returns whether any face has a region."""
        query = select(face_table.c.id).where(face_table.c.box != "").limit(1)
        return self._connection.execute(query).first() is not None

    def in_shared_photos(self, ids: Iterable[int]) -> set[int]:
        """Returns those of some faces that are not the only faces of their photos."""
        other = face_table.alias()
        query = select(face_table.c.id).where(
            select(other.c.id)
            .where(other.c.photo_id == face_table.c.photo_id, other.c.id != face_table.c.id)
            .exists()
        )
        return {
            number
            for part in parts(ids)
            for number in self._connection.execute(query.where(face_table.c.id.in_(part))).scalars()
        }

    def face_ids(self) -> Iterator[int]:
        """Yields the ids of all faces, ascending."""
        yield from self._connection.execute(select(face_table.c.id).order_by(face_table.c.id)).scalars()

    def last_face_id(self) -> int:
        """Returns the largest id of a face; 0 without faces."""
        return self._connection.execute(select(func.max(face_table.c.id))).scalar_one() or 0

    def face_ids_of(self, identity: str) -> list[int]:
        """Returns the ids of an identity's faces, ascending; the identity is given by its current name."""
        rows = self._connection.execute(
            select(face_table.c.id)
            .join(identity_table)
            .where(identity_table.c.name == identity)
            .order_by(face_table.c.id)
        )
        return list(rows.scalars())

    def face_ids_of_identities(self, identity_ids: Iterable[int]) -> list[int]:
        """Returns the ids of the faces of some identities, given by id."""
        query = select(face_table.c.id)
        return [
            number
            for part in parts(identity_ids)
            for number in self._connection.execute(query.where(face_table.c.identity_id.in_(part))).scalars()
        ]

    def identities_of_faces(self, face_ids: Iterable[int]) -> dict[int, int]:
        """Returns the identity id of each face, by face id; faces without an identity are absent."""
        query = select(face_table.c.id, face_table.c.identity_id).where(face_table.c.identity_id.is_not(None))
        return {
            face_id: identity_id
            for part in parts(face_ids)
            for face_id, identity_id in self._connection.execute(query.where(face_table.c.id.in_(part)))
        }

    def identity_of_every_face(self) -> NDArray[np.int64]:
        """Returns (n, 2) int64: face id and identity id of each face with an identity, by face id."""
        query = select(face_table.c.id, face_table.c.identity_id).where(face_table.c.identity_id.is_not(None))
        rows = self._connection.execute(query.order_by(face_table.c.id)).all()
        return np.array([tuple(row) for row in rows], np.int64).reshape(-1, 2)

    def names_of_identities(self, identity_ids: Iterable[int]) -> dict[int, str]:
        """Returns the current names of identities, by id."""
        query = select(identity_table.c.id, identity_table.c.name)
        return {
            number: name
            for part in parts(identity_ids)
            for number, name in self._connection.execute(query.where(identity_table.c.id.in_(part)))
        }

    def face_ids_where(self, where: Where) -> NDArray[np.int64]:
        """Returns the ids of the faces that match a filter, ascending."""
        return select_faces(self._connection, where)

    def identity_metadata(self, names: Iterable[str]) -> dict[str, Metadata]:
        """Returns the metadata of identities, by the given names, which may be current or former.

        Unknown names are absent; an identity without metadata has an empty object.
        """
        return {name: metadata for name, (_, metadata) in self.identities_named(names).items()}

    def identities_named(self, names: Iterable[str]) -> dict[str, tuple[int, Metadata]]:
        """Returns ids and metadata of identities, by the given names, which may be current or former."""
        current = select(identity_table.c.name, identity_table.c.id, identity_table.c.metadata)
        former = select(alias_table.c.name, identity_table.c.id, identity_table.c.metadata).select_from(
            alias_table.join(identity_table)
        )
        return {
            name: (number, metadata or {})
            for part in parts(names)
            for query in (
                former.where(alias_table.c.name.in_(part)),
                current.where(identity_table.c.name.in_(part)),
            )
            for name, number, metadata in self._connection.execute(query)
        }

    def names_of(self, identity_ids: Iterable[int]) -> set[str]:
        """Returns all current and former names of some identities, given by id."""
        current = select(identity_table.c.name)
        former = select(alias_table.c.name)
        return {
            name
            for part in parts(identity_ids)
            for query in (
                current.where(identity_table.c.id.in_(part)),
                former.where(alias_table.c.identity_id.in_(part)),
            )
            for name in self._connection.execute(query).scalars()
        }

    def identity_id(self, name: str) -> int | None:
        """Returns the id of the identity with this current name; None without one."""
        query = select(identity_table.c.id).where(identity_table.c.name == name)
        return self._connection.execute(query).scalar_one_or_none()

    def identity_names(self) -> list[str]:
        """Returns the current names of all identities, oldest first."""
        query = select(identity_table.c.name).order_by(identity_table.c.id)
        return list(self._connection.execute(query).scalars())

    def current_names(self, names: Iterable[str]) -> dict[str, str]:
        """Returns current names by former names; names that are no aliases are absent."""
        query = select(alias_table.c.name, identity_table.c.name).select_from(
            alias_table.join(identity_table)
        )
        return {
            old: new
            for part in parts(names)
            for old, new in self._connection.execute(query.where(alias_table.c.name.in_(part)))
        }

    def identities(self) -> list[tuple[str | None, int]]:
        """Returns (identity, number of faces), descending by number of faces, then by name."""
        number = func.count().label("number")
        rows = self._connection.execute(
            select(identity_table.c.name, number)
            .select_from(face_table.outerjoin(identity_table))
            .group_by(identity_table.c.name)
            .order_by(number.desc(), identity_table.c.name.nulls_first())
        )
        return [(name, count) for name, count in rows]

    def people(self, *, after: str = "", limit: int) -> list[Person]:
        """Returns at most `limit` identities, by name, from the first name behind `after` on."""
        page = select(identity_table.c.id).where(identity_table.c.name > after)
        ids = self._connection.execute(page.order_by(identity_table.c.name).limit(limit)).scalars().all()
        found = self.people_by_id(ids)
        return [found[number] for number in ids]

    def people_by_id(self, ids: Iterable[int]) -> dict[int, Person]:
        """Returns identities by id; unknown ids are absent."""
        columns = (identity_table.c.id, identity_table.c.name, identity_table.c.metadata)
        query = select(*columns, func.count(face_table.c.id), func.min(face_table.c.id))
        query = query.select_from(identity_table.outerjoin(face_table)).group_by(identity_table.c.id)
        return {
            number: Person(number, name, faces, first, metadata or {})
            for part in parts(ids)
            for number, name, metadata, faces, first in self._connection.execute(
                query.where(identity_table.c.id.in_(part))
            )
        }

    def face_ids_after(self, last: int, limit: int) -> list[int]:
        """Returns the ids of at most `limit` faces, ascending, from the first id above `last` on."""
        query = select(face_table.c.id).where(face_table.c.id > last).order_by(face_table.c.id)
        return list(self._connection.execute(query.limit(limit)).scalars())

    def unnamed_face_ids(self, *, after: int = 0, limit: int) -> list[int]:
        """Returns the ids of at most `limit` faces without an identity, ascending, from behind `after` on."""
        query = select(face_table.c.id).where(face_table.c.identity_id.is_(None), face_table.c.id > after)
        return list(self._connection.execute(query.order_by(face_table.c.id).limit(limit)).scalars())

    def files(self, paths: Iterable[str]) -> dict[str, int]:
        """Returns the photo id of each path; unknown paths are absent."""
        return {path: number for path, (number, _) in self.stamped_files(paths).items()}

    def known_files(self, paths: Iterable[str]) -> dict[str, KnownFile]:
        """Returns the record of each path; unknown paths are absent."""
        known = {}
        for part in parts(paths):
            rows = self._connection.execute(_KNOWN_FILES.where(file_table.c.path.in_(part))).all()
            for path, of_path in groupby(rows, key=itemgetter(0)):
                faces = list(of_path)
                _, photo_id, *_, size, mtime_ns, inode = faces[0]
                known[path] = KnownFile(
                    photo_id,
                    tuple(row[2] for row in faces),
                    tuple(row[3] for row in faces),
                    tuple(row[4] or {} for row in faces),
                    _stamp(size, mtime_ns, inode),
                )
        return known

    def stamped_files(self, paths: Iterable[str]) -> dict[str, tuple[int, Stamp | None]]:
        """Returns the photo id of each path and the stamp of its file; unknown paths are absent."""
        return {
            path: (number, _stamp(*stamp))
            for part in parts(paths)
            for path, number, *stamp in self._connection.execute(_FILES.where(file_table.c.path.in_(part)))
        }

    def all_files(self) -> Iterator[tuple[str, int, Stamp | None]]:
        """Yields each known path with its photo id and the stamp of its file, or None."""
        for path, number, *stamp in self._connection.execute(_FILES):
            yield path, number, _stamp(*stamp)

    def files_below(self, root: str) -> dict[str, tuple[int, Stamp | None]]:
        """Returns photo id and stamp of each known path that is `root` or below it, oldest first."""
        query = _FILES.where(is_below(file_table.c.path, root)).order_by(file_table.c.id)
        return {path: (number, _stamp(*stamp)) for path, number, *stamp in self._connection.execute(query)}

    def hosts(self) -> frozenset[str]:
        """Returns the hosts that enrolled photos were fetched from, as `paths.host_of` spells them."""
        return frozenset(self._connection.execute(select(host_table.c.name)).scalars())

    def without_files(self, photo_ids: Iterable[int]) -> list[int]:
        """Returns the ids of the faces of those photos that have no path (orphaned faces)."""
        query = select(face_table.c.id).outerjoin(file_table, file_table.c.photo_id == face_table.c.photo_id)
        query = query.where(file_table.c.id.is_(None))
        # Sorted here: with an order SQLite would go through all faces by their ids.
        return sorted(
            number
            for part in parts(photo_ids)
            for number in self._connection.execute(query.where(face_table.c.photo_id.in_(part))).scalars()
        )

    def merged_into(self, identity_id: int) -> list[int]:
        """Returns the ids of the identities that were merged into one, directly or indirectly."""
        merged, pending = [], [identity_id]
        while pending:
            query = select(merger_table.c.identity_id).where(merger_table.c.into_id == pending.pop())
            direct = list(self._connection.execute(query).scalars())
            merged += direct
            pending += direct
        return sorted(merged)

    def living(self, identity_id: int) -> int | None:
        """Returns the id of the identity that has the faces of one, which may be merged; None without any."""
        query = select(merger_table.c.into_id)
        passed: set[int] = set()
        while identity_id not in passed:
            if self.names_of_identities([identity_id]):
                return identity_id
            passed.add(identity_id)
            merged = query.where(merger_table.c.identity_id == identity_id)
            identity_id = self._connection.execute(merged).scalar_one_or_none() or identity_id
        return None

    def merges(self, *, before: int | None = None, limit: int | None = None) -> list[Merge]:
        """Returns the merges that can be undone, newest first: at most `limit`, with ids below `before`."""
        query = select(merge_table.c.id).order_by(merge_table.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(merge_table.c.id < before)
        ids = list(self._connection.execute(query).scalars())
        found = self.merges_by_id(ids)
        return [found[number] for number in ids]

    def merges_by_id(self, ids: Iterable[int]) -> dict[int, Merge]:
        """Returns merges that can be undone, by id; others are absent."""
        return {merge.id: merge for part in parts(ids) for merge in self._merges_of(merge_table.c.id, part)}

    def merges_into(self, identity_id: int) -> list[Merge]:
        """Returns the merges into an identity, directly or indirectly, that can be undone, newest first."""
        into = [identity_id, *self.merged_into(identity_id)]
        found = [one for part in parts(into) for one in self._merges_of(merge_table.c.into_id, part)]
        return sorted(found, key=lambda one: -one.id)

    def merge_of(self, identity_id: int) -> Merge | None:
        """Returns the merge of an identity into another one; None without one that can be undone."""
        return next(self._merges_of(merge_table.c.identity_id, [identity_id]), None)

    def merged_faces(self, merge_id: int) -> dict[int, int | None]:
        """Returns the identity id of each existing face that moved with a merge, by face id, ascending."""
        query = select(face_table.c.id, face_table.c.identity_id).join(merge_face_table)
        query = query.where(merge_face_table.c.merge_id == merge_id).order_by(face_table.c.id)
        return dict(iter(self._connection.execute(query)))

    def merged_labels(self, merge_id: int) -> list[MergedLabel]:
        """Returns the outputs of models that got another label by a merge."""
        columns = (merge_label_table.c.fingerprint, merge_label_table.c.output, merge_label_table.c.photos)
        query = select(*columns).where(merge_label_table.c.merge_id == merge_id).order_by(*columns[:2])
        return [
            MergedLabel(fingerprint, output, tuple((part, name) for part, name in _texts(photos, 2)))
            for fingerprint, output, photos in self._connection.execute(query)
        ]

    def remains(self, merge: Merge) -> Remains | None:
        """Returns what of a merged identity the other one still has; None if that one is gone."""
        owner = self.living(merge.into_id)
        if owner is None:
            return None
        today = self.people_by_id([owner])[owner].metadata
        faces = [face for face, identity in self.merged_faces(merge.id).items() if identity == owner]
        own = (merge.name, *merge.former_names)
        names = {name for name, (number, _) in self.identities_named(own).items() if number == owner}
        keys = {key for key in merge.filled if key in today and today[key] == merge.metadata.get(key)}
        name = self.names_of_identities([owner])[owner]
        return Remains(owner, tuple(faces), frozenset(names - {name}), frozenset(keys))

    def _merges_of(self, column: Column[Any], ids: Iterable[int]) -> Iterator[Merge]:
        """Yields the merges with one of some values in a column, oldest first."""
        rows = self._connection.execute(
            select(merge_table).where(column.in_(list(ids))).order_by(merge_table.c.id)
        )
        names = select(merge_name_table.c.name).order_by(merge_name_table.c.name)
        last = select(merge_table.c.name)
        for row in rows.mappings().all():
            today = self.names_of_identities([row["into_id"]])
            merged = self._connection.execute(last.where(merge_table.c.identity_id == row["into_id"]))
            into = today.get(row["into_id"]) or merged.scalar_one_or_none() or ""
            former = self._connection.execute(names.where(merge_name_table.c.merge_id == row["id"]))
            filled = tuple(key for (key,) in _texts(row["filled"], 1))
            fields = {**row, "metadata": row["metadata"] or {}, "filled": filled}
            yield checked(Merge(**fields, into=into, former_names=tuple(former.scalars())))

    def read_decisions(self) -> None:
        """Reads all merges and doubts.

        Raises:
            GalleryDamaged: one cannot be read.
        """
        for merge in self.merges():
            self.merged_labels(merge.id)
        self.doubts(self.doubt_states())

    def doubt_states(self) -> dict[str, DoubtState]:
        """Returns the state of each stored doubt, by its id."""
        rows = self._connection.execute(select(doubt_table.c.id, doubt_table.c.state))
        return {number: _doubt_state(state) for number, state in rows}

    def doubt_order(self) -> list[tuple[DoubtState, int | None, str]]:
        """Returns state, place in the last audit and id of each stored doubt."""
        columns = (doubt_table.c.state, doubt_table.c.place, doubt_table.c.id)
        rows = self._connection.execute(select(*columns))
        return [(_doubt_state(state), place, number) for state, place, number in rows]

    def fallen_doubts(self) -> set[str]:
        """Returns the ids of the doubts that stand no more, as of `StoredDoubt.stands`."""
        living = select(identity_table.c.id).where(identity_table.c.id == doubt_identity_table.c.identity_id)
        gone = select(doubt_identity_table.c.doubt_id).where(~living.exists())
        moved = select(doubt_face_table.c.doubt_id).join(face_table)
        moved = moved.where(doubt_face_table.c.doubted == 1)
        moved = moved.where(face_table.c.identity_id.is_distinct_from(doubt_face_table.c.identity_id))
        return {number for query in (gone, moved) for number in self._connection.execute(query).scalars()}

    def doubts(self, ids: Iterable[str]) -> dict[str, StoredDoubt]:
        """Returns stored doubts by id; unknown ids are absent.

        Raises:
            GalleryDamaged: one cannot be read.
        """
        found, fallen = {}, self.fallen_doubts()
        for part in parts(ids):
            faces: dict[str, dict[int, list[int]]] = {}
            columns = (doubt_face_table.c.doubt_id, doubt_face_table.c.part, doubt_face_table.c.face_id)
            shown = select(*columns).where(doubt_face_table.c.doubt_id.in_(part))
            for number, group, face in self._connection.execute(shown.order_by("part", "place")):
                faces.setdefault(number, {}).setdefault(group, []).append(face)
            rows = self._connection.execute(select(doubt_table).where(doubt_table.c.id.in_(part)))
            for row in rows.mappings():
                groups = tuple(tuple(group) for group in faces.get(row["id"], {}).values())
                found[row["id"]] = _stored_doubt(row, groups, stands=row["id"] not in fallen)
        return found

    def last_logged(self, action: str) -> str | None:
        """Returns when an action ended last, by the audit log; None if it never happened."""
        query = select(func.max(audit_table.c.ended_at)).where(audit_table.c.action == action)
        ended: str | None = self._connection.execute(query).scalar_one()
        return ended

    def receipts(self) -> list[Receipt]:
        """Returns the receipts of all erasures, oldest first."""
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
        """Returns the entries of the audit log, oldest first."""
        return self._audit_entries(select(audit_table).order_by(audit_table.c.id))

    def newest_audit_entries(
        self, limit: int, *, actions: Iterable[str] | None = None, without: Iterable[str] = ()
    ) -> list[AuditEntry]:
        """Returns at most `limit` entries of the audit log, newest first.

        Args:
            limit: the number of entries.
            actions: only entries of these actions; None for those of all.
            without: no entries of these actions.
        """
        query = select(audit_table).where(audit_table.c.action.not_in(list(without)))
        if actions is not None:
            query = query.where(audit_table.c.action.in_(list(actions)))
        return self._audit_entries(query.order_by(audit_table.c.id.desc()).limit(limit))

    def _audit_entries(self, query: Select[Any]) -> list[AuditEntry]:
        entries = self._connection.execute(query).mappings()
        return [
            AuditEntry(**{**entry, "detail": json.loads(entry["detail"])})
            for entry in ({name: row[name] for name in row if name != "id"} for row in entries)
        ]

    def rows(self, table: Table) -> Iterator[list[dict[str, Any]]]:
        """Yields all rows of a table as dictionaries, in lists, to copy it into a restored gallery."""
        result = self._connection.execute(select(table).order_by(*table.primary_key.columns))
        for part in result.mappings().partitions(LIST_LENGTH):
            yield [dict(row) for row in part]

    def _photos(self, column: Column[Any], values: Iterable[Any]) -> Iterator[StoredPhoto]:
        for part in parts(values):
            yield from self._photos_where(column.in_(part))

    def _photos_where(self, condition: ColumnElement[bool]) -> Iterator[StoredPhoto]:
        """Yields the photos with faces that match a condition, each with these faces only."""
        rows = self._connection.execute(_FACES.where(condition)).all()
        paths = self._paths({row[0] for row in rows})
        for (number, closed), of_photo in groupby(rows, key=itemgetter(0, 1)):
            known = tuple(paths.get(number, ()))
            yield StoredPhoto(number, tuple(_face(row, known) for row in of_photo), bool(closed))

    def _paths(self, photo_ids: Iterable[int]) -> dict[int, list[str]]:
        paths: dict[int, list[str]] = {}
        query = select(file_table.c.photo_id, file_table.c.path).order_by(file_table.c.id)
        for part in parts(photo_ids):
            for number, path in self._connection.execute(query.where(file_table.c.photo_id.in_(part))):
                paths.setdefault(number, []).append(path)
        return paths


def _face(row: Sequence[Any], paths: tuple[str, ...]) -> Face:
    """Returns the face of a row of `_FACES`.

    Raises:
        GalleryDamaged: its region is none that faceprint writes.
    """
    _, _, sha256, number, identity, enrolled_at, metadata, *columns = row
    try:
        region = FaceRegion.of(*columns)
    except (ValueError, TypeError) as error:
        raise GalleryDamaged(f"The gallery's database has no place of face {number}; {RESTORE}.") from error
    return Face(number, identity, paths, sha256, enrolled_at, metadata or {}, region=region)


def _stored_doubt(
    row: Mapping[Any, Any], groups: tuple[tuple[int, ...], ...], *, stands: bool
) -> StoredDoubt:
    names = ("place", "score", "measured", "decided_at", "merge_id")
    fields = {name: row[name] for name in names}
    state = _doubt_state(row["state"])
    return StoredDoubt(doubt_key(row["id"]), state, groups, **fields, stands=stands)


def doubt_key(stored: str) -> DoubtKey:
    """Returns what a stored doubt is about.

    Raises:
        GalleryDamaged: the text is no id of a doubt.
    """
    try:
        return DoubtKey.of(stored)
    except ValueError as error:
        raise GalleryDamaged(f"The gallery's database has a doubt that cannot be read; {RESTORE}.") from error


def _doubt_state(stored: str) -> DoubtState:
    try:
        return DoubtState(stored)
    except ValueError as error:
        raise GalleryDamaged(f"The gallery's database has a doubt that cannot be read; {RESTORE}.") from error


def _texts(stored: str, length: int) -> list[list[str]]:
    """Returns the lists of so many texts that a column holds as JSON.

    Raises:
        GalleryDamaged: it holds something else.
    """
    try:
        found = json.loads(stored)
        if not isinstance(found, list):
            raise TypeError("not a list")
        for one in found:
            if not isinstance(one, list) or [type(text) for text in one] != [str] * length:
                raise TypeError("not a list of texts")
    except (ValueError, TypeError, RecursionError) as error:
        raise GalleryDamaged(f"The gallery's database has a merge that cannot be read; {RESTORE}.") from error
    return found


def _is_region(*columns: Any) -> bool:
    """Returns whether a face may have these columns."""
    try:
        FaceRegion.of(*columns)
    except (ValueError, TypeError):
        return False
    return True


def _stamp(size: int | None, mtime_ns: int, inode: int) -> Stamp | None:
    return None if size is None else Stamp(size, mtime_ns, inode)
