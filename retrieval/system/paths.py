"""Paths and addresses (URLs): made absolute, comparable, and safe to print."""

import os
import posixpath
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import unquote, urlsplit

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AUTHORITY: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")

# Characters that two URL parsers may treat differently: white space, control characters, the backslash.
_AMBIGUOUS: Final = re.compile(r"[\x00-\x20\x7f\\]")

# "Zero width non-joiner" and "zero width joiner".
_JOINERS: Final = "\u200c\u200d"

# Schemes that name a server, and their default ports. In other schemes the authority is, say, a bucket.
_PORTS: Final = {"http": 80, "https": 443, "ftp": 21, "sftp": 22, "ssh": 22, "smb": 445}


def is_url(name: str | os.PathLike[str]) -> bool:
    """Returns whether a name is an address, such as https://... or s3://..., and not a path."""
    return _URL.match(os.fspath(name)) is not None


def absolute(name: str | os.PathLike[str]) -> str:
    """Returns an absolute path, links not resolved; URLs as given, but file:// and local:// as paths."""
    text = os.fspath(name)
    if text[:7].lower() == "file://":
        from urllib.request import url2pathname  # the rest of that module takes long to load

        text = url2pathname(urlsplit(text).path)
    elif text[:8].lower() == "local://":
        text = text[8:]  # fsspec's scheme, without percent-encoding
    return text if is_url(text) else os.path.abspath(text)


def host_of(url: str) -> str | None:
    """Returns the host that an address is fetched from, normalized; None where it is ambiguous.

    A server is `https://example.org:443`: lower case, always with the port, without user name and password.
    A bucket is `s3://name`. Malformed addresses and chains of fsspec (`zip://a.jpg::https://...`) are
    ambiguous.
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
    """Returns whether a path or address does not depend on the current folder."""
    return is_url(path) or os.path.isabs(path)


def is_below(path: str, roots: Iterable[str]) -> bool:
    """Returns whether a path is one of the roots, or is below one."""
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def parent_name(path: str) -> str | None:
    """Returns the name of the parent folder of a file, as an identity; None right below the root."""
    if is_url(path):
        path = unquote(urlsplit(path).path)
    return composed(posixpath.basename(posixpath.dirname(path))) or None


def composed(name: str) -> str:
    """Returns a name in Unicode normalization form C, encodable as UTF-8.

    macOS stores decomposed accents, other systems composed ones; bytes that are not UTF-8 become `\\xe9`.
    """
    return unicodedata.normalize("NFC", readable(name))


def readable(name: str | os.PathLike[str]) -> str:
    """Returns a name that UTF-8 can encode: lone surrogates (bytes that are not UTF-8) become escapes."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        # Not a file name of this system, but other text, which the encoding of the locale lacks.
        return os.fspath(name).encode("utf-8", "backslashreplace").decode()


def printable(name: str | os.PathLike[str]) -> str:
    """Returns a name for a sentence, on one line: `readable`, with control characters as escapes too."""
    return shown(readable(name), lambda letter: letter.encode("unicode_escape").decode())


def shown(text: str, instead: Callable[[str], str] = lambda letter: "\ufffd") -> str:
    """Returns a text with replacements for what cannot be shown on one line, such as control characters.

    Joiners, which Python counts among those, stay: Persian names and those in Indic scripts are spelled with
    them.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in _JOINERS else instead(one) for one in text)


def is_utf8_name(path: str) -> bool:
    """Returns whether the bytes of a path on the disk are the UTF-8 of its text, so that it can be stored.

    Where Python decodes names by another encoding (a locale that is not UTF-8, without UTF-8 mode), the text
    of a name beyond ASCII is wrong.
    """
    return is_utf8(path) if names_are_utf8() else path.isascii()


def names_are_utf8() -> bool:
    """Returns whether Python decodes file names as UTF-8, as in all but some locales."""
    return sys.getfilesystemencoding() == "utf-8"


def is_utf8(text: str) -> bool:
    """Returns whether a name read from the disk was UTF-8 (Python marks other bytes with surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
