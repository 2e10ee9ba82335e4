"""The survey of sources, for `retrieval.gallery.moves`: where on disk the bytes of stored faces are now."""

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

# Photos for each snapshot in which known files are read.
_LOOKUP_BATCH: Final = 512


@dataclass(frozen=True, slots=True)
class Seen:
    """The content of a path: its SHA-256 in hex, the identity that the source names, the file's stamp."""

    sha256: str
    identity: str | None
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Survey:
    """The state of known paths and of stored bytes on disk.

    Attributes:
        gone: known paths that do not exist as files.
        seen: content by path: changed files at known paths, and stored bytes at other paths.
        agreed: ids of photos that a source offers under a stored identity of theirs.
        rejected: a path by SHA-256, for bytes that were searched for and that cannot be enrolled at that path
            (a path that is not UTF-8, an identity name that cannot be stored, a folder that is taken for a
            model, a gallery or a backup).
        unseen: reason by path, of places that could not be read; they may hold any bytes that were not seen.
        passed_over: known paths that the scan excluded, each with the rule that excluded it.
    """

    gone: frozenset[str] = frozenset()
    seen: Mapping[str, Seen] = field(default_factory=dict)
    agreed: frozenset[int] = frozenset()
    rejected: Mapping[str, str] = field(default_factory=dict)
    unseen: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)


# Reasons for rejecting a photo that mean that its bytes could not be read, so that they may be any.
_UNREADABLE_REASONS: Final = frozenset(
    {
        *(reason for reason in Reason if reason.may_pass_when_retried),
        Reason.DAMAGED,  # an archive
        Reason.UNSUPPORTED_FORMAT,  # a member of one that is encrypted
    }
)


@dataclass(frozen=True)
class _LostPhotos:
    """Photos without an unchanged file: each of their known files is gone or changed.

    Attributes:
        gone, changed: known paths below the roots.
        inaccessible: known paths that cannot be examined; their photos do not count as lost.
        photos: SHA-256 of each lost photo, by its id.
        sizes: file sizes of the lost photos in bytes; None if one size is unknown: any file may match.
    """

    gone: frozenset[str]
    changed: frozenset[str]
    inaccessible: frozenset[str]
    photos: Mapping[int, str]
    sizes: frozenset[int] | None


@dataclass(frozen=True)
class _Findings:
    """The findings of a survey while it runs; the attributes are those of `Survey`."""

    seen: dict[str, Seen] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)

    def read(self, photo: Photo) -> Seen | None:
        """Returns the content of a photo's path; None if it cannot be read.

        Adds the path to `unseen` if the photo may have any bytes.
        """
        try:
            return _read(photo)
        except UnreadableImage as error:
            if error.reason in _UNREADABLE_REASONS:
                self.unseen[readable(photo.path or "")] = error.detail
            return None

    def reject(self, photo: Photo, lost: _LostPhotos) -> None:
        """Records the path of a photo that cannot be enrolled there."""
        path = photo.path or ""
        if photo.problem in _UNREADABLE_REASONS:
            self.unseen[readable(path)] = photo.why or str(photo.problem)
        elif _may_be_lost_photo(photo, lost) and (found := self.read(photo)) is not None:
            self.rejected.setdefault(found.sha256, readable(path))


def moved_files(
    store: Store,
    roots: Sequence[str],
    offered: Iterable[Photo],
    *,
    passed_over: PassedOver,
    gone: Sequence[str] = (),
) -> Survey:
    """Searches the sources for the bytes of photos of which each known file is gone or changed.

    Only files that may hold such bytes are read: changed files of these photos, and files of a matching size.
    A known file with an unchanged stamp is not read. A known member of an archive counts as unchanged if the
    archive has a member of that name. Folders that the scan took for models, galleries or backups are
    searched too: a stray file may have caused that.

    Args:
        store: the gallery's tables.
        roots: absolute paths; only known paths below them can be gone.
        offered: the photos of the sources; not read if no photo is lost.
        passed_over: the object to which the scan that yields `offered` adds what it excludes.
        gone: the roots that the caller declares gone; no exclusion rule applies below them.
    """
    lost = _lost_photos(store, roots)
    if not lost.photos:
        return Survey(lost.gone)
    digests = set(lost.photos.values())
    found = _Findings()
    for photo, known in _with_known_files(store, _usable(offered, lost, found)):
        path = photo.path
        assert path is not None  # `_with_known_files` gives no others
        changed = path in lost.changed
        # A listed path that does not exist is a dangling link, perhaps to a disk that is not mounted.
        if known is not None and not changed and not (path in lost.gone or path in lost.inaccessible):
            continue
        if not (changed and known is not None and known.photo_id in lost.photos) and not _may_be_lost_photo(
            photo, lost
        ):
            continue
        one = found.read(photo)
        if one is not None and (changed or one.sha256 in digests):
            found.seen[path] = one
    for photo in _hidden_photos(passed_over.ours):
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
    """Searches the sources for stored bytes that have another identity there, or the stored one."""
    seen: dict[str, Seen] = {}
    agreed: set[int] = set()
    for chunk in _chunks(_with_known_files(store, filter(_is_usable, offered))):
        read = [_read_unless_unchanged(photo, known) for photo, known in chunk]
        with store.read() as reader:
            stored = reader.photos_by_sha256({one.sha256 for one in read if one is not None})
            known_photos = reader.photos({known.photo_id for _, known in chunk if known is not None})
            names = {one.identity for one in read if one is not None} | {p.identity for p, _ in chunk}
            current_names = reader.current_names({name for name in names if name is not None})
        for (photo, known), one in zip(chunk, read, strict=True):
            found = stored.get(one.sha256) if one is not None else None
            if one is None and known is not None:
                found = known_photos[known.photo_id]
            identity = current_names.get(photo.identity or "", photo.identity)
            if found is None or identity is None or found.identities == {None} or photo.path is None:
                continue
            if identity in found.identities:
                agreed.add(found.id)
            else:
                seen[photo.path] = Seen(found.sha256, photo.identity, None if one is None else one.stamp)
    return Survey(seen=seen, agreed=frozenset(agreed))


