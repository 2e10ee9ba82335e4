"""Photos of all kinds of sources as one stream, always in the same order: the input of every bulk run."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, Required, TypeAlias, TypedDict, cast

import numpy as np
from PIL import Image

from retrieval.database import identity_names
from retrieval.errors import DataError, InputError, Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.pixels import MAX_BYTES, ImageSource
from retrieval.sources import archives, folders, lists, remote, webdataset
from retrieval.sources.exclusion import Exclusion, PassedOver
from retrieval.sources.identity_rules import KEYWORDS, Naming, inside
from retrieval.system import archive_paths
from retrieval.system.files import Stamp, open_file_or_pipe, why
from retrieval.system.manifests import parse_tree
from retrieval.system.paths import absolute, composed, is_url, is_utf8, is_utf8_name, names_are_utf8

STANDARD_INPUT: Final = "-"

_PROBLEM_DETAILS: Final = {
    Reason.NAME_NOT_UTF8: "its name is not UTF-8; rename it",
    Reason.NO_PERMISSION: "its permissions do not allow listing it",
    Reason.IO_ERROR: "the folder cannot be listed",
    Reason.LINK_LOOP: "it links back to a folder above it",
    Reason.BAD_IDENTITY: "the name of its person has a control character, "
    f"more than {identity_names.MAX_BYTES:,} bytes, or nothing but spaces",
}


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo of a source: its path, its identity and, where it cannot be read, the reason.

    Attributes:
        path: absolute, as given (symbolic links are not resolved); for a member of an archive, the archive's
            path followed by the member's path in it; an address (URL) unchanged; None for a picture without
            a file.
        identity: the name of the person, in Unicode's composed form (NFC); None when the source gives none.
        problem: why the photo cannot be read, where this is known without trying.
        metadata: a JSON object.
        content: the picture, where the source has it already; None where it is read from `path` later.
        detail: an explanation of `problem` for people.
    """

    path: str | None
    identity: str | None
    problem: Reason | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    content: ImageSource | None = field(default=None, hash=False)
    detail: str | None = None

    @property
    def held(self) -> int:
        """Bytes of memory that `content` takes; 0 where the picture is not in memory."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if isinstance(self.content, np.ndarray):
            return self.content.nbytes
        if isinstance(self.content, Image.Image):
            return 4 * self.content.width * self.content.height
        return 0

    @property
    def why(self) -> str | None:
        """An explanation of `problem` for people; None where there is no problem, or none is known."""
        if self.problem is Reason.NAME_NOT_UTF8 and not names_are_utf8():
            encoding = sys.getfilesystemencoding()
            return f"names of files are read as {encoding} here; start Python with -X utf8 or PYTHONUTF8=1"
        return self.detail or _PROBLEM_DETAILS.get(self.problem) if self.problem else None


_FIRST_FOLDER: Final = Naming(keyword="first")
_PARENT_FOLDER: Final = Naming(keyword="parent")

# Reasons that apply to an archive as a whole. A zip found in a folder is only a file that is not an image.
_ARCHIVE_REASONS: Final = (Reason.DAMAGED, Reason.NO_PERMISSION, Reason.IO_ERROR, Reason.UNREACHABLE)

Offered: TypeAlias = Photo | str | os.PathLike[str] | tuple[ImageSource, str | None]

_IdentityOf: TypeAlias = Callable[[str], str | None]
_Photos: TypeAlias = Callable[[], Iterator[Photo]]


@dataclass(frozen=True, slots=True)
class _ScanOptions:
    """The options of a scan: see `scan`."""

    naming: Naming | None
    exclusion: Exclusion
    passed_over: PassedOver | None

    def walked(self, path: str) -> "_ScanOptions":
        """Returns these options, after noting in `passed_over` what is passed over in a source."""
        if self.passed_over is not None:
            self.passed_over.walked[path] = self.exclusion
        return self


def scan(
    sources: Iterable[str | os.PathLike[str]],
    *,
    identity_from: str | None = None,
    exclude: Iterable[str] = (),
    passed_over: PassedOver | None = None,
) -> Iterator[Photo]:
    """Returns every photo of some sources as a lazy stream, source by source.

    A source is
    - a folder: each of its subfolders is an identity, see `folders.walk`; patterns in its file
      .faceprintignore select further files that are passed over;
    - a list, by its suffix .txt, .csv or .parquet: see `lists.rows`;
    - an archive, by its suffix .tar (.tar.gz, .tgz, .tar.bz2, .tar.xz) or .zip: a member's identity is the
      first folder of its path, after an outer folder with the archive's own name; see `archives.members` for
      which members are read, `webdataset.samples` for label files beside a photo;
    - "-": paths on the standard input, see `lists.names`;
    - an address (URL) of a file or an archive, when fsspec is installed;
    - any other file, without an identity.

    An input that cannot be used is one Photo with a `problem`: a member that is a link, a row without a
    path, a damaged archive.

    Args:
        sources: as above.
        identity_from: where identities come from, where a list has no column `identity`: "first", the first
            folder of the path below the source (for lists, below the folder of the list); "parent", the
            folder that contains the photo; "none", nowhere; the name of a column of lists, which takes
            precedence over `identity`; or, where it has a parenthesis, a regular expression that is searched
            for in the path below the source: its group `identity`, or its first group, is the name. None
            means "first" for folders and archives (in archives after an outer folder with the archive's own
            name), "parent" for lists and standard input, and "none" for single files.
        exclude: patterns in the syntax of .gitignore, of files and folders that are passed over in folders
            and archives, in addition to system files and a folder's own .faceprintignore; see
            `exclusion.Pattern`. A source that is named itself (a file, a row of a list, an address) is taken.
        passed_over: counts the files and folders that are passed over.

    Raises:
        DataError: a source does not exist, a list cannot be read as a list, or a .faceprintignore cannot be
            read; raised before the first photo.
        MissingDependency: a source needs a package that is not installed; raised before the first photo. An
            address in a list raises it when it is reached.
        InputError: `identity_from` is not a valid pattern, or names a column and no source is a list with
            columns; `exclude` has an invalid pattern, or has patterns and no source is a folder or archive.
    """
    naming, sources = Naming.parse(identity_from), list(sources)
    if naming is not None and naming.column is not None and not any(map(lists.has_columns, sources)):
        raise InputError(
            f"An identity comes from {', '.join(KEYWORDS)}, from a column of a list (none of the sources has "
            f"columns, so not from {naming.column!a}), or from a pattern with a group in parentheses."
        )
    exclusion = Exclusion.of(exclude)
    if exclusion.patterns and not any(map(_is_walked, sources)):
        raise InputError("Patterns to exclude are about folders and archives; name one, or leave them out.")
    options = _ScanOptions(naming, exclusion, passed_over)
    found = [_open_source(source, options) for source in sources]
    return chain.from_iterable(photos() for photos in found)


def of(offered: Iterable[Offered]) -> Iterator[Photo]:
    """Returns the pictures of a program as photos, lazily and in their order.

    Args:
        offered: pairs of a picture (the path or address of a file, bytes, a PIL image or a uint8 array) and
            an identity or None; paths of single files without an identity; or Photos, which are unchanged.

    Raises:
        InputError: an element has another type.
    """
    for one in offered:
        if isinstance(one, Photo):
            yield one
            continue
        is_pair = isinstance(one, tuple) and len(one) == 2
        picture, identity = cast("tuple[ImageSource, str | None]", one if is_pair else (one, None))
        if isinstance(picture, str | os.PathLike):
            yield _file(absolute(picture), identity)
        elif is_pair and isinstance(picture, bytes | Image.Image | np.ndarray):
            yield Photo(None, identity, content=picture)
        else:
            raise InputError(
                f"A value of the type {type(picture).__name__} was offered as a photo; offer pairs of a "
                "path, bytes, a PIL image or a uint8 array and an identity, or Photos."
            )


def from_report(path: str | os.PathLike[str]) -> list[Photo]:
    """Returns the rejected photos of a report that `faceprint ingest --report` wrote, in its order.

    A photo keeps its problem where the report lacks what a second try needs: the metadata of a list's row,
    the rest of a damaged archive.

    Raises:
        DataError: the file does not exist, cannot be read, or is not such a report.
    """
    not_a_report = f"{path} is not a report of rejected photos; pass what `faceprint ingest --report` wrote."
    try:
        with open_file_or_pipe(Path(path)) as file:
            texts = file.read().decode().splitlines()
    except OSError as error:
        raise DataError(f"The report {path} cannot be read: {why(error)}.") from error
    except ValueError as error:
        raise DataError(not_a_report) from error
    found = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        name, advice = f"{path}, line {number},", "pass what `faceprint ingest --report` wrote"
        line = parse_tree(text, _ReportLine, name=name, error=DataError, advice=advice)
        if line["status"] == "rejected" and line["path"] is not None:
            try:
                found.append(_photo_of_report(line))
            except (ValueError, KeyError) as error:  # an unknown reason, or a line without a reason
                raise DataError(not_a_report) from error
    return found


class _ReportLine(TypedDict, total=False):
    """The fields of a report's line that `from_report` reads."""

    status: Required[str]
    path: Required[str | None]
    identity: str | None
    reason: str | None
    detail: str | None


