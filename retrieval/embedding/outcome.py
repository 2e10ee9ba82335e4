"""Outcomes: the result for each photo offered to a gallery, which its content decides, never its path.

The same bytes under a new path add that path to their face. Other bytes under a known path remove the path
from the face that had it. The same bytes under two identities are a conflict: the photo is rejected, and
the identity changes only on request.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

from retrieval.database.metadata import Metadata, encoded, filled
from retrieval.database.records import Face, NewFace
from retrieval.errors import InputError, Reason
from retrieval.system.files import Stamp

_T = TypeVar("_T")
_U = TypeVar("_U")


class Status(StrEnum):
    """The status of a photo that was offered to a gallery, or embedded without one."""

    EMBEDDED = "embedded"
    ENROLLED = "enrolled"
    KNOWN = "already-known"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one photo.

    Attributes:
        path: its file; None for bytes, images and arrays.
        identity: the identity that the photo was offered under.
        status: what was done with it.
        face_id: of the face that was enrolled, or that has the same bytes.
        reason: the stable code, for a rejected photo.
        detail: a short explanation for people.
        replaced: the id of the face that had this path before the bytes of the file changed.
    """

    path: str | None
    identity: str | None
    status: Status
    face_id: int | None = None
    reason: Reason | None = None
    detail: str | None = None
    replaced: int | None = None


def in_their_places(entries: Iterable[_T | Outcome], found: Iterable[_U]) -> list[_U | Outcome]:
    """Returns `entries` with each element that is no Outcome replaced by the next element of `found`."""
    following = iter(found)
    return [entry if isinstance(entry, Outcome) else next(following) for entry in entries]


