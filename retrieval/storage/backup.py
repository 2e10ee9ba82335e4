"""Writes a backup: a consistent copy of a gallery, taken beside readers and writers.

`backup_contents` says which files it has, `backup_integrity` checks them, `restore` makes a gallery of them.
"""

import errno
import hashlib
import os
import re
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.records import Generation, Segment, utc_now
from retrieval.database.store import Store
from retrieval.errors import GalleryBusy, GalleryDamaged, GalleryError, InputError, StorageError
from retrieval.models.bundle import ModelBundle
from retrieval.storage.backup_contents import (
    MODEL_CARD,
    MODEL_DESCRIPTION,
    MODELS,
    Backup,
    CardDamaged,
    card_text,
    database_name,
    read_backup,
    sha256_of,
    vectors_name,
)
from retrieval.storage.layout import BACKUP_CARD, VECTORS, segment_path
from retrieval.storage.vault import LOCK_TIMEOUT, Vault
from retrieval.system import lock
from retrieval.system.files import (
    create,
    is_no_file,
    make_folder,
    make_output_folder,
    open_plain,
    remove,
    sync,
    why,
    write_durably,
)

_BLOCK_BYTES: Final = 2**20

# The files that a backup may delete: its own, complete or temporary (of any version), and SQLite's with them.
_BACKUP_FILE_NAME: Final = re.compile(
    r"gallery-[0-9a-f]{16}\.db(-wal|-shm|-journal)?|\.gallery\.part(-wal|-shm|-journal)?"
    r"|[0-9a-f]{64}\.(faiss|part)|\..*\.part|MODELCARD\.md"
)
_MODEL_FOLDER: Final = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}-\w+")

# The most segments that are opened before the first is copied: far below the limit of open files.
_MAX_OPEN_SEGMENTS: Final = 256

# The most attempts of a backup when other processes merge segments away or erase faces during each.
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


class _Unfinished(Exception):
    """The gallery has deferred work, which changes the database."""


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
        GalleryBusy: another process writes a backup there, or keeps erasing faces of the gallery.
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
        if sha256_of(self.target / name) != sha256:
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

    def check(self) -> None:
        """Reads the copied files back and compares them.

        Raises:
            StorageError: a file has other bytes than were written.
        """
        for name, sha256 in self.copied.items():
            path = self.target / name
            if sha256_of(path) != sha256:
                raise StorageError(
                    f"{path} reads back as something else than was written: the disk may be failing; back up "
                    "to another one."
                )


def _back_up(vault: Vault, target: Path, *, verify: bool) -> BackedUp:
    _check_target(vault, target)
    for folder in (VECTORS, MODELS):
        make_folder(target / folder, like=target, exist_ok=True)
    copying = _Copying(target)
    database = _copy_with_retries(vault, copying)
    with closing(Store.open(database, read_only=True)) as store, store.read() as reader:
        row, segments, faces = reader.gallery(), reader.segments(), reader.count()
        generations = list(reader.generations().values())
    vectors = {vectors_name(segment): segment.sha256 for segment in segments}
    files = {database.name: copying.copied[database.name], **vectors}
    for generation in generations:
        files |= _model_files(copying, generation)
    if verify:
        copying.check()
    below = {target, target / VECTORS, target / MODELS, *((target / name).parent for name in files)}
    for part in sorted(below, reverse=True):
        sync(part)
    backup = Backup(target, row.uuid, utc_now(), SCHEMA_VERSION, database.name, files, faces, row.revision)
    write_durably(target / BACKUP_CARD, card_text(backup), inherit=True, anything=True)
    _remove_unnamed(backup)
    copied = vectors.keys() & copying.copied.keys()
    return BackedUp(
        os.fspath(target),
        faces,
        row.revision,
        segments_copied=len(copied),
        segments_kept=len(vectors) - len(copied),
        bytes_copied=sum(segment.bytes for segment in segments if vectors_name(segment) in copied),
    )


def _check_target(vault: Vault, target: Path) -> None:
    """Checks that a folder can take the backup: it is empty, or holds a backup of the same gallery.

    A backup with a damaged card is still recognized by its database, and completed.

    Raises:
        InputError: the folder cannot take the backup.
    """
    with vault.store.read() as reader:
        gallery = reader.gallery().uuid
    for name in (VECTORS, MODELS):
        if (target / name).is_symlink():
            raise InputError(
                f"{target / name} is a symbolic link; a backup is one folder: remove the link, or choose "
                "another folder."
            )
    damaged, before = False, None
    if os.path.lexists(target / BACKUP_CARD):
        try:
            before = read_backup(target)
        except CardDamaged:
            damaged = True
    if before is not None and before.gallery == gallery:
        return
    if before is not None or damaged:
        if _owner(target) == gallery:
            return
        if damaged:
            raise InputError(
                f"{target / BACKUP_CARD} is damaged, and no database beside it names the gallery of the "
                "backup; choose another folder."
            )
        raise InputError(f"{target} is a backup of another gallery; choose another folder.")
    ours = {"writer.lock", VECTORS, MODELS}
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
        if path.name != database_name(sha256_of(path)):
            continue
        with (
            suppress(GalleryDamaged, GalleryError),
            closing(Store.open(path, read_only=True)) as store,
            store.read() as reader,
        ):
            return reader.gallery().uuid
    return None


