"""Outcomes: the result for each photo offered to a gallery, which its content decides, never its path.

The same bytes under a new path add that path to their photo. Other bytes under a known path remove the path
from the photo that had it. The same face under two identities is a conflict: the photo is rejected, and the
identity changes only on request.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

from retrieval.database.metadata import Metadata, encoded, filled
from retrieval.database.records import Face, NewFace, StoredPhoto
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
        face_id: of the face that was enrolled, or that has the same bytes; of several, the first.
        reason: the stable code, for a rejected photo.
        detail: a short explanation for people.
        replaced: the id of the photo that had this path before the bytes of the file changed: that of its
            first face.
        further_ids: of the photo's other faces, ascending.
    """

    path: str | None
    identity: str | None
    status: Status
    face_id: int | None = None
    reason: Reason | None = None
    detail: str | None = None
    replaced: int | None = None
    further_ids: tuple[int, ...] = ()

    @property
    def face_ids(self) -> tuple[int, ...]:
        """Returns the ids of all faces, ascending; none for a photo that was not enrolled."""
        return () if self.face_id is None else (self.face_id, *self.further_ids)


def of_photo(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome of a photo from those of its faces, one or more: enrolled if any face was."""
    first = next((one for one in outcomes if one.status is Status.ENROLLED), outcomes[0])
    ids = sorted({number for one in outcomes if one.reason is None for number in one.face_ids})
    if len(ids) < 2:
        return first
    replaced = next((one.replaced for one in outcomes if one.replaced is not None), None)
    return dataclasses.replace(first, face_id=ids[0], further_ids=tuple(ids[1:]), replaced=replaced)


def in_their_places(entries: Iterable[_T | Outcome], found: Iterable[_U]) -> list[_U | Outcome]:
    """Returns `entries` with each element that is no Outcome replaced by the next element of `found`."""
    following = iter(found)
    return [entry if isinstance(entry, Outcome) else next(following) for entry in entries]


class Deduplicator:
    """Decides the outcomes of a batch of faces, in order, and collects the changes to be stored.

    Attributes:
        new: the row in the batch and the face of each face to be stored; ids are consecutive from `first_id`.
        photos: the photo id of each of these faces that is not the first of its photo, by face id.
        names: the new identity of stored faces, by face id; None for no identity.
        metadata: the new metadata of stored faces, by face id.
        paths: the photo id of each path that is new or has moved to another photo.
        stamps: the stamps of files when they were read, by path; without those that are None or stored.
        orphaned: ids of photos that lost a path; those without any path are to be removed, unless contested.
        contested: ids of photos that were offered under another identity, or that have their bytes at another
            known path, which the run may reach later.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredPhoto],
        owners: Mapping[str, int],
        *,
        first_id: int,
        stamps: Mapping[str, Stamp | None] = MappingProxyType({}),
        contested: Set[int] = frozenset(),
        follow: Callable[[Iterable[str]], Iterable[int]] = lambda paths: (),
    ) -> None:
        """Takes the stored state that concerns the batch.

        Args:
            stored: photos by SHA-256.
            owners: the photo id of each path.
            first_id: the id of the next new face.
            stamps: the stored stamp of each path that has one.
            contested: ids of photos that earlier batches of the same run found contested.
            follow: returns the ids of the photos that have their bytes at the given known paths now, of those
                that have theirs at the paths of these photos, and so on.
        """
        self.new: list[tuple[int, NewFace]] = []
        self.photos: dict[int, int] = {}
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
        self._offers: dict[int, int] = {}
        self._paths = {photo.id: set(photo.paths) for photo in stored.values()}

    @property
    def changes_nothing(self) -> bool:
        """Whether nothing is to be stored except stamps."""
        return not (self.new or self.names or self.paths or self.metadata)

    def decide(
        self, row: int, face: NewFace, *, has_vector: bool, offer: int | None = None
    ) -> Outcome | None:
        """Decides the outcome of one face; None where its photo is to be enrolled but has no vector.

        A face of a stored photo that is none of its faces is added, if it has a vector, no face of the photo
        was removed, and the photo was not read again for it. Otherwise, and without a region on one side, the
        face stands for all faces of its photo.

        Args:
            row: in the batch.
            face: with the current name of its identity.
            has_vector: whether the batch has a vector of it.
            offer: the same number for the faces of a photo that was read: they are enrolled together, or not
                at all where the photo is stored; None for a face with a vector of its own.
        """
        photo = self._stored.get(face.sha256)
        if photo is None:
            if not has_vector:
                return None
            if offer is not None:
                self._offers[self._first_id + len(self.new)] = offer
            return self._enroll(row, face, None)
        lost = photo.id in self.orphaned and photo.id not in self.contested
        same = _same_region(face, photo)
        if lost and not self._paths[photo.id] and (same or not has_vector):
            return self._enroll_again(face, photo)
        adds = not photo.closed and (offer is None or self._offers.get(photo.id) == offer)
        if not same and has_vector and adds:
            self.orphaned.discard(photo.id)
            return self._enroll(row, face, photo)
        return self._recognize(face, photo, same or photo.faces)

    def _recognize(self, face: NewFace, photo: StoredPhoto, same: Sequence[Face]) -> Outcome:
        """Decides the outcome of stored bytes; `same` are the faces of the photo that it is about."""
        named = None
        if face.identity is not None and all(one.identity != face.identity for one in same):
            if len(same) > 1 or same[0].identity is not None:
                self.contested.add(photo.id)
                return _several_faces(face, photo) if len(same) > 1 else _conflict(face, same[0])
            named = f"had no identity until now; it is {face.identity}'s"
        try:
            merged = {one.id: new for one in same if (new := _merged_metadata(one, face)) is not None}
        except InputError as error:
            return _rejected(face, same[0], Reason.BAD_METADATA, error.words)
        changed: dict[int, Face] = {}
        if named is not None:
            self.names[same[0].id] = face.identity
            changed[same[0].id] = dataclasses.replace(same[0], identity=face.identity)
        for one in same:
            if one.id in merged:
                changed[one.id] = dataclasses.replace(changed.get(one.id, one), metadata=merged[one.id])
        if changed:
            self.metadata |= merged
            self._change(photo, changed)
        number, *further = (one.id for one in same)
        if face.path is not None and self._owners.get(face.path) == photo.id:
            if face.stamp is not None and face.stamp != self._stamps.get(face.path):
                self.stamps[face.path] = self._stamps[face.path] = face.stamp
            return Outcome(
                face.path, face.identity, Status.KNOWN, number, detail=named, further_ids=tuple(further)
            )
        original = photo.path or f"face {number}"
        detail = f"the same bytes as {original}" + (f", which {named}" if named else "")
        return Outcome(
            face.path,
            face.identity,
            Status.DUPLICATE,
            number,
            detail=detail,
            replaced=self._assign_path(face, photo.id),
            further_ids=tuple(further),
        )

    def _change(self, photo: StoredPhoto, faces: Mapping[int, Face]) -> None:
        """Replaces faces of a photo, by id."""
        changed = tuple(faces.get(one.id, one) for one in photo.faces)
        self._stored[photo.sha256] = dataclasses.replace(photo, faces=changed)

    def _enroll(self, row: int, face: NewFace, photo: StoredPhoto | None) -> Outcome:
        """Enrolls a face; `photo` is the photo with its bytes, if there is one already."""
        number = self._first_id + len(self.new)
        self.new.append((row, face))
        paths = () if face.path is None else (face.path,)
        new = Face(number, face.identity, paths, face.sha256, "", face.metadata, region=face.region)
        if photo is None:
            photo = StoredPhoto(number, (new,))
        else:
            self.photos[number] = photo.id
            photo = dataclasses.replace(photo, faces=(*photo.faces, new))
        self._stored[face.sha256] = photo
        known = face.path is not None and self._owners.get(face.path) == photo.id
        replaced = None if known else self._assign_path(face, photo.id)
        return Outcome(face.path, face.identity, Status.ENROLLED, number, replaced=replaced)

    def _enroll_again(self, face: NewFace, photo: StoredPhoto) -> Outcome:
        """Keeps a photo that lost its last path in this batch, and reports its bytes as enrolled.

        Its faces get the identity and metadata of the new photo, as if it had been removed before. A name
        does not say which of several faces it is of: such a photo is rejected, and keeps its faces.
        """
        if face.identity is not None and len(photo.faces) > 1 and face.identity not in photo.identities:
            self.contested.add(photo.id)
            return _several_faces(face, photo)
        self.orphaned.discard(photo.id)
        changed: dict[int, Face] = {}
        for one in photo.faces:
            identity = one.identity if len(photo.faces) > 1 and face.identity else face.identity
            if identity != one.identity:
                self.names[one.id] = identity
            if face.metadata != one.metadata:
                self.metadata[one.id] = face.metadata
            changed[one.id] = dataclasses.replace(one, identity=identity, metadata=face.metadata)
        self._change(photo, changed)
        replaced = self._assign_path(face, photo.id)
        number, *further = photo.face_ids
        return Outcome(
            face.path,
            face.identity,
            Status.ENROLLED,
            number,
            replaced=replaced,
            further_ids=tuple(further),
        )

    def _assign_path(self, face: NewFace, number: int) -> int | None:
        """Gives a path to a photo; returns the id of the photo that had it before, or None."""
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
            # Renames may form a cycle: a to b, b to c, c to a. Then the bytes of the photo that loses this
            # path are at a path of the photo that gets it, or of one reached from there.
            left = self._paths.get(number, set()) - {path}
            if left and before not in self.contested:
                self.contested.update(self._follow(sorted(left)))
        self._owners[path] = self.paths[path] = number
        self._paths.setdefault(number, set()).add(path)
        return before