def count(sources: Iterable[str | os.PathLike[str]], *, exclude: Iterable[str] = ()) -> int | None:
    """Returns how many photos `scan` gives; None where counting needs to read an archive or standard input.

    Raises:
        DataError, MissingDependency: as `scan`.
    """
    sources = list(sources)
    found = scan(sources, exclude=exclude)
    if any(_is_stream(source) for source in sources):
        return None
    return sum(1 for _ in found)


def check_comparable(sources: Iterable[str | os.PathLike[str]]) -> None:
    """Checks that all sources show which of their photos are gone, as folders, files and archives do.

    Raises:
        InputError: a source is a list, standard input, an address or a pipe: a photo that it does not name
            may still exist.
    """
    for source in sources:
        if not _is_comparable(source):
            raise InputError(
                f"What is gone cannot be told from {os.fspath(source)}; "
                "for that, name folders and archives that lie on this machine."
            )


def _is_comparable(source: str | os.PathLike[str]) -> bool:
    path = absolute(source)
    if os.fspath(source) == STANDARD_INPUT or is_url(path):
        return False
    if os.path.isdir(path) or not os.path.exists(path):
        return True  # the source does not exist: reading it raises the error
    return not _is_list(path) and (archive_paths.kind(path) is None or os.path.isfile(path))


