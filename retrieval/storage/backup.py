"""Backups: consistent copies of a gallery, taken beside writers, and their restoration.

my.backup/
  backup.json                     the card; written last, so it names only complete files
  gallery-<SHA-256>.db            the database, one snapshot
  vectors/<SHA-256>.faiss         segments by their content: a second backup copies only new ones
  models/<SHA-256 of the card>/   the bundles
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import numpy as np

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.reader import Reader
from retrieval.database.records import Generation, Receipt, Segment, utc_now
from retrieval.database.store import Store
from retrieval.database.tables import (
    alias_table,
    audit_table,
    calibration_table,
    face_table,
    file_table,
    host_table,
    identity_table,
    merger_table,
    photo_table,
)
from retrieval.database.writer import Writer
from retrieval.errors import BundleError, DataError, GalleryDamaged, GalleryError, InputError, StorageError
from retrieval.index.segments import FlatVectors
from retrieval.models.bundle import FILE_NAMES, FORGOTTEN, ModelBundle, Relabel
from retrieval.storage.layout import BACKUP_CARD, MODEL, VECTORS
from retrieval.storage.leftovers import is_unfinished_backup, unfinished_backup
from retrieval.storage.vault import LOCK_TIMEOUT, Vault
from retrieval.system import lock
from retrieval.system.files import (
    copy_durably,
    create,
    is_no_file,
    make_folder,
    make_output_folder,
    open_plain,
    other_than_file,
    remove,
    sync,
    temporary_folder,
    why,
    write_durably,
)
from retrieval.system.manifests import parse_manifest

_T = TypeVar("_T")

_CARD: Final = BACKUP_CARD
_FORMAT: Final = 1
_MODELS: Final = "models"
_BLOCK_BYTES: Final = 2**20

# The files of a model. Its card states the SHA-256 of the others, but not of the description, which is for
# people and may be missing.
_MODEL_CARD: Final = "bundle.json"
_DESCRIPTION: Final = "MODELCARD.md"

# The file names that a card may contain: none outside the folder of the backup.
_NAME: Final = re.compile(
    r"gallery-[0-9a-f]{16}\.db|vectors/[0-9a-f]{64}\.faiss"
    rf"|models/[0-9a-f]{{64}}/({'|'.join(map(re.escape, sorted(FILE_NAMES)))})"
)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

# The files that a backup may delete: its own, complete or temporary (of any version), and SQLite's with them.
_BACKUP_FILE_NAME: Final = re.compile(
    r"gallery-[0-9a-f]{16}\.db(-wal|-shm|-journal)?|\.gallery\.part(-wal|-shm|-journal)?"
    r"|[0-9a-f]{64}\.(faiss|part)|\..*\.part|MODELCARD\.md"
)
_MODEL_FOLDER: Final = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}-\w+")

_FORGET: Final = Relabel(None, keep_photos=False)

# The most segments that are opened before the first is copied: far below the limit of open files.
_MAX_OPEN_SEGMENTS: Final = 256

# The most attempts of a backup when segments are merged away before it could open them.
_ATTEMPTS: Final = 20


@dataclass(frozen=True, slots=True)
class BackedUp:
    """The result of a backup; sizes in bytes."""

    folder: str
    faces: int
    revision: int
    segments_copied: int
    segments_kept: int
    bytes_copied: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a restore: faces in the gallery now, and faces of the backup that stay erased."""

    folder: str
    faces: int
    forgotten_again: int
    taken_at: str


class _Unfinished(Exception):
    """The gallery has deferred work, which changes the database."""


class _CardDamaged(DataError):
    """The card of a backup is damaged."""


@dataclass(frozen=True)
class _Backup:
    """The content of a backup, as its card states it."""

    folder: Path
    gallery: str
    taken_at: str
    schema: str
    database: str
    files: dict[str, str]  # SHA-256 by path, relative to the folder
    faces: int
    revision: int

    def vectors(self, segment: Segment) -> Path:
        return self.folder / VECTORS / f"{segment.sha256}.faiss"

    def model(self, generation: Generation) -> Path:
        return self.folder / _MODELS / generation.card_sha256


