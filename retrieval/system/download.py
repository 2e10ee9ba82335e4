"""Downloads of files that are known by their SHA-256, kept in the cache folder."""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Final

from retrieval.system.cache import cache_folder
from retrieval.system.files import open_plain, why, write_durably

_BLOCK_BYTES: Final = 2**16


class Failed(Exception):
    """A download failed; the message says why in a few words."""


def fetch(url: str, *, sha256: str, most: int, seconds: float = 30.0) -> bytes:
    """Returns a file from the cache folder or, the first time, from its address.

    Nothing is returned or kept that does not have the SHA-256. A cache folder that cannot be written is no
    error: the file is then downloaded each time.

    Args:
        url: the address, http or https.
        sha256: the expected SHA-256, in hex.
        most: the largest size in bytes.
        seconds: the longest wait for a connection or for the next bytes; the whole takes at most twice that.

    Raises:
        Failed: the server cannot be reached or gave another file.
    """
    folder = cache_folder("downloads")
    kept = None if folder is None else folder / sha256
    if kept is not None and (data := _read(kept, most)) is not None and _is(data, sha256):
        return data
    data = _download(url, most, seconds)
    if not _is(data, sha256):
        raise Failed("what arrived is another file")
    if kept is not None:
        with suppress(OSError):
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(kept, data)
    return data


def _is(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256


def _read(path: Path, most: int) -> bytes | None:
    try:
        with open_plain(path) as file:
            return file.read(most + 1)
    except OSError:
        return None


def _download(url: str, most: int, seconds: float) -> bytes:
    # The timeout of a socket ends a wait, but not a server that sends a byte now and then.
    deadline = time.monotonic() + 2 * seconds
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:
            while block := answer.read1(_BLOCK_BYTES):
                data += block
                if len(data) > most:
                    raise Failed("what arrived is another file")
                if time.monotonic() > deadline:
                    raise Failed(f"it took longer than {2 * seconds:g} seconds")
    except urllib.error.HTTPError as error:
        error.close()
        raise Failed(f"HTTP status {error.code}") from error
    except urllib.error.URLError as error:
        reason = error.reason
        raise Failed(why(reason) if isinstance(reason, OSError) else str(reason)) from error
    except OSError as error:
        raise Failed(why(error)) from error
    except http.client.HTTPException as error:
        raise Failed("the connection broke off") from error
    return bytes(data)
