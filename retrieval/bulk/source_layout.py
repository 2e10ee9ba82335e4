"""The layout of sources, for reports of `ingest`: identities, their origin, signs of a wrong layout."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from retrieval.embedding.outcome import Outcome, Status
from retrieval.sources import lists
from retrieval.sources.identity_rules import Naming
from retrieval.sources.photos import STANDARD_INPUT
from retrieval.system import archive_paths
from retrieval.system.paths import absolute, composed, is_below

# Names of columns of lists that usually hold the identity of a photo.
_IDENTITY_COLUMNS: Final = frozenset({"label", "labels", "name", "person", "subject", "class", "identity"})

# Subfolders that a note names, and that are kept per identity.
_MAX_NAMED: Final = 3
_MAX_KEPT: Final = 50


class Layout:
    """The layout of some sources, collected from the outcomes of their photos.

    Attributes:
        identities: the different identities of the photos.
        photos: the number of photos that were read, or known without reading.
    """

    def __init__(self, sources: Iterable[str | os.PathLike[str]], identity_from: str | None = None) -> None:
        """Takes the arguments of `photos.scan`, which must be called before, since it checks them."""
        self.identities: set[str] = set()
        self.photos = 0
        self._naming = Naming.parse(identity_from)
        self._origins: list[str] = []
        self._notes: list[str] = []
        self._trees: list[tuple[str, str]] = []  # the root of a folder or archive, and a first folder to skip
        self._deeper: dict[str, set[str]] = defaultdict(set)
        for source in sources:
            self._add_source(source)

    def count(self, outcome: Outcome) -> None:
        """Adds one photo."""
        if outcome.status is Status.REJECTED and outcome.face_id is None:
            return  # not a photo, or not readable
        self.photos += 1
        if outcome.identity is None:
            return
        self.identities.add(outcome.identity)
        below = self._below(outcome.path or "")
        if below is not None and len(below) > 2 and len(self._deeper[below[0]]) < _MAX_KEPT:
            self._deeper[below[0]].add(below[1])

    @property
    def origin(self) -> str:
        """Where identities come from, in words."""
        return " and ".join(dict.fromkeys(self._origins))

    def notes(self) -> list[str]:
        """Returns signs that the sources have another layout than was assumed, each as a sentence."""
        if not self._origins:
            return []  # the photos are of no sources
        found = list(self._notes)
        wanted = self._naming is not None and self._naming.keyword == "none"
        if self.photos > 1 and not self.identities and not wanted:
            found.append(
                f"none of the {self.photos:,} photos has an identity; a source needs a subfolder for each "
                "person, or `identity_from` must say where the names are"
            )
        if self.photos > 1 and len(self.identities) == 1:
            (name,) = self.identities
            found.append(f"all of the {self.photos:,} photos are of one identity, {name}")
        deeper = {name: inner for name, inner in self._deeper.items() if inner}
        if deeper:
            name, inner = max(deeper.items(), key=lambda item: (len(item[1]), item[0]))
            shown = ", ".join(sorted(inner)[:_MAX_NAMED]) + (", ..." if len(inner) > _MAX_NAMED else "")
            others = f" (and so have {len(deeper) - 1:,} others)" if len(deeper) > 1 else ""
            found.append(
                f"{name} has subfolders with photos: {shown}{others}; if these are the people, name the "
                "folder that contains them as the source or pass `identity_from='parent'`; `relabel` also "
                "renames what is enrolled already"
            )
        return found

    def _below(self, path: str) -> Sequence[str] | None:
        """Returns the parts of a path below its source, if the first is the identity; else None."""
        for root, own in self._trees:
            if is_below(path, [root]) and path != root:
                parts = path[len(root.rstrip(os.sep)) + 1 :].split("/")
                return parts[1:] if composed(parts[0]) == own else parts
        return None

    def _add_source(self, source: str | os.PathLike[str]) -> None:
        path = absolute(source)
        columns = self._columns(Path(path)) if lists.has_columns(path) and os.path.isfile(path) else None
        naming = self._naming
        if naming is not None and naming.column is not None and columns is None:
            naming = None
        self._origins.append(_origin(path, columns, naming))
        if naming is None or naming.keyword == "first":
            if os.path.isdir(path):
                self._trees.append((path, ""))
            elif archive_paths.kind(path):
                self._trees.append((path, "" if naming else composed(archive_paths.stem(path))))
        if columns is not None and "identity" not in columns and naming is None:
            self._note_column(path, columns)

    def _columns(self, path: Path) -> list[str]:
        """Returns the columns of a list; adds notes about semicolons and paths of Windows."""
        head = lists.head(path)
        if head.semicolons:
            self._notes.append(f"{path} has semicolons between its columns, and was read so")
        if head.path is not None and "\\" in head.path:
            self._notes.append(
                f"{path} has paths of Windows, such as {head.path}; below its folder they are found with / "
                "in place of \\, on another drive they are not"
            )
        return head.columns

    def _note_column(self, path: str, names: Sequence[str]) -> None:
        for name in names:
            if name.strip().lower() in _IDENTITY_COLUMNS:
                self._notes.append(
                    f"{path} has the column `{name}` and none called `identity`, so identities come from the "
                    f"folders of the files; to take them from that column pass `identity_from={name!r}`"
                )
                return


def _origin(path: str, columns: Sequence[str] | None, naming: Naming | None) -> str:
    """Returns where the identities of a source come from, in words."""
    if naming is not None and naming.column is not None:
        return f"the column `{naming.column}`"
    if columns is not None and "identity" in columns:
        return "the column `identity`"
    if naming is not None:
        words = {"none": "nothing", "first": "first folders", "parent": "the folders of the files"}
        return "the pattern" if naming.keyword is None else words[naming.keyword]
    if os.path.isdir(path):
        return "folder names"
    if archive_paths.kind(path):
        return "first folders in archives"
    is_list = os.path.splitext(path)[1].lower() in lists.SUFFIXES
    return "the folders of the files" if is_list or os.path.basename(path) == STANDARD_INPUT else "nothing"
