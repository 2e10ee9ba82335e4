"""Integrity: whether every file, row and vector is what was written, and the repair of what is not.

Nothing is guessed: a vector comes back from its own photo, as long as that has the same SHA-256, or from a
segment of a backup that has the SHA-256 which the row states.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from retrieval.database import page_checksums
from retrieval.database.reader import Reader
from retrieval.database.records import Face, Generation, Segment
from retrieval.database.sqlite_errors import blames_machine
from retrieval.database.store import LOCK_NAME
from retrieval.embedding.reread import Embedded, embed_again
from retrieval.errors import BundleError, GalleryDamaged, GalleryError, StorageError
from retrieval.gallery import suspects
from retrieval.index.segments import Ids, SegmentMissing, basis_name, codes_name
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources.remote import Fetching
from retrieval.storage import layout, leftovers, optimization, ownership
from retrieval.storage.layout import DATABASE, VECTORS
from retrieval.storage.vault import LOCK_TIMEOUT, Vault
from retrieval.system import lock
from retrieval.system.files import (
    is_no_file,
    make_folder,
    make_room,
    open_plain,
    other_than_file,
    who_else_reads,
    why,
    write_durably,
)
from retrieval.system.paths import printable, readable

# How often reading starts over when segments are merged away meanwhile.
_ATTEMPTS: Final = 20

_NO_SUMS: Final = (
    "gallery.sums is missing or out of date, as after a crash: gallery.db was checked by SQLite only. "
    "The next write renews it."
)

# What ends a suspicion.
_LIFT: Final = (
    "put the photos back where they were and run `faceprint repair`, with --fetch for those at addresses; or "
    "erase these faces with `faceprint forget --face` and enroll their photos again"
)
_DROP: Final = (
    "no search uses that model now; drop it with `faceprint reembed --drop-other`, or run `faceprint repair`"
)

_MODEL_FILES: Final = frozenset({"bundle.json", "model.onnx", "model.safetensors", "MODELCARD.md"})


class Trouble(StrEnum):
    """What is wrong. The values are stable: programs may rely on them."""

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
    """Something that is not as it was written.

    Attributes:
        trouble: the stable code.
        file: relative to the gallery; None where it is about rows.
        detail: a few words for a person.
        face_ids: the faces that it concerns, as far as they are known.
    """

    trouble: Trouble
    file: str | None
    detail: str
    face_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at, and what is wrong with it. Sizes in bytes.

    Attributes:
        findings: empty where everything is as it was written.
        notes: what is worth knowing and is no damage.
        faces, segments, bytes: how much was read.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    faces: int
    segments: int
    bytes: int

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


@dataclass
class _Notebook:
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faces: int = 0
    segments: int = 0
    bytes: int = 0

    def add(self, trouble: Trouble, file: str | None, detail: str, ids: Iterable[int] = ()) -> None:
        self.findings.append(Finding(trouble, file, detail, tuple(ids)))

    def names(self, file: str) -> bool:
        """Whether something is wrong with a file."""
        return any(finding.file == file for finding in self.findings)

    def verification(self) -> Verification:
        return Verification(tuple(self.findings), tuple(self.notes), self.faces, self.segments, self.bytes)


def verify(folder: Path) -> Verification:
    """Reads every byte of a gallery and compares. Others may read and write meanwhile.

    Raises:
        GalleryError: there is no gallery, or one of another version.
        GalleryBusy: somebody wrote for longer than a writer waits.
        StorageError: a file cannot be read.
    """
    book = _Notebook()
    if (folder / DATABASE).is_file():
        with quiet(folder):
            _check_pages(folder / DATABASE, book)
    try:
        # A damaged database may look like one that has to be brought up to date.
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
            _check(vault, book)
        except StorageError as error:
            if not book.names(DATABASE) or blames_machine(error):
                raise
        except OSError as error:
            raise StorageError(f"{error.filename or folder} cannot be read: {why(error)}.") from error
        except (GalleryDamaged, SQLAlchemyError, ValueError, TypeError, KeyError) as error:
            if blames_machine(error):
                raise StorageError(f"{folder} cannot be verified: {error}") from error
            # Damaged rows break whatever is read from them.
            if not book.names(DATABASE):
                book.add(Trouble.DATABASE_DAMAGED, DATABASE, str(error))
    return book.verification()


def _check(vault: Vault, book: _Notebook) -> None:
    if not book.names(DATABASE):
        for line in vault.store.problems():
            book.add(Trouble.DATABASE_DAMAGED, DATABASE, line)
    with quiet(vault.folder), vault.store.read() as reader:
        for line in reader.counter_problems():
            book.add(Trouble.DATABASE_DAMAGED, DATABASE, line)
        _check_files(vault, reader, book)
        _check_ownership(vault, reader, book)
        _check_models(vault, reader, book)
        _check_codes(vault, reader, book)
    verified: dict[int, Ids | None] = {}
    for _ in range(_ATTEMPTS):
        _read_segments(vault, book, verified)
        with vault.store.read() as reader:
            if {segment.id for segment in reader.segments()} <= verified.keys():
                _check_rows(vault, reader, book, verified)
                return
    raise StorageError(f"{vault.folder} changes faster than it can be read; try again when less is written.")


def _check_pages(path: Path, book: _Notebook) -> None:
    if not page_checksums.sums_path(path).exists():
        book.notes.append(_NO_SUMS)
        return
    found = page_checksums.check(path)
    for damage in found.damage:
        database = damage.file == path
        trouble = Trouble.DATABASE_DAMAGED if database else Trouble.SUMS_DAMAGED
        book.add(trouble, damage.file.name, _pages(damage.pages) if damage.pages else damage.problem)
    if found.out_of_date:
        book.notes.append(_NO_SUMS)
    book.bytes += path.stat().st_size


def _pages(numbers: Sequence[int]) -> str:
    """Some page numbers in words, however many there are."""
    first = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else "")
    return f"page{'s' if len(numbers) > 1 else ''} {first}: not what was written"


def _check_files(vault: Vault, reader: Reader, book: _Notebook) -> None:
    """Files that nobody should have put there, or that nothing names any more."""
    removed, kept = map(set, vault.leftovers(reader))
    folders = {generation.folder for generation in reader.generations().values()}
    copies = {path.name for path in vault.store.upgrade_copies()}
    ours = {
        DATABASE,
        f"{DATABASE}-wal",
        f"{DATABASE}-shm",
        "gallery.sums",
        LOCK_NAME,
        VECTORS,
        *copies,
        *folders,
    }
    expected: dict[Path, Collection[str]] = {
        vault.folder: ours,
        vault.folder / VECTORS: leftovers.named_files(reader),
    }
    expected |= {vault.folder / name: _MODEL_FILES for name in folders}
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


def _check_ownership(vault: Vault, reader: Reader, book: _Notebook) -> None:
    """Whether the gallery's folders are its own: writers refuse others."""
    folders = [generation.folder for generation in reader.generations().values()]
    for name in ownership.links(vault.folder, [VECTORS, *folders]):
        book.add(Trouble.SYMBOLIC_LINK, name, "it is a symbolic link; move the folder itself here")
    vectors = vault.folder / VECTORS
    known, found = reader.gallery().folder_id, ownership.read_id(vectors)
    book.bytes += ownership.size(vectors)
    if known is not None and found != known:
        detail = "it is missing" if found is None else "the folder has another gallery's id, or a damaged one"
        detail = _is_other(vault.folder / VECTORS / layout.ID_NAME) or detail
        book.add(Trouble.OTHER_FOLDER, f"{VECTORS}/{layout.ID_NAME}", detail)
    other = None if vectors.is_symlink() else ownership.sharer(vault.folder, vectors, DATABASE)
    if other is not None:
        detail = f"it is also the folder of vectors of {printable(other)}; give each a copy of its own"
        book.add(Trouble.OTHER_FOLDER, VECTORS, detail)


