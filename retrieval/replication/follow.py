"""Follows a published gallery: a folder that is a read-only gallery, in step with the published state.

What a state needs is fetched and proven first, beside the state that is there; then the database is replaced
by one rename, and with it the state of every process that reads the folder, from its next search on. What
only the former state needed is removed, and the follower confirms: from then on it has no byte of what was
forgotten.

A follower that is killed at any moment has the former state or the new one, and goes on with what it has
fetched.
"""

import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from retrieval.database import page_checksums
from retrieval.database.engines.sqlite_file import LOCK_NAME
from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.reader import Reader
from retrieval.database.store import Store
from retrieval.errors import DataError, GalleryBusy, GalleryError, InputError, StorageError
from retrieval.index.segments import basis_name, codes_name
from retrieval.models.bundle import FILE_NAMES
from retrieval.replication.objects import ObjectMissing, ObjectStore, open_objects
from retrieval.replication.states import (
    CHUNK_BYTES,
    Confirmation,
    Head,
    Manifest,
    Stored,
    follower_key,
    is_follower_name,
    newest_head,
    now,
    read_manifest,
    seconds_since,
    to_json,
)
from retrieval.storage import leftovers, ownership
from retrieval.storage.backup_contents import MODEL_CARD, sha256_of
from retrieval.storage.following import Follower, read_follower, write_follower
from retrieval.storage.layout import DATABASE, FOLLOWER_CARD, FOLLOWER_LOCK, VECTORS
from retrieval.storage.vault import LOCK_TIMEOUT
from retrieval.system import lock
from retrieval.system.files import (
    create,
    is_free,
    make_folder,
    make_output_folder,
    make_room,
    open_plain,
    remove,
    sync,
    why,
    write_durably,
)

# Objects that are fetched at the same time; a large one has 64 MiB.
_CHUNKS_TOGETHER: Final = 16
_FILES_TOGETHER: Final = 4

# How often a follower without news says that it is there, in seconds.
_CONFIRM_SECONDS: Final = 60.0

# The most attempts when states are published, and former ones deleted, while they are fetched.
_ATTEMPTS: Final = 20

_PART: Final = f".{DATABASE}.part"


@dataclass(frozen=True, slots=True)
class Synced:
    """The result of a sync.

    Attributes:
        folder: the follower's.
        number: of the state that it has now.
        revision, faces: of the gallery in it.
        changed: whether it is another state of the gallery than before.
        objects_fetched, bytes_fetched: what had to be fetched.
        age: seconds since the publisher said that this is the gallery's state.
    """

    folder: str
    number: int
    revision: int
    faces: int
    changed: bool
    objects_fetched: int
    bytes_fetched: int
    age: float


