"""The integrity check, for `Gallery.verify`: whether all files, rows and vectors are what was written."""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from retrieval.database import page_checksums
from retrieval.database.engines.sqlite_file import LOCK_NAME
from retrieval.database.reader import Reader
from retrieval.database.records import Generation, Segment
from retrieval.database.sqlite_errors import blames_machine
from retrieval.errors import BundleError, GalleryDamaged, GalleryError, StorageError
from retrieval.index.segments import Ids, SegmentMissing, basis_name, codes_name
from retrieval.models.bundle import FILE_NAMES, ModelBundle
from retrieval.storage import layout, leftovers, ownership
from retrieval.storage.layout import DATABASE, VECTORS
from retrieval.storage.vault import LOCK_TIMEOUT, Vault
from retrieval.system import lock
from retrieval.system.files import (
    is_no_file,
    open_plain,
    other_than_file,
    who_else_reads,
    why,
)
from retrieval.system.paths import printable, readable

# How often reading the segments starts over if compaction replaces some of them meanwhile.
_ATTEMPTS: Final = 20

_NO_SUMS: Final = (
    "gallery.sums is missing or out of date, as after a crash: gallery.db was checked by SQLite only. "
    "The next write renews it."
)

# How a user resolves suspects of the active model, and of the other one.
_RESOLVE_SUSPECTS: Final = (
    "put the photos back where they were and run `faceprint repair`, or `faceprint repair --fetch` if some "
    "are at addresses; or erase these faces with `faceprint forget --face` and enroll their photos again"
)
_DROP_OTHER_MODEL: Final = (
    "no search uses that model now; drop it with `faceprint reembed --drop-other`, or run `faceprint repair`"
)


class Trouble(StrEnum):
    """The kinds of damage. The values are stable: programs may rely on them."""

    DATABASE_DAMAGED = "database-damaged"
    SUMS_DAMAGED = "sums-damaged"
    SEGMENT_MISSING = "segment-missing"
    SEGMENT_DAMAGED = "segment-damaged"
    CODES_DAMAGED = "codes-damaged"
    FACE_WITHOUT_VECTOR = "face-without-vector"
    VECTOR_WITHOUT_FACE = "vector-without-face"
    MODEL_MISSING = "model-missing"
    MODEL_DAMAGED = "model-damaged"
    OTHER_MODEL = "other-model"
    LEFTOVER = "leftover"
    UNKNOWN_FILE = "unknown-file"
    UNFINISHED = "unfinished"
    SYMBOLIC_LINK = "symbolic-link"
    OTHER_FOLDER = "other-folder"
    SUSPECT_VECTOR = "suspect-vector"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between a gallery and what was written.

    Attributes:
        trouble: the kind of damage.
        file: path relative to the gallery; None for damage of rows.
        detail: a short description for users.
        face_ids: ids of the affected faces, as far as they are known.
    """

    trouble: Trouble
    file: str | None
    detail: str
    face_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of an integrity check.

    Attributes:
        findings: the damage; empty if everything is what was written.
        notes: remarks that are not damage.
        faces, segments, bytes: how many faces, segments and bytes were read.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    faces: int
    segments: int
    bytes: int

    @property
    def whole(self) -> bool:
        """Whether there are no findings."""
        return not self.findings


@dataclass
class Notebook:
    """The findings of a running check; the attributes are those of `Verification`."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faces: int = 0
    segments: int = 0
    bytes: int = 0

    def add(self, trouble: Trouble, file: str | None, detail: str, ids: Iterable[int] = ()) -> None:
        """Adds a finding; see `Finding`."""
        self.findings.append(Finding(trouble, file, detail, tuple(ids)))

    def names(self, file: str) -> bool:
        """Returns whether there is a finding about a file."""
        return any(finding.file == file for finding in self.findings)

    def verification(self) -> Verification:
        """Returns the findings so far, as the result of a check."""
        return Verification(tuple(self.findings), tuple(self.notes), self.faces, self.segments, self.bytes)


