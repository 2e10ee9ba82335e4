"""Files elsewhere: what fsspec reads, which is optional (http, https, s3 with s3fs, and so on)."""

import re
from typing import Any, BinaryIO, Final, cast

from retrieval.errors import DataError, MissingDependency, Reason, UnreadableImage

_REFUSED: Final = (401, 403)
_GONE: Final = (404, 410)
_IPV6: Final = re.compile(r"\[[0-9A-Fa-f:.%]*\]")


def check(url: str) -> None:
    """Checks that files of this kind of address can be read; asks no server.

    Raises:
        MissingDependency: fsspec, or what it needs for them, is not installed.
        DataError: nobody knows this kind.
    """
    if _is_chain(url):
        raise DataError(f"{url} is an address inside another; name the file or the archive itself.")
    scheme = url.split("://", 1)[0].lower()
    try:
        _fsspec().get_filesystem_class(scheme)
    except ImportError as error:
        raise MissingDependency(f"{scheme}:// cannot be read yet: {str(error).rstrip('.')}.") from error
    except ValueError as error:
        raise DataError(f"There is no way to read {scheme}://; check the address {url}.") from error


def opened(url: str) -> BinaryIO:
    """A remote file, to be read from its beginning, and closed by the caller.

    Raises:
        UnreadableImage: missing, refused or unreachable.
        MissingDependency: as `check`.
    """
    if _is_chain(url):
        raise UnreadableImage(Reason.UNSUPPORTED_FORMAT, "it is an address inside another")
    try:
        return cast(BinaryIO, _fsspec().open(url, "rb", compression=None).open())
    except ImportError:
        check(url)
        raise
    except Exception as error:
        raise _said(error) from error


def read(url: str, *, max_bytes: int) -> bytes:
    """A remote file's bytes, at most `max_bytes` of them.

    Raises:
        UnreadableImage: as `opened`, or empty, or too many bytes.
        MissingDependency: as `check`.
    """
    parts: list[bytes] = []
    left = max_bytes + 1
    with opened(url) as file:
        try:
            # A stream gives what has arrived, which may be less than what was asked for.
            while left > 0 and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        except Exception as error:
            raise _said(error) from error
    if left <= 0:
        raise UnreadableImage(
            Reason.TOO_MANY_BYTES, f"it has more than {max_bytes:,} bytes, which is the limit"
        )
    if not parts:
        raise UnreadableImage(Reason.EMPTY_FILE, "the file is empty")
    return b"".join(parts)


def _is_chain(url: str) -> bool:
    """Whether fsspec would read an address through another, which may be a file or a pipe of this machine."""
    return "::" in _IPV6.sub("", url)


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependency(
            "Reading from addresses needs fsspec; install it with pip install 'faceprint[remote]'."
        ) from error
    return fsspec


def _said(error: Exception) -> UnreadableImage:
    """What a library that reads from a network raised, which may be anything."""
    # fsspec says of whatever goes wrong over http that there is no such file.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(cause, "status", None)
    if status in _GONE or isinstance(cause, FileNotFoundError):
        return UnreadableImage(Reason.MISSING, "there is no such file at this address")
    if status in _REFUSED or isinstance(cause, PermissionError):
        return UnreadableImage(Reason.NO_PERMISSION, "the server does not allow reading it")
    words = " ".join(str(cause).split())[:200] or type(cause).__name__
    return UnreadableImage(Reason.UNREACHABLE, f"its server could not be asked: {words}")
