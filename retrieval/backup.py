"""Backups: a consistent copy of a gallery taken while others write, and the way back.

my.backup/
  backup.json                     what the backup is; written last, so it names only what is there
  gallery-<SHA-256>.db            the database, one snapshot
  vectors/<SHA-256>.faiss         segments by their content: a second backup copies only new ones
  models/<SHA-256 of the card>/   the bundles
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Final

import numpy as np

from retrieval import lock
from retrieval.bundle import FORGOTTEN, ModelBundle, Relabel
from retrieval.errors import DataError, GalleryDamaged, InputError, StorageError
from retrieval.files import (
    copy_durably,
    create,
    make_folder,
    make_output_folder,
    remove,
    sync,
    temporary_folder,
    why,
    write_durably,
)
from retrieval.store import (
    SCHEMA_VERSION,
    Generation,
    Reader,
    Receipt,
    Segment,
    Store,
    Writer,
    utc_now,
)
from retrieval.tables import (
    alias_table,
    audit_table,
    calibration_table,
    face_table,
    file_table,
    host_table,
    identity_table,
    merger_table,
)
from retrieval.vault import LOCK_TIMEOUT, MODEL, VECTORS, Vault

_CARD: Final = "backup.json"
_FORMAT: Final = 1
_MODELS: Final = "models"
_BLOCK: Final = 2**20

_FORGET: Final = Relabel(None, keep_photos=False)

# How many segments are opened before the first is copied: far below what a process may open.
_OPEN: Final = 256

# How often a backup starts over when segments are merged away before it could open them.
_ATTEMPTS: Final = 20


@dataclass(frozen=True, slots=True)
class BackedUp:
    """What a backup did; sizes in bytes."""

    folder: str
    faces: int
    revision: int
    segments_copied: int
    segments_kept: int
    bytes_copied: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: faces in the gallery now, and faces of the backup that stay forgotten."""

    folder: str
    faces: int
    forgotten_again: int
    taken_at: str


class _Unfinished(Exception):
    """The gallery owes something to its last transaction."""


@dataclass(frozen=True)
class _Backup:
    """A backup on disk, as its card states it."""

    folder: Path
    gallery: str
    taken_at: str
    schema: str
    database: str
    files: dict[str, str]  # SHA-256 by path, relative to the folder

    def vectors(self, segment: Segment) -> Path:
        return self.folder / VECTORS / f"{segment.sha256}.faiss"

    def model(self, generation: Generation) -> Path:
        return self.folder / _MODELS / generation.card_sha256


def back_up(vault: Vault, target: Path) -> BackedUp:
    """Copies one snapshot of a gallery; writers and readers go on meanwhile.

    The older backup in `target` stays whole until the new one is; what only it needs is then deleted.

    Raises:
        InputError: `target` is something else than a backup of this gallery.
        GalleryDamaged: a file of the gallery is not what its row says; the older backup stays as it was.
        GalleryBusy: another process makes a backup there.
        StorageError: the disk refused; the older backup stays as it was.
    """
    try:
        lock.check(target)
        make_output_folder(target)
        with lock.exclusive(target / "writer.lock", timeout=LOCK_TIMEOUT):
            done = _back_up(vault, target)
    except OSError as error:
        raise StorageError(f"The backup {target} cannot be written: {why(error)}.") from error
    if not vault.read_only:
        with vault.writing() as writer:
            vault.log(writer, "backup", faces=done.faces, revision=done.revision)
    return done