def back_up(vault: Vault, target: Path, *, verify: bool = True) -> BackedUp:
    """Copies one snapshot of a gallery, without blocking writers and readers, and returns the figures.

    A file of an older backup in `target` is kept only if its SHA-256 is the expected one; otherwise it is
    copied again. The older backup stays complete until the new one is; the files that only the older one
    needs are then deleted.

    Args:
        vault: the gallery.
        target: the folder of the backup.
        verify: read each copied file back and compare its SHA-256.

    Raises:
        InputError: `target` is not a backup of this gallery, and is not an empty or missing folder.
        GalleryDamaged: a file of the gallery does not match its row; the older backup is unchanged.
        GalleryBusy: another process writes a backup there.
        StorageError: the file system refused, or read back other bytes than were written; the older backup is
            unchanged.
    """
    if target.resolve().is_relative_to(vault.folder.resolve()):
        raise InputError(f"{target} is in the gallery itself; choose a folder elsewhere.")
    try:
        lock.check_lockable(target)
        if target.is_dir():
            _check_target(vault, target)  # before a lock file is made among other files
        make_output_folder(target)
        with lock.exclusive(target / "writer.lock", timeout=LOCK_TIMEOUT):
            done = _back_up(vault, target, verify=verify)
    except OSError as error:
        raise StorageError(f"The backup {target} cannot be written: {why(error)}.") from error
    if not vault.read_only:
        with vault.writing() as writer:
            vault.log(writer, "backup", faces=done.faces, revision=done.revision)
    return done


@dataclass
class _Copying:
    """The files of a backup in progress.

    Attributes:
        target: the folder of the backup.
        kept: SHA-256 by name of files of an older backup, each read and compared in this run.
        copied: SHA-256 by name of files that were copied in this run.
    """

    target: Path
    kept: dict[str, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)

    def has(self, name: str, sha256: str) -> bool:
        """Returns whether a file exists with this SHA-256; reads all of it, once a run."""
        if sha256 in (self.kept.get(name), self.copied.get(name)):
            return True
        if _sha256(self.target / name) != sha256:
            return False
        self.kept[name] = sha256
        return True

    def copy(self, name: str, source: IO[bytes], sha256: str | None = None) -> str | None:
        """Copies a file durably, replacing any file of that name; returns the SHA-256 of the bytes read.

        If it differs from `sha256`, no file is replaced and None is returned.
        """
        path = self.target / name
        part = path.with_name(f".{path.name}.part")
        digest = hashlib.sha256()
        try:
            with create(part, inherit=True) as copy:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    copy.write(block)
                copy.flush()
                os.fsync(copy.fileno())
            found = digest.hexdigest()
            if sha256 is not None and found != sha256:
                return None
            _replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.kept.pop(name, None)
        self.copied[name] = found
        return found

    def prove(self) -> None:
        """Reads the copied files back and compares them.

        Raises:
            StorageError: a file has other bytes than were written.
        """
        for name, sha256 in self.copied.items():
            path = self.target / name
            if _sha256(path) != sha256:
                raise StorageError(
                    f"{path} reads back as something else than was written: the disk may be failing; back up "
                    "to another one."
                )