def read_content(path: str) -> bytes:
    """Returns the bytes of a file, of a member of an archive on disk, or of the file at an address.

    Raises:
        UnreadableImage: missing, no permission, not a file, empty, too many bytes, unreachable, an I/O error.
        MissingDependency: for an address, fsspec is not installed.
    """
    return read_stamped(path)[0]


def read_stamped(path: str) -> tuple[bytes, Stamp | None]:
    """Returns the bytes as `read_content` does, and the stamp that later shows whether the file is unchanged.

    The stamp is None for members of archives and for addresses; see `pixels.read_file`.
    """
    with archives.Shelf() as shelf:
        return read_from(shelf, path)


def read_from(shelf: archives.Shelf, path: str) -> tuple[bytes, Stamp | None]:
    """Returns what `read_stamped` does; a `shelf` shared by many calls keeps the last archive open."""
    if is_url(path):
        return remote.read(path, max_bytes=MAX_BYTES), None
    try:
        return pixels.read_file(path)
    except UnreadableImage as error:
        member = archive_paths.split(path) if error.reason is Reason.MISSING else None
        if member is None:
            raise
    return shelf.read(*member), None


def read_stored(shelf: archives.Shelf, path: str, fetching: remote.Fetching) -> bytes:
    """Returns the bytes at a path that a gallery stores; addresses are read only where `fetching` allows it.

    Raises:
        NotFetched, UnreadableImage, MissingDependency: as `Fetching.read` and `read_content`.
    """
    if is_url(path):
        return fetching.read(path, max_bytes=MAX_BYTES)
    return read_from(shelf, path)[0]


def _open_source(source: str | os.PathLike[str], options: _ScanOptions) -> _Photos:
    """Checks that a source exists and is usable; returns a function that starts the stream of its photos."""
    naming = options.naming
    column = None if naming is None else naming.column
    if column is not None:
        naming = None  # sources without columns use their default
        options = replace(options, naming=None)
    if os.fspath(source) == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("There is no standard input to read paths from; name a list of them.")
        return partial(_standard_input, _identity_below(os.getcwd(), naming or _PARENT_FOLDER))
    path = absolute(source)
    kind = archive_paths.kind(path)
    if is_url(path):
        _check_address(path)
        opened = partial(remote.opened, path)
        return partial(_archive, path, opened, options) if kind else _single_file(path, naming)
    # Path.exists raises for a name that is too long and for a folder without permission; this returns False.
    if not os.path.exists(path):
        raise DataError(f"There is no file or folder {path}; check the path.")
    if os.path.isdir(path):
        options = replace(options, exclusion=options.exclusion.with_file_of(path))
        return partial(_folder, path, options.walked(path))
    if _is_list(path):
        lists.check_list(Path(path), column)
        identity_of = _identity_below(os.path.dirname(path), naming or _PARENT_FOLDER)
        return partial(_list, path, identity_of, column)
    if (kind and os.path.isfile(path)) or (kind == "tar" and Path(path).is_fifo()):
        return partial(_archive, path, partial(archives.on_disk, path), options.walked(path))
    return _single_file(path, naming)


def _check_address(url: str) -> None:
    remote.check_address(url)
    if url.endswith("/"):
        raise DataError(f"{url} is no file; name the files in a list, a .txt with an address a line.")
    if _is_list(url):
        raise DataError(f"A list must be on this machine; download {url} and name the copy.")