def _back_up(vault: Vault, target: Path) -> BackedUp:
    before = _open(target) if (target / _CARD).is_file() else None
    _check_target(vault, target, before)
    for folder in (VECTORS, _MODELS):
        make_folder(target / folder, like=target, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        try:
            database, copied = _copy_snapshot(vault, target)
            break
        except _Unfinished:
            vault.settle()
        except FileNotFoundError as error:
            # Merged away by a writer meanwhile; what was copied until now need not be copied again.
            if attempt == _ATTEMPTS - 1:
                raise GalleryDamaged(
                    f"{error.filename} is missing; see `faceprint verify {vault.folder}`."
                ) from error
    with closing(Store.open(database, read_only=True)) as store, store.read() as reader:
        row, segments, faces = reader.gallery(), reader.segments(), reader.count()
        generations = list(reader.generations().values())
    files = {database.name: str(_sha256(database))}
    files |= {f"{VECTORS}/{segment.sha256}.faiss": segment.sha256 for segment in segments}
    for generation in generations:
        files |= _copy_model(vault, target, generation)
    for folder in (VECTORS, _MODELS, "."):
        sync(target / folder)
    backup = _Backup(target, row.uuid, utc_now(), SCHEMA_VERSION, database.name, files)
    card = {"format": _FORMAT, "faces": faces, "revision": row.revision, **asdict(backup)}
    del card["folder"]
    write_durably(target / _CARD, (json.dumps(card, indent=1) + "\n").encode(), inherit=True)
    _remove_unnamed(backup)
    return BackedUp(
        os.fspath(target),
        faces,
        row.revision,
        segments_copied=len(copied),
        segments_kept=len(segments) - len(copied),
        bytes_copied=sum(copied),
    )


def _check_target(vault: Vault, target: Path, before: _Backup | None) -> None:
    with vault.store.read() as reader:
        gallery = reader.gallery().uuid
    if before is not None and before.gallery != gallery:
        raise InputError(f"{target} is a backup of another gallery; choose another folder.")
    ours = {"writer.lock", VECTORS, _MODELS}
    strange = [
        path.name
        for path in target.iterdir()
        if path.name not in ours and not path.name.startswith(("gallery-", ".gallery-", ".backup"))
    ]
    if before is None and strange:
        raise InputError(f"{target} is not empty and is no backup; choose another folder.")


def _copy_snapshot(vault: Vault, target: Path) -> tuple[Path, list[int]]:
    """Copies the database and those of its segments that the backup lacks; returns the copies' sizes.

    Raises:
        FileNotFoundError: a segment was merged away before it could be opened.
        _Unfinished: an erasure is half done; a copy would keep what is to be erased.
    """
    part = target / ".gallery.part"
    vault.store.copy(part)
    database = target / f"gallery-{str(_sha256(part))[:16]}.db"
    os.replace(part, database)
    with closing(Store.open(database, read_only=True)) as store, store.read() as reader:
        segments = sorted(reader.segments(), key=lambda segment: segment.rows)
        if reader.gallery().unfinished is not None:
            raise _Unfinished
    lacking = [segment for segment in segments if not _is_there(target, segment)]
    with ExitStack() as stack:
        # An open file can be read after a writer has merged it away, as happens soonest to small ones.
        opened = [stack.enter_context(open(_source(vault, one), "rb")) for one in lacking[:_OPEN]]
        for segment, file in zip_longest(lacking, opened):
            with nullcontext(file) if file else open(_source(vault, segment), "rb") as source:
                _copy_segment(vault, target, segment, source)
    return database, [segment.bytes for segment in lacking]


def _source(vault: Vault, segment: Segment) -> Path:
    return vault.folder / VECTORS / f"{segment.id:08d}.faiss"


def _is_there(target: Path, segment: Segment) -> bool:
    kept = target / VECTORS / f"{segment.sha256}.faiss"
    return kept.is_file() and kept.stat().st_size == segment.bytes


def _copy_segment(vault: Vault, target: Path, segment: Segment, source: IO[bytes]) -> None:
    path = target / VECTORS / f"{segment.sha256}.faiss"
    part = path.with_suffix(".part")
    digest = hashlib.sha256()
    with create(part, inherit=True) as copy:
        while block := source.read(_BLOCK):
            digest.update(block)
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())
    if digest.hexdigest() != segment.sha256:
        part.unlink()
        raise GalleryDamaged(
            f"{_source(vault, segment)} is not what was written; see `faceprint verify {vault.folder}`."
        )
    os.replace(part, path)


