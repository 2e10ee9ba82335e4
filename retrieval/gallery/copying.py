"""Copies a gallery from a folder to databases, or back, or to others of its kind: all rows, all vectors.

A copy is the same gallery: its faces keep their ids, and it keeps its UUID, so that receipts of erasures and
backups hold for it as they do for a restored backup. Write to one of the two only.

Vectors are copied first, in parts that stay when the copy is interrupted: the same call goes on with what is
missing. Then they are read back and compared, and one transaction adds the rows, compares them with those of
the source, and makes a gallery of it all. Until then there is none at the target.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from sqlalchemy import Table

from retrieval.database.reader import Reader
from retrieval.database.records import AuditEntry, Generation, utc_now
from retrieval.database.tables import (
    basis_table,
    calibration_table,
    codes_table,
    gallery_table,
    generation_table,
    metadata,
    segment_table,
    suspect_table,
)
from retrieval.database.writer import Writer
from retrieval.errors import GalleryDamaged, InputError, Interrupted
from retrieval.gallery.copy_targets import FolderTarget, ServerTarget, Target
from retrieval.index.segments import Ids, Vectors, rows_at_a_time
from retrieval.storage.any_vault import AnyVault, who
from retrieval.storage.vault import Vault
from retrieval.system.places import Place

# Tables with a row for each file, model or gallery; they are made anew.
_OWN: Final = frozenset((gallery_table, generation_table, segment_table, basis_table, codes_table))
# Tables with rows of a model, of which the copy has the active one only.
_OF_A_MODEL: Final = frozenset((calibration_table, suspect_table))

_MODULUS: Final = 2**256


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of a copy.

    Attributes:
        target: what messages call the copy.
        faces: the number of its faces.
        vectors: how many vectors this call has copied; an interrupted one had copied the others.
        sha256: of ids, rows and vectors, in hex; the same as of the source, whatever the order.
    """

    target: str
    faces: int
    vectors: int
    sha256: str


