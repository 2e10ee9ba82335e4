"""Remote files for `photos`: http, https, s3 and others through fsspec, which is optional.

An address that the user names is read without restrictions, and redirects are followed. An address that a
gallery stores is not trusted, since it may come from the author of a file of embeddings, an export or a
backup: `Fetching` reads it only when the caller allows it, and only from hosts that this gallery has enrolled
photos from.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO, Final, cast
from urllib.parse import urljoin

from retrieval.errors import DataError, MissingDependency, Reason, UnreadableImage
from retrieval.system.paths import host_of

_REFUSED_STATUSES: Final = (401, 403)
_GONE_STATUSES: Final = (404, 410)
_IPV6: Final = re.compile(r"\[[0-9A-Fa-f:.%]*\]")

_NO_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({})

# Browsers and curl follow 20 to 50; a file on a usual server takes one or two.
_MAX_REDIRECTS: Final = 5


class NotFetched(UnreadableImage):
    """An address that a gallery stores, and that the caller does not allow to be fetched."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """Whether addresses that a gallery stores may be fetched, and from where.

    Attributes:
        allowed: whether the caller allows it at all.
        hosts: those that photos were enrolled from, in the form that `paths.host_of` returns.
    """

    allowed: bool = False
    hosts: frozenset[str] = frozenset()

    def read(self, url: str, *, max_bytes: int) -> bytes:
        """Returns a remote file's bytes as `remote.read` does; follows redirects to hosts of `hosts` only.

        Raises:
            NotFetched: fetching is not allowed.
            UnreadableImage: the host is not one of `hosts`; too many redirects; or as `remote.read`.
            MissingDependency: as `check_address`.
        """
        if not self.allowed:
            raise NotFetched(Reason.UNREACHABLE, "it is at an address; `fetch=True` allows fetching it")
        for _ in range(_MAX_REDIRECTS + 1):
            self._check(url)
            is_http = url[:4].lower() == "http"
            options = {"allow_redirects": False, "get_client": _strict_client} if is_http else {}
            try:
                return _read(url, max_bytes, options)
            except _Redirected as redirected:
                url = urljoin(url, redirected.location)
                if url[:4].lower() != "http":
                    break
        raise UnreadableImage(Reason.UNREACHABLE, "its server redirects without end, or to what is no server")

    def _check(self, url: str) -> None:
        host = host_of(url)
        if host is None or host not in self.hosts:
            raise UnreadableImage(
                Reason.UNREACHABLE,
                f"it lies at {host or 'a malformed address'}, from where `ingest` has enrolled nothing",
            )


# The default: no stored address is fetched.
NOTHING_FETCHED: Final = Fetching()


class _Redirected(Exception):
    """A server answered with a redirect to `location`."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


def check_address(url: str) -> None:
    """Checks that fsspec can read addresses with this scheme; sends no request.

    Raises:
        MissingDependency: fsspec, or a package that it needs for the scheme, is not installed.
        DataError: the scheme is unknown, or the address contains another address.
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
    """Returns a remote file, opened at its beginning; the caller closes it.

    Raises:
        UnreadableImage: missing, refused or unreachable, or the address contains another address.
        MissingDependency: as `check_address`.
    """
    return _opened(url, _NO_OPTIONS)


def _opened(url: str, options: Mapping[str, Any]) -> BinaryIO:
    if _is_chain(url):
        raise UnreadableImage(Reason.UNSUPPORTED_FORMAT, "it is an address inside another")
    try:
        return cast(BinaryIO, _fsspec().open(url, "rb", compression=None, **options).open())
    except ImportError:
        check_address(url)
        raise
    except Exception as error:
        raise _translated(error) from error


def read(url: str, *, max_bytes: int) -> bytes:
    """Returns a remote file's bytes, at most `max_bytes` of them.

    Raises:
        UnreadableImage: as `opened`, or empty, or more than `max_bytes`.
        MissingDependency: as `check_address`.
    """
    return _read(url, max_bytes, _NO_OPTIONS)


def _read(url: str, max_bytes: int, options: Mapping[str, Any]) -> bytes:
    parts: list[bytes] = []
    left = max_bytes + 1
    with _opened(url, options) as file:
        try:
            # A read of a stream may return fewer bytes than asked for: those that have arrived.
            while left > 0 and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        except Exception as error:
            raise _translated(error) from error
    if left <= 0:
        raise UnreadableImage(
            Reason.TOO_MANY_BYTES, f"it has more than {max_bytes:,} bytes, which is the limit"
        )
    if not parts:
        raise UnreadableImage(Reason.EMPTY_FILE, "the file is empty")
    return b"".join(parts)


def _is_chain(url: str) -> bool:
    """Returns whether fsspec would read an address through another one (`::`).

    The inner address may be a file or a pipe of this machine.
    """
    return "::" in _IPV6.sub("", url)


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependency(
            "Reading from addresses needs fsspec; install it with pip install 'faceprint[remote]'."
        ) from error
    return fsspec


async def _strict_client(**options: Any) -> Any:
    """Returns a client for fsspec that raises `_Redirected` where a server answers with a redirect."""
    import aiohttp
    from fsspec.implementations.http import get_client

    async def refuse(_session: Any, _context: Any, answered: Any) -> None:
        if 300 <= answered.response.status < 400:
            raise _Redirected(answered.response.headers.get("Location", ""))

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(refuse)
    return await get_client(**options, trace_configs=[trace])


def _translated(error: Exception) -> Exception:
    """Translates an exception of fsspec, which may be of any type, into one of this project."""
    # fsspec raises FileNotFoundError for every failure over http; its cause is the real one.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    if isinstance(cause, _Redirected):
        return cause
    status = getattr(cause, "status", None)
    if status in _GONE_STATUSES or isinstance(cause, FileNotFoundError):
        return UnreadableImage(Reason.MISSING, "there is no such file at this address")
    if status in _REFUSED_STATUSES or isinstance(cause, PermissionError):
        return UnreadableImage(Reason.NO_PERMISSION, "the server does not allow reading it")
    words = " ".join(str(cause).split())[:200] or type(cause).__name__
    return UnreadableImage(Reason.UNREACHABLE, f"its server could not be asked: {words}")