def _copy_with_retries(vault: Vault, copying: _Copying) -> Path:
    """Copies a snapshot, again if a writer changes the gallery meanwhile; returns the database's path.

    Raises:
        GalleryDamaged: a file of the gallery is missing, or does not match its row.
        GalleryBusy: another process erased faces during each attempt.
    """
    missing: FileNotFoundError | None = None
    for _ in range(_ATTEMPTS):
        try:
            return _copy_snapshot(vault, copying)
        except _Unfinished:
            vault.run_deferred()
        except FileNotFoundError as error:
            # A writer merged the segment away. What was copied so far is not copied again.
            missing = error
    if missing is None:
        raise GalleryBusy(f"Another process keeps erasing faces of {vault.name}; back up again later.")
    raise GalleryDamaged(f"{missing.filename} is missing; see `faceprint verify {vault.name}`.") from missing


def _copy_snapshot(vault: Vault, copying: _Copying) -> Path:
    """Copies the database, and the segments and models that the backup lacks; returns the database's path.

    Raises:
        FileNotFoundError: a segment was merged away, or a model changed, before it could be copied.
        _Unfinished: an erasure is not finished; a copy would keep its traces.
    """
    target = copying.target
    part = target / ".gallery.part"
    vault.store.file.copy(part)
    digest = sha256_of(part)
    database = target / database_name(digest)
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
            if not copying.has(vectors_name(segment), segment.sha256):
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


def _open_source(vault: Vault, segment: Segment) -> IO[bytes]:
    """Opens the file of a segment.

    Raises:
        FileNotFoundError: the file does not exist.
        GalleryDamaged: its path is not a plain file.
    """
    path = segment_path(vault.folder, segment.id)
    try:
        return open_plain(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_no_file(error):
            raise _damaged(vault, path) from error
        raise


def _copy_segment(vault: Vault, copying: _Copying, segment: Segment, source: IO[bytes]) -> None:
    if copying.copy(vectors_name(segment), source, segment.sha256) is None:
        raise _damaged(vault, segment_path(vault.folder, segment.id))


def _damaged(vault: Vault, path: Path) -> GalleryDamaged:
    return GalleryDamaged(f"{path} is not what was written; see `faceprint verify {vault.name}`.")


def _copy_model(vault: Vault, copying: _Copying, generation: Generation) -> None:
    """Copies the files of a model that the backup lacks.

    Raises:
        FileNotFoundError: the card of the gallery's model has changed since the snapshot.
        GalleryDamaged: a file of the gallery's model is damaged.
    """
    source = vault.folder / generation.folder
    below = f"{MODELS}/{generation.card_sha256}"
    folder = copying.target / below
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()
    make_folder(folder, like=copying.target, exist_ok=True)
    card = f"{below}/{MODEL_CARD}"
    if not copying.has(card, generation.card_sha256):
        _copy_model_file(vault, copying, source / MODEL_CARD, card, generation.card_sha256, generation)
    for name, digest in ModelBundle.stated_files(folder).items():
        if not copying.has(f"{below}/{name}", digest):
            _copy_model_file(vault, copying, source / name, f"{below}/{name}", digest, generation)
    # The description is for people. No card states its SHA-256, so it is compared with the gallery's file.
    described = source / MODEL_DESCRIPTION
    sha256 = sha256_of(described)
    if sha256 is None:
        (folder / MODEL_DESCRIPTION).unlink(missing_ok=True)
    elif not copying.has(f"{below}/{MODEL_DESCRIPTION}", sha256):
        with open_plain(described) as file:
            copying.copy(f"{below}/{MODEL_DESCRIPTION}", file)


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
    below = f"{MODELS}/{generation.card_sha256}/"
    return {
        name: digest for name, digest in (copying.kept | copying.copied).items() if name.startswith(below)
    }


def _remove_unnamed(backup: Backup) -> None:
    """Removes files that only an older backup needed or that an interrupted one left; no other files."""
    named = {backup.folder / name for name in backup.files}
    keep = named | {path.parent for path in named}
    for path in (
        *backup.folder.glob("gallery-*.db*"),
        *backup.folder.glob(".gallery.part*"),
        *(backup.folder / VECTORS).iterdir(),
        *(path for folder in keep if folder.parent.name == MODELS for path in folder.iterdir()),
    ):
        if path not in keep and _BACKUP_FILE_NAME.fullmatch(path.name):
            remove(path)
    for path in (backup.folder / MODELS).iterdir():
        if path not in keep and _MODEL_FOLDER.fullmatch(path.name):
            remove(path)
