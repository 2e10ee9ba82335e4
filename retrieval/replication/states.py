"""What a published gallery is at its address: heads, manifests, objects, and the confirmations of followers.

    heads/000000000042.json       a published state: its number, revision and time, and its manifest
    objects/000000000042/SHA-256  what state 42 has and 41 had not: the manifest, files, parts of the database
    followers/NAME.json           the state that a follower has, and nothing that only earlier states had

A head is created and never replaced, so of two publishers that make the same number one is refused. The
highest number is the current state. The database travels in chunks by their content, so that only changed
ones do.

A publisher of state N uses objects of the manifest of N - 1, and writes the others below `objects/N/`; it
deletes only objects below numbers up to N that no kept head needs. So an object that a later state uses is
never deleted, however slow a publisher is.

This module has the three documents (`Head`, `Manifest`, `Confirmation`), the names of the objects, and the
functions that read and check them. `publish` and `follow` write.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

from retrieval.database.records import MODEL_FOLDER
from retrieval.errors import DataError
from retrieval.models.bundle import FILE_NAMES
from retrieval.replication.objects import ObjectMissing, ObjectStore
from retrieval.storage.layout import VECTORS
from retrieval.system.manifests import parse_manifest

_T = TypeVar("_T")

_FORMAT: Final = 1
_ADVICE: Final = "publish again with `faceprint publish`"

HEADS: Final = "heads"
OBJECTS: Final = "objects"
FOLLOWERS: Final = "followers"

# The bytes of a chunk of the database; of the last one, at most.
CHUNK_BYTES: Final = 256 * 1024

_HEAD: Final = re.compile(rf"{HEADS}/([0-9]{{12}})\.json")
_OBJECT: Final = re.compile(rf"{OBJECTS}/([0-9]{{12}})/[0-9a-f]{{64}}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FOLLOWER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# The files that a manifest may name: vectors, codes, bases and models, and nothing outside of a gallery.
_FILE: Final = re.compile(
    rf"{VECTORS}/([0-9]{{8,19}}\.faiss|[0-9]{{8,19}}-[0-9]{{1,19}}\.codes|[0-9]{{8,19}}\.basis)"
    rf"|{MODEL_FOLDER.pattern}/({'|'.join(map(re.escape, sorted(FILE_NAMES)))})"
)

# The largest manifest: that of a billion faces.
_MAX_MANIFEST_BYTES: Final = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A file or a chunk among the objects.

    Attributes:
        sha256: of its bytes, in hex.
        bytes: how many they are.
        number: of the published state that wrote the object, which its name begins with.
    """

    sha256: str
    bytes: int
    number: int

    @property
    def key(self) -> str:
        """The name of the object, below the address."""
        return object_key(self.number, self.sha256)


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure that was published.

    Attributes:
        receipt: the id of its receipt.
        at: when it was done; ISO 8601, UTC.
        number: of the first published state without the erased faces.
    """

    receipt: str
    at: str
    number: int


@dataclass(frozen=True, slots=True)
class History:
    """The audit log of a gallery up to a state, by its SHA-256: later states of the gallery begin with it.

    A copy of the gallery that was changed elsewhere does not, and must not be published over this one.

    Attributes:
        entries: how many entries the log had.
        sha256: of these entries; of the newest one only the fields that do not change while a run
            goes on.
    """

    entries: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that a published state consists of.

    Attributes:
        gallery, folder_id: the UUID of the gallery, and the id of its vectors folder.
        revision, faces, schema: of the gallery's database: the number that rises with each change, the number
            of faces, and the revision of the tables.
        database: its chunks, in order.
        files: vectors, codes, bases and models, by their path in a gallery.
        history: of the gallery.
        erasures: all that were published, oldest first.
    """

    gallery: str
    folder_id: str
    revision: int
    faces: int
    schema: str
    database: tuple[Stored, ...]
    files: dict[str, Stored]
    history: History
    erasures: tuple[Erasure, ...] = ()
    format: int = _FORMAT

    def keys(self) -> set[str]:
        """Returns the names of the objects that the state consists of, without the manifest."""
        return {one.key for one in (*self.database, *self.files.values())}

    def objects_by_sha256(self) -> dict[str, Stored]:
        """Returns the same objects by their content, so that the next state need not write it again."""
        return {one.sha256: one for one in (*self.database, *self.files.values())}


@dataclass(frozen=True)
class Head:
    """A published state, as its head states it.

    Attributes:
        number: of the state.
        current_at: when this was the state of the gallery; ISO 8601, UTC.
        publisher: who published it: a machine and a folder.
        gallery, folder_id, revision, faces: as of the manifest.
        manifest: the object that holds it.
        token: random; tells two heads apart that are otherwise equal.
    """

    number: int
    current_at: str
    publisher: str
    gallery: str
    folder_id: str
    revision: int
    faces: int
    manifest: Stored
    token: str
    format: int = _FORMAT


@dataclass(frozen=True)
class Confirmation:
    """What a follower says of itself.

    Attributes:
        name: of the follower.
        number: of the state that it has; 0 while it fetches its first. It confirms a state only when nothing
            is left of what only earlier ones had, so that an erasure can rely on it.
        revision: of the gallery in that state.
        at: when it said so; ISO 8601, UTC.
    """

    name: str
    number: int
    revision: int
    at: str
    format: int = _FORMAT


