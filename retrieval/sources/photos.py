"""Photos: all sources as one stream of photos, always in the same order."""

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
    """A photograph, where it is, and who is on it.

    Attributes:
        path: absolute, as given (symbolic links are not resolved); of a member of an archive, the archive's
            path and the member's below it; an address (URL) as it is; None for a picture without a name.
        identity: the name of the person, in Unicode's composed form (NFC), or None when nobody said.
        problem: why it cannot be read, known without trying.
        metadata: what is said about it, a JSON object.
        content: the picture, where it is here already; None where it is read from `path` later.
        detail: words for a person, beside `problem`.
    """

    path: str | None
    identity: str | None
    problem: Reason | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    content: ImageSource | None = field(default=None, hash=False)
    detail: str | None = None

    @property
    def held(self) -> int:
        """Bytes of memory that its content takes; 0 where it is not here."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if isinstance(self.content, np.ndarray):
            return self.content.nbytes
        if isinstance(self.content, Image.Image):
            return 4 * self.content.width * self.content.height
        return 0

    @property
    def why(self) -> str | None:
        """What is known about its problem, for a person."""
        if self.problem is Reason.NAME_NOT_UTF8 and not names_are_utf8():
            encoding = sys.getfilesystemencoding()
            return f"names of files are read as {encoding} here; start Python with -X utf8 or PYTHONUTF8=1"
        return self.detail or _PROBLEM_DETAILS.get(self.problem) if self.problem else None


_FIRST: Final = Naming(keyword="first")
_PARENT: Final = Naming(keyword="parent")

# What may be said of an archive as a whole; a zip that is found in a folder is just no image.
_ARCHIVE_REASONS: Final = (Reason.DAMAGED, Reason.NO_PERMISSION, Reason.IO_ERROR, Reason.UNREACHABLE)

Offered: TypeAlias = Photo | str | os.PathLike[str] | tuple[ImageSource, str | None]

_Whose: TypeAlias = Callable[[str], str | None]
_Photos: TypeAlias = Callable[[], Iterator[Photo]]


@dataclass(frozen=True, slots=True)
class _How:
    """How sources are read: see `scan`."""

    naming: Naming | None
    exclusion: Exclusion
    passed_over: PassedOver | None

    def walked(self, path: str) -> "_How":
        """The same, once it is noted what is passed over in a source."""
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
    """Every photo of some sources, one after the other, each as it is reached.

    A source is
    - a folder: each of its subfolders is an identity, see `folders.walk`; patterns in a file
      .faceprintignore right in it say what else is passed over;
    - a list, by its suffix .txt, .csv or .parquet: see `lists.rows`;
    - an archive, by its suffix .tar (.tar.gz, .tgz, .tar.bz2, .tar.xz) or .zip: a member's identity is the
      first folder of its path, one with the archive's own name passed over; see `archives.members` for what
      is read, `webdataset.samples` for what files beside a photo say;
    - "-": paths on the standard input, see `lists.names`;
    - an address (URL) of a file or an archive, when fsspec is installed;
    - any other file, whose identity is unknown.

    What cannot be used comes out as one Photo with its `problem`: a member that is a link, a row without a
    path, a damaged archive.

    Args:
        sources: as above.
        identity_from: what names the person on a photo, where a list has no column `identity`: "first", the
            first folder of the path below the source (for lists, below the folder of the list); "parent", the
            folder that the photo lies in; "none", nothing; the name of a column of lists, also where there is
            `identity`; or, where it has a parenthesis, a regular expression that is searched for in the path
            below the source, with the name in its group `identity` or its first one. None is "first" for
            folders and archives (in these a first folder of the archive's own name is passed over), "parent"
            for lists and standard input, and "none" for single files.
        exclude: patterns, as of .gitignore, of files and folders that are passed over in folders and
            archives, beside litter and what a folder's own .faceprintignore says; see `exclusion.Pattern`.
            What is named itself (a file, a row of a list, an address) is taken.
        passed_over: what was passed over is added to it.

    Raises:
        DataError: a source that does not exist, or a list that is none, or a .faceprintignore that cannot be
            read; raised before the first photo.
        MissingDependency: for a source that needs it; raised before the first photo. An address in a list
            raises it when it is reached.
        InputError: `identity_from` is no pattern, or a column and no source is a list with columns; a pattern
            to exclude that is none, or some and no source that they are about.
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
    how = _How(naming, exclusion, passed_over)
    found = [_source(source, how) for source in sources]
    return chain.from_iterable(photos() for photos in found)


def of(offered: Iterable[Offered]) -> Iterator[Photo]:
    """Pictures that a program has, as photos: lazily, in their order.

    Args:
        offered: pairs of a picture (the path or address of a file, bytes, a PIL image or a uint8 array) and
            an identity or None; paths of single files, whose identity is unknown; or Photos, as they are.

    Raises:
        InputError: one that is none of these.
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
    """The rejected photos of a report that `faceprint ingest --report` wrote, in its order.

    What a report cannot bring back keeps its problem: the metadata of a list's row, the rest of an archive.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    not_a_report = f"{path} is not a report of faceprint ingest; pass what --report wrote."
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
                found.append(_reported(line))
            except (ValueError, KeyError) as error:  # a reason that there is not, or a line without one
                raise DataError(not_a_report) from error
    return found


class _ReportLine(TypedDict, total=False):
    """A line of a report, as far as it is read."""

    status: Required[str]
    path: Required[str | None]
    identity: str | None
    reason: str | None
    detail: str | None


def count(sources: Iterable[str | os.PathLike[str]], *, exclude: Iterable[str] = ()) -> int | None:
    """How many photos `scan` will give; None where that takes reading an archive or standard input.

    Raises:
        DataError, MissingDependency: as `scan`.
    """
    sources = list(sources)
    found = scan(sources, exclude=exclude)
    if any(_is_stream(source) for source in sources):
        return None
    return sum(1 for _ in found)


def check_comparable(sources: Iterable[str | os.PathLike[str]]) -> None:
    """Checks that sources show which of their photos are gone, as folders, files and archives do.

    Raises:
        InputError: a list, standard input, an address or a pipe: what they do not name may still be there.
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
        return True  # nothing is there: whoever reads it says so
    return not _is_list(path) and (archive_paths.kind(path) is None or os.path.isfile(path))


def read_content(path: str) -> bytes:
    """The bytes of a file, of a member of an archive on disk, or of what is at an address.

    Raises:
        UnreadableImage: missing, no permission, not a file, empty, too many bytes, unreachable, an I/O error.
        MissingDependency: for an address, fsspec is not installed.
    """
    return read_stamped(path)[0]


def read_stamped(path: str) -> tuple[bytes, Stamp | None]:
    """As `read_content`, with the stamp by which a file can be known as unchanged later.

    What is no file of its own has none; see `pixels.read_file`.
    """
    with archives.Shelf() as shelf:
        return read_from(shelf, path)


def read_from(shelf: archives.Shelf, path: str) -> tuple[bytes, Stamp | None]:
    """As `read_stamped`; a shelf that many calls share opens each archive once."""
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
    """The bytes at a path that a gallery stores; of an address only where fetching it is allowed.

    Raises:
        NotFetched, UnreadableImage, MissingDependency: as `Fetching.read` and `read_content`.
    """
    if is_url(path):
        return fetching.read(path, max_bytes=MAX_BYTES)
    return read_from(shelf, path)[0]


def _source(source: str | os.PathLike[str], how: _How) -> _Photos:
    """What gives the photos of a source, once it is known to exist."""
    naming = how.naming
    column = None if naming is None else naming.column
    if column is not None:
        naming = None  # of sources without columns, as if nothing was said
        how = replace(how, naming=None)
    if os.fspath(source) == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("There is no standard input to read paths from; name a list of them.")
        return partial(_standard_input, _whose_below(os.getcwd(), naming or _PARENT))
    path = absolute(source)
    kind = archive_paths.kind(path)
    if is_url(path):
        _check_address(path)
        opened = partial(remote.opened, path)
        return partial(_archive, path, opened, how) if kind else _one(path, naming)
    # Path.exists raises for a name that is too long and for a barred folder; this says no.
    if not os.path.exists(path):
        raise DataError(f"There is no file or folder {path}; check the path.")
    if os.path.isdir(path):
        how = replace(how, exclusion=how.exclusion.with_file_of(path))
        return partial(_folder, path, how.walked(path))
    if _is_list(path):
        lists.check_list(Path(path), column)
        whose = _whose_below(os.path.dirname(path), naming or _PARENT)
        return partial(_list, path, whose, column)
    if (kind and os.path.isfile(path)) or (kind == "tar" and Path(path).is_fifo()):
        return partial(_archive, path, partial(archives.on_disk, path), how.walked(path))
    return _one(path, naming)


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


def _whose_below(root: str, naming: Naming) -> _Whose:
    return lambda place: naming.name(inside(place, root), place)


def _is_walked(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a folder or an archive, in which files are found."""
    return archive_paths.kind(absolute(source)) is not None or os.path.isdir(absolute(source))


def _file(path: str, identity: str | None, metadata: Mapping[str, Any] | None = None) -> Photo:
    problem = None if is_utf8_name(path) else Reason.NAME_NOT_UTF8
    return Photo(path, identity, problem, metadata or {})


def _one(path: str, naming: Naming | None) -> _Photos:
    identity = None if naming is None else _whose_below(os.path.dirname(path), naming)(path)
    return lambda: iter([_file(path, identity)])


def _folder(path: str, how: _How) -> Iterator[Photo]:
    whose = how.naming and _whose_below(path, how.naming)
    for file in folders.walk(path, exclusion=how.exclusion, passed_over=how.passed_over):
        place = os.fspath(file.path)
        yield Photo(place, whose(place) if whose else file.identity, file.problem)


def _standard_input(whose: _Whose) -> Iterator[Photo]:
    return _listed(
        lists.ListRow(place, whose(place)) for place in map(absolute, lists.names(sys.stdin.buffer))
    )


def _list(path: str, whose: _Whose, column: str | None) -> Iterator[Photo]:
    try:
        yield from _listed(lists.rows(Path(path), whose, column))
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
            yield _named(_file(row.path, row.identity, row.metadata))


def _named(photo: Photo) -> Photo:
    """A photo, with its problem where the name of its person cannot be stored."""
    if photo.problem is not None or photo.identity is None or identity_names.problem(photo.identity) is None:
        return photo
    return replace(photo, problem=Reason.BAD_IDENTITY, content=None)


def _unknown_address(url: str) -> str | None:
    try:
        remote.check_address(url)
    except DataError as error:
        return error.words
    return None


def _archive(path: str, opened: Callable[[], BinaryIO], how: _How) -> Iterator[Photo]:
    whose = partial(_whose_member, naming=how.naming, own=composed(archive_paths.stem(path)))
    members = archives.members(path, opened, exclusion=how.exclusion, passed_over=how.passed_over)
    for sample in webdataset.samples(members, whose):
        member = sample.member
        place = f"{path}/{member.name}" if member.name else path
        if "\0" in place or not is_utf8_name(place):
            yield Photo(place, sample.identity, Reason.NAME_NOT_UTF8)
        else:
            yield _named(
                Photo(place, sample.identity, member.problem, sample.metadata, member.content, member.detail)
            )


def _whose_member(name: str, *, naming: Naming | None, own: str) -> str | None:
    """Whose a member of an archive called `own` is, by its path in there."""
    if naming is None:
        folder, _, below = name.partition("/")
        return _FIRST.name(below if composed(folder) == own and below else name, name)
    return naming.name(name, name)


def _reported(line: dict[str, Any]) -> Photo:
    """A rejected photo as something to try again, if it is."""
    path, identity = cast(str, line["path"]), cast("str | None", line["identity"])
    reason, detail = line["reason"], line.get("detail")
    if reason == Reason.NAME_NOT_UTF8:
        # A name that is not UTF-8 stands in a report as it can be written, and leads nowhere.
        return Photo(path, identity, Reason.NAME_NOT_UTF8)
    if reason in (Reason.BAD_METADATA, Reason.BAD_ROW, Reason.BAD_IDENTITY):
        return Photo(path, identity, Reason(reason), detail=detail)
    if archive_paths.kind(path) and reason in _ARCHIVE_REASONS:
        again = f"{detail or reason}; name the archive itself as a source again"
        return Photo(path, identity, Reason(reason), detail=again)
    if _is_list(path) and reason == Reason.DAMAGED:
        return Photo(path, identity, Reason.DAMAGED, detail=detail)
    return Photo(path, identity)