def _back_up(vault: Vault, target: Path, *, verify: bool) -> BackedUp:
    _check_target(vault, target)
    for folder in (VECTORS, _MODELS):
        make_folder(target / folder, like=target, exist_ok=True)
    copying = _Copying(target)
    for attempt in range(_ATTEMPTS):
        try:
            database = _copy_snapshot(vault, copying)
            break
        except _Unfinished:
            vault.run_deferred()
        except FileNotFoundError as error:
            # A writer merged it away meanwhile; files copied so far are not copied again.
            if attempt == _ATTEMPTS - 1:
                raise GalleryDamaged(
                    f"{error.filename} is missing; see `faceprint verify {vault.folder}`."
                ) from error
    with closing(Store.open(database, read_only=True)) as store, store.read() as reader:
        row, segments, faces = reader.gallery(), reader.segments(), reader.count()
        generations = list(reader.generations().values())
    vectors = {_vectors_name(segment): segment.sha256 for segment in segments}
    files = {database.name: copying.copied[database.name], **vectors}
    for generation in generations:
        files |= _model_files(copying, generation)
    if verify:
        copying.prove()
    below = {target, target / VECTORS, target / _MODELS, *((target / name).parent for name in files)}
    for part in sorted(below, reverse=True):
        sync(part)
    backup = _Backup(target, row.uuid, utc_now(), SCHEMA_VERSION, database.name, files, faces, row.revision)
    write_durably(target / _CARD, _card(backup), inherit=True, anything=True)
    _remove_unnamed(backup)
    copied = vectors.keys() & copying.copied.keys()
    return BackedUp(
        os.fspath(target),
        faces,
        row.revision,
        segments_copied=len(copied),
        segments_kept=len(vectors) - len(copied),
        bytes_copied=sum(segment.bytes for segment in segments if _vectors_name(segment) in copied),
    )


def _check_target(vault: Vault, target: Path) -> None:
    """Checks that a folder can take the backup: it is empty, or holds a backup of the same gallery.

    A backup with a damaged card is still recognized by its database, and completed.

    Raises:
        InputError: the folder cannot take the backup.
    """
    with vault.store.read() as reader:
        gallery = reader.gallery().uuid
    for name in (VECTORS, _MODELS):
        if (target / name).is_symlink():
            raise InputError(
                f"{target / name} is a symbolic link; a backup is one folder: remove the link, or choose "
                "another folder."
            )
    damaged, before = False, None
    if os.path.lexists(target / _CARD):
        try:
            before = _read_backup(target)
        except _CardDamaged:
            damaged = True
    if before is not None and before.gallery == gallery:
        return
    if before is not None or damaged:
        if _owner(target) == gallery:
            return
        if damaged:
            raise InputError(
                f"{target / _CARD} is damaged, and no database beside it names the gallery of the backup; "
                "choose another folder."
            )
        raise InputError(f"{target} is a backup of another gallery; choose another folder.")
    ours = {"writer.lock", VECTORS, _MODELS}
    strange = [
        path.name
        for path in target.iterdir()
        if path.name not in ours and not path.name.startswith(("gallery-", ".gallery", ".backup"))
    ]
    if strange:
        raise InputError(f"{target} is not empty and is no backup; choose another folder.")


def _owner(target: Path) -> str | None:
    """Returns the gallery UUID of a backup's database that matches the hash in its name; None without one."""
    for path in sorted(target.glob("gallery-*.db")):
        if path.name != _database_name(_sha256(path)):
            continue
        with (
            suppress(GalleryDamaged, GalleryError),
            closing(Store.open(path, read_only=True)) as store,
            store.read() as reader,
        ):
            return reader.gallery().uuid
    return None


def _copy_snapshot(vault: Vault, copying: _Copying) -> Path:
    """Copies the database, and the segments and models that the backup lacks; returns the database's path.

    Raises:
        FileNotFoundError: a segment was merged away, or a model changed, before it could be copied.
        _Unfinished: an erasure is not finished; a copy would keep its traces.
    """
    target = copying.target
    part = target / ".gallery.part"
    vault.store.copy(part)
    digest = _sha256(part)
    database = target / _database_name(digest)
    _replace(part, database)
    copying.copied[database.name] = str(digest)
    with closing(Store.open(database, read_only=True)) as store, store.read() as reader:
        segments = sorted(reader.segments(), key=lambda segment: segment.rows)
        generations = list(reader.generations().values())
        if reader.gallery().unfinished is not None:
            raise _Unfinished
    with ExitStack() as stack:
        # An open file stays readable after a writer has merged it away; small segments are merged first.
        opened: dict[int, IO[bytes]] = {}
        for segment in segments[:_MAX_OPEN_SEGMENTS]:
            with suppress(FileNotFoundError):  # the backup may have it
                opened[segment.id] = stack.enter_context(_open_source(vault, segment))
        for segment in segments:
            if not copying.has(_vectors_name(segment), segment.sha256):
                file = opened.get(segment.id)
                with nullcontext(file) if file else _open_source(vault, segment) as source:
                    _copy_segment(vault, copying, segment, source)
    for generation in generations:
        _copy_model(vault, copying, generation)
    return database