def _copy_model(vault: Vault, target: Path, generation: Generation) -> dict[str, str]:
    """Copies a model unless it is there; returns its files' SHA-256."""
    copy = target / _MODELS / generation.card_sha256
    if not copy.is_dir():
        bundle = ModelBundle.load(vault.folder / generation.folder).save(copy, inherit=True)
    else:
        bundle = ModelBundle.load(copy)
    below = f"{_MODELS}/{generation.card_sha256}"
    return {
        f"{below}/bundle.json": bundle.card_sha256(),
        **{f"{below}/{name}": digest for name, digest in bundle.files.items()},
    }


def _remove_unnamed(backup: _Backup) -> None:
    """Removes what only an older backup needed, or an interrupted one left."""
    named = {backup.folder / name for name in backup.files}
    keep = named | {path.parent for path in named}
    for path in (*backup.folder.glob("gallery-*.db*"), *(backup.folder / VECTORS).iterdir()):
        if path not in keep:
            remove(path)
    for path in (backup.folder / _MODELS).iterdir():
        if path not in keep:
            remove(path)


def restore(
    folder: Path,
    vault: Vault,
    *,
    receipts: Sequence[Receipt] = (),
    fresh: bool = False,
) -> Restored:
    """Makes a gallery what a backup of it says, in one transaction; what was forgotten since stays forgotten.

    Args:
        folder: the backup's.
        vault: of the same gallery, in a later or an earlier state; or a new and empty one.
        receipts: of erasures that neither the backup nor the gallery knows.
        fresh: the gallery is new; it becomes the backup's gallery, its history included.

    Raises:
        DataError: there is no backup, or one of its files is not what was written; nothing was changed.
        InputError: the backup is another gallery's.
    """
    backup = _open(folder)
    if damaged := check(folder):
        raise DataError(f"{folder / damaged[0]} is not what was backed up; restore another backup.")
    with _readable(backup) as store, store.read() as reader, vault.writing() as writer:
        if not fresh and writer.gallery().uuid != backup.gallery:
            raise InputError(
                f"{folder} is a backup of another gallery than {vault.folder}; restore it to a new folder."
            )
        return _restore(backup, reader, vault, writer, receipts, fresh=fresh)


@contextmanager
def _readable(backup: _Backup) -> Iterator[Store]:
    """A backup's database; one of an older version is copied and brought up to date, never changed."""
    path = backup.folder / backup.database
    if backup.schema == SCHEMA_VERSION:
        with closing(Store.open(path, read_only=True)) as store:
            yield store
        return
    with temporary_folder(Path(tempfile.gettempdir()), "faceprint-restore-") as temporary:
        copy_durably(path, temporary / "gallery.db")
        with closing(Store.open(temporary / "gallery.db")) as store:
            yield store


