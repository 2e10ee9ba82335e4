"""Manifests: the JSON files that faceprint writes and reads back, checked strictly when they are read.

A manifest may come from another machine or another person, so its types are checked, unknown fields are
passed over, and whatever is wrong is one sentence that names the file and the field.
"""

import os
from pathlib import Path
from typing import Final, TypeVar

from retrieval.errors import FaceprintError
from retrieval.files import why

_T = TypeVar("_T")

# More than any manifest of ours: a card lists the photos of its split, some hundred bytes each.
MAX_BYTES: Final = 512 * 2**20


def read_manifest(
    path: Path, kind: type[_T], *, error: type[FaceprintError], advice: str, max_bytes: int = MAX_BYTES
) -> _T:
    """Reads a JSON file as a value of a type.

    Args:
        path: of the file.
        kind: what it must hold: a dataclass or TypedDict with annotated fields, a dict[str, str], ...
            Types are strict: the text "1" is not a number. Fields that `kind` does not have are passed over.
        error: raised for whatever is wrong with the file.
        advice: the end of its sentence, what to do: "take another backup".
        max_bytes: a larger file is refused without being read.

    Raises:
        `error`: the file is missing, too large, no JSON, nested too deeply, or not of this type; it names
            the file and, where one is wrong, the field.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= max_bytes else b""
    except OSError as failure:
        raise error(f"{path} cannot be read ({why(failure)}); {advice}.") from failure
    if size > max_bytes:
        raise error(f"{path} has {size:,} bytes and {max_bytes:,} is the limit; {advice}.")
    return parse_manifest(data, kind, name=path, error=error, advice=advice)


def parse_manifest(
    data: bytes | str,
    kind: type[_T],
    *,
    name: str | os.PathLike[str],
    error: type[FaceprintError],
    advice: str,
) -> _T:
    """As `read_manifest`, of JSON that was read already; `name` is what the sentence calls it."""
    # Imported here: most commands read no manifest of this kind before they answer.
    import msgspec

    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as failure:
        # "Expected `int`, got `str` - at `$.dimension`"
        problem, _, place = str(failure).partition(" - at `$")
        field = place.rstrip("`").lstrip(".")
        where = f"the field {field}: " if field else ""
        raise error(f"{os.fspath(name)} is damaged ({where}{_words(problem)}); {advice}.") from failure
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise error(f"{os.fspath(name)} is damaged (it is not JSON); {advice}.") from failure


def _words(problem: str) -> str:
    """msgspec's words for a wrong value, as a part of a sentence."""
    return (problem[:1].lower() + problem[1:]).replace("`", "")