def _check_models(vault: Vault, reader: Reader, book: _Notebook) -> None:
    pending = reader.gallery().unfinished is not None
    for generation in reader.generations().values():
        folder = vault.folder / generation.folder
        if not folder.is_dir():
            detail = _is_other(folder, "folder") or "the model is missing"
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
                detail = _is_other(folder / name) or "it is missing"
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
                size, found = _hash(folder / name)
                book.bytes += size
                if found != digest:
                    book.add(
                        Trouble.MODEL_DAMAGED, f"{generation.folder}/{name}", "it is not what was written"
                    )


def _check_codes(vault: Vault, reader: Reader, book: _Notebook) -> None:
    """Whether codes and bases are what was written: a search trusts them as it trusts the vectors."""
    for name, digest in _codes_files(reader).items():
        path = vault.folder / VECTORS / name
        try:
            size, found = _hash(path)
        except FileNotFoundError:
            book.add(Trouble.CODES_DAMAGED, f"{VECTORS}/{name}", "it is missing; searches are slower without")
            continue
        book.bytes += size
        if found != digest:
            detail = _is_other(path) or "it is not what was written"
            book.add(Trouble.CODES_DAMAGED, f"{VECTORS}/{name}", detail)


def _codes_files(reader: Reader) -> dict[str, str]:
    """The SHA-256 of each file of codes and each basis."""
    files = {codes_name(one.segment_id, one.basis_id): one.sha256 for one in reader.codes().values()}
    return files | {
        basis_name(number): basis.sha256 for number, basis in reader.bases().items() if basis.coordinates
    }


