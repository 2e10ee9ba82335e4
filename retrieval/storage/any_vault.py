"""`AnyVault`: what searches and changes of a gallery need of its rows and vectors, wherever these are.

`vault.Vault` keeps them in a folder, `server_vault.ServerVault` in the databases of two servers. In both, the
vectors of new faces are durable before the transaction that adds their rows, ids are never used again, and a
vector without a row does not exist.
"""

import getpass
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from retrieval.database.reader import Reader
from retrieval.database.records import AuditEntry, Calibration, Generation, Receipt, utc_now
from retrieval.database.store import Store
from retrieval.database.writer import Writer
from retrieval.index.searched import SearchedVectors
from retrieval.index.segments import Ids, Vectors
from retrieval.models.bundle import ModelBundle, Relabel
from retrieval.storage.following import FollowerCard

_T = TypeVar("_T")

# Who asked for the current change, where that is not the process itself (see `called_by`).
_CALLER: ContextVar[str | None] = ContextVar("caller", default=None)


@dataclass(frozen=True, slots=True)
class State:
    """What a search needs of a snapshot: generation, number of faces, calibration, vectors."""

    revision: int
    generation: Generation
    faces: int
    calibration: Calibration | None
    vectors: SearchedVectors


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on disk of the parts of a gallery.

    Attributes:
        database: of the rows, and of what finds them.
        vectors: of the whole vectors, of all generations.
        codes: of codes and bases.
    """

    database: int
    vectors: int
    codes: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.database + self.vectors + self.codes


class AnyVault(ABC):
    """Rows and vectors of a gallery. Safe to share between threads; any number of processes may read.

    Attributes:
        name: what messages call the gallery: its folder, or its address without a password.
        store: the tables.
        read_only: whether writing is refused.
        via: the caller in the audit log: a command, or "library".
        follower: the card of a folder that follows a published gallery, which is always read-only; else None.
        in_folder: whether rows and vectors are files of a folder.
        remains: what an erasure leaves where this program does not reach, as a sentence; None for nothing.
        vectors_address: where its vectors are, if it was opened with that; else None.
    """

    in_folder: ClassVar[bool] = False
    remains: ClassVar[str | None] = None
    vectors_address: str | None = None

    def __init__(
        self, name: str, store: Store, *, read_only: bool, via: str, follower: FollowerCard | None = None
    ) -> None:
        self.name = name
        self.store = store
        self.read_only = read_only
        self.via = via
        self.follower = follower
        self._logged: tuple[int, str] | None = None  # the newest entry of the audit log, and its caller

    @property
    @abstractmethod
    def place(self) -> str:
        """The absolute folder or the whole address, which opens the gallery again; never shown."""

    @abstractmethod
    def close(self) -> None:
        """Closes all files and connections; does nothing if they are closed."""

    # Reading

    @abstractmethod
    def state(self, reader: Reader) -> State:
        """Returns the state of a snapshot; cached until the revision changes."""

    def serving(self, reader: Reader) -> Generation:
        """Returns the generation that serves searches."""
        return reader.serving_generation()

    def check_age(self) -> None:
        """Checks that a copy of a published gallery is not older than it may be; else does nothing.

        Raises:
            OutOfDate: it is.
        """
        if self.follower is not None:
            self.follower.check_age()

    def check_vectors(self) -> None:
        """Checks that the server of the vectors answers; does nothing where they are files.

        Raises:
            GalleryError, GalleryDamaged, StorageError: it does not, or has not the vectors of this gallery.
        """
        return

    @abstractmethod
    def on_a_snapshot(self, work: Callable[[Reader], _T]) -> _T:
        """Returns the result of `work` on a snapshot; retries on a later one if its vectors were removed."""

    @abstractmethod
    def vector(self, reader: Reader, generation: Generation, face_id: int) -> Vectors | None:
        """Returns the vector of a face, (d,) float32; None where the generation has none."""

    @abstractmethod
    def rows_at_a_time(self, generation: Generation) -> int:
        """Returns the most faces that one transaction adds."""

    @abstractmethod
    def proven_parts(self, reader: Reader, proven: set[int]) -> Iterator[tuple[Ids, Vectors]]:
        """Returns the ids and vectors of all faces of a snapshot, in parts, for a copy of the gallery.

        Damaged vectors must not get new, valid checksums, so all are compared with what was written, where
        that is recorded, before it returns.

        Args:
            reader: the snapshot.
            proven: the numbers of the parts that were compared before, which are added to.

        Raises:
            GalleryDamaged: some are not what was written, or missing.
        """

    @abstractmethod
    def bundle(self, reader: Reader, generation: Generation) -> ModelBundle:
        """Returns the model of a generation, with the labels of this snapshot.

        Raises:
            BundleError, ModelMismatch: the model is missing or damaged, or has another fingerprint.
            StorageError: the machine cannot read it.
        """

    @abstractmethod
    def sizes(self, reader: Reader) -> Sizes:
        """Returns the bytes on disk."""

    # Writing

    @abstractmethod
    def writing(self) -> AbstractContextManager[Writer]:
        """Returns a context with the only writer, in one transaction.

        Raises:
            GalleryBusy: another process is writing, and did not finish in time.
            InputError: the gallery was opened for reading only.
            StorageError: the machine, or a server, refused; nothing was changed, unless the message says so.
        """

    @abstractmethod
    def trying(self) -> AbstractContextManager[Writer]:
        """Returns a context with a writer whose changes never take effect, to see what they would be."""

    def reserve(self, writer: Writer, count: int) -> int:
        """Returns the first of `count` ids for new faces, before the transaction changes anything else."""
        return writer.gallery().next_face_id

    @abstractmethod
    def appending(
        self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors
    ) -> AbstractContextManager[None]:
        """Returns a context that writes new vectors, many in a thread while its body writes their rows."""

    def append(self, writer: Writer, generation: Generation, ids: Ids, vectors: Vectors) -> None:
        """Writes new vectors of existing rows; see `appending`."""
        with self.appending(writer, generation, ids, vectors):
            pass

    @abstractmethod
    def remove(self, writer: Writer, ids: Sequence[int]) -> None:
        """Removes faces: their rows, and their vectors of all generations."""

    @abstractmethod
    def defer(self, writer: Writer, *, erase: bool, labels: Mapping[str, Mapping[int, Relabel]]) -> None:
        """Changes labels of models, and erases traces of what was deleted, with the commit or right after it.

        Args:
            writer: the transaction.
            erase: leave no trace of deleted rows where this program can reach them.
            labels: changes of labels by index, by the folder of their model.
        """

    def told(self, receipt: Receipt) -> dict[str, Any]:
        """Returns a receipt as values for JSON, with what the erasure leaves elsewhere as `remains`."""
        return asdict(receipt) | ({} if self.remains is None else {"remains": self.remains})

    def log(
        self, writer: Writer, action: str, *, faces: int = 0, extend: int | None = None, **detail: Any
    ) -> int:
        """Adds to the audit log, or to its newest entry if that has the id `extend`; returns the id.

        An entry of another caller is not added to.
        """
        via = _CALLER.get() or self.via
        if extend is not None and self._logged == (extend, via) and writer.extend_audit(extend, faces):
            return extend
        now = utc_now()
        number = writer.add_audit(AuditEntry(now, now, who(), via, action, faces, detail))
        self._logged = number, via
        return number


@contextmanager
def called_by(via: str) -> Iterator[None]:
    """Names the caller in the audit log for the changes of this thread, until the with statement ends.

    Args:
        via: the caller, in place of `AnyVault.via`: never the name of a person in the gallery.
    """
    token = _CALLER.set(via)
    try:
        yield
    finally:
        _CALLER.reset(token)


def who() -> str:
    """Returns the name of the operating system user, for the audit log."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"