def _same_region(face: NewFace, photo: StoredPhoto) -> tuple[Face, ...]:
    """Returns the faces of a stored photo that a new face is: all, where the place of one is not known."""
    place = None if face.region is None else face.region.detected
    places = [None if one.region is None else one.region.detected for one in photo.faces]
    if place is None or None in places:
        return photo.faces
    # Another machine may find the same face some thousandths of a pixel away.
    return tuple(
        one
        for one, stored in zip(photo.faces, places, strict=True)
        if stored is not None and stored.is_same_as(place)
    )


def _merged_metadata(stored: Face, face: NewFace) -> Metadata | None:
    """Returns a stored face's metadata with the new keys that it lacks; None where it lacks none.

    Raises:
        InputError: the result is too large.
    """
    if not face.metadata.keys() - stored.metadata.keys():
        return None
    merged = filled(stored.metadata, face.metadata)
    encoded(merged, stored.path or f"face {stored.id}")
    return merged


def _conflict(face: NewFace, stored: Face) -> Outcome:
    detail = f"the same bytes are enrolled as {stored.identity}"
    if stored.path is not None:
        detail += f" from {stored.path}"
    detail += "; if this name is right, `relabel` moves them to it"
    return _rejected(face, stored, Reason.IDENTITY_CONFLICT, detail)


def _several_faces(face: NewFace, photo: StoredPhoto) -> Outcome:
    detail = f"the same bytes are enrolled with {len(photo.faces)} faces, and {face.identity} is none of them"
    return _rejected(face, photo.faces[0], Reason.SEVERAL_FACES, detail)


def _rejected(face: NewFace, stored: Face, reason: Reason, detail: str) -> Outcome:
    return Outcome(face.path, face.identity, Status.REJECTED, stored.id, reason, detail)