class FollowerFolder:
    """A folder that follows a published gallery; a context manager that one process at a time enters."""

    def __init__(
        self,
        address: str,
        folder: Path,
        *,
        name: str | None = None,
        max_age: float | None = None,
    ) -> None:
        """Takes the arguments; nothing is read before the with statement.

        Args:
            address: where the gallery is published.
            folder: of the follower: missing, empty, or one that follows this gallery already.
            name: in the list of followers; None is the name that the folder has, or one of this machine's
                name and random digits.
            max_age: searches in the folder are refused when its state is older than so many seconds; None for
                never.

        Raises:
            InputError: no follower can have this name, or `max_age` is not above 0.
            DataError, MissingDependency: there is no way to reach such an address.
        """
        if name is not None and not is_follower_name(name):
            raise InputError(
                f"`name` is {name!a}; use up to 100 letters, digits, dots, hyphens and underscores, and "
                "begin with a letter or a digit."
            )
        if max_age is not None and not max_age > 0:
            raise InputError(f"`max_age` is {max_age:g} s; it must be above 0.")
        self.folder = folder
        self.objects: ObjectStore = open_objects(address)
        self._name = name
        self._max_age = max_age
        self._stack = ExitStack()
        # Files that were compared with their SHA-256 by this process, and nothing changes them since.
        self._proven: dict[str, str] = {}
        self._confirmed: Confirmation | None = None
        self._card: Follower | None = None
        # The SHA-256 of the manifest of the state that is here, proven, and with nothing of another one.
        self._settled: str | None = None

    def __enter__(self) -> Self:
        """Makes the folder, or takes over one that follows this gallery.

        Raises:
            InputError: nothing is published at the address, or the folder is something else.
            GalleryBusy: another process follows into this folder.
            StorageError: the store cannot be reached, or the disk refused.
        """
        try:
            with _translated(self.folder):
                self._card = self._taken_over() if self._exists() else None
                if self._card is None:
                    head = self._head()
                    lock.check_lockable(self.folder)
                    make_output_folder(self.folder)
                    self._stack.enter_context(self._alone())
                    make_folder(self.folder / VECTORS, like=self.folder, exist_ok=True)
                    self._card = self._new_card(head)
                else:
                    self._stack.enter_context(self._alone())
                write_follower(self.folder, self._card)
            # Before the first byte of a person is here: an erasure has to hear of this follower.
            if self._card.number == 0:
                self._confirm(force=True)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def card(self) -> Follower:
        """What the folder follows, and the state that it has."""
        assert self._card is not None  # set by the with statement
        return self._card

    @property
    def has_state(self) -> bool:
        """Whether a state is complete here, so that the folder can be searched."""
        return self.card.number > 0 and (self.folder / DATABASE).is_file()

    def sync(self) -> Synced:
        """Brings the folder to the published state, if that is another one, and confirms it.

        Raises:
            InputError: another gallery is published at the address now.
            DataError: what is published is damaged, or by a newer version; the former state stays.
            GalleryBusy: states are published faster than they are fetched.
            StorageError: the store cannot be reached, or the disk refused; the former state stays.
        """
        for _ in range(_ATTEMPTS):
            head = self._head()
            self._check_line(head, self.card)
            try:
                with _translated(self.folder):
                    return self._to(head)
            except ObjectMissing as error:
                # A later state was published, and what only this one needed deleted.
                if self._head().number == head.number:
                    raise DataError(f"{error} It was published; publish again.") from error
        raise GalleryBusy(f"{self.objects.address} changes faster than it can be fetched; try again.")

    # The folder

    def _exists(self) -> bool:
        return not is_free(self.folder)

    def _taken_over(self) -> Follower | None:
        """Returns the card of a folder that follows this gallery; None for one in which nothing was begun.

        Raises:
            InputError: it is something else.
        """
        card = read_follower(self.folder) if self.folder.is_dir() else None
        if card is None:
            begun = self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {
                FOLLOWER_LOCK,
                VECTORS,
                f".{FOLLOWER_CARD}.part",
            }
            if begun and not any((self.folder / VECTORS).glob("*")):
                return None
            raise InputError(f"{self.folder} is there already and follows nothing; choose another folder.")
        if card.address != self.objects.address:
            # The gallery may be published elsewhere now, where numbers begin again.
            card = replace(card, address=self.objects.address, number=0)
            self._check_line(self._head(), card)
        return replace(card, name=self._name or card.name, max_age=self._max_age)

    def _new_card(self, head: Head) -> Follower:
        host = "".join(one if is_follower_name(f"a{one}") else "-" for one in socket.gethostname())
        return Follower(
            address=self.objects.address,
            name=self._name or f"{host.strip('-._')[:80] or 'follower'}-{secrets.token_hex(4)}",
            publisher=head.publisher,
            gallery=head.gallery,
            folder_id=head.folder_id,
            number=0,
            revision=0,
            current_at=head.current_at,
            max_age=self._max_age,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with lock.exclusive(self.folder / FOLLOWER_LOCK, timeout=0.0):
                yield
        except GalleryBusy as error:
            raise GalleryBusy(
                f"Another process follows {self.objects.address} into {self.folder}; stop it first."
            ) from error

    def _head(self) -> Head:
        head = newest_head(self.objects)
        if head is None:
            raise InputError(
                f"No gallery is published at {self.objects.address}; publish one with `faceprint publish "
                f"GALLERY {self.objects.address}`, or check the address."
            )
        return head

    def _check_line(self, head: Head, card: Follower) -> None:
        if head.gallery != card.gallery or card.folder_id not in ("", head.folder_id):
            raise InputError(
                f"Another gallery, or another copy of it, is published at {self.objects.address} than "
                f"{self.folder} follows; follow it into another folder."
            )
        if head.number < card.number or head.revision < card.revision:
            raise InputError(
                f"{self.objects.address} has an earlier state than {self.folder} (number {head.number:,} "
                f"after {card.number:,}); if that is meant, follow it into another folder."
            )

    # A state

    def _to(self, head: Head) -> Synced:
        fetched = [0, 0]
        changed = not self.has_state or head.revision != self.card.revision
        if head.manifest.sha256 != self._settled:
            manifest = read_manifest(self.objects, head)
            if manifest.schema > SCHEMA_VERSION:
                raise DataError(
                    f"{self.objects.address} is published by a newer version of faceprint; upgrade faceprint "
                    "here."
                )
            fetching = _Fetching(self.objects, fetched)
            self._fetch(manifest, fetching)
            self._switch(head, manifest, fetching)
            self._settle(manifest)
            self._settled = head.manifest.sha256
        card = replace(
            self.card,
            publisher=head.publisher,
            folder_id=head.folder_id,
            number=head.number,
            revision=head.revision,
            current_at=head.current_at,
        )
        if card != self.card:
            write_follower(self.folder, card)
            self._card = card
        self._confirm(force=changed)
        return Synced(
            os.fspath(self.folder),
            head.number,
            head.revision,
            head.faces,
            changed,
            objects_fetched=fetched[0],
            bytes_fetched=fetched[1],
            age=card.age(),
        )

    def _fetch(self, manifest: Manifest, fetching: "_Fetching") -> None:
        """Fetches the files of a state that are not here, but no cards of models, which the former needs."""
        if manifest.folder_id and ownership.read_id(self.folder / VECTORS) != manifest.folder_id:
            ownership.write_id(self.folder / VECTORS, manifest.folder_id, self.folder)
        needed = {
            name: stored
            for name, stored in manifest.files.items()
            if not self._has(name, stored) and not _is_card(name)
        }
        for parent in {(self.folder / name).parent for name in manifest.files}:
            make_folder(parent, like=self.folder, exist_ok=True)

        def keep(name: str, data: bytes) -> None:
            write_durably(self.folder / name, data, inherit=True, anything=True)
            self._proven[name] = manifest.files[name].sha256

        fetching.each(needed.items(), keep, _FILES_TOGETHER)

    def _has(self, name: str, stored: Stored) -> bool:
        """Returns whether a file is here; reads all of it, once a process."""
        if self._proven.get(name) == stored.sha256:
            return True
        if sha256_of(self.folder / name) != stored.sha256:
            return False
        self._proven[name] = stored.sha256
        return True

    def _switch(self, head: Head, manifest: Manifest, fetching: "_Fetching") -> None:
        """Puts the database of a state in the place of the former one, in one step."""
        path, part = self.folder / DATABASE, self.folder / _PART
        make_room(part)
        cards = {
            name: fetching.one(stored)
            for name, stored in manifest.files.items()
            if _is_card(name) and not self._has(name, stored)
        }
        replaced = False
        try:
            with create(part, inherit=True) as file:
                replaced = fetching.database(manifest.database, path, file)
                file.flush()
                os.fsync(file.fileno())
            if replaced:
                _check_database(part, head, manifest)
            with lock.exclusive(self.folder / LOCK_NAME, timeout=LOCK_TIMEOUT):
                for name, data in cards.items():
                    write_durably(self.folder / name, data, inherit=True, anything=True)
                    self._proven[name] = manifest.files[name].sha256
                if replaced:
                    page_checksums.discard(path)
                    make_room(path)
                    os.replace(part, path)
                    sync(self.folder)
        finally:
            part.unlink(missing_ok=True)

    def _settle(self, manifest: Manifest) -> None:
        """Removes what only former states needed, and writes the checksums of the database."""
        path = self.folder / DATABASE
        with lock.exclusive(self.folder / LOCK_NAME, timeout=LOCK_TIMEOUT):
            with closing(Store.open_replaced(path)) as store, store.read() as reader:
                unneeded = list(leftovers.unnamed(self.folder, reader))
            for file in unneeded:
                remove(file)
                self._proven.pop(file.relative_to(self.folder).as_posix(), None)
            for folder in {Path(name).parent for name in manifest.files if not name.startswith(VECTORS)}:
                for name in FILE_NAMES:
                    if f"{folder}/{name}" not in manifest.files:
                        (self.folder / folder / name).unlink(missing_ok=True)
            for folder in {self.folder, self.folder / VECTORS}:
                sync(folder)
            page_checksums.write_sums(path)

    def _confirm(self, *, force: bool) -> None:
        """Confirms the state that is here, at once with `force`, otherwise once in `_CONFIRM_SECONDS`.

        To be called only when nothing is left of what only former states had.
        """
        last = self._confirmed
        if force or last is None or seconds_since(last.at) >= _CONFIRM_SECONDS:
            confirmation = Confirmation(self.card.name, self.card.number, self.card.revision, now())
            self.objects.put(follower_key(confirmation.name), to_json(confirmation))
            self._confirmed = confirmation


class _Fetching:
    """Objects that are fetched and proven; `fetched` counts them, and their bytes."""

    def __init__(self, objects: ObjectStore, fetched: list[int]) -> None:
        self._objects = objects
        self._fetched = fetched

    def one(self, stored: Stored) -> bytes:
        """Returns the bytes of an object.

        Raises:
            DataError: they are not what was published.
        """
        data = self._objects.get(stored.key)
        if len(data) != stored.bytes or hashlib.sha256(data).hexdigest() != stored.sha256:
            raise DataError(
                f"{self._objects.address}/{stored.key} is not what was published; remove it, and publish "
                "again."
            )
        self._fetched[0] += 1
        self._fetched[1] += len(data)
        return data

    def each(
        self,
        needed: Iterable[tuple[str, Stored]],
        keep: Callable[[str, bytes], None],
        together: int,
    ) -> None:
        """Fetches objects, several at a time, and keeps each in this thread, as it comes."""
        with ThreadPoolExecutor(together, thread_name_prefix="faceprint-fetch") as pool:
            waiting = []
            for name, stored in needed:
                waiting.append((name, pool.submit(self.one, stored)))
                if len(waiting) >= together:
                    first, got = waiting.pop(0)
                    keep(first, got.result())
            for name, got in waiting:
                keep(name, got.result())

    def database(self, chunks: Iterable[Stored], former: Path, file: BinaryIO) -> bool:
        """Writes a database, from the chunks of the former one as far as they are the same.

        Returns:
            Whether it differs from the former one.
        """
        needed: list[tuple[str, Stored]] = []
        size = 0
        with ExitStack() as stack:
            source = None
            with suppress(OSError):
                source = stack.enter_context(open_plain(former))
            for number, stored in enumerate(chunks):
                data = b"" if source is None else source.read(CHUNK_BYTES)
                if len(data) == stored.bytes and hashlib.sha256(data).hexdigest() == stored.sha256:
                    file.seek(number * CHUNK_BYTES)
                    file.write(data)
                else:
                    needed.append((str(number), stored))
                size += stored.bytes
            longer = source is None or bool(source.read(1))

        def keep(number: str, data: bytes) -> None:
            file.seek(int(number) * CHUNK_BYTES)
            file.write(data)

        self.each(needed, keep, _CHUNKS_TOGETHER)
        return longer or bool(needed)


def _is_card(name: str) -> bool:
    return name.endswith(f"/{MODEL_CARD}")


def _check_database(path: Path, head: Head, manifest: Manifest) -> None:
    """Checks that a database and its manifest state the same.

    Raises:
        DataError: they do not.
    """
    try:
        with closing(Store.open_replaced(path)) as store, store.read() as reader:
            row = reader.gallery()
            same = (row.uuid, row.folder_id or "", row.revision, reader.count())
            wanted = (manifest.gallery, manifest.folder_id, manifest.revision, manifest.faces)
            files = _files_of(reader)
    except GalleryError as error:
        raise DataError(f"The published database cannot be used: {error}") from error
    stated = {
        name: stored.sha256 for name, stored in manifest.files.items() if name in files or _is_stated(name)
    }
    if same != wanted or files != stated or row.unfinished is not None:
        raise DataError(
            f"State {head.number:,} contradicts itself: its database and its manifest state different "
            "things; publish again."
        )


def _is_stated(name: str) -> bool:
    """Returns whether rows of the database state the SHA-256 of a file."""
    return name.startswith(f"{VECTORS}/") or _is_card(name)


def _files_of(reader: Reader) -> dict[str, str]:
    """Returns the SHA-256 of the files that rows of a database state."""
    found = {f"{VECTORS}/{segment.id:08d}.faiss": segment.sha256 for segment in reader.segments()}
    for codes in reader.codes().values():
        found[f"{VECTORS}/{codes_name(codes.segment_id, codes.basis_id)}"] = codes.sha256
    for basis in reader.bases().values():
        if basis.coordinates:
            found[f"{VECTORS}/{basis_name(basis.id)}"] = basis.sha256
    for generation in reader.generations().values():
        found[f"{generation.folder}/{MODEL_CARD}"] = generation.card_sha256
    return found


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or folder} cannot be written: {why(error)}.") from error