def copy(
    vault: AnyVault,
    target: Place,
    *,
    vectors: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Copied:
    """Copies one snapshot of a gallery; others may write to it meanwhile.

    Only the active model is copied, with its vectors and its calibration. The audit logs of both record it.

    Args:
        vault: of the source.
        target: a new folder, or the address of an empty schema in PostgreSQL; or where an interrupted copy
            of this gallery was to be.
        vectors: with an address, that of the collection in Milvus, new or of the interrupted copy.
        on_progress: called with the number of faces that have vectors, and of all.
        should_stop: called between parts; True interrupts the copy.

    Raises:
        InputError: an address without `vectors`, or a folder with it.
        GalleryError: there is something else at the target.
        Interrupted: `should_stop` returned True.
        GalleryDamaged: the source is damaged, or the copy is not equal to it: it is no gallery then.
        StorageError, GalleryBusy: a machine or a server refused.
    """
    if isinstance(vault, Vault) and not vault.read_only:
        vault.run_deferred()
    proven: set[int] = set()

    def work(reader: Reader) -> Copied:
        with closing(_target(vault, reader, target, vectors)) as made:
            return _Copy(vault, reader, made, on_progress, should_stop).run(proven)

    return vault.on_a_snapshot(work)


def _target(vault: AnyVault, reader: Reader, target: Place, vectors: str | None) -> Target:
    generation, row = vault.serving(reader), reader.gallery()
    if target.database is not None:
        if vectors is None:
            raise InputError(
                "A gallery in PostgreSQL has its vectors in Milvus; give their address too, as "
                "`vectors=milvus://HOST:PORT/COLLECTION`."
            )
        return ServerTarget(target.database, vectors, row, generation)
    if vectors is not None:
        raise InputError(f"The folder {target} has its vectors itself; leave `vectors` out.")
    return FolderTarget(Path(target.text), row, generation)


class _Copy:
    def __init__(
        self,
        vault: AnyVault,
        reader: Reader,
        target: Target,
        on_progress: Callable[[int, int], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._vault, self._reader, self._target = vault, reader, target
        self._generation = vault.serving(reader)
        self._on_progress, self._should_stop = on_progress, should_stop

    def run(self, proven: set[int]) -> Copied:
        rows = np.fromiter(self._reader.face_ids(), np.int64)
        parts = self._vault.proven_parts(self._reader, proven)
        there = self._target.begin(rows)
        total = _Sum()
        done = len(there)
        for ids, vectors in _joined(self._watched(parts), rows_at_a_time(self._generation.dimension)):
            total.add_vectors(ids, vectors)
            missing = ~np.isin(ids, there)
            if missing.any():
                self._target.put(ids[missing], np.ascontiguousarray(vectors[missing]))
                done += int(missing.sum())
            self._on_progress(done, len(rows))
        copied = _Sum()
        for ids, vectors in self._watched(self._target.stored(rows)):
            copied.add_vectors(ids, vectors)
        if copied.vectors != total.vectors:
            raise GalleryDamaged(f"{self._different('vectors')}; {self._target.advice}.")
        self._finish(total)
        return Copied(self._target.name, len(rows), done - len(there), total.hex())

    def _watched(self, parts: Iterable[tuple[Ids, Vectors]]) -> Iterator[tuple[Ids, Vectors]]:
        for part in parts:
            if self._should_stop():
                raise Interrupted("Stopped; the same command goes on with what is missing.")
            yield part

    def _finish(self, total: "_Sum") -> None:
        """Adds the rows, and compares them."""
        total.add_rows(self._reader, self._generation.id)
        now, faces = utc_now(), self._reader.count()
        entry = AuditEntry(now, now, who(), self._vault.via, "copy", faces, {"sha256": total.hex()})
        if not self._vault.read_only:
            with self._vault.writing() as writer:
                writer.add_audit(entry)

        def fill(writer: Writer) -> None:
            number = self._target.generation
            _fill(self._reader, writer, self._generation, number)
            copied = _Sum()
            copied.add_rows(writer, number)
            if copied.rows != total.rows:
                raise GalleryDamaged(f"{self._different('rows')}; {self._target.advice}.")
            writer.add_audit(entry)

        self._target.finish(self._vault.bundle(self._reader, self._generation), fill)

    def _different(self, what: str) -> str:
        return f"The {what} of {self._target.name} are not those of {self._vault.name}"


class _Sum:
    """Sums of the SHA-256 of each vector and of each row: equal for equal contents, in whatever order."""

    def __init__(self) -> None:
        self.vectors = 0
        self.rows = 0

    def add_vectors(self, ids: Ids, vectors: Vectors) -> None:
        for number, vector in zip(ids.tolist(), np.asarray(vectors, "<f4"), strict=True):
            self.vectors = _added(self.vectors, b"%d|" % number + vector.tobytes())

    def add_rows(self, reader: Reader, generation: int) -> None:
        for table in _copied_tables():
            for rows in reader.rows(table):
                for row in _of_generation(table, rows, generation):
                    told = json.dumps(row, sort_keys=True, ensure_ascii=False)
                    self.rows = _added(self.rows, f"{table.name}|{told}".encode("utf-8", "surrogatepass"))

    def hex(self) -> str:
        """Returns the SHA-256 of both sums."""
        return hashlib.sha256(f"{self.vectors} {self.rows}".encode()).hexdigest()


def _added(total: int, data: bytes) -> int:
    return (total + int.from_bytes(hashlib.sha256(data).digest(), "big")) % _MODULUS


def _copied_tables() -> list[Table]:
    """Returns the tables of which rows are copied, those that others refer to first."""
    return [table for table in metadata.sorted_tables if table not in _OWN]


def _of_generation(
    table: Table, rows: Iterable[dict[str, Any]], generation: int, put: int = 0
) -> list[dict[str, Any]]:
    """Returns rows without those of another model; `put` takes the place of the model's number."""
    if table not in _OF_A_MODEL:
        return list(rows)
    return [{**row, "generation_id": put} for row in rows if row["generation_id"] == generation]


def _fill(reader: Reader, writer: Writer, generation: Generation, number: int) -> None:
    """Adds the rows of a gallery to the tables of an empty one, in which the model has a number."""
    for table in _copied_tables():
        for rows in reader.rows(table):
            kept = _of_generation(table, rows, generation.id, put=number)
            if kept:
                writer.fill(table, kept)
    writer.set_checked_before(number, generation.checked_before)
    there, here = reader.gallery(), writer.gallery()
    writer.set_gallery(
        uuid=there.uuid,
        created_at=there.created_at,
        next_face_id=there.next_face_id,
        next_identity_id=there.next_identity_id,
        next_segment_id=max(here.next_segment_id, there.next_segment_id),
        next_generation_id=max(here.next_generation_id, there.next_generation_id),
        next_basis_id=max(here.next_basis_id, there.next_basis_id),
        revision=there.revision,
        revision_check=-there.revision,
    )


def _joined(parts: Iterable[tuple[Ids, Vectors]], rows: int) -> Iterator[tuple[Ids, Vectors]]:
    """Yields parts of at most `rows`, if none of the given ones is larger."""
    waiting: list[tuple[Ids, Vectors]] = []
    for ids, vectors in parts:
        if waiting and sum(len(one) for one, _ in waiting) + len(ids) > rows:
            yield _concatenated(waiting)
            waiting = []
        waiting.append((ids, vectors))
    if waiting:
        yield _concatenated(waiting)


def _concatenated(parts: list[tuple[Ids, Vectors]]) -> tuple[Ids, Vectors]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([some for _, some in parts])