def now() -> str:
    """Returns the current time in UTC as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def object_key(number: int, sha256: str) -> str:
    """Returns the name of an object that a state wrote."""
    return f"{OBJECTS}/{number:012d}/{sha256}"


def number_of_object(name: str) -> int | None:
    """Returns the number of the state that wrote an object; None for another file."""
    found = _OBJECT.fullmatch(name)
    return None if found is None else int(found[1])


def head_key(number: int) -> str:
    """Returns the name of a head."""
    return f"{HEADS}/{number:012d}.json"


def head_numbers(objects: ObjectStore) -> list[int]:
    """Returns the numbers of the heads that are there, ascending."""
    found = map(_HEAD.fullmatch, objects.sizes(HEADS))
    return sorted(int(one[1]) for one in found if one is not None)


def newest_head(objects: ObjectStore) -> Head | None:
    """Returns the current head; None where nothing is published.

    Raises:
        DataError: it is damaged, or a newer version wrote it.
        StorageError: the store cannot be reached.
    """
    while numbers := head_numbers(objects):
        try:
            return read_head(objects, numbers[-1])
        except ObjectMissing:
            continue  # a later one was published since the listing, and this one deleted
    return None


def read_head(objects: ObjectStore, number: int) -> Head:
    """Returns a head.

    Raises:
        ObjectMissing: there is none of this number.
        DataError: it is damaged, or a newer version wrote it.
    """
    name = head_key(number)
    head = _parsed(objects, name, objects.get(name), Head)
    _check(head.number == number and is_time(head.current_at), objects, name)
    _check(_SHA256.fullmatch(head.manifest.sha256) is not None, objects, name)
    return head


def read_manifest(objects: ObjectStore, head: Head) -> Manifest:
    """Returns the manifest of a head.

    Raises:
        ObjectMissing: it was deleted, since a later state is published.
        DataError: it is damaged, or a newer version wrote it.
    """
    key = head.manifest.key
    data = objects.get(key)
    _check(hashlib.sha256(data).hexdigest() == head.manifest.sha256, objects, key)
    manifest = _parsed(objects, key, data, Manifest)
    stored = (*manifest.database, *manifest.files.values())
    _check(all(_SHA256.fullmatch(one.sha256) for one in stored), objects, key)
    _check(all(map(_FILE.fullmatch, manifest.files)), objects, key)
    _check(all(one.bytes == CHUNK_BYTES for one in manifest.database[:-1]), objects, key)
    same = (manifest.gallery, manifest.folder_id, manifest.revision, manifest.faces)
    _check(same == (head.gallery, head.folder_id, head.revision, head.faces), objects, key)
    return manifest


def read_confirmations(objects: ObjectStore) -> list[Confirmation]:
    """Returns what the followers say of themselves, by name.

    Raises:
        DataError: one is damaged, or a newer version wrote it.
    """
    found = []
    for name in sorted(objects.sizes(FOLLOWERS)):
        try:
            confirmation = _parsed(objects, name, objects.get(name), Confirmation)
        except ObjectMissing:
            continue  # it was deleted since the listing
        _check(name == follower_key(confirmation.name) and is_time(confirmation.at), objects, name)
        found.append(confirmation)
    return found


def is_follower_name(name: str) -> bool:
    """Returns whether a follower may have this name."""
    return _FOLLOWER.fullmatch(name) is not None


def follower_key(name: str) -> str:
    """Returns the name of the object in which a follower confirms."""
    return f"{FOLLOWERS}/{name}.json"


def to_json(value: "Head | Manifest | Confirmation") -> bytes:
    """Returns a head, a manifest or a confirmation as JSON."""
    return json.dumps(asdict(value), separators=(",", ":")).encode() + b"\n"


def is_time(text: str) -> bool:
    """Returns whether a text is a time in ISO 8601 with a time zone."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def seconds_since(text: str) -> float:
    """Returns the seconds since a time in ISO 8601; 0 for one that this machine's clock has not reached."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds())


@dataclass(frozen=True)
class _FormatOnly:
    """The field that any version of a document has: a newer one is recognized by it alone."""

    format: int


def _parsed(objects: ObjectStore, name: str, data: bytes, kind: type[_T]) -> _T:
    """Returns a document of a class, from the JSON of an object.

    Raises:
        DataError: it is damaged, or a newer version wrote it.
    """
    at = f"{objects.address}/{name}"
    _check(len(data) <= _MAX_MANIFEST_BYTES, objects, name)
    if parse_manifest(data, _FormatOnly, name=at, error=DataError, advice=_ADVICE).format > _FORMAT:
        raise DataError(f"{at} was written by a newer version of faceprint; upgrade faceprint.")
    return parse_manifest(data, kind, name=at, error=DataError, advice=_ADVICE)


def _check(is_sound: bool, objects: ObjectStore, name: str) -> None:
    """Raises a DataError about an object if a check of it failed."""
    if not is_sound:
        raise DataError(f"{objects.address}/{name} is not what was published; {_ADVICE}.")
