"""Publishes a gallery: one snapshot after the other, beside readers and writers, and only what is new.

`states` describes what lies in the store. A state exists once its head does, so a publisher that is killed
before that has published nothing; the next one goes on with what it wrote. What a published erasure leaves
unreferenced is deleted before `publish` returns; everything else after followers had time to fetch it.
"""

import hashlib
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import IO, Final

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.reader import Reader
from retrieval.database.records import AuditEntry, GalleryRow, Receipt
from retrieval.database.store import Store
from retrieval.errors import DataError, GalleryBusy, GalleryDamaged, InputError, StorageError
from retrieval.index.segments import basis_name, codes_name
from retrieval.models.bundle import ModelBundle
from retrieval.replication.objects import FolderObjects, ObjectMissing, ObjectStore, open_objects
from retrieval.replication.states import (
    CHUNK_BYTES,
    OBJECTS,
    Erasure,
    Head,
    History,
    Manifest,
    Stored,
    head_key,
    head_numbers,
    newest_head,
    now,
    number_of_object,
    read_head,
    read_manifest,
    seconds_since,
    to_json,
)
from retrieval.storage.backup_contents import MODEL_CARD, MODEL_DESCRIPTION, sha256_of
from retrieval.storage.layout import VECTORS, segment_path
from retrieval.storage.vault import Vault
from retrieval.system.files import is_no_file, open_plain, temporary_folder, why

# How long the objects of a former state are kept for followers that fetch it, in seconds.
GRACE: Final = 900.0

# Objects that are written at the same time; a large one has 64 MiB.
_CHUNKS_TOGETHER: Final = 16
_FILES_TOGETHER: Final = 4

# The most files that are opened before the first is sent: far below the limit of open files.
_MAX_OPEN_FILES: Final = 256

# The most attempts when other processes merge files away, or publish, during each.
_ATTEMPTS: Final = 20


@dataclass(frozen=True, slots=True)
class Published:
    """The result of publishing.

    Attributes:
        address: where.
        number: of the published state.
        revision, faces: of the gallery in it.
        changed: whether anything changed since the state before.
        objects_written, bytes_written: what had to be written, without the head.
        objects_deleted: how many objects no state needs any more.
        erasures: the receipts of erasures that no state before had.
    """

    address: str
    number: int
    revision: int
    faces: int
    changed: bool
    objects_written: int
    bytes_written: int
    objects_deleted: int
    erasures: tuple[str, ...]


class _Changed(Exception):
    """A writer removed a file of the snapshot before it was sent."""


