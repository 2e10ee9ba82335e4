"""Writer: one transaction that changes a gallery's tables, for the vault."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    JSON,
    Connection,
    Dialect,
    Executable,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.sql.compiler import SQLCompiler

from retrieval.database.filter_sql import LIST_LENGTH, parts
from retrieval.database.metadata import to_json
from retrieval.database.photo_keys import key_of
from retrieval.database.reader import IS_SUSPECT, Reader, doubt_key
from retrieval.database.records import (
    AuditEntry,
    BasisRow,
    Calibration,
    CodesRow,
    DoubtState,
    Generation,
    Merge,
    MergedLabel,
    NewFace,
    Receipt,
    Remains,
    Segment,
    StoredDoubt,
    utc_now,
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
from retrieval.system.paths import host_of

_NO_STAMPS: Final[Mapping[str, Stamp]] = MappingProxyType({})

# The columns of a face without a region.
_NO_REGION: Final = {"box": "", "landmarks": None, "score": None, "sharpness": None, "yaw": None}


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns ranges (first, end) in order, without empty ones; adjacent and overlapping ones are joined."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if first >= end:
            continue
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


class Writer(Reader):
    """A Reader that changes the tables; all of its changes are committed together or not at all.

    Attributes:
        changed: whether it has changed anything yet.
        defers: whether there is deferred work to run after the commit.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.changed = False
        self.defers = False
        # SHA-256 that were looked up in this transaction: no photo has them.
        self._absent: set[str] = set()
        self._filled_photos = False

    @property
    def connection(self) -> Connection:
        """The connection of the transaction, for what concerns the database's file."""
        return self._connection

    def add_faces(
        self, first_id: int, faces: Sequence[NewFace], photos: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """Inserts faces with consecutive ids from `first_id`, which `gallery().next_face_id` gave.

        `add_files` adds the paths of their photos separately: a path may belong to different photos over
        time.

        Args:
            first_id: the id of the first face.
            faces: the faces.
            photos: the photo id of each face of a photo that is stored, or that has an earlier face in
                `faces`, by face id; the other faces are the first of their photos.

        Raises:
            GalleryDamaged: a photo would be stored twice.
        """
        identities = self._identity_ids({face.identity for face in faces if face.identity is not None})
        now = utc_now()
        numbered = list(enumerate(faces, first_id))
        new = [
            {
                "id": number,
                "sha256": face.sha256,
                "closed": 0,
                "sha256_key": key_of(number, face.sha256),
            }
            for number, face in numbered
            if number not in photos
        ]
        self._check_absent([face.sha256 for number, face in numbered if number not in photos])
        self._insert(photo_table, new)
        self._insert(
            face_table,
            [
                {
                    "id": number,
                    "identity_id": None if face.identity is None else identities[face.identity],
                    "enrolled_at": now,
                    "metadata": face.metadata or None,
                    "photo_id": photos.get(number, number),
                    **(_NO_REGION if face.region is None else face.region.fields()),
                }
                for number, face in numbered
            ],
        )
        self.set_gallery(next_face_id=first_id + len(faces))

    def photo_ids_by_sha256(self, digests: Iterable[str]) -> dict[str, int]:
        """See `Reader`."""
        wanted = set(digests)
        found = super().photo_ids_by_sha256(wanted)
        self._absent |= wanted - found.keys()
        return found

    def _check_absent(self, digests: Sequence[str]) -> None:
        """Checks that photos may be inserted; looks up only what this transaction has not looked up before.

        Raises:
            GalleryDamaged: a photo has one of the SHA-256, or one of them is given twice.
        """
        new = set(digests)
        stored = super().photo_ids_by_sha256(new - self._absent)
        self._absent -= new
        if stored or len(new) < len(digests):
            raise GalleryDamaged(
                "A photo that is in the gallery would be stored a second time; run `faceprint verify`."
            )

    def remove_faces(self, ids: Iterable[int]) -> None:
        """Deletes faces, and the photos, paths, identities, hosts and suspect ranges without faces then."""
        ids = list(dict.fromkeys(ids))
        photos, others = self._photos_of(ids)
        hosts = self._hosts_of(photos)
        for part in parts(ids):
            self._change(delete(merge_face_table).where(merge_face_table.c.face_id.in_(part)))
            self._remove_faces_of_doubts(part)
            self._change(delete(face_table).where(face_table.c.id.in_(part)))
        for part in parts(photos):
            self._change(delete(file_table).where(file_table.c.photo_id.in_(part)))
            self._change(delete(photo_table).where(photo_table.c.id.in_(part)))
        for part in parts(others):
            self._change(update(photo_table).where(photo_table.c.id.in_(part)).values(closed=1))
        if ids:
            self.remove_orphaned_identities()
            self._change(delete(suspect_table).where(~select(face_table.c.id).where(IS_SUSPECT).exists()))
        self._remove_unused(hosts)

    def _photos_of(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the ids of the photos that have none but the given faces, and of those that have others."""
        left: Counter[int] = Counter()
        numbers = select(face_table.c.photo_id)
        for part in parts(ids):
            left.subtract(self._connection.execute(numbers.where(face_table.c.id.in_(part))).scalars())
        for part in parts(list(left)):
            left.update(self._connection.execute(numbers.where(face_table.c.photo_id.in_(part))).scalars())
        return [n for n, count in left.items() if count == 0], [n for n, count in left.items() if count]

    def remove_orphaned_identities(self) -> None:
        """Deletes identities without faces, their former names, and merges that cannot be undone then."""
        alive = select(face_table.c.id)
        faces_of = alive.where(face_table.c.identity_id == alias_table.c.identity_id)
        self._change(delete(alias_table).where(~faces_of.exists()))
        faces_of = alive.where(face_table.c.identity_id == identity_table.c.id)
        self._change(delete(identity_table).where(~faces_of.exists()))
        self._remove_orphaned_merges()

    def _remove_orphaned_merges(self) -> None:
        """Deletes merges without faces, and those into an identity that is gone and not merged itself."""
        faces = select(merge_face_table.c.face_id).where(merge_face_table.c.merge_id == merge_table.c.id)
        into = select(identity_table.c.id).where(identity_table.c.id == merge_table.c.into_id)
        later = merge_table.alias()
        merged = select(later.c.id).where(later.c.identity_id == merge_table.c.into_id)
        orphaned = select(merge_table.c.id).where(~faces.exists() | (~into.exists() & ~merged.exists()))
        # Deleting one may orphan an earlier one, of an identity that was merged into this one.
        while ids := list(self._connection.execute(orphaned).scalars()):
            self.remove_merges(ids)
        self._remove_orphaned_doubts()

    def _remove_faces_of_doubts(self, face_ids: Sequence[int]) -> None:
        """Deletes doubts about faces, open doubts that show one, and the faces from the other doubts."""
        showing = select(doubt_face_table.c.doubt_id, doubt_table.c.state).join(doubt_table).distinct()
        rows = self._connection.execute(showing.where(doubt_face_table.c.face_id.in_(face_ids))).all()
        gone = set(face_ids)
        self.remove_doubts(
            number
            for number, state in rows
            if state == DoubtState.OPEN or not gone.isdisjoint(doubt_key(number).face_ids)
        )
        self._change(delete(doubt_face_table).where(doubt_face_table.c.face_id.in_(face_ids)))

    def _remove_orphaned_doubts(self) -> None:
        """Deletes doubts about an identity that is gone, unless an undo of its merge brings it back."""
        identity = doubt_identity_table.c.identity_id
        living = select(identity_table.c.id).where(identity_table.c.id == identity)
        merged = select(merge_table.c.id).where(merge_table.c.identity_id == identity)
        orphaned = select(doubt_identity_table.c.doubt_id).where(~living.exists() & ~merged.exists())
        self.remove_doubts(list(self._connection.execute(orphaned).scalars()))

    def remove_doubts(self, ids: Iterable[str]) -> None:
        """Deletes doubts, whatever was decided."""
        for part in parts(ids):
            for table in (doubt_face_table, doubt_identity_table):
                self._change(delete(table).where(table.c.doubt_id.in_(part)))
            self._change(delete(doubt_table).where(doubt_table.c.id.in_(part)))

    def add_doubt(self, doubt: StoredDoubt) -> None:
        """Inserts a doubt, or replaces the one with its id; its faces keep the identities of now."""
        number = str(doubt.key)
        self.remove_doubts([number])
        names = ("state", "place", "score", "measured", "decided_at", "merge_id")
        self._insert(doubt_table, [{"id": number, **{name: getattr(doubt, name) for name in names}}])
        owners = self.identities_of_faces(doubt.key.face_ids)
        self._insert(
            doubt_face_table,
            [
                {
                    "doubt_id": number,
                    "part": part,
                    "place": place,
                    "face_id": face,
                    "doubted": int(face in doubt.key.face_ids),
                    "identity_id": owners.get(face),
                }
                for part, group in enumerate(doubt.groups)
                for place, face in enumerate(group)
            ],
        )
        people = enumerate(doubt.key.identity_ids)
        self._insert(
            doubt_identity_table,
            [{"doubt_id": number, "place": place, "identity_id": one} for place, one in people],
        )

    def set_doubt(self, number: str, state: DoubtState, *, merge_id: int | None = None) -> None:
        """Records what was decided about a doubt."""
        decided = None if state is DoubtState.OPEN else utc_now()
        changed = update(doubt_table).where(doubt_table.c.id == number)
        self._change(changed.values(state=state.value, decided_at=decided, merge_id=merge_id))

    def forget_last_audit(self) -> None:
        """Deletes the open doubts, and the places of the others in the last audit."""
        still_open = select(doubt_table.c.id).where(doubt_table.c.state == DoubtState.OPEN.value)
        self.remove_doubts(list(self._connection.execute(still_open).scalars()))
        self._change(update(doubt_table).values(place=None))

    def remove_files(self, paths: Iterable[str]) -> None:
        """Deletes paths; their photos stay."""
        for part in parts(paths):
            self._change(delete(file_table).where(file_table.c.path.in_(part)))

    def add_files(self, files: Iterable[tuple[str, int]], stamps: Mapping[str, Stamp] = _NO_STAMPS) -> None:
        """Adds paths, each to a photo, with the stamps of their files where these are known."""
        self._insert(
            file_table,
            [{"path": path, "photo_id": number, **_stamped(stamps.get(path))} for path, number in files],
        )

    def set_stamps(self, stamps: Mapping[str, Stamp]) -> None:
        """Sets the stamps of the files of known paths."""
        rows = [{"known": path, **_stamped(stamp)} for path, stamp in stamps.items()]
        if rows:
            changed = update(file_table).where(file_table.c.path == bindparam("known"))
            self._change(changed.values({name: bindparam(name) for name in _stamped(None)}), rows)

    def add_hosts(self, hosts: Iterable[str]) -> None:
        """Records hosts that photos were enrolled from, so that photos may be fetched from there again."""
        self._insert(host_table, [{"name": name} for name in sorted(set(hosts) - self.hosts())])

    def name_face(self, face_id: int, identity: str | None) -> None:
        """Sets the identity of a face; `remove_orphaned_identities` removes one without faces."""
        number = None if identity is None else self._identity_ids({identity})[identity]
        self._change(update(face_table).where(face_table.c.id == face_id).values(identity_id=number))

    def set_metadata(self, table: Table, metadata: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Replaces the metadata of faces (`face_table`) or identities (`identity_table`), by id."""
        rows = [{"number": number, "said": said or None} for number, said in metadata.items()]
        if rows:
            changed = update(table).where(table.c.id == bindparam("number"))
            self._change(changed.values(metadata=bindparam("said")), rows)

    def rename_identity(self, identity_id: int, name: str) -> None:
        """Gives an identity another name, which must be free."""
        self._change(update(identity_table).where(identity_table.c.id == identity_id).values(name=name))

    def add_alias(self, name: str, identity_id: int) -> None:
        """Makes a free name a former name of an identity."""
        self.remove_alias(name)
        self._insert(alias_table, [{"name": name, "identity_id": identity_id}])

    def remove_alias(self, name: str) -> None:
        """Removes a former name."""
        self._change(delete(alias_table).where(alias_table.c.name == name))

    def merge_identities(self, identity_id: int, into_id: int) -> None:
        """Moves an identity's faces and former names to another one, and deletes it."""
        faces = update(face_table).where(face_table.c.identity_id == identity_id)
        self._change(faces.values(identity_id=into_id))
        aliases = update(alias_table).where(alias_table.c.identity_id == identity_id)
        self._change(aliases.values(identity_id=into_id))
        self._insert(merger_table, [{"identity_id": identity_id, "into_id": into_id}])
        self._change(delete(identity_table).where(identity_table.c.id == identity_id))
        if self.merge_of(identity_id) is None:  # an undo of earlier merges leads to the remaining identity
            earlier = update(merge_table).where(merge_table.c.into_id == identity_id)
            self._change(earlier.values(into_id=into_id))
            self._remove_orphaned_doubts()

    def add_merge(self, merge: Merge, face_ids: Iterable[int], labels: Iterable[MergedLabel]) -> None:
        """Records what it takes to undo a merge; `merge_identities` merges.

        Args:
            merge: the merge.
            face_ids: of the faces that move.
            labels: the outputs of models that get another label.
        """
        row = {name: getattr(merge, name) for name in ("id", "merged_at", "identity_id", "into_id", "name")}
        filled = json.dumps([[key] for key in merge.filled])
        row |= {"metadata": merge.metadata or None, "filled": filled, "faces": merge.faces}
        self._insert(merge_table, [row])
        self._insert(merge_face_table, [{"merge_id": merge.id, "face_id": face} for face in face_ids])
        self._insert(merge_name_table, [{"merge_id": merge.id, "name": name} for name in merge.former_names])
        self._insert(
            merge_label_table,
            [{"merge_id": merge.id, **asdict(one), "photos": json.dumps(one.photos)} for one in labels],
        )

    def remove_merges(self, ids: Iterable[int]) -> None:
        """Deletes what it would take to undo some merges; the identities stay merged."""
        for part in parts(ids):
            for table in (merge_face_table, merge_name_table, merge_label_table):
                self._change(delete(table).where(table.c.merge_id.in_(part)))
            self._change(delete(merge_table).where(merge_table.c.id.in_(part)))

    def split_identity(self, merge: Merge, remains: Remains) -> None:
        """Undoes a merge: the merged identity is restored with its id, name, metadata and what remains."""
        row = {"id": merge.identity_id, "name": merge.name, "metadata": merge.metadata or None}
        self._insert(identity_table, [row])
        for part in parts(remains.face_ids):
            faces = update(face_table).where(face_table.c.id.in_(part))
            self._change(faces.values(identity_id=merge.identity_id))
        self.remove_alias(merge.name)
        for name in sorted(remains.names - {merge.name}):
            self.add_alias(name, merge.identity_id)
        self.remove_metadata_keys(remains.owner, remains.keys)
        self._change(delete(merger_table).where(merger_table.c.identity_id == merge.identity_id))
        self.remove_merges([merge.id])
        confirmed = update(doubt_table).where(doubt_table.c.merge_id == merge.id)
        self._change(confirmed.values(state=DoubtState.OPEN.value, decided_at=None, merge_id=None))

    def remove_metadata_keys(self, identity_id: int, keys: Iterable[str]) -> None:
        """Removes keys from the metadata of an identity."""
        keys, today = set(keys), self.people_by_id([identity_id])[identity_id].metadata
        if not keys.isdisjoint(today):
            kept = {key: value for key, value in today.items() if key not in keys}
            self.set_metadata(identity_table, {identity_id: kept})

    def erase_merged(self, merge: Merge) -> None:
        """Removes what a merge, and merges after it, brought to another identity, except the faces."""
        remains = self.remains(merge)
        if remains is not None:
            for name in remains.names:
                self.remove_alias(name)
            self.remove_metadata_keys(remains.owner, remains.keys)
        names, later = {merge.name, *merge.former_names}, self.merge_of(merge.into_id)
        while later is not None:
            self._erase_from(later, names, {key: merge.metadata.get(key) for key in merge.filled})
            later = self.merge_of(later.into_id)
        self.remove_merges([merge.id])
        self._remove_orphaned_merges()

    def _erase_from(self, merge: Merge, names: Iterable[str], said: Mapping[str, Any]) -> None:
        """Removes former names and metadata from what would undo a merge."""
        gone = delete(merge_name_table).where(merge_name_table.c.merge_id == merge.id)
        for part in parts(names):
            self._change(gone.where(merge_name_table.c.name.in_(part)))
        kept = {key: one for key, one in merge.metadata.items() if key not in said or said[key] != one}
        self.set_metadata(merge_table, {merge.id: kept})
        filled = json.dumps([[key] for key in merge.filled if key in kept])
        self._change(update(merge_table).where(merge_table.c.id == merge.id).values(filled=filled))

    def erase_merged_name(self, name: str) -> None:
        """Removes a name from all merges: those of an identity of that name cannot be undone any more."""
        self._change(delete(merge_name_table).where(merge_name_table.c.name == name))
        named = select(merge_table.c.id).where(merge_table.c.name == name)
        self.remove_merges(list(self._connection.execute(named).scalars()))
        self._remove_orphaned_merges()

    def erase_merged_photos(self, identity_id: int) -> None:
        """Removes the names of training photos from the merges into an identity."""
        into = select(merge_table.c.id).where(merge_table.c.into_id == identity_id)
        photos = update(merge_label_table).where(merge_label_table.c.merge_id.in_(into))
        self._change(photos.values(photos="[]"))

    def replace_segments(self, old: Iterable[int], new: Sequence[Segment]) -> None:
        """Deletes the rows of `old` and inserts `new`; new ids begin at `gallery().next_segment_id`."""
        for part in parts(old):
            self.remove_codes(part)
            self._change(delete(segment_table).where(segment_table.c.id.in_(part)))
        for segment in new:
            self._insert(segment_table, [asdict(segment)])
            self.set_gallery(next_segment_id=segment.id + 1)

    def set_codes(self, codes: CodesRow) -> None:
        """Inserts the row of a file of codes, in place of another of the same segment."""
        self.remove_codes([codes.segment_id])
        self._insert(codes_table, [asdict(codes)])

    def remove_codes(self, segments: Iterable[int]) -> None:
        """Deletes the rows of the codes of segments."""
        for part in parts(segments):
            self._change(delete(codes_table).where(codes_table.c.segment_id.in_(part)))

    def add_basis(self, basis: BasisRow) -> None:
        """Adds a basis; its id is `gallery().next_basis_id`."""
        self._insert(basis_table, [{**asdict(basis), "detail": json.dumps(basis.detail)}])
        self.set_gallery(next_basis_id=basis.id + 1)

    def remove_bases(self, ids: Iterable[int]) -> None:
        """Deletes the rows of bases, and of the codes in them."""
        for part in parts(ids):
            self._change(delete(codes_table).where(codes_table.c.basis_id.in_(part)))
            self._change(delete(basis_table).where(basis_table.c.id.in_(part)))

    def set_calibration(self, calibration: Calibration) -> None:
        """Replaces the calibration of a generation."""
        self.remove_calibration(calibration.generation)
        fields = calibration.fields()
        left_out = ("generation", "fingerprint", "points")
        row = {name: value for name, value in fields.items() if name not in left_out}
        row |= {"generation_id": calibration.generation, "points": json.dumps(fields["points"])}
        self._insert(calibration_table, [row])

    def remove_calibration(self, generation: int) -> None:
        """Deletes the calibration of a generation."""
        self._change(delete(calibration_table).where(calibration_table.c.generation_id == generation))

    def add_generation(self, generation: Generation) -> None:
        """Inserts a generation without vectors."""
        self._insert(generation_table, [asdict(generation)])
        self.set_gallery(next_generation_id=generation.id + 1)

    def remove_generation(self, generation: int) -> None:
        """Deletes a generation that has no segments and does not serve."""
        self.remove_bases(self.bases(generation))
        self.remove_calibration(generation)
        self.set_suspects(generation, [])
        self._change(delete(generation_table).where(generation_table.c.id == generation))

    def set_card(self, generation: int, card_sha256: str) -> None:
        """Sets the SHA-256 of the card of a generation."""
        changed = update(generation_table).where(generation_table.c.id == generation)
        self._change(changed.values(card_sha256=card_sha256))

    def set_vectors_address(self, generation: int, address: str) -> None:
        """Records where the vectors of a generation are; only in a database on a server."""
        self._change(delete(vectors_table).where(vectors_table.c.generation_id == generation))
        self._insert(vectors_table, [{"generation_id": generation, "address": address}])

    def set_model_file(self, generation: int, name: str, parts: Iterable[bytes]) -> None:
        """Stores a file of a generation's model; only in a database on a server."""
        this = {"generation_id": generation, "name": name}
        table = model_file_table.c
        self._change(delete(model_file_table).where(table.generation_id == generation, table.name == name))
        for number, part in enumerate(parts):
            self._insert(model_file_table, [{**this, "part": number, "data": part}])

    def set_suspects(self, generation: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Replaces the suspects of a generation: faces that its model may have embedded while damaged.

        Args:
            generation: the id of the generation.
            ranges: ranges of face ids, (first, end); they may overlap, and empty ones are ignored.
        """
        self._change(delete(suspect_table).where(suspect_table.c.generation_id == generation))
        rows = [{"generation_id": generation, "first_id": a, "end_id": b} for a, b in merged(ranges)]
        self._insert(suspect_table, rows)

    def set_checked_before(self, generation: int, face_id: int | None) -> None:
        """Records that all faces below an id, except suspects, were compared with their photos."""
        changed = update(generation_table).where(generation_table.c.id == generation)
        self._change(changed.values(checked_before=face_id))

    def set_gallery(self, **values: Any) -> None:
        """Updates the row of the gallery."""
        self._change(update(gallery_table).values(**values))

    def add_receipt(self, receipt: Receipt) -> None:
        """Inserts a receipt and its tombstones, unless the receipt exists."""
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
        """Inserts an entry of the audit log; returns its id."""
        values = {**asdict(entry), "detail": json.dumps(entry.detail, sort_keys=True)}
        self._insert(audit_table, [values])
        return int(self._connection.execute(select(func.max(audit_table.c.id))).scalar_one())

    def extend_audit(self, number: int, faces: int) -> bool:
        """Adds to the newest entry if its id is still `number`; returns whether it was."""
        if self._connection.execute(select(func.max(audit_table.c.id))).scalar_one() != number:
            return False
        grown = update(audit_table).where(audit_table.c.id == number)
        self._change(grown.values(faces=audit_table.c.faces + faces, ended_at=utc_now()))
        return True

    def clear(self, table: Table) -> None:
        """Empties a table."""
        self._change(delete(table))

    def fill(self, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        """Inserts rows of another gallery's table unchanged."""
        if table is photo_table:
            self._absent.clear()
            self._filled_photos = True
        self._insert(table, rows)

    def finish(self) -> None:
        """Raises the revision if the transaction has changed anything: readers detect changes by it.

        Raises:
            GalleryDamaged: two photos of another gallery's table have the same SHA-256.
        """
        if self._filled_photos and (duplicates := self.photo_duplicates()):
            raise GalleryDamaged(f"Where these rows come from, {duplicates[0]}; nothing was written.")
        if self.changed:
            self.set_gallery(
                revision=gallery_table.c.revision + 1, revision_check=-(gallery_table.c.revision + 1)
            )

    def _change(self, statement: Executable, rows: Sequence[dict[str, Any]] | None = None) -> None:
        self._connection.execute(statement, rows)
        self._note_change()

    def _note_change(self) -> None:
        self.changed = True
        self._kept_segments = self._kept_codes = None

    def _insert(self, table: Table, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        self._note_change()
        if "id" in table.c and "id" not in rows[0] and self._connection.dialect.name != "sqlite":
            rows = self._numbered(table, rows)
        compiled = _insertion(table, tuple(rows[0]), self._connection.dialect)
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

    def _numbered(self, table: Table, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Returns rows with the ids that SQLite would give them, each above all that are there.

        A sequence of the database would not know of the ids of restored rows.
        """
        last = self._connection.execute(select(func.max(table.c.id))).scalar_one() or 0
        return [{"id": number, **row} for number, row in enumerate(rows, last + 1)]

    def _hosts_of(self, photo_ids: Iterable[int]) -> set[str]:
        """Returns the known hosts in the paths of photos."""
        known = self.hosts()
        if not known:
            return set()
        query = select(file_table.c.path)
        paths = (
            path
            for part in parts(photo_ids)
            for path in self._connection.execute(query.where(file_table.c.photo_id.in_(part))).scalars()
        )
        return {host for path in paths if (host := host_of(path)) in known}

    def _remove_unused(self, hosts: set[str]) -> None:
        """Deletes those of the hosts that no path contains any more."""
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
        """Returns the ids of identities by name; inserts new ones."""
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


@lru_cache(maxsize=100)
def _insertion(table: Table, names: tuple[str, ...], dialect: Dialect) -> SQLCompiler:
    """Returns the compiled statement that inserts rows with these columns."""
    compiled = insert(table).compile(dialect=dialect, column_keys=list(names))
    assert isinstance(compiled, SQLCompiler)  # only DDL has another compiler
    return compiled


def _stamped(stamp: Stamp | None) -> dict[str, int | None]:
    """Returns the columns of a file's stamp."""
    if stamp is None:
        return {"size": None, "mtime_ns": None, "inode": None}
    return {"size": stamp.size, "mtime_ns": stamp.mtime_ns, "inode": stamp.inode}