def _lost_photos(store: Store, roots: Sequence[str]) -> _LostPhotos:
    paths: dict[str, set[str]] = {"gone": set(), "changed": set(), "inaccessible": set()}
    absent: set[int] = set()
    present: set[int] = set()
    with archives.Shelf() as shelf, store.read() as reader:
        for path, number, stamp in reader.all_files():
            state = _state(path, stamp, shelf) if is_below(path, roots) else "same"
            if state != "same":
                paths[state].add(path)
            (present if state in ("same", "inaccessible") else absent).add(number)
        found = reader.photos(absent - present)
        sizes: dict[int, int | None] = dict.fromkeys(found)
        known = reader.known_files(path for photo in found.values() for path in photo.paths)
        for file in known.values():
            if file.stamp is not None:
                sizes[file.photo_id] = file.stamp.size
    every = frozenset(size for size in sizes.values() if size is not None)
    digests = {number: photo.sha256 for number, photo in found.items()}
    gone, changed, inaccessible = map(frozenset, paths.values())
    return _LostPhotos(gone, changed, inaccessible, digests, None if None in sizes.values() else every)


def _state(path: str, stamp: Stamp | None, shelf: archives.Shelf) -> str:
    """Returns the state of a known file, without reading it: "gone", "same", "changed" or "inaccessible"."""
    if not is_utf8_name(path):
        return "same"  # under this locale, `os.stat` would look up another name
    try:
        status = os.stat(path)
    except NotADirectoryError:
        member = archive_paths.split(path)
        return "gone" if member is None or not shelf.has(*member) else "same"
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "inaccessible"  # no proof that it is gone
    return "same" if _is_unchanged(status, stamp) else "changed"


def _is_unchanged(status: os.stat_result, stamp: Stamp | None) -> bool:
    return stamp is not None and Stamp.of(status) == stamp and stat.S_ISREG(status.st_mode)


def _is_usable(photo: Photo) -> bool:
    return photo.problem is None and photo.path is not None and is_utf8_name(photo.path)


def _usable(offered: Iterable[Photo], lost: _LostPhotos, found: _Findings) -> Iterator[Photo]:
    """Yields the photos that can be enrolled; records the others in `found`."""
    for photo in offered:
        if _is_usable(photo):
            yield photo
        elif photo.path is not None:
            found.reject(photo, lost)


def _hidden_photos(ours: Iterable[str]) -> Iterator[Photo]:
    """Yields the files in folders that were taken for models, galleries or backups."""
    for folder in ours:
        for file in walk(folder, ours_too=True):
            yield Photo(os.fspath(file.path), None, file.problem)


def _with_known_files(store: Store, offered: Iterable[Photo]) -> Iterator[tuple[Photo, KnownFile | None]]:
    """Yields each photo with the known file at its path, or None."""
    for chunk in _chunks(offered):
        with store.read() as reader:
            known = reader.known_files({one.path for one in chunk if one.path is not None})
        for one in chunk:
            yield one, known.get(one.path or "")


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _LOOKUP_BATCH)):
        yield chunk


def _may_be_lost_photo(photo: Photo, lost: _LostPhotos) -> bool:
    """Returns whether a photo has the size of a lost one, or one of the sizes is unknown."""
    if lost.sizes is None:
        return True
    if isinstance(photo.content, bytes):
        return len(photo.content) in lost.sizes
    try:
        return os.stat(photo.path or "").st_size in lost.sizes
    except (OSError, ValueError):
        return True  # reading the file reports the error


def _read_unless_unchanged(photo: Photo, known: KnownFile | None) -> Seen | None:
    """Returns the content of a photo's path; None for an unchanged file and for one that cannot be read."""
    if known is not None and photo.content is None:
        try:
            if _is_unchanged(os.stat(photo.path or ""), known.stamp):
                return None
        except OSError:
            return None
    try:
        return _read(photo)
    except UnreadableImage:
        return None  # enrollment reports the error


def _read(photo: Photo) -> Seen:
    """Returns the content of a photo's path.

    Raises:
        UnreadableImage: it cannot be read.
    """
    if isinstance(photo.content, bytes):
        return Seen(content_sha256(photo.content), photo.identity)
    content, stamp = photos.read_stamped(photo.path or "")
    return Seen(content_sha256(content), photo.identity, stamp)