def verify(folder: Path) -> Verification:
    """Reads every byte of a gallery, compares it with what was written, and returns the findings.

    Other threads and processes may read and write meanwhile.

    Raises:
        GalleryError: there is no gallery in `folder`, or one of another version.
        GalleryBusy: another process wrote for longer than a writer waits.
        StorageError: a file cannot be read, or the gallery changes faster than it is read.
    """
    book = Notebook()
    if (folder / DATABASE).is_file():
        with quiet(folder):
            _check_pages(folder / DATABASE, book)
    try:
        # A damaged database may look like one of an older version: opening it must not upgrade it.
        read_only = bool(book.findings) or not os.access(folder, os.W_OK)
        vault = Vault.open(folder, read_only=read_only)
    except (GalleryDamaged, GalleryError, StorageError) as error:
        if not (folder / DATABASE).is_file() or (isinstance(error, GalleryError) and not book.findings):
            raise
        if blames_machine(error) and not book.findings:
            raise
        if not book.findings:
            book.add(Trouble.DATABASE_DAMAGED, DATABASE, str(error))
        return book.verification()
    with closing(vault):
        try:
            _check_opened(vault, book)
        except StorageError as error:
            if not book.names(DATABASE) or blames_machine(error):
                raise
        except OSError as error:
            raise StorageError(f"{error.filename or folder} cannot be read: {why(error)}.") from error
        except (GalleryDamaged, SQLAlchemyError, ValueError, TypeError, KeyError) as error:
            if blames_machine(error):
                raise StorageError(f"{folder} cannot be verified: {error}") from error
            # Damaged rows may cause any of these errors.
            if not book.names(DATABASE):
                book.add(Trouble.DATABASE_DAMAGED, DATABASE, str(error))
    return book.verification()


def _check_opened(vault: Vault, book: Notebook) -> None:
    if not book.names(DATABASE):
        for line in vault.store.problems():
            book.add(Trouble.DATABASE_DAMAGED, DATABASE, line)
    with quiet(vault.folder), vault.store.read() as reader:
        for line in [*reader.counter_problems(), *reader.row_problems()]:
            book.add(Trouble.DATABASE_DAMAGED, DATABASE, line)
        reader.read_decisions()
        _check_files(vault, reader, book)
        _check_ownership(vault, reader, book)
        check_models(vault, reader, book)
        check_codes(vault, reader, book)
    verified: dict[int, Ids | None] = {}
    for _ in range(_ATTEMPTS):
        read_segments(vault, book, verified)
        with vault.store.read() as reader:
            if {segment.id for segment in reader.segments()} <= verified.keys():
                check_rows(vault, reader, book, verified)
                return
    raise StorageError(f"{vault.name} changes faster than it can be read; try again when less is written.")


def _check_pages(path: Path, book: Notebook) -> None:
    if not page_checksums.sums_path(path).exists():
        book.notes.append(_NO_SUMS)
        return
    found = page_checksums.check_pages(path)
    for damage in found.damage:
        database = damage.file == path
        trouble = Trouble.DATABASE_DAMAGED if database else Trouble.SUMS_DAMAGED
        book.add(trouble, damage.file.name, _damaged_pages(damage.pages) if damage.pages else damage.problem)
    if found.out_of_date:
        book.notes.append(_NO_SUMS)
    book.bytes += path.stat().st_size


def _damaged_pages(numbers: Sequence[int]) -> str:
    """Returns a sentence about damaged pages, with at most 5 of their numbers."""
    first = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else "")
    return f"page{'s' if len(numbers) > 1 else ''} {first}: not what was written"


def _check_files(vault: Vault, reader: Reader, book: Notebook) -> None:
    """Adds findings about leftovers, unknown files and unfinished work, and notes about other files."""
    removed, kept = map(set, vault.leftovers(reader))
    folders = {generation.folder for generation in reader.generations().values()}
    copies = {path.name for path in vault.store.file.upgrade_copies()}
    ours = {
        DATABASE,
        f"{DATABASE}-wal",
        f"{DATABASE}-shm",
        "gallery.sums",
        LOCK_NAME,
        layout.TOKENS,
        layout.TOKENS_USED,
        layout.FOLLOWER_CARD,
        layout.FOLLOWER_LOCK,
        VECTORS,
        *copies,
        *folders,
    }
    expected: dict[Path, Collection[str]] = {
        vault.folder: ours,
        vault.folder / VECTORS: leftovers.named_files(reader),
    }
    expected |= {vault.folder / name: FILE_NAMES for name in folders}
    for folder, names in expected.items():
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            file = readable(path.relative_to(vault.folder))
            if path in removed | kept:
                detail = (
                    "the next write removes it" if path in removed else "it stays while vectors are missing"
                )
                book.add(Trouble.LEFTOVER, file, f"nothing names it; {detail}")
            elif path.name not in names:
                book.add(Trouble.UNKNOWN_FILE, file, "it does not belong to the gallery; move it away")
    for path in leftovers.beside(vault.folder):
        detail = "a killed creation or restore of the gallery left it; the next write removes it"
        book.add(Trouble.LEFTOVER, f"../{readable(path.name)}", detail)
    if (others := who_else_reads(vault.folder)) is not None:
        book.notes.append(others)
    for copy in sorted(copies):
        book.notes.append(
            f"{copy} is the database as it was before it was brought up to date; it may be deleted."
        )
    if reader.gallery().unfinished is not None:
        book.add(Trouble.UNFINISHED, None, "an erasure was interrupted; the next write finishes it")