class Publisher:
    """Publishes a gallery at an address, as often as asked."""

    def __init__(self, vault: Vault, address: str, *, name: str | None = None) -> None:
        """Checks the store.

        Args:
            vault: the gallery's.
            address: a folder, or an address that fsspec reaches, such as s3://bucket/folder.
            name: who publishes, for followers to say; None is this machine and the gallery's folder.

        Raises:
            InputError: the gallery is itself a copy of a published one, or the store does not keep what a
                publisher needs.
            DataError, MissingDependency, StorageError: the store cannot be used.
        """
        if vault.follower is not None:
            raise InputError(
                f"{vault.name} is a copy of {vault.follower.current().address}; publish the gallery itself."
            )
        self.objects: ObjectStore = open_objects(address)
        self._vault = vault
        self._name = name or f"{socket.gethostname()}:{vault.folder.resolve()}"
        self._manifest: tuple[str, Manifest] | None = None
        self._last = 0  # the number of the newest state that was seen
        # Objects may be there that no state needs: of a killed publisher, or of one that came second.
        self._collect_all = True
        if isinstance(self.objects, FolderObjects) and self.objects.is_in(vault.folder):
            raise InputError(f"{address} is in the gallery itself; choose a folder elsewhere.")
        self.objects.check_writable()

    def publish(self) -> Published:
        """Publishes the current state of the gallery; where nothing changed, that it is still the current
        one.

        Raises:
            InputError: another gallery, or another copy of this one, is published at the address.
            GalleryDamaged: a file of the gallery is not what was written.
            GalleryBusy: other processes change, or publish, the gallery faster than it is published.
            StorageError: the store or the disk refused; what was published before stays.
        """
        for _ in range(_ATTEMPTS):
            head = newest_head(self.objects)
            number = 0 if head is None else head.number
            if number < self._last:
                # Not to begin again at 1, which followers would take for an earlier state.
                raise StorageError(
                    f"{self.objects.address} had state {self._last:,} and does not show it any more; see "
                    "what became of it."
                )
            self._last = number
            try:
                done = self._publish_after(head)
            except _Changed:
                continue
            except ObjectMissing:
                if newest_head(self.objects) == head:
                    raise
                continue
            if done is not None:
                return done
            self._collect_all = True
        raise GalleryBusy(
            f"{self._vault.name} changes faster than it can be published at {self.objects.address}; try "
            "again."
        )

    def _publish_after(self, head: Head | None) -> Published | None:
        """Publishes the state after another one; returns None where another publisher did before."""
        with self._vault.store.read() as reader:
            row = reader.gallery()
        if row.unfinished is not None:
            self._vault.run_deferred()
            with self._vault.store.read() as reader:
                row = reader.gallery()
        before = None if head is None else self._manifest_of(head)
        if head is not None:
            self._check_line(head, row)
        number = 1 if head is None else head.number + 1
        # A migration changes the tables and not the revision; followers of this version need the new tables.
        same = before is not None and before.schema == SCHEMA_VERSION
        if head is not None and before is not None and same and head.revision == row.revision:
            return self._create(replace(head, number=number), before, written=[], erasures=())
        with temporary_folder(Path(tempfile.gettempdir()), "faceprint-publish-") as folder:
            manifest, written = self._sent(folder / "gallery.db", number, before)
        data = to_json(manifest)
        stored = Stored(hashlib.sha256(data).hexdigest(), len(data), number)
        self.objects.put(stored.key, data)
        known = set() if before is None else {one.receipt for one in before.erasures}
        made = Head(
            number=number,
            current_at=now(),
            publisher=self._name,
            gallery=manifest.gallery,
            folder_id=manifest.folder_id,
            revision=manifest.revision,
            faces=manifest.faces,
            manifest=stored,
            token=secrets.token_hex(8),
        )
        erasures = tuple(one.receipt for one in manifest.erasures if one.receipt not in known)
        return self._create(made, manifest, written=[*written, stored], erasures=erasures)

    def _create(
        self, head: Head, manifest: Manifest, *, written: list[Stored], erasures: tuple[str, ...]
    ) -> Published | None:
        """Creates a head, and deletes what no head needs any more; returns None if another was created."""
        head = replace(head, current_at=now(), publisher=self._name, token=secrets.token_hex(8))
        data = to_json(head)
        if not self.objects.create(head_key(head.number), data) and not self._is_ours(head):
            return None
        self._manifest, self._last = (head.manifest.key, manifest), head.number
        self._collect_all |= bool(written)
        deleted = self._collect(head, manifest)
        self._collect_all = False
        return Published(
            self.objects.address,
            head.number,
            head.revision,
            head.faces,
            changed=bool(written),
            objects_written=len(written),
            bytes_written=sum(one.bytes for one in written),
            objects_deleted=deleted,
            erasures=erasures,
        )

    def _is_ours(self, head: Head) -> bool:
        """Returns whether the head of this number is this one: a repeated request says that it exists."""
        try:
            return read_head(self.objects, head.number).token == head.token
        except ObjectMissing:
            return False

    def _manifest_of(self, head: Head) -> Manifest:
        if self._manifest is None or self._manifest[0] != head.manifest.key:
            self._manifest = head.manifest.key, read_manifest(self.objects, head)
        return self._manifest[1]

    def _check_line(self, head: Head, row: GalleryRow) -> None:
        """Checks that the published state is an earlier one of this gallery.

        Raises:
            InputError: it is another gallery's, or later.
        """
        folder, address = self._vault.folder, self.objects.address
        if head.gallery != row.uuid:
            raise InputError(
                f"Another gallery is published at {address}, by {head.publisher}; choose another address."
            )
        # A gallery of an older version gets its id with its first write.
        if head.folder_id not in ("", row.folder_id):
            raise InputError(
                f"{folder} was restored to another folder than {head.publisher}, which is published at "
                f"{address}; publish it at another address, and have followers follow that."
            )
        if head.revision > row.revision:
            raise self._diverged(head)

    def _diverged(self, head: Head) -> InputError:
        return InputError(
            f"{self.objects.address} has a state of this gallery, by {head.publisher}, that does not lead to "
            f"{self._vault.name}: two copies of the gallery were changed. Publish the right one at "
            "another address."
        )

    # Sending

    def _sent(self, copy: Path, number: int, before: Manifest | None) -> tuple[Manifest, list[Stored]]:
        """Sends what is new in a snapshot; returns its manifest, and the objects that were written.

        Raises:
            _Changed: a writer removed a file of the snapshot before it was sent.
        """
        self._vault.store.file.copy(copy)
        with closing(Store.open(copy, read_only=True)) as store, store.read() as reader:
            row, faces, receipts = reader.gallery(), reader.count(), reader.receipts()
            if row.unfinished is not None:
                raise _Changed
            files, log = dict(self._files(reader)), reader.audit_log()
        if before is not None:
            self._check_continues(before, files, log)
        sending = _Sending(self.objects, number, before)
        with ExitStack() as opened:
            sources = [(one, sending.is_new(one.sha256)) for one in files.values()]
            # An open file stays readable after a writer has merged it away; small ones are merged first.
            for source in sorted((one for one, new in sources if new), key=lambda one: one.size)[
                :_MAX_OPEN_FILES
            ]:
                with suppress(FileNotFoundError):
                    source.file = opened.enter_context(open_plain(source.path))
            database = sending.chunks(copy)
            stored = sending.files(files, self._damaged)
        manifest = Manifest(
            row.uuid,
            row.folder_id or "",
            row.revision,
            faces,
            SCHEMA_VERSION,
            tuple(database),
            stored,
            _history(log),
            _erasures(receipts, () if before is None else before.erasures, number),
        )
        return manifest, sending.written

    def _check_continues(
        self, before: Manifest, files: "Mapping[str, _Source]", log: Sequence[AuditEntry]
    ) -> None:
        """Checks that a snapshot is a later state of what is published: its audit log goes on from there.

        Ids of segments are never used again, so that their files have to be the same as well.

        Raises:
            InputError: it is not, so that two copies of the gallery were changed.
        """
        same = _history(log[: before.history.entries]) == before.history
        for name, stored in before.files.items():
            if name.endswith(".faiss") and name in files:
                same &= files[name].sha256 == stored.sha256
        head = newest_head(self.objects)
        if not same and head is not None:
            raise self._diverged(head)

    def _files(self, reader: Reader) -> "Iterator[tuple[str, _Source]]":
        """Yields the files of a snapshot by their names in the gallery.

        Raises:
            _Changed: a card of a model changed since.
            GalleryDamaged: it is not what was written.
        """
        folder = self._vault.folder
        for segment in reader.segments():
            path = segment_path(folder, segment.id)
            yield f"{VECTORS}/{path.name}", _Source(path, segment.sha256, segment.bytes)
        for codes in reader.codes().values():
            name = f"{VECTORS}/{codes_name(codes.segment_id, codes.basis_id)}"
            yield name, _Source(folder / name, codes.sha256, codes.bytes)
        for basis in reader.bases().values():
            if basis.coordinates:
                name = f"{VECTORS}/{basis_name(basis.id)}"
                yield name, _Source(folder / name, basis.sha256, basis.bytes)
        for generation in reader.generations().values():
            model = folder / generation.folder
            if sha256_of(model / MODEL_CARD) != generation.card_sha256:
                raise self._damaged(_Source(model / MODEL_CARD, generation.card_sha256, 0))
            stated = {MODEL_CARD: generation.card_sha256, **ModelBundle.stated_files(model)}
            # The description is for people, and no card states its SHA-256.
            if (described := sha256_of(model / MODEL_DESCRIPTION)) is not None:
                stated[MODEL_DESCRIPTION] = described
            for name, digest in stated.items():
                yield f"{generation.folder}/{name}", _Source(model / name, digest, _size(model / name))

    def _damaged(self, source: "_Source") -> Exception:
        """Returns the error for a file that is not the one of the snapshot: it changed, or is damaged."""
        with self._vault.store.read() as reader:
            named = {segment_path(self._vault.folder, one.id) for one in reader.segments()}
            named |= {
                self._vault.folder / VECTORS / codes_name(one.segment_id, one.basis_id)
                for one in reader.codes().values()
            }
            named |= {self._vault.folder / VECTORS / basis_name(number) for number in reader.bases()}
            cards = {
                self._vault.folder / one.folder: one.card_sha256 for one in reader.generations().values()
            }
        is_model = source.path.parent in cards and (
            source.path.name != MODEL_CARD or cards[source.path.parent] == source.sha256
        )
        if source.path in named or is_model:
            return GalleryDamaged(
                f"{source.path} is not what was written; see `faceprint verify {self._vault.name}`."
            )
        return _Changed()

    # Deleting

    def _collect(self, head: Head, manifest: Manifest) -> int:
        """Deletes what only former states needed; returns how many objects.

        The heads go last: as long as one is there, the next publisher looks for its objects.
        """
        erased = max((one.number for one in manifest.erasures), default=0)
        kept, read = {head.manifest.key} | manifest.keys(), {head.manifest.key}
        gone: list[int] = []
        unneeded = self._collect_all
        for number in head_numbers(self.objects):
            if number >= head.number:
                continue
            former = self._former(number)
            if former is None or number < erased or seconds_since(former.current_at) > GRACE:
                gone.append(number)
                unneeded |= former is None or former.manifest.key not in read
            elif former.manifest.key not in read:
                read.add(former.manifest.key)
                with suppress(ObjectMissing, DataError):
                    kept |= {former.manifest.key} | read_manifest(self.objects, former).keys()
        deleted = self._delete_all_but(kept, head.number) if unneeded else 0
        self.objects.delete(map(head_key, gone))
        return deleted

    def _delete_all_but(self, kept: set[str], number: int) -> int:
        """Deletes the objects of states up to a number, except some; returns how many.

        Raises:
            StorageError: one is still there after it was deleted.
        """
        deleted = {
            name
            for name in self.objects.sizes(OBJECTS)
            if (written_by := number_of_object(name)) is not None
            and written_by <= number
            and name not in kept
        }
        self.objects.delete(deleted)
        if left := self.objects.sizes(OBJECTS).keys() & deleted:
            raise StorageError(
                f"{self.objects.address}/{min(left)} is still there after it was deleted; the store may keep "
                "what is deleted, so what was forgotten is not gone from it."
            )
        return len(deleted)

    def _former(self, number: int) -> Head | None:
        """Returns the head of a former state; None where it is gone, or damaged and of no use."""
        try:
            return read_head(self.objects, number)
        except (ObjectMissing, DataError):
            return None


