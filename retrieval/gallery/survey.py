"""A survey of sources: where on disk the bytes of stored faces are now."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeVar

from retrieval.database.records import KnownFile
from retrieval.database.store import Store
from retrieval.errors import Reason, UnreadableImage
from retrieval.images.pixels import content_sha256
from retrieval.sources import archives, photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.folders import walk
from retrieval.sources.photos import Photo
from retrieval.system import archive_paths
from retrieval.system.files import Stamp
from retrieval.system.paths import is_below, is_utf8_name, readable

_T = TypeVar("_T")

# Photos that are looked up together.
_CHUNK: Final = 512


@dataclass(frozen=True, slots=True)
class Seen:
    """What lies at a path: the SHA-256 of its bytes in hex, whom the source names, the stamp of the file."""

    sha256: str
    identity: str | None
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Survey:
    """What the disk says of known paths and stored bytes.

    Attributes:
        gone: known paths whose files do not exist.
        seen: what was read, by path: files at known paths that changed, and stored bytes at other paths.
        agreed: faces that a source offers under the name that they have.
        rejected: where bytes that were looked for lie, by SHA-256, of photos that cannot be enrolled there (a
            name that is not UTF-8, a name of a person that cannot be stored, a folder that is taken for a
            model, a gallery or a backup).
        unseen: places that could not be looked at, and why; any bytes that were not seen may be there.
        passed_over: known paths of which the sources say nothing, by the rule that passes over each.
    """

    gone: frozenset[str] = frozenset()
    seen: Mapping[str, Seen] = field(default_factory=dict)
    agreed: frozenset[int] = frozenset()
    rejected: Mapping[str, str] = field(default_factory=dict)
    unseen: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)


# Reasons of rejected photos that could not be read: their bytes may be any.
_UNSEEN: Final = frozenset(
    {
        *(reason for reason in Reason if reason.may_pass_when_retried),
        Reason.DAMAGED,  # an archive
        Reason.UNSUPPORTED_FORMAT,  # a member of one that is encrypted
    }
)


@dataclass(frozen=True)
class _Lost:
    """Faces all of whose known files are gone or have changed, and the known paths in question.

    Attributes:
        gone, changed: known paths below the roots.
        barred: those that cannot be looked at; their faces are not lost.
        faces: SHA-256 of each face by its id.
        sizes: of their files in bytes; None where one of them is not known, so any file may be theirs.
    """

    gone: frozenset[str]
    changed: frozenset[str]
    barred: frozenset[str]
    faces: Mapping[int, str]
    sizes: frozenset[int] | None


@dataclass(frozen=True)
class _Sightings:
    """What a survey comes upon, as in `Survey`."""

    seen: dict[str, Seen] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)

    def read(self, photo: Photo) -> Seen | None:
        """What lies at a photo's path; None for one that cannot be read, which is noted if it may be any."""
        try:
            return _read(photo)
        except UnreadableImage as error:
            if error.reason in _UNSEEN:
                self.unseen[readable(photo.path or "")] = error.detail
            return None

    def reject(self, photo: Photo, lost: _Lost) -> None:
        """Notes where a photo's bytes are, which cannot be enrolled there."""
        path = photo.path or ""
        if photo.problem in _UNSEEN:
            self.unseen[readable(path)] = photo.why or str(photo.problem)
        elif _may_be(photo, lost) and (found := self.read(photo)) is not None:
            self.rejected.setdefault(found.sha256, readable(path))


def moved_files(
    store: Store,
    roots: Sequence[str],
    offered: Iterable[Photo],
    *,
    passed_over: PassedOver,
    gone: Sequence[str] = (),
) -> Survey:
    """Looks for the bytes of faces whose every known file is gone or has changed.

    Files are read only if they may hold such bytes: by their size, and where a known file has another stamp.
    Members of archives are looked for by their names; one that is there counts as unchanged. Folders that the
    scan took for models, galleries or backups are looked through as well: a stray file may hide photos.

    Args:
        store: the gallery's tables.
        roots: absolute paths; only known paths below them can be gone.
        offered: the photos of the sources; not read where nothing is lost.
        passed_over: what the scan that gives `offered` adds to.
        gone: those of the roots that are said to be gone; no rule passes over what is below them.
    """
    lost = _lost_faces(store, roots)
    if not lost.faces:
        return Survey(lost.gone)
    digests = set(lost.faces.values())
    found = _Sightings()
    for photo, known in _with_known(store, _usable(offered, lost, found)):
        path = photo.path
        assert path is not None  # `_with_known` gives no others
        changed = path in lost.changed
        # One that is listed and yet gone is a link that leads nowhere, perhaps to a disk that is not mounted.
        if known is not None and not changed and not (path in lost.gone or path in lost.barred):
            continue
        if not (changed and known is not None and known.face_id in lost.faces) and not _may_be(photo, lost):
            continue
        one = found.read(photo)
        if one is not None and (changed or one.sha256 in digests):
            found.seen[path] = one
    for photo in _hidden(passed_over.ours):
        found.reject(photo, lost)
    rules = {path: passed_over.rule_of(path) for path in lost.gone if not is_below(path, gone)}
    return Survey(
        lost.gone - found.seen.keys(),
        found.seen,
        rejected=found.rejected,
        unseen=found.unseen,
        passed_over={path: rule for path, rule in rules.items() if rule is not None},
    )