def _missing_files(folder: Path, generation: Generation) -> list[str]:
    """Files of a model that are not there; what its card says counts only where that is what was written."""
    card = folder / "bundle.json"
    if not card.is_file() or _hash(card)[1] != generation.card_sha256:
        return []
    return [name for name in ModelBundle.stated_files(folder) if not (folder / name).is_file()]


def _read_segments(vault: Vault, book: _Notebook, verified: dict[int, Ids | None]) -> None:
    """Reads each segment that was not read yet, outside of any snapshot: that may take minutes."""
    with vault.store.read() as reader:
        generations, segments = reader.generations(), reader.segments()
    for segment in segments:
        if segment.id in verified:
            continue
        path = vault.folder / VECTORS / f"{segment.id:08d}.faiss"
        try:
            size, ids = _proven(vault, segment, generations[segment.generation_id], path)
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
            detail = _is_other(path) or "it is not what was written"
            detail += f"; it has {segment.rows:,} vectors"
            book.add(Trouble.SEGMENT_DAMAGED, f"{VECTORS}/{path.name}", detail)


def _proven(vault: Vault, segment: Segment, generation: Generation, path: Path) -> tuple[int, Ids | None]:
    """A segment's size and its ids; None instead of these where it is not what was written."""
    size, digest = _hash(path)
    if (size, digest) != (segment.bytes, segment.sha256):
        return size, None
    return size, vault.vectors(generation).rows(segment.id)[0]


def _check_rows(vault: Vault, reader: Reader, book: _Notebook, verified: Mapping[int, Ids | None]) -> None:
    """Whether there is a row for each vector, and a vector for each row."""
    faces = np.fromiter(reader.face_ids(), np.int64)
    serving = vault.serving(reader)
    segments = reader.segments()
    book.faces, book.segments = len(faces), len(segments)
    for generation in reader.generations().values():
        mine = [segment for segment in segments if segment.generation_id == generation.id]
        parts = [ids for segment in mine if (ids := verified[segment.id]) is not None]
        ids, counts = np.unique(np.concatenate([*parts, np.empty(0, np.int64)]), return_counts=True)
        astray = np.concatenate([np.setdiff1d(ids, faces), ids[counts > 1]]).tolist()
        if astray:
            detail = f"{len(astray):,} vectors have no face, or a second vector beside them"
            book.add(Trouble.VECTOR_WITHOUT_FACE, None, detail, astray)
        unread = sum(segment.rows for segment in mine if verified[segment.id] is None)
        lost = np.setdiff1d(faces, ids).tolist()
        # Those of segments that cannot be read are told of already.
        if generation.id == serving.id and len(lost) > unread:
            book.add(Trouble.FACE_WITHOUT_VECTOR, None, f"{len(lost) - unread:,} faces have no vector", lost)
        _check_suspects(reader, generation, ids, book, serving=generation.id == serving.id)


