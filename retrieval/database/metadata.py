"""Metadata of faces and identities: JSON objects, validated so that any database can store them."""

import json
import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from retrieval.errors import InputError

Metadata: TypeAlias = dict[str, Any]

# The largest metadata of one face or identity, in bytes of JSON.
MOST_BYTES: Final = 64 * 1024

# The deepest nesting of objects and lists. The limits of databases are far above.
MAX_LEVELS: Final = 64

# The integers that every database holds exactly.
INTEGERS: Final = range(-(2**63), 2**63)


def to_json(value: Any) -> str:
    """Returns canonical JSON for the database: equal values give equal texts."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def encoded(metadata: Mapping[str, Any] | None, of: str) -> str | None:
    """Returns metadata as JSON text; None for None and for an empty object.

    Args:
        metadata: keys are texts; values texts, integers of 64 bits, floats, booleans, None, lists and
            objects of these.
        of: the owner, for error messages.

    Raises:
        InputError: a value that JSON or a database cannot hold exactly, or more than 64 KiB of JSON.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InputError(
            f"The metadata of {of} are {_kind(metadata)}; they must be an object, with a value for each key."
        )
    text = to_json(_checked(metadata, of, MAX_LEVELS))
    size = len(text.encode())
    if size > MOST_BYTES:
        raise InputError(
            f"The metadata of {of} take {size:,} bytes as JSON; {MOST_BYTES:,} are allowed. Shorten them."
        )
    return text if metadata else None


def decoded(text: str | None, of: str) -> Metadata:
    """Returns metadata from JSON text; an empty object for None and for an empty text.

    Raises:
        InputError: the text is not JSON, is not an object, or is one that `encoded` refuses.
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The metadata of {of} are not JSON.") from error
    stored = encoded(found, of)
    return json.loads(stored) if stored else {}


def filled(own: Mapping[str, Any], others: Mapping[str, Any]) -> Metadata:
    """Returns own metadata, completed by the keys of others that it lacks."""
    return {**others, **own}


def _checked(value: Any, of: str, levels: int) -> Any:
    """Returns a value converted to the plain types of JSON.

    Raises:
        InputError: the value contains another type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked_text(value, of)
    if isinstance(value, int):
        if value not in INTEGERS:
            raise InputError(f"The metadata of {of} have an integer beyond 64 bits; give it as text.")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"The metadata of {of} have the number {value}, which JSON does not know.")
        return float(value)
    if not isinstance(value, Mapping | list | tuple):
        raise InputError(f"The metadata of {of} have {_kind(value)}, which JSON does not know.")
    if not levels:
        raise InputError(f"The metadata of {of} lie more than {MAX_LEVELS} levels deep; flatten them.")
    if isinstance(value, list | tuple):
        return [_checked(one, of, levels - 1) for one in value]
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"The metadata of {of} have the key {key!r}; keys must be texts.")
    return {checked_text(key, of): _checked(one, of, levels - 1) for key, one in value.items()}


def checked_text(text: str, of: str) -> str:
    """Returns a text, or a key, as a plain `str`.

    Raises:
        InputError: the text is not valid Unicode, or contains a zero character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"The metadata of {of} have the text {text!a}, not valid Unicode.") from error
    if "\0" in text:
        # SQLite's JSON functions end a text there, and PostgreSQL refuses it.
        raise InputError(f"The metadata of {of} have a text with a zero character; leave it out.")
    return str(text)


def _kind(value: object) -> str:
    return f"a value of the type {type(value).__name__}"
