"""Rules for identities: which part of a path or list gives the name, as `--identity-from` selects it."""

import os
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from retrieval.errors import InputError
from retrieval.system.paths import composed, is_below, is_url, parent_name

KEYWORDS: Final = ("first", "parent", "none")


@dataclass(frozen=True, slots=True)
class Naming:
    """A rule that gives the identity of a photo; one of the three attributes is set.

    Attributes:
        keyword: "first", the first folder of a path below its source; "parent", the folder that contains a
            file; "none", no identity; None where `column` or `pattern` is set.
        column: the column of lists that holds the identity.
        pattern: searched for in a path below its source, with / between folders; its group `identity`, or
            its first group, is the name.
    """

    keyword: str | None = None
    column: str | None = None
    pattern: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Naming | None":
        """Parses a rule: a keyword, a pattern where it has a parenthesis, else a column; None gives None.

        Raises:
            InputError: the text is empty, or a pattern that cannot be compiled or has no group.
        """
        if text is None:
            return None
        if text in KEYWORDS:
            return cls(keyword=text)
        if not text:
            raise InputError(
                f"An identity comes from {', '.join(KEYWORDS)}, a column or a pattern; name one."
            )
        if "(" not in text:
            return cls(column=text)
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise InputError(f"The pattern {text!a} cannot be read: {error}.") from error
        if not pattern.groups:
            raise InputError(f"The pattern {text!a} has no group; put what is the name into parentheses.")
        return cls(pattern=pattern)

    def name(self, inside: str, place: str) -> str | None:
        """Returns the identity that a path gives, in composed form (NFC); None where it gives none.

        Args:
            inside: the path below the source, with / between folders.
            place: the absolute path, or the address.
        """
        found: str | None = None
        if self.pattern is not None:
            match = self.pattern.search(inside)
            if match is not None:
                found = match["identity"] if "identity" in self.pattern.groupindex else match[1]
        elif self.keyword == "parent":
            found = parent_name(place)
        elif self.keyword == "first" and "/" in inside:
            found = inside.split("/")[0]
        return composed(found) if found else None


def inside(place: str, root: str) -> str:
    """Returns a path relative to a root, with / between folders.

    A path outside the root is relative to the root of the file system, an address to the root of its host.
    """
    if is_url(place):
        return unquote(urlsplit(place).path).lstrip("/")
    if not is_below(place, [root]):
        return place.replace(os.sep, "/").lstrip("/")
    return os.path.relpath(place, root).replace(os.sep, "/")