def _check_suspects(
    reader: Reader, generation: Generation, stored: Ids, book: _Notebook, *, serving: bool
) -> None:
    """Faces that a damaged model may have embedded, and that no repair has compared with their photos."""
    found = np.intersect1d(np.asarray(reader.suspect_ids(generation.id), np.int64), stored).tolist()
    if found:
        book.add(
            Trouble.SUSPECT_VECTOR,
            None,
            f"{len(found):,} faces may have been embedded while {generation.folder}/ was damaged, and were "
            f"not compared with their photos: {_LIFT if serving else _DROP}",
            found,
        )


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Keeps writers waiting, where there can be any."""
    if not os.access(folder, os.W_OK):
        yield
        return
    with lock.exclusive(folder / LOCK_NAME, timeout=LOCK_TIMEOUT):
        yield


def _hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file; 0 and nothing of what is no plain file.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read.
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


def _is_other(path: Path, expected: str = "file") -> str | None:
    """What is found of a path where neither a plain file nor what is expected is."""
    other = other_than_file(path)
    return None if other in (None, f"a {expected}") else f"it is {other}, not a {expected}"


# Mending


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was wrong before a repair, what is still wrong after it, and which faces could not be mended.

    Attributes:
        before, after: the verifications.
        embedded: vectors that were made again from their photos.
        copied: files that came from the backup or the model.
        given_up: faces that were removed because nothing can bring their vectors back.
        lost: faces whose vectors cannot be brought back, and whose rows were left as they are.
        reasons: of each lost face by its id, why its photo is no help, in words.
        unfetched: ids of the lost faces that have an address which was not allowed to be fetched. While there
            are any, no vector is mended and no face given up.
        suspects: faces that a damaged model may have embedded: enrolled since the last comparison.
        compared: how many of these were embedded again and compared.
        replaced: how many of these had another vector than their photo gives, and have the latter now.
    """

    before: Verification
    after: Verification
    embedded: int
    copied: int
    given_up: int
    lost: tuple[Face, ...]
    reasons: Mapping[int, str] = field(default_factory=dict, hash=False)
    unfetched: tuple[int, ...] = ()
    suspects: int = 0
    compared: int = 0
    replaced: int = 0


def repair(
    folder: Path,
    embedder: Callable[[ModelBundle], Embedder],
    *,
    backup: Callable[[str], Path | None] = lambda sha256: None,
    model: ModelBundle | None = None,
    give_up: bool = False,
    fetch: bool = False,
) -> Repaired:
    """Mends what can be mended without a guess, and says what cannot.

    Leftovers go, an interrupted erasure is finished, damaged files come back from a backup or a model
    where these have them with the SHA-256 that was written down, lost vectors are embedded again from photos
    that still have their SHA-256. Where a model was damaged, faces that were enrolled since the last
    comparison are suspects, also after this repair has ended: they are embedded again (a sample; all of them
    if any differs), vectors that differ are replaced, and faces without their photos stay suspects.
    A damaged database is not touched: restore a backup.

    Args:
        folder: the gallery's.
        embedder: loads a model.
        backup: finds a file of a SHA-256 in a backup.
        model: another copy of the gallery's model.
        give_up: remove faces whose vectors cannot be brought back, and vectors without a face.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.

    Raises:
        GalleryError: there is no gallery.
        StorageError, GalleryBusy: what was mended until then stays mended.
    """
    before = verify(folder)
    troubles = {finding.trouble for finding in before.findings}
    if not troubles or Trouble.DATABASE_DAMAGED in troubles:
        return Repaired(before, before, 0, 0, 0, ())
    with closing(Vault.open(folder, via="faceprint repair")) as vault:
        vault.claim()
        if Trouble.SUMS_DAMAGED in troubles:
            with quiet(folder):
                page_checksums.discard(folder / DATABASE)
        mender = _Mender(vault, backup, model, give_up=give_up, fetch=fetch)
        damaged = _damaged_models(before)
        suspects.note(vault, damaged)
        mender.mend_models()
        with vault.writing() as writer:
            # Writing removes leftovers and finishes what was interrupted, and the entry renews the sums.
            vault.log(writer, "repair", findings=len(before.findings))
        # Whoever had the damaged model open may have enrolled until now.
        suspects.note(vault, damaged)
        if Trouble.CODES_DAMAGED in troubles:
            mender.mend_codes()
        if not {Trouble.MODEL_MISSING, Trouble.MODEL_DAMAGED, Trouble.OTHER_MODEL} & mender.unmended:
            mender.mend_vectors(embedder)
            if not mender.lost:
                mender.mend_suspects(embedder)
        if Trouble.CODES_DAMAGED in troubles:
            with suppress(GalleryDamaged):  # where vectors are still damaged; their codes have to wait
                optimization.optimize(vault)
    found = verify(folder)
    after = replace(found, notes=(*found.notes, *mender.notes))
    return Repaired(
        before,
        after,
        mender.embedded,
        mender.copied,
        mender.given_up,
        mender.lost,
        mender.reasons,
        mender.unfetched,
        mender.suspects,
        mender.compared,
        mender.replaced,
    )


