"""Cursors: where a page of a list ends, as a text that a caller sends back for the next page.

A cursor says the last id or name, so that pages neither skip nor repeat what stays while others change the
list. It gives no access: what it leads to is what the token of the request may see.
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from retrieval.errors import InputError

_T = TypeVar("_T", int, str)
_Item = TypeVar("_Item")


def encoded(last: int | str) -> str:
    """Returns the cursor behind an id or a name."""
    return base64.urlsafe_b64encode(json.dumps(last).encode()).decode().rstrip("=")


def decoded(cursor: str | None, first: _T) -> _T:
    """Returns the id or the name that a cursor says, or `first` without one.

    Raises:
        InputError: the text is not a cursor of this list.
    """
    if cursor is None:
        return first
    try:
        last = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
        if isinstance(last, str):
            last.encode()
    except (binascii.Error, ValueError, RecursionError) as error:
        raise _wrong() from error
    if type(last) is not type(first) or (isinstance(last, int) and not 0 <= last < 2**63):
        raise _wrong()
    return last


def paged(
    found: Sequence[_Item], limit: int, key: Callable[[_Item], int | str]
) -> tuple[list[_Item], str | None]:
    """Returns the items of a page, and the cursor of the next page; None where there is none.

    Args:
        found: the items from the beginning of the page on, of more than `limit` at least one more.
        limit: of the page.
        key: returns the id or the name of an item, which the list is ordered by.
    """
    shown = list(found[:limit])
    return shown, encoded(key(shown[-1])) if len(found) > limit else None


def _wrong() -> InputError:
    return InputError("`cursor` is none of this list; send the `next` of the page before, or leave it out.")
