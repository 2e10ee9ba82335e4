"""Names of identities: checks that they can be stored, and finds similar ones that may mean one person."""

import difflib
import unicodedata
from collections.abc import Iterable
from itertools import islice
from typing import Final

from retrieval.errors import InputError
from retrieval.system.paths import is_utf8

# How long a name may be, in bytes of UTF-8.
MAX_BYTES: Final = 1024

# The most names that are compared with an unknown one, to find the nearest.
_MAX_COMPARED: Final = 100_000


def problem(name: str) -> str | None:
    """Returns why a name cannot be stored, as the end of a sentence; None where it can."""
    if not is_utf8(name):
        return "it is not valid Unicode"
    if len(name) > MAX_BYTES or len(name.encode()) > MAX_BYTES:
        return f"it has more than {MAX_BYTES:,} bytes"
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "it has a control character, such as a line break or a zero"
    if not folded(name):
        return "it has nothing but spaces" if name else "it is empty"
    return None


def check_identity(name: str) -> None:
    """Checks that a name can be stored.

    Raises:
        InputError: it is too long, empty, not valid Unicode, or has only spaces or a control character in it.
    """
    found = problem(name)
    if found is not None:
        raise InputError(f"The identity {name[:80]!a} cannot be stored: {found}.")


def folded(name: str) -> str:
    """Returns a name without differences of case, width, spaces and composition of accents."""
    if not name.isascii():
        visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        # Folding case may undo the normal form, and leave what has one again.
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())
    return " ".join(name.casefold().split())


def twins(every: Iterable[str], among: Iterable[str] | None = None) -> tuple[tuple[str, ...], ...]:
    """Returns groups of names that are equal after `folded`; with `among`, only groups that contain one."""
    groups: dict[str, list[str]] = {}
    for name in every:
        groups.setdefault(folded(name), []).append(name)
    wanted = groups.keys() if among is None else set(map(folded, among))
    return tuple(tuple(sorted(names)) for key, names in groups.items() if len(names) > 1 and key in wanted)


def nearest(name: str, every: Iterable[str]) -> list[str]:
    """Returns the known names most similar to an unknown one, at most three, the most similar first."""
    spelled = {folded(one): one for one in islice(every, _MAX_COMPARED)}
    return [spelled[one] for one in difflib.get_close_matches(folded(name), spelled, n=3)]
