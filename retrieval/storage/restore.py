"""Restores a gallery from a backup, in one transaction; faces erased since the backup stay erased."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from retrieval.database.reader import Reader
from retrieval.database.records import Generation, Merge, Receipt, Segment
from retrieval.database.tables import (
    alias_table,
    audit_table,
    calibration_table,
    doubt_face_table,
    doubt_identity_table,
    doubt_table,
    face_table,
    file_table,
    host_table,
    identity_table,
    merge_face_table,
    merge_label_table,
    merge_name_table,
    merge_table,
    merger_table,
    photo_table,
)
from retrieval.database.writer import Writer
from retrieval.errors import BundleError, InputError
from retrieval.models.bundle import FORGOTTEN, ModelBundle, Relabel
from retrieval.storage.backup_contents import MODEL_CARD, Backup, sha256_of
from retrieval.storage.backup_integrity import readable, verified
from retrieval.storage.layout import MODEL
from retrieval.storage.vault import Vault

_FORGET: Final = Relabel(None, keep_photos=False)


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a restore: faces in the gallery now, and faces of the backup that stay erased."""

    folder: str
    faces: int
    forgotten_again: int
    taken_at: str


@dataclass(frozen=True, slots=True)
class _Forgotten:
    """The labels of erased identities: their names, and the outputs that a merge in the backup relabelled."""

    names: set[str]
    outputs: Mapping[tuple[str, int], Relabel]

    @classmethod
    def of(cls, reader: Reader, people: set[int], merges: Sequence[Merge]) -> "_Forgotten":
        outputs = {
            (one.fingerprint, one.output): Relabel(None, False, one.photos)
            for merge in merges
            for one in reader.merged_labels(merge.id)
        }
        return cls(reader.names_of(people), outputs)

    def changes(self, bundle: ModelBundle, erased: set[int]) -> dict[int, Relabel]:
        """Returns the changes of a model that erase its labels, given by output number."""
        return {number: self.outputs.get((bundle.fingerprint, number), _FORGET) for number in erased}


def _merges_of(reader: Reader, people: set[int]) -> list[Merge]:
    """Returns the merges in a backup of identities that were erased since, after an undo of the merge."""
    return [merge for merge in reader.merges() if merge.identity_id in people]


def restore_vault(
    folder: Path,
    vault: Vault,
    *,
    receipts: Sequence[Receipt] = (),
    fresh: bool = False,
) -> Restored:
    """Restores a gallery from a backup, in one transaction; faces erased since the backup stay erased.

    Args:
        folder: the folder of the backup.
        vault: the same gallery, in a later or an earlier state; or a new and empty one.
        receipts: receipts of erasures that neither the backup nor the gallery knows.
        fresh: the gallery is new; it becomes the gallery of the backup, including its audit log.

    Raises:
        DataError: there is no backup, or one of its files is damaged; nothing was changed.
        InputError: the backup is of another gallery.
    """
    backup = verified(folder)
    with readable(backup) as store, store.read() as reader, vault.writing() as writer:
        if not fresh and writer.gallery().uuid != backup.gallery:
            raise InputError(
                f"{folder} is a backup of another gallery than {vault.name}; restore it to a new folder."
            )
        return _restore(backup, reader, vault, writer, receipts, fresh=fresh)


def _restore(
    backup: Backup,
    reader: Reader,
    vault: Vault,
    writer: Writer,
    receipts: Sequence[Receipt],
    *,
    fresh: bool,
) -> Restored:
    erased = {receipt.id: receipt for receipt in (*receipts, *reader.receipts(), *writer.receipts())}
    numbers = {number for receipt in erased.values() for number in receipt.face_ids}
    people = {number for receipt in erased.values() for number in receipt.identity_ids}
    # A receipt may contain ids that neither gallery nor backup has reached: they stay reserved.
    next_face, next_identity = max(numbers, default=0) + 1, max(people, default=0) + 1
    numbers |= set(reader.face_ids_of_identities(people))
    merged = _merges_of(reader, people)
    for merge in merged:
        remains = reader.remains(merge)
        numbers |= set(remains.face_ids if remains is not None else ())
    gone = [number for number in reader.face_ids() if number in numbers]

    old = list(writer.generations().values())
    forgotten = _Forgotten.of(reader, people, merged)
    generations = _restore_models(backup, reader, vault, writer, forgotten)
    writer.replace_segments([segment.id for segment in writer.segments()], [])
    for segment in reader.segments():
        _restore_segment(backup, vault, writer, segment, generations[segment.generation_id], gone)
    _restore_rows(reader, writer, fresh=fresh)
    _restore_calibrations(reader, writer, generations)
    _restore_suspects(reader, writer, generations, old)
    here, there = writer.gallery(), reader.gallery()
    revision = max(here.revision, there.revision)
    writer.set_gallery(
        uuid=backup.gallery,
        created_at=there.created_at,
        generation_id=generations[there.generation_id].id,
        next_face_id=max(here.next_face_id, there.next_face_id, next_face),
        next_identity_id=max(here.next_identity_id, there.next_identity_id, next_identity),
        revision=revision,
        revision_check=-revision,
    )
    for generation in old:
        if generation not in generations.values():
            writer.remove_generation(generation.id)
    for receipt in erased.values():
        writer.add_receipt(receipt)
    for merge in merged:
        writer.erase_merged(merge)
    writer.remove_faces(gone)
    count = writer.count()
    vault.log(writer, "restore", faces=count, taken_at=backup.taken_at, forgotten_again=len(gone))
    # No trace of the former content and of erased faces may remain.
    vault.defer(writer, erase=True, labels={})
    return Restored(vault.name, count, len(gone), backup.taken_at)