def _replace(part: Path, path: Path) -> None:
    """Renames a file to `path`, replacing a file or folder there."""
    if path.is_dir() and not path.is_symlink():
        remove(path)
    os.replace(part, path)


def _source(vault: Vault, segment: Segment) -> Path:
    return vault.folder / VECTORS / f"{segment.id:08d}.faiss"


def _open_source(vault: Vault, segment: Segment) -> IO[bytes]:
    """Opens the file of a segment.

    Raises:
        FileNotFoundError: the file does not exist.
        GalleryDamaged: its path is not a plain file.
    """
    path = _source(vault, segment)
    try:
        return open_plain(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_no_file(error):
            raise _damaged(vault, path) from error
        raise


def _vectors_name(segment: Segment) -> str:
    return f"{VECTORS}/{segment.sha256}.faiss"


def _database_name(sha256: str | None) -> str:
    return f"gallery-{str(sha256)[:16]}.db"


def _copy_segment(vault: Vault, copying: _Copying, segment: Segment, source: IO[bytes]) -> None:
    if copying.copy(_vectors_name(segment), source, segment.sha256) is None:
        raise _damaged(vault, _source(vault, segment))


def _damaged(vault: Vault, path: Path) -> GalleryDamaged:
    return GalleryDamaged(f"{path} is not what was written; see `faceprint verify {vault.folder}`.")


def _copy_model(vault: Vault, copying: _Copying, generation: Generation) -> None:
    """Copies the files of a model that the backup lacks.

    Raises:
        FileNotFoundError: the card of the gallery's model has changed since the snapshot.
        GalleryDamaged: a file of the gallery's model is damaged.
    """
    source = vault.folder / generation.folder
    below = f"{_MODELS}/{generation.card_sha256}"
    folder = copying.target / below
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()
    make_folder(folder, like=copying.target, exist_ok=True)
    card = f"{below}/{_MODEL_CARD}"
    if not copying.has(card, generation.card_sha256):
        _copy_model_file(vault, copying, source / _MODEL_CARD, card, generation.card_sha256, generation)
    for name, digest in ModelBundle.stated_files(folder).items():
        if not copying.has(f"{below}/{name}", digest):
            _copy_model_file(vault, copying, source / name, f"{below}/{name}", digest, generation)
    # The description is for people. No card states its SHA-256, so it is compared with the gallery's file.
    described = source / _DESCRIPTION
    sha256 = _sha256(described)
    if sha256 is None:
        (folder / _DESCRIPTION).unlink(missing_ok=True)
    elif not copying.has(f"{below}/{_DESCRIPTION}", sha256):
        with open_plain(described) as file:
            copying.copy(f"{below}/{_DESCRIPTION}", file)


def _copy_model_file(
    vault: Vault, copying: _Copying, source: Path, name: str, sha256: str, generation: Generation
) -> None:
    try:
        with open_plain(source) as file:
            if copying.copy(name, file, sha256) is not None:
                return
    except OSError as error:
        if not is_no_file(error):
            raise
    with vault.store.read() as reader:
        if reader.generations().get(generation.id) != generation:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(source))
    raise _damaged(vault, source)


