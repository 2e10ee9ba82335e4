"""Names of identities: validates them, and finds similar ones that may be the same person."""

import difflib
import unicodedata
from collections.abc import Iterable
from itertools import islice
from typing import Final

from retrieval.errors import InputError
from retrieval.system.paths import is_utf8

# The most bytes of a name in UTF-8.
MAX_BYTES: Final = 1024

# The most names that are compared with an unknown name to find similar ones.
_MAX_COMPARED: Final = 100_000


def problem(name: str) -> str | None:
    """Returns the reason why a name cannot be stored, as a clause; None if it can."""
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
        InputError: it is too long, empty, blank or not valid Unicode, or contains a control character.
    """
    reason = problem(name)
    if reason is not None:
        raise InputError(f"The identity {name[:80]!a} cannot be stored: {reason}.")


def folded(name: str) -> str:
    """Returns a name with case, width, spaces and the composition of accents normalized."""
    if not name.isascii():
        visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        # Case folding may undo the normal form, so the result is normalized again.
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())
    return " ".join(name.casefold().split())


def twins(every: Iterable[str], among: Iterable[str] | None = None) -> tuple[tuple[str, ...], ...]:
    """Returns groups of names with equal `folded` forms; with `among`, only groups of those names."""
    groups: dict[str, list[str]] = {}
    for name in every:
        groups.setdefault(folded(name), []).append(name)
    wanted = groups.keys() if among is None else set(map(folded, among))
    return tuple(tuple(sorted(names)) for key, names in groups.items() if len(names) > 1 and key in wanted)


def nearest(name: str, every: Iterable[str]) -> list[str]:
    """Returns at most three known names similar to an unknown one, most similar first."""
    spelled = {folded(one): one for one in islice(every, _MAX_COMPARED)}
    return [spelled[one] for one in difflib.get_close_matches(folded(name), spelled, n=3)]