def _damaged_models(found: Verification) -> set[str]:
    """The folders of the models of which something was found."""
    troubles = (Trouble.MODEL_MISSING, Trouble.MODEL_DAMAGED, Trouble.OTHER_MODEL)
    return {one.file.partition("/")[0] for one in found.findings if one.trouble in troubles and one.file}


class _Mender:
    """One repair of one gallery, and what it has come to."""

    def __init__(
        self,
        vault: Vault,
        backup: Callable[[str], Path | None],
        model: ModelBundle | None,
        *,
        give_up: bool,
        fetch: bool,
    ) -> None:
        self._vault = vault
        self._fetch = fetch
        self._backup = backup
        self._model = model
        self._give_up = give_up
        self.embedded = self.copied = self.given_up = 0
        self.lost: tuple[Face, ...] = ()
        self.reasons: dict[int, str] = {}
        self.unfetched: tuple[int, ...] = ()
        self.unmended: set[Trouble] = set()
        self.suspects = self.compared = self.replaced = 0
        self.notes: list[str] = []

    def mend_models(self) -> None:
        """Brings damaged files of models back from where their SHA-256 is found."""
        with self._vault.store.read() as reader:
            generations = list(reader.generations().values())
        for generation in generations:
            folder = self._vault.folder / generation.folder
            self._mend_file(folder / "bundle.json", generation.card_sha256)
            with suppress(BundleError):
                for name, digest in ModelBundle.stated_files(folder).items():
                    self._mend_file(folder / name, digest)
        book = _Notebook()
        with self._vault.store.read() as reader:
            _check_models(self._vault, reader, book)
        self.unmended = {finding.trouble for finding in book.findings}

    def _mend_file(self, path: Path, sha256: str, *, beside: Sequence[Path] = ()) -> None:
        if path.is_file() and _hash(path)[1] == sha256:
            return
        of_model = self._model.folder / path.name if self._model is not None else None
        for source in (of_model, *beside, self._backup(sha256)):
            if source is not None and source.is_file() and _hash(source)[1] == sha256:
                try:
                    if not path.parent.is_dir():
                        make_room(path.parent)
                    make_folder(path.parent, like=self._vault.folder, exist_ok=True)
                    write_durably(path, source.read_bytes(), inherit=True, anything=True)
                except OSError as error:
                    raise StorageError(f"{path} cannot be written: {why(error)}.") from error
                self.copied += 1
                return

    def mend_codes(self) -> None:
        """Makes damaged codes and bases not exist; `Vault.optimize` makes others from the vectors."""
        book = _Notebook()
        with self._vault.store.read() as reader:
            _check_codes(self._vault, reader, book)
            broken = {finding.file for finding in book.findings}
            bases = [n for n in reader.bases() if f"{VECTORS}/{basis_name(n)}" in broken]
            segments = [
                one.segment_id
                for one in reader.codes().values()
                if f"{VECTORS}/{codes_name(one.segment_id, one.basis_id)}" in broken
            ]
        if bases or segments:
            with self._vault.writing() as writer:
                writer.remove_codes(segments)
                writer.remove_bases(bases)

    def mend_vectors(self, embedder: Callable[[ModelBundle], Embedder]) -> None:
        """Brings damaged segments back from the backup, and lost vectors from their photos."""
        with self._vault.store.read() as reader:
            # Where the number in a row is damaged, its file is there under the right one.
            unnamed = list(leftovers.unnamed(self._vault.folder, reader))
            for segment in reader.segments():
                path = self._vault.folder / VECTORS / f"{segment.id:08d}.faiss"
                self._mend_file(path, segment.sha256, beside=unnamed)
        book, verified = _Notebook(), dict[int, Ids | None]()
        _read_segments(self._vault, book, verified)
        with self._vault.store.read() as reader:
            _check_rows(self._vault, reader, book, verified)
            serving = self._vault.serving(reader)
            present = np.concatenate(
                [np.empty(0, np.int64)]
                + [
                    ids
                    for segment in reader.segments(serving.id)
                    if (ids := verified[segment.id]) is not None
                ]
            )
            lost = np.setdiff1d(np.fromiter(reader.face_ids(), np.int64), present)
            faces = list(reader.faces(lost.tolist()).values())
            fetching = Fetching(self._fetch, reader.hosts())
        broken = [number for number, ids in verified.items() if ids is None]
        astray = [n for f in book.findings if f.trouble is Trouble.VECTOR_WITHOUT_FACE for n in f.face_ids]
        mended: list[Embedded] = []
        if faces:
            bundle = ModelBundle.load(self._vault.folder / serving.folder)
            mended = list(embed_again(faces, embedder(bundle), fetching))
        hopeless = tuple(face for part in mended for face in part.lost)
        self.unfetched = tuple(sorted(number for part in mended for number in part.unfetched))
        if self.unfetched or (hopeless and not self._give_up):
            self.lost = hopeless
            self.reasons = {number: words for part in mended for number, words in part.reasons.items()}
            return
        with self._vault.writing() as writer:
            writer.replace_segments(broken, [])
            for part in mended:
                if len(part.ids):
                    self._vault.append(writer, serving, part.ids, part.vectors)
                    self.embedded += len(part.ids)
            # A second vector of a face is no reason to lose the face.
            alive = set(writer.face_ids())
            nobodys = [number for number in astray if number not in alive] if self._give_up else []
            gone = [*(face.id for face in hopeless), *nobodys]
            self._vault.remove(writer, gone)
            self.given_up = len(hopeless)
            if gone or mended:
                self._vault.log(writer, "mend", faces=self.embedded, given_up=len(gone))

    def mend_suspects(self, embedder: Callable[[ModelBundle], Embedder]) -> None:
        """Compares faces that a damaged model may have embedded with their photos; replaces what differs."""
        with self._vault.store.read() as reader:
            generations = [one for one in reader.generations().values() if reader.suspects(one.id)]
        for generation in generations:
            self._mend_suspects(generation, embedder)

    def _mend_suspects(self, generation: Generation, embedder: Callable[[ModelBundle], Embedder]) -> None:
        with self._vault.store.read() as reader:
            fetching = Fetching(self._fetch, reader.hosts())
            flat = self._vault.vectors(generation)
            parts = [flat.rows(segment.id)[0] for segment in reader.segments(generation.id)]
            noted = np.asarray(reader.suspect_ids(generation.id), np.int64)
        ids = np.intersect1d(np.concatenate([np.empty(0, np.int64), *parts]), noted)
        folder = self._vault.folder / generation.folder
        found = suspects.compare(
            self._vault, generation, lambda one: embedder(ModelBundle.load(folder)), ids, fetching
        )
        replaced = suspects.replace_vectors(self._vault, generation, found) if len(found.ids) else 0
        suspects.settle(self._vault, generation, found)
        self.suspects += found.suspects
        self.compared += found.looked_at
        self.replaced += replaced
        if (unseen := found.suspects - found.looked_at - len(found.lost)) > 0:
            self.notes.append(
                f"{found.looked_at:,} of {found.suspects:,} faces that the damaged model may have embedded "
                f"were compared with their photos, and agree; the other {unseen:,} were not looked at."
            )