def _model_files(copying: _Copying, generation: Generation) -> dict[str, str]:
    """Returns the SHA-256 of the files of a model in the backup, by name."""
    below = f"{_MODELS}/{generation.card_sha256}/"
    return {
        name: digest for name, digest in (copying.kept | copying.copied).items() if name.startswith(below)
    }


def _card(backup: _Backup) -> bytes:
    """Returns the text of backup.json."""
    fields = {"format": _FORMAT, **asdict(backup)}
    del fields["folder"]
    return (json.dumps({**fields, "sha256": _card_checksum(fields)}, indent=1) + "\n").encode()


def _card_checksum(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the fields of a card, without the checksum itself."""
    said = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _remove_unnamed(backup: _Backup) -> None:
    """Removes files that only an older backup needed or that an interrupted one left; no other files."""
    named = {backup.folder / name for name in backup.files}
    keep = named | {path.parent for path in named}
    for path in (
        *backup.folder.glob("gallery-*.db*"),
        *backup.folder.glob(".gallery.part*"),
        *(backup.folder / VECTORS).iterdir(),
        *(path for folder in keep if folder.parent.name == _MODELS for path in folder.iterdir()),
    ):
        if path not in keep and _BACKUP_FILE_NAME.fullmatch(path.name):
            remove(path)
    for path in (backup.folder / _MODELS).iterdir():
        if path not in keep and _MODEL_FOLDER.fullmatch(path.name):
            remove(path)


def restore(
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
    backup = _verified(folder)
    with _readable(backup) as store, store.read() as reader, vault.writing() as writer:
        if not fresh and writer.gallery().uuid != backup.gallery:
            raise InputError(
                f"{folder} is a backup of another gallery than {vault.folder}; restore it to a new folder."
            )
        return _restore(backup, reader, vault, writer, receipts, fresh=fresh)


@contextmanager
def _readable(backup: _Backup) -> Iterator[Store]:
    """Yields the database of a backup; one of an older schema is migrated in a temporary copy."""
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
    # A receipt may contain ids that neither gallery nor backup has reached: they stay reserved.
    next_face, next_identity = max(numbers, default=0) + 1, max(people, default=0) + 1
    numbers |= set(reader.face_ids_of_identities(people))
    gone = [number for number in reader.face_ids() if number in numbers]

    old = list(writer.generations().values())
    generations = _restore_models(backup, reader, vault, writer, reader.names_of(people))
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
    writer.remove_faces(gone)
    count = writer.count()
    vault.log(writer, "restore", faces=count, taken_at=backup.taken_at, forgotten_again=len(gone))
    # No trace of the former content and of erased faces may remain.
    vault.defer(writer, erase=True, labels={})
    return Restored(os.fspath(vault.folder), count, len(gone), backup.taken_at)


def _restore_models(
    backup: _Backup, reader: Reader, vault: Vault, writer: Writer, forgotten: set[str]
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
        bundle = bundle.relabelled(dict.fromkeys(erased, _FORGET))
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
            copy.relabelled(dict.fromkeys(erased, _FORGET)).rewrite_card()
        made = dataclasses.replace(generation, id=number, folder=folder, card_sha256=copy.card_sha256())
        writer.add_generation(made)
        found[generation.id] = made
    return found


def _is_intact(folder: Path, card_sha256: str) -> bool:
    """Returns whether all files of a gallery's model match their SHA-256; reads all of them."""
    if _sha256(folder / _MODEL_CARD) != card_sha256:
        return False
    try:
        stated = ModelBundle.stated_files(folder)
    except BundleError:
        return False
    return all(_sha256(folder / name) == digest for name, digest in stated.items())


def _forgotten_labels(
    vault: Vault,
    here: Sequence[Generation],
    generation: Generation,
    bundle: ModelBundle,
    forgotten: set[str],
) -> set[int]:
    """Returns the indices of the labels to erase in a backup's model: erased by name, or in this gallery."""
    erased = {number for number, label in enumerate(bundle.labels) if label in forgotten}
    for one in here:
        if one.fingerprint == generation.fingerprint:
            today = ModelBundle.load(vault.folder / one.folder).labels
            erased |= {number for number, label in enumerate(today) if label == FORGOTTEN}
    return {number for number in erased if bundle.labels[number] != FORGOTTEN}


def _restore_segment(
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


def _restore_rows(reader: Reader, writer: Writer, *, fresh: bool) -> None:
    # Foreign keys: referring tables are cleared first, and filled last.
    tables = [identity_table, photo_table, face_table, file_table, alias_table, merger_table, host_table]
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


def check_backup(folder: Path) -> list[str]:
    """Returns the names of the files of a backup that are missing or damaged.

    Raises:
        DataError: there is no backup, its card is damaged, or its files contradict each other.
        StorageError: a file cannot be read.
    """
    backup = _read_backup(folder)
    wrong = sorted(name for name, digest in backup.files.items() if _sha256_in(folder, name) != digest)
    if not wrong:
        with _readable(backup) as store:
            if problems := store.problems():
                raise _contradiction(backup, f"hold a database that is damaged ({problems[0]})")
            with store.read() as reader:
                _check_against(backup, reader)
    return wrong


def _check_against(backup: _Backup, reader: Reader) -> None:
    """Checks that the card, database, models and segments of a backup agree; their hashes were compared.

    Raises:
        DataError: they contradict each other.
    """
    row, generations, segments = reader.gallery(), reader.generations(), reader.segments()
    if row.unfinished is not None:
        raise _contradiction(backup, "hold a database with an erasure half done")
    if row.uuid != backup.gallery:
        raise _contradiction(backup, "name different galleries")
    if (row.revision, reader.count()) != (backup.revision, backup.faces):
        raise _contradiction(backup, "state different numbers of faces or revisions")
    if row.generation_id not in generations:
        raise _contradiction(backup, "name different models")
    expected = {backup.database: backup.files[backup.database]}
    for generation in generations.values():
        try:
            bundle = ModelBundle.load(backup.model(generation))
        except BundleError as error:
            raise DataError(f"{error} So the backup {backup.folder} is not whole; back up again.") from error
        if (bundle.fingerprint, bundle.dimension) != (generation.fingerprint, generation.dimension):
            raise _contradiction(backup, "state different models")
        below = f"{_MODELS}/{generation.card_sha256}"
        expected |= {f"{below}/{_MODEL_CARD}": generation.card_sha256}
        expected |= {f"{below}/{name}": digest for name, digest in bundle.files.items()}
        described = f"{below}/{_DESCRIPTION}"
        expected |= {described: backup.files[described]} if described in backup.files else {}
    for segment in segments:
        expected[_vectors_name(segment)] = segment.sha256
        _check_segment(backup, segment, generations)
    if differing := sorted(expected.items() ^ backup.files.items()):
        raise _contradiction(backup, f"do not name the same files ({differing[0][0]} is one)")


def _check_segment(backup: _Backup, segment: Segment, generations: Mapping[int, Generation]) -> None:
    path = backup.vectors(segment)
    if segment.generation_id not in generations:
        raise _contradiction(backup, "name vectors of no model")
    flat = FlatVectors(backup.folder / VECTORS, generations[segment.generation_id].dimension)
    try:
        ids, _ = flat.rows_of_file(path)
    except GalleryDamaged as error:
        raise DataError(f"{path} is not a vector file of this backup; back up again.") from error
    if (len(ids), path.stat().st_size) != (segment.rows, segment.bytes):
        raise _contradiction(backup, f"state different sizes of {path.name}")


def _contradiction(backup: _Backup, what: str) -> DataError:
    return DataError(
        f"The backup {backup.folder} contradicts itself: its files {what}; back up again, or use another "
        "backup."
    )


def files_by_sha256(folder: Path) -> dict[str, Path]:
    """Returns the files of a backup by the SHA-256 that its card states.

    Raises:
        DataError: there is no backup.
    """
    return {digest: folder / name for name, digest in _read_backup(folder).files.items()}


def gallery_model(folder: Path) -> ModelBundle:
    """Returns the model that served searches when a backup was taken.

    Raises:
        DataError: there is no backup, or it is damaged.
    """
    backup = _verified(folder)
    with _readable(backup) as store, store.read() as reader:
        return ModelBundle.load(backup.model(reader.serving_generation()))


def _verified(folder: Path) -> _Backup:
    """Returns a backup after checking all of its files.

    Raises:
        DataError: there is no backup, or a file is missing or damaged.
    """
    if damaged := check_backup(folder):
        raise DataError(f"{folder / damaged[0]} is not what was backed up; restore another backup.")
    return _read_backup(folder)


@dataclass(frozen=True)
class _Stated:
    """The fields of a card in every version, which identify a newer version."""

    format: int
    schema: str


@dataclass(frozen=True)
class _Fields(_Stated):
    gallery: str
    taken_at: str
    database: str
    files: dict[str, str]
    faces: int
    revision: int


def _read_backup(folder: Path) -> _Backup:
    """Returns the content of a backup's card.

    Raises:
        DataError: there is no card, a newer version wrote it, or it is damaged.
        StorageError: it cannot be read.
    """
    path = folder / _CARD
    advice = "back up again, or use another backup"
    try:
        if path.is_symlink():
            raise _CardDamaged(f"{path} is a symbolic link; {advice}.")
        # Reading a pipe would block.
        if (other := other_than_file(path)) is not None:
            raise _CardDamaged(f"{path} is {other}, not a file; {advice}.")
        data = path.read_bytes()
    except OSError as error:
        if not is_no_file(error):
            raise StorageError(f"{path} cannot be read: {why(error)}.") from error
        if is_unfinished_backup(folder):
            raise DataError(unfinished_backup(folder)) from error
        raise DataError(
            f"{folder} is not a backup: it has no {_CARD}; make one with `faceprint backup`."
        ) from error

    def parsed(kind: type[_T]) -> _T:
        return parse_manifest(data, kind, name=path, error=_CardDamaged, advice=advice)

    said = parsed(dict[str, Any])
    if "sha256" in said and said["sha256"] != _card_checksum(said):
        raise _CardDamaged(f"{path} is damaged: it is not what was written; {advice}.")
    stated = parsed(_Stated)
    if stated.format > _FORMAT or stated.schema > SCHEMA_VERSION:
        raise DataError(f"The backup {folder} was made by a newer version of faceprint; upgrade faceprint.")
    fields = parsed(_Fields)
    strange = [
        name
        for name, digest in [*fields.files.items(), (fields.database, "0" * 64)]
        if not (_NAME.fullmatch(name) and _SHA256.fullmatch(digest))
    ]
    if strange or fields.database not in fields.files or "/" in fields.database:
        name = strange[0] if strange else fields.database
        raise _CardDamaged(f"{path} is damaged: it names {name!r}, which is no file of a backup; {advice}.")
    try:
        datetime.fromisoformat(fields.taken_at)
    except ValueError as error:
        raise _CardDamaged(f"{path} is damaged (the field taken_at: it is no time); {advice}.") from error
    facts = {name: value for name, value in vars(fields).items() if name != "format"}
    return _Backup(folder=folder, **facts)


def _sha256_in(folder: Path, name: str) -> str | None:
    """Returns the SHA-256 of a file of a backup, in hex; None if it or its folder is missing or a link."""
    path = folder / name
    if any((folder / parent).is_symlink() for parent in Path(name).parents if parent.name):
        return None
    return _sha256(path)


def _sha256(path: Path) -> str | None:
    """Returns the SHA-256 of a file, in hex; None if it does not exist or is not a plain file.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        # Opening a FIFO must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        # Something else than a plain file counts as damaged; all other errors are of the disk.
        if is_no_file(error):
            return None
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error