def other_names(store: Store, offered: Iterable[Photo]) -> Survey:
    """Looks for stored bytes that a source offers under another name than is stored, or under the same."""
    seen: dict[str, Seen] = {}
    agreed: set[int] = set()
    for chunk in _chunks(_with_known(store, filter(_is_usable, offered))):
        read = [_known_or_read(photo, known) for photo, known in chunk]
        with store.read() as reader:
            faces = reader.faces_by_sha256({one.sha256 for one in read if one is not None})
            known_faces = reader.faces({known.face_id for _, known in chunk if known is not None})
            names = {one.identity for one in read if one is not None} | {p.identity for p, _ in chunk}
            today = reader.current_names({name for name in names if name is not None})
        for (photo, known), one in zip(chunk, read, strict=True):
            face = faces.get(one.sha256) if one is not None else None
            if one is None and known is not None:
                face = known_faces.get(known.face_id)
            said = today.get(photo.identity or "", photo.identity)
            if face is None or said is None or face.identity is None or photo.path is None:
                continue
            if said == face.identity:
                agreed.add(face.id)
            else:
                seen[photo.path] = Seen(face.sha256, photo.identity, None if one is None else one.stamp)
    return Survey(seen=seen, agreed=frozenset(agreed))


def _lost_faces(store: Store, roots: Sequence[str]) -> _Lost:
    paths: dict[str, set[str]] = {"gone": set(), "changed": set(), "barred": set()}
    faces: set[int] = set()
    alive: set[int] = set()
    with archives.Shelf() as shelf, store.read() as reader:
        for path, number, stamp in reader.all_files():
            state = _state(path, stamp, shelf) if is_below(path, roots) else "same"
            if state != "same":
                paths[state].add(path)
            (alive if state in ("same", "barred") else faces).add(number)
        found = reader.faces(faces - alive)
        sizes: dict[int, int | None] = dict.fromkeys(found)
        known = reader.known_files(path for face in found.values() for path in face.paths)
        for file in known.values():
            if file.stamp is not None:
                sizes[file.face_id] = file.stamp.size
    every = frozenset(size for size in sizes.values() if size is not None)
    digests = {number: face.sha256 for number, face in found.items()}
    gone, changed, barred = map(frozenset, paths.values())
    return _Lost(gone, changed, barred, digests, None if None in sizes.values() else every)


def _state(path: str, stamp: Stamp | None, shelf: archives.Shelf) -> str:
    """Whether a known file is "gone", the "same", "changed" or "barred", as far as can be told unread."""
    if not is_utf8_name(path):
        return "same"  # the locale would look for another name
    try:
        status = os.stat(path)
    except NotADirectoryError:
        member = archive_paths.split(path)
        return "gone" if member is None or not shelf.has(*member) else "same"
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "barred"  # nothing shows that it is gone
    return "same" if _is_unchanged(status, stamp) else "changed"


def _is_unchanged(status: os.stat_result, stamp: Stamp | None) -> bool:
    return stamp is not None and Stamp.of(status) == stamp and stat.S_ISREG(status.st_mode)


def _is_usable(photo: Photo) -> bool:
    return photo.problem is None and photo.path is not None and is_utf8_name(photo.path)


def _usable(offered: Iterable[Photo], lost: _Lost, found: _Sightings) -> Iterator[Photo]:
    """Photos that may be enrolled; of the others, it is noted where the bytes that are looked for lie."""
    for photo in offered:
        if _is_usable(photo):
            yield photo
        elif photo.path is not None:
            found.reject(photo, lost)


def _hidden(ours: Iterable[str]) -> Iterator[Photo]:
    """The files in folders that were taken for models, galleries or backups."""
    for folder in ours:
        for file in walk(folder, ours_too=True):
            yield Photo(os.fspath(file.path), None, file.problem)


def _with_known(store: Store, offered: Iterable[Photo]) -> Iterator[tuple[Photo, KnownFile | None]]:
    """Photos with what is known of their paths."""
    for chunk in _chunks(offered):
        with store.read() as reader:
            known = reader.known_files({one.path for one in chunk if one.path is not None})
        for one in chunk:
            yield one, known.get(one.path or "")


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _may_be(photo: Photo, lost: _Lost) -> bool:
    """Whether a photo has as many bytes as one that is looked for, or its size is unknown."""
    if lost.sizes is None:
        return True
    if isinstance(photo.content, bytes):
        return len(photo.content) in lost.sizes
    try:
        return os.stat(photo.path or "").st_size in lost.sizes
    except (OSError, ValueError):
        return True  # whoever reads it says why


def _known_or_read(photo: Photo, known: KnownFile | None) -> Seen | None:
    """What lies at a path; None for a file that is what it was, and for one that cannot be read."""
    if known is not None and photo.content is None:
        try:
            if _is_unchanged(os.stat(photo.path or ""), known.stamp):
                return None
        except OSError:
            return None
    try:
        return _read(photo)
    except UnreadableImage:
        return None  # whoever enrolls it says why


def _read(photo: Photo) -> Seen:
    """What lies at a photo's path.

    Raises:
        UnreadableImage: it cannot be read.
    """
    if isinstance(photo.content, bytes):
        return Seen(content_sha256(photo.content), photo.identity)
    content, stamp = photos.read_stamped(photo.path or "")
    return Seen(content_sha256(content), photo.identity, stamp)