def _check_ownership(vault: Vault, reader: Reader, book: Notebook) -> None:
    """Adds findings about folders that do not belong to this gallery: writers refuse such folders."""
    folders = [generation.folder for generation in reader.generations().values()]
    for name in ownership.links(vault.folder, [VECTORS, *folders]):
        book.add(Trouble.SYMBOLIC_LINK, name, "it is a symbolic link; move the folder itself here")
    vectors = vault.folder / VECTORS
    known, found = reader.gallery().folder_id, ownership.read_id(vectors)
    book.bytes += ownership.size(vectors)
    if known is not None and found != known:
        detail = "it is missing" if found is None else "the folder has another gallery's id, or a damaged one"
        detail = _unexpected_kind(vault.folder / VECTORS / layout.ID_NAME) or detail
        book.add(Trouble.OTHER_FOLDER, f"{VECTORS}/{layout.ID_NAME}", detail)
    other = None if vectors.is_symlink() else ownership.sharer(vault.folder, vectors, DATABASE)
    if other is not None:
        detail = f"it is also the folder of vectors of {printable(other)}; give each a copy of its own"
        book.add(Trouble.OTHER_FOLDER, VECTORS, detail)


def check_models(vault: Vault, reader: Reader, book: Notebook) -> None:
    """Adds findings about files of models that are not what was written, or not the model of their row."""
    pending = reader.gallery().unfinished is not None
    for generation in reader.generations().values():
        folder = vault.folder / generation.folder
        if not folder.is_dir():
            detail = _unexpected_kind(folder, "folder") or "the model is missing"
            book.add(Trouble.MODEL_MISSING, generation.folder, detail)
            continue
        card = f"{generation.folder}/bundle.json"
        try:
            bundle = ModelBundle.load(folder)
        except BundleError as error:
            if blames_machine(error):
                raise StorageError(str(error)) from error
            missing = _missing_files(folder, generation)
            for name in missing:
                detail = _unexpected_kind(folder / name) or "it is missing"
                book.add(Trouble.MODEL_DAMAGED, f"{generation.folder}/{name}", detail)
            if not missing:
                book.add(Trouble.MODEL_DAMAGED, card, str(error))
            continue
        if bundle.fingerprint != generation.fingerprint:
            book.add(Trouble.OTHER_MODEL, card, "it is another model than the gallery was made with")
        elif bundle.card_sha256() != generation.card_sha256 and not pending:
            book.add(Trouble.MODEL_DAMAGED, card, "it is not what was written")
        else:
            for name, digest in bundle.files.items():
                size, found = hash_file(folder / name)
                book.bytes += size
                if found != digest:
                    book.add(
                        Trouble.MODEL_DAMAGED, f"{generation.folder}/{name}", "it is not what was written"
                    )


def check_codes(vault: Vault, reader: Reader, book: Notebook) -> None:
    """Adds findings about files of codes and bases that are missing or not what was written.

    A search relies on these files as it relies on the vectors.
    """
    for name, digest in _codes_files(reader).items():
        path = vault.folder / VECTORS / name
        try:
            size, found = hash_file(path)
        except FileNotFoundError:
            book.add(Trouble.CODES_DAMAGED, f"{VECTORS}/{name}", "it is missing; searches are slower without")
            continue
        book.bytes += size
        if found != digest:
            detail = _unexpected_kind(path) or "it is not what was written"
            book.add(Trouble.CODES_DAMAGED, f"{VECTORS}/{name}", detail)


def _codes_files(reader: Reader) -> dict[str, str]:
    """Returns the SHA-256 of each file of codes and each basis."""
    files = {codes_name(one.segment_id, one.basis_id): one.sha256 for one in reader.codes().values()}
    return files | {
        basis_name(number): basis.sha256 for number, basis in reader.bases().items() if basis.coordinates
    }


def _missing_files(folder: Path, generation: Generation) -> list[str]:
    """Returns the missing files of a model, by its card; none if the card itself is not what was written."""
    card = folder / "bundle.json"
    if not card.is_file() or hash_file(card)[1] != generation.card_sha256:
        return []
    return [name for name in ModelBundle.stated_files(folder) if not (folder / name).is_file()]


