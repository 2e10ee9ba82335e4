"""Paths and addresses (URLs): absolute, comparable, and safe to print."""

import os
import posixpath
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AUTHORITY: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")

# What two parsers may read differently: white space, control characters and the backslash.
_AMBIGUOUS: Final = re.compile(r"[\x00-\x20\x7f\\]")

# Schemes that name a server, and its usual port. Elsewhere the first name is a bucket or the like.
_PORTS: Final = {"http": 80, "https": 443, "ftp": 21, "sftp": 22, "ssh": 22, "smb": 445}


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether a name is an address, such as https://... or s3://..., and not a path."""
    return _URL.match(os.fspath(name)) is not None


def absolute(name: str | os.PathLike[str]) -> str:
    """A path made absolute, links not resolved; an address as it is, but file:// and local:// are paths."""
    text = os.fspath(name)
    if text[:7].lower() == "file://":
        text = url2pathname(urlsplit(text).path)
    elif text[:8].lower() == "local://":
        text = text[8:]  # fsspec's, in which nothing is quoted
    return text if is_url(text) else os.path.abspath(text)


def host_of(url: str) -> str | None:
    """What an address is fetched from, in one spelling; None where that is not certain.

    A server is `https://example.org:443`: lower case, the port always, no user name or password. A bucket is
    `s3://name`. Not certain are malformed addresses and chains of fsspec (`zip://a.jpg::https://...`).
    """
    found = _AUTHORITY.match(url)
    if found is None or "::" in url or _AMBIGUOUS.search(found[2]):
        return None
    scheme = found[1].lower()
    if scheme not in _PORTS:
        return f"{scheme}://{found[2]}"
    try:
        parts = urlsplit(f"{scheme}://{found[2]}")
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name:
        return None
    shown = f"[{name}]" if ":" in name else name
    return f"{scheme}://{shown}:{_PORTS[scheme] if port is None else port}"


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


def composed(name: str) -> str:
    """One spelling a name, that can be written anywhere.

    macOS stores decomposed accents, everybody else composed ones; bytes that are not UTF-8 become `\\xe9`.
    """
    return unicodedata.normalize("NFC", readable(name))


def readable(name: str | os.PathLike[str]) -> str:
    """A name that can be written anywhere: lone surrogates, for bytes that are not UTF-8, are spelled out."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        # No name of a file here, but a text from elsewhere; the locale has no letters for it.
        return os.fspath(name).encode("utf-8", "backslashreplace").decode()


def printable(name: str | os.PathLike[str]) -> str:
    """A name as a sentence shows it, on one line: `readable`, and control characters are spelled out, too."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in readable(name)
    )


def is_utf8_name(path: str) -> bool:
    """Whether a path can be stored, and found again, as the UTF-8 that its bytes on the disk are.

    Where Python decodes names by another encoding (a locale that is not UTF-8, without UTF-8 mode), a name
    with letters beyond ASCII is not the text that it seems to be.
    """
    return is_utf8(path) if names_are_utf8() else path.isascii()


def names_are_utf8() -> bool:
    """Whether Python decodes names of files as UTF-8, as it does but in some locales."""
    return sys.getfilesystemencoding() == "utf-8"


def is_utf8(text: str) -> bool:
    """Whether a name read from the disk was UTF-8 (Python marks other bytes with surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