def _restore_models(
    backup: Backup, reader: Reader, vault: Vault, writer: Writer, forgotten: _Forgotten
) -> dict[int, Generation]:
    """Copies the models of a backup, without the names of erased identities.

    Returns:
        The generations in the gallery, by the generation ids of the backup.
    """
    here = list(writer.generations().values())
    found: dict[int, Generation] = {}
    for generation in reader.generations().values():
        bundle = ModelBundle.load(backup.model(generation))
        erased = _forgotten_labels(vault, here, generation, bundle, forgotten)
        changes = forgotten.changes(bundle, erased)
        bundle = bundle.relabelled(changes)
        card = hashlib.sha256(bundle.card().encode()).hexdigest() if erased else generation.card_sha256
        same = [
            one
            for one in here
            if (one.fingerprint, one.dimension, one.card_sha256)
            == (generation.fingerprint, generation.dimension, card)
            and _is_intact(vault.folder / one.folder, card)
        ]
        if same:
            found[generation.id] = same[0]
            continue
        number = writer.gallery().next_generation_id
        folder = f"{MODEL}-{number}"
        copy = ModelBundle.load(backup.model(generation)).save(vault.folder / folder, inherit=True)
        if erased:
            copy.relabelled(changes).rewrite_card()
        made = dataclasses.replace(generation, id=number, folder=folder, card_sha256=copy.card_sha256())
        writer.add_generation(made)
        found[generation.id] = made
    return found


def _is_intact(folder: Path, card_sha256: str) -> bool:
    """Returns whether all files of a gallery's model match their SHA-256; reads all of them."""
    if sha256_of(folder / MODEL_CARD) != card_sha256:
        return False
    try:
        stated = ModelBundle.stated_files(folder)
    except BundleError:
        return False
    return all(sha256_of(folder / name) == digest for name, digest in stated.items())


def _forgotten_labels(
    vault: Vault,
    here: Sequence[Generation],
    generation: Generation,
    bundle: ModelBundle,
    forgotten: _Forgotten,
) -> set[int]:
    """Returns the indices of the labels to erase in a backup's model: erased by name, or in this gallery."""
    erased = {number for number, label in enumerate(bundle.labels) if label in forgotten.names}
    erased |= {output for fingerprint, output in forgotten.outputs if fingerprint == bundle.fingerprint}
    for one in here:
        if one.fingerprint == generation.fingerprint:
            today = ModelBundle.load(vault.folder / one.folder).labels
            erased |= {number for number, label in enumerate(today) if label == FORGOTTEN}
    return {n for n in erased if n < len(bundle.labels) and bundle.labels[n] != FORGOTTEN}


def _restore_segment(
    backup: Backup,
    vault: Vault,
    writer: Writer,
    segment: Segment,
    generation: Generation,
    gone: Sequence[int],
) -> None:
    flat = vault.vectors(generation)
    ids, matrix = flat.rows_of_file(backup.vectors(segment))
    kept = ~np.isin(ids, np.asarray(gone, np.int64))
    if kept.all():
        vault.put(writer, generation, [], [(ids, matrix)])
    elif kept.any():
        vault.put(writer, generation, [], [(ids[kept], matrix[kept])])


def _restore_rows(reader: Reader, writer: Writer, *, fresh: bool) -> None:
    # Foreign keys: referring tables are cleared first, and filled last.
    tables = [identity_table, photo_table, face_table, file_table, alias_table, merger_table, host_table]
    tables += [merge_table, merge_face_table, merge_name_table, merge_label_table]
    tables += [doubt_table, doubt_face_table, doubt_identity_table]
    for table in reversed(tables):
        writer.clear(table)
    for table in [*tables, *([audit_table] if fresh else [])]:
        for rows in reader.rows(table):
            writer.fill(table, rows)


def _restore_calibrations(reader: Reader, writer: Writer, generations: dict[int, Generation]) -> None:
    """Replaces the calibrations by those of the backup: the gallery's own were measured on other faces."""
    writer.clear(calibration_table)
    for number, generation in reader.generations().items():
        found = reader.calibration(generation)
        if found is not None:
            writer.set_calibration(dataclasses.replace(found, generation=generations[number].id))


def _restore_suspects(
    reader: Reader, writer: Writer, generations: dict[int, Generation], here: Sequence[Generation]
) -> None:
    """Merges the suspects of the backup with those that this gallery recorded since.

    Faces that were compared with their photos since the backup get their older vectors again, so that they
    are suspects again.
    """
    for number, stored in reader.generations().items():
        compared, ranges = stored.checked_before or 0, reader.suspects(number)
        for one in here:
            if one.fingerprint == stored.fingerprint:
                ranges.append((compared, one.checked_before or 0))
                ranges += [(max(first, compared), end) for first, end in writer.suspects(one.id)]
        writer.set_suspects(generations[number].id, ranges)
        writer.set_checked_before(generations[number].id, stored.checked_before)
