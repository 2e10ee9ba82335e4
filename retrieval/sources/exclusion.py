"""Exclusion: which files and folders of a source are passed over, by name or pattern, and how many.

Every walk of a folder and every reader of an archive uses it, so that enrolling, embedding, checking,
training, calibrating and evaluating read the same files.
"""

import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from retrieval.errors import DataError, InputError
from retrieval.system.files import why
from retrieval.system.paths import composed, is_below, is_utf8

# The file of patterns in the root folder of a source.
IGNORE_FILE: Final = ".faceprintignore"

# System files: names, in any case, that programs give to their own files and folders among photos.
_SYSTEM_NAMES: Final = (
    # Windows and its file systems
    *("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information", "FOUND.000", "WPSystem"),
    *("Thumbs.db", "Thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
    # macOS, AFP
    *("__MACOSX", "Icon\r", "Network Trash Folder", "Temporary Items", "TheVolumeSettingsFolder"),
    # Linux, Android
    *("lost+found", "LOST.DIR"),
    # Synology, QNAP, NetApp
    *("@eaDir", "@tmp", "@sharebin", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "~snapshot"),
    # GoodSync
    "_gsdata_",
    # Picasa, Capture One, Nikon Capture, ZoomBrowser, PaintShop: settings and previews
    *("Picasa.ini", "CaptureOne", "NKSC_PARAM", "ZbThumbnail.info", "pspbrwse.jbf"),
    # previews by any program
    *("Thumbs", "Thumbnails", "_thumbs", "_thumbnails"),
)
_SYSTEM_NAMES_FOLDED: Final = {name.casefold(): name for name in _SYSTEM_NAMES}

# Names that begin with a dot: .Trash-1000, .@__thumb, .AppleDouble, .Spotlight-V100, .picasaoriginals, ...
_HIDDEN_RULE: Final = "names that begin with a dot"
# Lightroom's "Catalog Previews.lrdata" and similar folders.
_PREVIEWS_SUFFIX: Final = ".lrdata"

# Files in passed-over folders are counted up to this number per rule, since a NAS snapshot may hold millions.
MAX_COUNTED: Final = 10_000

_MAX_IGNORE_BYTES: Final = 2**20
_MAX_RULES_SHOWN: Final = 8


def litter_rule(name: str) -> str | None:
    """Returns the rule that passes over files and folders of this name in every source; None without one."""
    if name.startswith("."):
        return _HIDDEN_RULE
    folded = name.casefold()
    return f"*{_PREVIEWS_SUFFIX}" if folded.endswith(_PREVIEWS_SUFFIX) else _SYSTEM_NAMES_FOLDED.get(folded)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern in the syntax of .gitignore.

    Attributes:
        text: the pattern as it was given.
        negated: whether a matching path is taken instead of passed over.
        folders_only: whether the pattern matches folders only.
        segments: an expression for each name of a path; None matches any number of names.
    """

    text: str
    negated: bool
    folders_only: bool
    segments: tuple[re.Pattern[str] | None, ...]

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Parses a pattern.

        Raises:
            InputError: the pattern is empty, or is not text in UTF-8.
        """
        body = _without_trailing_spaces(text)
        negated = body.startswith("!")
        body = body[negated:]
        folders_only = body.endswith("/")
        body = body.rstrip("/")
        if not body or "\0" in body or not is_utf8(body):
            raise InputError(
                f"{text!a} is no pattern; write a name (raw), names of files (*.gif), a folder (raw/) or a "
                "path from the source on (/Ada/raw)."
            )
        names = body.lstrip("/").split("/")
        if "/" not in body:
            names = ["**", *names]
        if names[-1] == "**":
            names.append("*")  # the contents of the folder, not the folder itself
        return cls(text, negated, folders_only, tuple(None if n == "**" else _compiled(n) for n in names))

    def matches(self, names: Sequence[str], *, folder: bool) -> bool:
        """Returns whether a path matches, given as its names below the source. Takes linear time."""
        if self.folders_only and not folder:
            return False
        reached = self._skip({0})
        for name in names:
            following = set()
            for place in reached:
                segment = self.segments[place] if place < len(self.segments) else _MATCHES_NOTHING
                if segment is None:
                    following.add(place)
                elif segment.match(name):
                    following.add(place + 1)
            reached = self._skip(following)
        return len(self.segments) in reached

    def _skip(self, places: set[int]) -> set[int]:
        """Returns positions in the pattern, and those after each `**` there, which may match no name."""
        found = set(places)
        for place in sorted(places):
            while place < len(self.segments) and self.segments[place] is None:
                place += 1
                found.add(place)
        return found


_MATCHES_NOTHING: Final = re.compile(r"(?!)")


def _without_trailing_spaces(text: str) -> str:
    bare = text.rstrip(" \t\r\n")
    # A backslash keeps the one space after it.
    escaped = (len(bare) - len(bare.rstrip("\\"))) % 2 == 1
    return bare + text[len(bare) : len(bare) + 1] if escaped else bare


def _compiled(glob: str) -> re.Pattern[str]:
    """Compiles one name of a pattern. Expressions of `fnmatch` never backtrack, even for hostile patterns."""

    def spelled(found: re.Match[str]) -> str:
        if found[0] == "[^":
            return "[!"
        return f"[{found[1]}]" if found[1] in "*?[" else found[1]

    glob = re.sub(r"\\(.)|\[\^", spelled, glob, flags=re.DOTALL)
    return re.compile(fnmatch.translate(composed(glob)))


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Decides what is passed over in a source: the last matching pattern decides, else `litter_rule`."""

    patterns: tuple[Pattern, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Exclusion":
        """Returns the exclusion of some patterns, in addition to system files.

        Raises:
            InputError: a pattern is invalid.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return cls(tuple(map(Pattern.parse, texts)))

    def with_file_of(self, folder: str | os.PathLike[str]) -> "Exclusion":
        """Returns this exclusion with the patterns of a folder's .faceprintignore, if any, before its own.

        Raises:
            DataError: the .faceprintignore cannot be read, or has an invalid pattern.
        """
        return Exclusion((*_ignore_file(Path(folder)), *self.patterns))

    def rule(self, names: Sequence[str], *, folder: bool) -> str | None:
        """Returns the rule that passes over a path, given as its names below the source; None without one."""
        if self.patterns:
            spelled = [composed(name) for name in names]
            for pattern in reversed(self.patterns):
                if pattern.matches(spelled, folder=folder):
                    return None if pattern.negated else pattern.text.strip()
        return litter_rule(names[-1])

    def rule_of_member(self, name: str) -> str | None:
        """Returns the rule that passes over a file of an archive, or a folder above it; None without one."""
        names = name.split("/")
        for end in range(1, len(names) + 1):
            found = self.rule(names[:end], folder=end < len(names))
            if found is not None:
                return found
        return None


def _ignore_file(folder: Path) -> list[Pattern]:
    path = folder / IGNORE_FILE
    try:
        if not os.path.lexists(path):
            return []
        if not path.is_file():
            raise DataError(f"{path} is not a regular file; it must be a text with a pattern a line.")
        with open(path, "rb") as file:
            content = file.read(_MAX_IGNORE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = why(error) if isinstance(error, OSError) else "it is not a text in UTF-8"
        raise DataError(f"The patterns in {path} cannot be read: {reason}.") from error
    if len(content) > _MAX_IGNORE_BYTES:
        raise DataError(f"{path} has more than {_MAX_IGNORE_BYTES:,} bytes; it must be a few patterns.")
    patterns = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                patterns.append(Pattern.parse(line))
            except InputError as error:
                raise DataError(f"Line {number:,} of {path}: {error}") from error
    return patterns


@dataclass(slots=True)
class Passed:
    """Counts of what a rule passed over: files, folders, files inside these (`more`: there may be more)."""

    rule: str
    files: int = 0
    folders: int = 0
    inside: int = 0
    more: bool = False

    def __str__(self) -> str:
        words = []
        if self.folders:
            most = "more than " if self.more else ""
            words.append(f"{most}{_counted(self.inside, 'file')} in {_counted(self.folders, 'folder')}")
        if self.files:
            words.append(_counted(self.files, "file"))
        return f"{' and '.join(words)} of {self.rule}"


@dataclass(slots=True)
class PassedOver:
    """Counts by rule of what walks passed over. These files were not opened, and do not count as *found*.

    Attributes:
        by_rule: the counts.
        walked: the folders and archives that were walked, and the exclusion of each.
        ours: folders that were passed over as models, galleries or backups, which a file in them shows.
    """

    by_rule: dict[str, Passed] = field(default_factory=dict)
    walked: dict[str, Exclusion] = field(default_factory=dict, compare=False)
    ours: list[str] = field(default_factory=list, compare=False)

    def rule_of(self, path: str) -> str | None:
        """Returns the rule that passes over a path or a folder above it; None where a walk would take it.

        Also None for a path that lies below no walked source.
        """
        rules = [
            exclusion.rule_of_member(path[len(root.rstrip(os.sep)) + 1 :])
            for root, exclusion in self.walked.items()
            if path != root and is_below(path, [root])
        ]
        return rules[0] if rules and None not in rules else None

    def __bool__(self) -> bool:
        return bool(self.by_rule)

    def add_file(self, rule: str) -> None:
        """Counts a file."""
        self._counts_of(rule).files += 1

    def add_folder(self, rule: str, path: str | os.PathLike[str]) -> None:
        """Counts a folder and the files below it, except those that cannot be listed."""
        passed = self._counts_of(rule)
        passed.folders += 1
        inside, more = _files_below(os.fspath(path), MAX_COUNTED - passed.inside)
        passed.inside += inside
        passed.more |= more

    def _counts_of(self, rule: str) -> Passed:
        return self.by_rule.setdefault(rule, Passed(rule))

    def __str__(self) -> str:
        rules = sorted(self.by_rule.values(), key=lambda one: (-one.inside - one.files, one.rule))
        shown = [str(one) for one in rules[:_MAX_RULES_SHOWN]]
        more = len(rules) - len(shown)
        return "; ".join([*shown, *([f"and by {_counted(more, 'more rule')}"] if more else [])])

    def aside(self) -> str:
        """Returns the counts in parentheses, to end a clause about missing photos; empty without any."""
        return f" (passed over: {self})" if self else ""

    def as_json(self) -> list[dict[str, Any]]:
        """Returns the counts of all rules, as JSON values."""
        return [
            {
                "rule": one.rule,
                "files": one.files + one.inside,
                "folders": one.folders,
                "at_least": one.more,
            }
            for one in sorted(self.by_rule.values(), key=lambda one: one.rule)
        ]


def _files_below(folder: str, most: int) -> tuple[int, bool]:
    """Returns how many files lie below a folder, at most `most`, and whether there may be more.

    Follows no link, and stops after `MAX_COUNTED` entries.
    """
    found, listed_entries, waiting = 0, 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as listed:
                for entry in listed:
                    listed_entries += 1
                    is_folder = entry.is_dir(follow_symlinks=False)
                    # Bounds the entries too: a tree of folders without files may be large.
                    if listed_entries > MAX_COUNTED or (not is_folder and found == most):
                        return found, True
                    if is_folder:
                        waiting.append(entry.path)
                    else:
                        found += 1
        except OSError:
            continue  # no permission, as for lost+found: its contents are not counted
    return found, False


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