def _restore(
    backup: _Backup,
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
    # A receipt may know numbers that neither gallery nor backup has reached: they are nobody else's.
    next_face, next_identity = max(numbers, default=0) + 1, max(people, default=0) + 1
    numbers |= set(reader.face_ids_of_identities(people))
    gone = [number for number in reader.face_ids() if number in numbers]

    old = list(writer.generations().values())
    generations = _bring_models(backup, reader, vault, writer, reader.names_of(people))
    writer.replace_segments([segment.id for segment in writer.segments()], [])
    for segment in reader.segments():
        _bring_segment(backup, vault, writer, segment, generations[segment.generation], gone)
    _bring_rows(reader, writer, fresh=fresh)
    _bring_calibrations(reader, writer, generations)
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
    writer.remove_faces(gone)
    count = writer.count()
    vault.log(writer, "restore", faces=count, taken_at=backup.taken_at, forgotten_again=len(gone))
    # Of what stood here before, and of the forgotten, no trace is to stay.
    vault.owe(writer, erase=True, labels={})
    return Restored(os.fspath(vault.folder), count, len(gone), backup.taken_at)


def _bring_models(
    backup: _Backup, reader: Reader, vault: Vault, writer: Writer, forgotten: set[str]
) -> dict[int, Generation]:
    """The backup's models in the gallery, by the backup's numbers; the names of the forgotten taken off."""
    here = list(writer.generations().values())
    found: dict[int, Generation] = {}
    for generation in reader.generations().values():
        bundle = ModelBundle.load(backup.model(generation))
        erased = _forgotten_labels(vault, here, generation, bundle, forgotten)
        bundle = bundle.relabelled(dict.fromkeys(erased, _FORGET))
        card = hashlib.sha256(bundle.card().encode()).hexdigest() if erased else generation.card_sha256
        same = [one for one in here if (one.fingerprint, one.card_sha256) == (generation.fingerprint, card)]
        if same:
            found[generation.id] = same[0]
            continue
        number = writer.gallery().next_generation_id
        folder = f"{MODEL}-{number}"
        copy = ModelBundle.load(backup.model(generation)).save(vault.folder / folder, inherit=True)
        if erased:
            copy.relabelled(dict.fromkeys(erased, _FORGET)).rewrite_card()
        made = dataclasses.replace(generation, id=number, folder=folder, card_sha256=copy.card_sha256())
        writer.add_generation(made)
        found[generation.id] = made
    return found


def _forgotten_labels(
    vault: Vault,
    here: Sequence[Generation],
    generation: Generation,
    bundle: ModelBundle,
    forgotten: set[str],
) -> set[int]:
    """Numbers of the labels of a backup's model that are to be forgotten: by name, or forgotten here."""
    erased = {number for number, label in enumerate(bundle.labels) if label in forgotten}
    for one in here:
        if one.fingerprint == generation.fingerprint:
            today = ModelBundle.load(vault.folder / one.folder).labels
            erased |= {number for number, label in enumerate(today) if label == FORGOTTEN}
    return {number for number in erased if bundle.labels[number] != FORGOTTEN}


def _bring_segment(
    backup: _Backup,
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


def _bring_rows(reader: Reader, writer: Writer, *, fresh: bool) -> None:
    # Deleted from those that refer to others to those that are referred to, and filled the other way.
    tables = [identity_table, face_table, file_table, alias_table, merger_table, host_table]
    for table in reversed(tables):
        writer.clear(table)
    for table in [*tables, *([audit_table] if fresh else [])]:
        for rows in reader.rows(table):
            writer.fill(table, rows)


def _bring_calibrations(reader: Reader, writer: Writer, generations: dict[int, Generation]) -> None:
    """What the backup knows of distances, and nothing else: what is known here is of other faces."""
    writer.clear(calibration_table)
    for number, generation in reader.generations().items():
        found = reader.calibration(generation)
        if found is not None:
            writer.set_calibration(dataclasses.replace(found, generation=generations[number].id))


def check(folder: Path) -> list[str]:
    """What is wrong with a backup: the names of files that are missing or not what was written.

    Raises:
        DataError: there is no backup.
    """
    backup = _open(folder)
    return sorted(name for name, digest in backup.files.items() if _sha256(folder / name) != digest)


def files_by_sha256(folder: Path) -> dict[str, Path]:
    """The files of a backup by the SHA-256 that its card states.

    Raises:
        DataError: there is no backup.
    """
    return {digest: folder / name for name, digest in _open(folder).files.items()}


def gallery_model(folder: Path) -> ModelBundle:
    """The model that served when a backup was taken.

    Raises:
        DataError: there is no backup.
    """
    backup = _open(folder)
    with closing(Store.open(folder / backup.database, read_only=True)) as store, store.read() as reader:
        return ModelBundle.load(backup.model(reader.generations()[reader.gallery().generation_id]))


def _open(folder: Path) -> _Backup:
    path = folder / _CARD
    if not path.is_file():
        raise DataError(f"{folder} is not a backup: it has no {_CARD}; make one with `faceprint backup`.")
    try:
        card = json.loads(path.read_text("utf-8"))
        newer = card["format"] > _FORMAT or card["schema"] > SCHEMA_VERSION
        facts = {name: card[name] for name in ("gallery", "taken_at", "schema", "database")}
        backup = _Backup(folder=folder, files=dict(card["files"]), **facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; take another backup.") from error
    if newer:
        raise DataError(f"The backup {folder} was made by a newer version of faceprint; upgrade faceprint.")
    return backup


def _sha256(path: Path) -> str | None:
    """Of a file, in hex; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
