"""Places: absolute paths of files, addresses (URLs), which are absolute by themselves, and names in them."""

import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# What operating systems leave in every folder, and nobody ever meant to enroll.
_LITTER: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether a name is an address, such as https://... or s3://..., and not a path."""
    return _URL.match(os.fspath(name)) is not None


def absolute(name: str | os.PathLike[str]) -> str:
    """A path made absolute, links not resolved; an address as it is, but file:// is a path."""
    text = os.fspath(name)
    if text[:7].lower() == "file://":
        text = url2pathname(urlsplit(text).path)
    return text if is_url(text) else os.path.abspath(text)


def is_absolute(path: str) -> bool:
    """Whether a place means the same from everywhere."""
    return is_url(path) or os.path.isabs(path)


def is_below(path: str, roots: Iterable[str]) -> bool:
    """Whether a path is one of some files or folders, or lies below one."""
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def parent_name(path: str) -> str | None:
    """The name of the folder that a file lies in, as an identity; None right below the root."""
    if is_url(path):
        path = unquote(urlsplit(path).path)
    return composed(posixpath.basename(posixpath.dirname(path))) or None


def is_litter(name: str) -> bool:
    """Whether files of this name are passed over: hidden ones, and the litter of operating systems."""
    return name.startswith(".") or name.lower() in _LITTER


def composed(name: str) -> str:
    """One spelling a name, that can be written anywhere.

    macOS stores decomposed accents, everybody else composed ones; bytes that are not UTF-8 become `\\xe9`.
    """
    return unicodedata.normalize("NFC", readable(name))


def readable(name: str | os.PathLike[str]) -> str:
    """A name that can be written anywhere: lone surrogates, for bytes that are not UTF-8, are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_utf8(text: str) -> bool:
    """Whether a name read from the disk was UTF-8 (Python marks other bytes with surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