def _is_list(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in lists.SUFFIXES


def _is_stream(source: str | os.PathLike[str]) -> bool:
    if os.fspath(source) == STANDARD_INPUT:
        return True
    return archive_paths.kind(source) is not None and not os.path.isdir(source)


def _identity_below(root: str, naming: Naming) -> _IdentityOf:
    return lambda place: naming.name(inside(place, root), place)


def _is_walked(source: str | os.PathLike[str]) -> bool:
    """Returns whether a source is a folder or an archive."""
    return archive_paths.kind(absolute(source)) is not None or os.path.isdir(absolute(source))


def _file(path: str, identity: str | None, metadata: Mapping[str, Any] | None = None) -> Photo:
    problem = None if is_utf8_name(path) else Reason.NAME_NOT_UTF8
    return Photo(path, identity, problem, metadata or {})


def _single_file(path: str, naming: Naming | None) -> _Photos:
    identity = None if naming is None else _identity_below(os.path.dirname(path), naming)(path)
    return lambda: iter([_file(path, identity)])


def _folder(path: str, options: _ScanOptions) -> Iterator[Photo]:
    identity_of = options.naming and _identity_below(path, options.naming)
    for file in folders.walk(path, exclusion=options.exclusion, passed_over=options.passed_over):
        place = os.fspath(file.path)
        yield Photo(place, identity_of(place) if identity_of else file.identity, file.problem)


def _standard_input(identity_of: _IdentityOf) -> Iterator[Photo]:
    return _listed(
        lists.ListRow(place, identity_of(place)) for place in map(absolute, lists.names(sys.stdin.buffer))
    )


def _list(path: str, identity_of: _IdentityOf, column: str | None) -> Iterator[Photo]:
    try:
        yield from _listed(lists.rows(Path(path), identity_of, column))
    except (InputError, OSError) as error:
        detail = error.words if isinstance(error, InputError) else str(error.strerror).lower()
        yield Photo(path, None, Reason.DAMAGED, detail=f"the list cannot be read on: {detail}")


def _listed(rows: Iterable[lists.ListRow]) -> Iterator[Photo]:
    for row in rows:
        if row.path is None or row.problem is not None:
            path = row.path if is_utf8(row.path or "") else None
            yield Photo(path, row.identity, row.problem, detail=row.detail)
        elif is_url(row.path) and (unknown := _unknown_address(row.path)):
            yield Photo(row.path, row.identity, Reason.UNSUPPORTED_FORMAT, detail=unknown)
        else:
            yield _with_checked_identity(_file(row.path, row.identity, row.metadata))


def _with_checked_identity(photo: Photo) -> Photo:
    """Returns a photo, with the problem `BAD_IDENTITY` where its identity cannot be stored."""
    if photo.problem is not None or photo.identity is None or identity_names.problem(photo.identity) is None:
        return photo
    return replace(photo, problem=Reason.BAD_IDENTITY, content=None)


def _unknown_address(url: str) -> str | None:
    try:
        remote.check_address(url)
    except DataError as error:
        return error.words
    return None


def _archive(path: str, opened: Callable[[], BinaryIO], options: _ScanOptions) -> Iterator[Photo]:
    identity_of = partial(_identity_of_member, naming=options.naming, own=composed(archive_paths.stem(path)))
    members = archives.members(path, opened, exclusion=options.exclusion, passed_over=options.passed_over)
    for sample in webdataset.samples(members, identity_of):
        member = sample.member
        place = f"{path}/{member.name}" if member.name else path
        if "\0" in place or not is_utf8_name(place):
            yield Photo(place, sample.identity, Reason.NAME_NOT_UTF8)
        else:
            yield _with_checked_identity(
                Photo(place, sample.identity, member.problem, sample.metadata, member.content, member.detail)
            )


def _identity_of_member(name: str, *, naming: Naming | None, own: str) -> str | None:
    """Returns the identity that a member's path gives, in an archive called `own` without its suffix."""
    if naming is None:
        folder, _, below = name.partition("/")
        return _FIRST_FOLDER.name(below if composed(folder) == own and below else name, name)
    return naming.name(name, name)


def _photo_of_report(line: dict[str, Any]) -> Photo:
    """Returns the photo of a report's rejected line; it has a problem where a second try cannot succeed."""
    path, identity = cast(str, line["path"]), cast("str | None", line["identity"])
    reason, detail = line["reason"], line.get("detail")
    if reason == Reason.NAME_NOT_UTF8:
        # The report holds an escaped form of a name that is not UTF-8, which is the path of no file.
        return Photo(path, identity, Reason.NAME_NOT_UTF8)
    if reason in (Reason.BAD_METADATA, Reason.BAD_ROW, Reason.BAD_IDENTITY):
        return Photo(path, identity, Reason(reason), detail=detail)
    if archive_paths.kind(path) and reason in _ARCHIVE_REASONS:
        again = f"{detail or reason}; name the archive itself as a source again"
        return Photo(path, identity, Reason(reason), detail=again)
    if _is_list(path) and reason == Reason.DAMAGED:
        return Photo(path, identity, Reason.DAMAGED, detail=detail)
    return Photo(path, identity)