def read_segments(vault: Vault, book: Notebook, verified: dict[int, Ids | None]) -> None:
    """Reads each segment that is not in `verified` yet, and adds its ids there, or None if it is damaged.

    This runs outside of any snapshot, because it may take minutes.
    """
    with vault.store.read() as reader:
        generations, segments = reader.generations(), reader.segments()
    for segment in segments:
        if segment.id in verified:
            continue
        path = vault.folder / VECTORS / f"{segment.id:08d}.faiss"
        try:
            size, ids = _read_segment(vault, segment, generations[segment.generation_id], path)
        except (FileNotFoundError, SegmentMissing):
            with vault.store.read() as newer:
                if segment.id not in {one.id for one in newer.segments()}:
                    continue  # merged away meanwhile
            verified[segment.id] = None
            detail = f"it is missing, with {segment.rows:,} vectors"
            book.add(Trouble.SEGMENT_MISSING, f"{VECTORS}/{path.name}", detail)
            continue
        book.bytes += size
        verified[segment.id] = ids
        if ids is None:
            detail = _unexpected_kind(path) or "it is not what was written"
            detail += f"; it has {segment.rows:,} vectors"
            book.add(Trouble.SEGMENT_DAMAGED, f"{VECTORS}/{path.name}", detail)


def _read_segment(
    vault: Vault, segment: Segment, generation: Generation, path: Path
) -> tuple[int, Ids | None]:
    """Returns the bytes of a segment and its ids; None for the ids if it is not what was written."""
    size, digest = hash_file(path)
    if (size, digest) != (segment.bytes, segment.sha256):
        return size, None
    return size, vault.vectors(generation).rows(segment.id)[0]


def check_rows(vault: Vault, reader: Reader, book: Notebook, verified: Mapping[int, Ids | None]) -> None:
    """Adds findings about vectors without a row, rows without a vector, and suspects."""
    faces = np.fromiter(reader.face_ids(), np.int64)
    serving = vault.serving(reader)
    segments = reader.segments()
    book.faces, book.segments = len(faces), len(segments)
    for generation in reader.generations().values():
        mine = [segment for segment in segments if segment.generation_id == generation.id]
        parts = [ids for segment in mine if (ids := verified[segment.id]) is not None]
        ids, counts = np.unique(np.concatenate([*parts, np.empty(0, np.int64)]), return_counts=True)
        stray = np.concatenate([np.setdiff1d(ids, faces), ids[counts > 1]]).tolist()
        if stray:
            detail = f"{len(stray):,} vectors have no face, or a second vector beside them"
            book.add(Trouble.VECTOR_WITHOUT_FACE, None, detail, stray)
        unread = sum(segment.rows for segment in mine if verified[segment.id] is None)
        lost = np.setdiff1d(faces, ids).tolist()
        # Vectors in unreadable segments are reported with these segments.
        if generation.id == serving.id and len(lost) > unread:
            book.add(Trouble.FACE_WITHOUT_VECTOR, None, f"{len(lost) - unread:,} faces have no vector", lost)
        _check_suspects(reader, generation, ids, book, serving=generation.id == serving.id)


def _check_suspects(
    reader: Reader, generation: Generation, stored: Ids, book: Notebook, *, serving: bool
) -> None:
    """Adds a finding about faces that a damaged model may have embedded and that no repair has compared."""
    found = np.intersect1d(np.asarray(reader.suspect_ids(generation.id), np.int64), stored).tolist()
    if found:
        book.add(
            Trouble.SUSPECT_VECTOR,
            None,
            f"{len(found):,} faces may have been embedded while {generation.folder}/ was damaged, and were "
            f"not compared with their photos: {_RESOLVE_SUSPECTS if serving else _DROP_OTHER_MODEL}",
            found,
        )


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Holds the writers' lock of a gallery; does nothing if the folder cannot be written to."""
    if not os.access(folder, os.W_OK):
        yield
        return
    with lock.exclusive(folder / LOCK_NAME, timeout=LOCK_TIMEOUT):
        yield


def hash_file(path: Path) -> tuple[int, str]:
    """Returns the size in bytes and the SHA-256 of a file; 0 and an empty string if it is no plain file.

    Raises:
        FileNotFoundError: there is no file at `path`.
        StorageError: the file cannot be read.
    """
    try:
        with open_plain(path) as file:
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_no_file(error):
            return 0, ""
        raise StorageError(f"{path} cannot be read: {why(error)}.") from error


def _unexpected_kind(path: Path, expected: str = "file") -> str | None:
    """Describes a path that is something else than the expected file or folder; None if it is not."""
    other = other_than_file(path)
    return None if other in (None, f"a {expected}") else f"it is {other}, not a {expected}"