@dataclass(eq=False)
class _Source:
    """A file of the gallery to publish; `file` is open where a writer may remove it meanwhile."""

    path: Path
    sha256: str
    size: int
    file: IO[bytes] | None = None

    def read(self) -> bytes | None:
        """Returns the bytes of the file; None where they are not the expected ones.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            if self.file is None:
                with open_plain(self.path) as file:
                    data = file.read()
            else:
                data = self.file.read()
        except OSError as error:
            if is_no_file(error):
                return None
            raise StorageError(f"{self.path} cannot be read: {why(error)}.") from error
        return data if hashlib.sha256(data).hexdigest() == self.sha256 else None


class _Sending:
    """The objects of a state that is being written.

    Attributes:
        written: those that were written in this run.
    """

    def __init__(self, objects: ObjectStore, number: int, before: Manifest | None) -> None:
        self._objects = objects
        self._number = number
        self._known = {} if before is None else before.objects_by_sha256()
        # What a killed publisher of the same state wrote.
        self._there = objects.sizes(f"{OBJECTS}/{number:012d}")
        self.written: list[Stored] = []

    def is_new(self, sha256: str) -> bool:
        """Returns whether the state before lacks an object with this content."""
        return sha256 not in self._known

    def chunks(self, copy: Path) -> list[Stored]:
        """Sends the new chunks of a database; returns all, in order."""
        found: list[Stored] = []

        def new() -> Iterator[tuple[Stored, Callable[[], bytes]]]:
            with open(copy, "rb") as file:
                while data := file.read(CHUNK_BYTES):
                    sha256 = hashlib.sha256(data).hexdigest()
                    stored = self._known.get(sha256)
                    if stored is None:
                        stored = self._known[sha256] = Stored(sha256, len(data), self._number)
                        yield stored, lambda data=data: data  # type: ignore[misc]
                    found.append(stored)

        self._send(new(), _CHUNKS_TOGETHER)
        return found

    def files(
        self, sources: Mapping[str, _Source], damaged: Callable[[_Source], Exception]
    ) -> dict[str, Stored]:
        """Sends the new files; returns all, by name."""
        found: dict[str, Stored] = {}

        def new() -> Iterator[tuple[Stored, Callable[[], bytes]]]:
            for name, source in sources.items():
                stored = self._known.get(source.sha256)
                if stored is None:
                    stored = self._known[source.sha256] = Stored(source.sha256, source.size, self._number)
                    yield stored, lambda source=source: read(source)  # type: ignore[misc]
                found[name] = stored

        def read(source: _Source) -> bytes:
            data = source.read()
            if data is None:
                raise damaged(source)
            return data

        self._send(new(), _FILES_TOGETHER)
        return found

    def _send(self, new: Iterable[tuple[Stored, Callable[[], bytes]]], together: int) -> None:
        """Writes objects, several at a time; each is read when its turn comes."""

        def send(stored: Stored, read: Callable[[], bytes]) -> None:
            if self._there.get(stored.key) != stored.bytes:
                self._objects.put(stored.key, read())
                self.written.append(stored)

        with ThreadPoolExecutor(together, thread_name_prefix="faceprint-publish") as pool:
            waiting = []
            for stored, read in new:
                waiting.append(pool.submit(send, stored, read))
                while len(waiting) >= 2 * together:
                    waiting.pop(0).result()
            for one in waiting:
                one.result()


def _history(log: Sequence[AuditEntry]) -> History:
    entries = [list(astuple(entry)) for entry in log[:-1]]
    # The newest entry may be of a run that goes on, and its counts grow.
    entries += [[entry.began_at, entry.who, entry.via, entry.action] for entry in log[-1:]]
    return History(len(log), hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest())


def _erasures(receipts: Iterable[Receipt], before: tuple[Erasure, ...], number: int) -> tuple[Erasure, ...]:
    """Returns the erasures of a snapshot: those of the state before keep the number of theirs."""
    known = {one.receipt: one for one in before}
    return tuple(known.get(receipt.id) or Erasure(receipt.id, receipt.at, number) for receipt in receipts)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