class Deduplicator:
    """Decides the outcomes of a batch of photos, in order, and collects the changes to be stored.

    Attributes:
        new: the row in the batch and the face of each face to be stored; ids are consecutive from `first_id`.
        names: the new identity of stored faces, by face id; None for no identity.
        metadata: the new metadata of stored faces, by face id.
        paths: the face id of each path that is new or has moved to another face.
        stamps: the stamps of files when they were read, by path; without those that are None or stored.
        orphaned: ids of faces that lost a path; those without any path are to be removed, unless contested.
        contested: ids of faces that were offered under another identity, or that have their bytes at another
            known path, which the run may reach later.
    """

    def __init__(
        self,
        stored: Mapping[str, Face],
        owners: Mapping[str, int],
        *,
        first_id: int,
        stamps: Mapping[str, Stamp | None] = MappingProxyType({}),
        contested: Set[int] = frozenset(),
        follow: Callable[[Iterable[str]], Iterable[int]] = lambda paths: (),
    ) -> None:
        """Takes the stored state that concerns the batch.

        Args:
            stored: faces by SHA-256.
            owners: the face id of each path.
            first_id: the id of the next new face.
            stamps: the stored stamp of each path that has one.
            contested: ids of faces that earlier batches of the same run found contested.
            follow: returns the ids of the faces that have their bytes at the given known paths now, of those
                that have theirs at the paths of these faces, and so on.
        """
        self.new: list[tuple[int, NewFace]] = []
        self.names: dict[int, str | None] = {}
        self.metadata: dict[int, Metadata] = {}
        self.paths: dict[str, int] = {}
        self.stamps: dict[str, Stamp] = {}
        self.orphaned: set[int] = set()
        self.contested = set(contested)
        self._follow = follow
        self._stored = dict(stored)
        self._owners = dict(owners)
        self._stamps = dict(stamps)
        self._first_id = first_id
        self._paths = {face.id: set(face.paths) for face in stored.values()}

    @property
    def changes_nothing(self) -> bool:
        """Whether nothing is to be stored except stamps."""
        return not (self.new or self.names or self.paths or self.metadata)

    def decide(self, row: int, face: NewFace, *, has_vector: bool) -> Outcome | None:
        """Decides the outcome of one photo; None where it is to be enrolled but has no vector."""
        stored = self._stored.get(face.sha256)
        if stored is None:
            return self._enroll(row, face) if has_vector else None
        lost = stored.id in self.orphaned and stored.id not in self.contested
        if lost and not self._paths[stored.id]:
            return self._enroll_again(face, stored)
        renamed = face.identity is not None and face.identity != stored.identity
        if renamed and stored.identity is not None:
            self.contested.add(stored.id)
            return _conflict(face, stored)
        try:
            merged = self._merged_metadata(face)
        except InputError as error:
            return _rejected(face, stored, Reason.BAD_METADATA, error.words)
        named = None
        if renamed:
            self.names[stored.id] = face.identity
            self._stored[face.sha256] = dataclasses.replace(stored, identity=face.identity)
            named = f"had no identity until now; it is {face.identity}'s"
        if merged is not None:
            self.metadata[stored.id] = merged
            self._stored[face.sha256] = dataclasses.replace(self._stored[face.sha256], metadata=merged)
        if face.path is not None and self._owners.get(face.path) == stored.id:
            if face.stamp is not None and face.stamp != self._stamps.get(face.path):
                self.stamps[face.path] = self._stamps[face.path] = face.stamp
            return Outcome(face.path, face.identity, Status.KNOWN, stored.id, detail=named)
        original = stored.path or f"face {stored.id}"
        detail = f"the same bytes as {original}" + (f", which {named}" if named else "")
        replaced = self._assign_path(face, stored.id)
        return Outcome(
            face.path, face.identity, Status.DUPLICATE, stored.id, detail=detail, replaced=replaced
        )

    def _enroll(self, row: int, face: NewFace) -> Outcome:
        number = self._first_id + len(self.new)
        self.new.append((row, face))
        paths = () if face.path is None else (face.path,)
        self._stored[face.sha256] = Face(number, face.identity, paths, face.sha256, "", face.metadata)
        replaced = self._assign_path(face, number)
        return Outcome(face.path, face.identity, Status.ENROLLED, number, replaced=replaced)

    def _enroll_again(self, face: NewFace, stored: Face) -> Outcome:
        """Keeps a face that lost its last path in this batch, and reports its bytes as enrolled.

        The face gets the photo's identity and metadata, as if it had been removed before.
        """
        self.orphaned.discard(stored.id)
        if face.identity != stored.identity:
            self.names[stored.id] = face.identity
        if face.metadata != stored.metadata:
            self.metadata[stored.id] = face.metadata
        self._stored[face.sha256] = dataclasses.replace(
            stored, identity=face.identity, metadata=face.metadata
        )
        replaced = self._assign_path(face, stored.id)
        return Outcome(face.path, face.identity, Status.ENROLLED, stored.id, replaced=replaced)

    def _merged_metadata(self, face: NewFace) -> Metadata | None:
        """Returns a stored face's metadata with the photo's keys that it lacks; None where it lacks none.

        Raises:
            InputError: the result is too large.
        """
        stored = self._stored[face.sha256]
        if not face.metadata.keys() - stored.metadata.keys():
            return None
        merged = filled(stored.metadata, face.metadata)
        encoded(merged, stored.path or f"face {stored.id}")
        return merged

    def _assign_path(self, face: NewFace, number: int) -> int | None:
        """Gives a photo's path to a face; returns the id of the face that had it before, or None."""
        path = face.path
        if path is None:
            return None
        self.stamps.pop(path, None)
        if face.stamp is not None:
            self.stamps[path] = face.stamp
        self._stamps[path] = face.stamp
        before = self._owners.get(path)
        if before is not None:
            self.orphaned.add(before)
            self._paths.setdefault(before, set()).discard(path)
            # Renames may form a cycle: a to b, b to c, c to a. Then the bytes of the face that loses this
            # path are at a path of the face that gets it, or of one reached from there.
            left = self._paths.get(number, set()) - {path}
            if left and before not in self.contested:
                self.contested.update(self._follow(sorted(left)))
        self._owners[path] = self.paths[path] = number
        self._paths.setdefault(number, set()).add(path)
        return before


def _conflict(face: NewFace, stored: Face) -> Outcome:
    detail = f"the same bytes are enrolled as {stored.identity}"
    if stored.path is not None:
        detail += f" from {stored.path}"
    detail += "; if this name is right, `relabel` moves them to it"
    return _rejected(face, stored, Reason.IDENTITY_CONFLICT, detail)


def _rejected(face: NewFace, stored: Face, reason: Reason, detail: str) -> Outcome:
    return Outcome(face.path, face.identity, Status.REJECTED, stored.id, reason, detail)
