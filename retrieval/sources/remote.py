"""Remote files: http, https, s3 and others through fsspec, which is optional.

An address that the user names is read as it is, and redirects are followed. An address that a gallery stores
may come from anybody who made a file of embeddings, an export or a backup: `Fetching` reads it only when the
caller allows it, and only from hosts that this gallery has enrolled photos from.
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

# As many as browsers and curl follow is 20 to 50; a file that is served seriously takes one or two.
_MAX_REDIRECTS: Final = 5


class NotFetched(UnreadableImage):
    """An address that a gallery stores, and that the caller does not allow to be fetched."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """Whether addresses that a gallery stores may be fetched, and from where.

    Attributes:
        allowed: whether the caller allows it at all.
        hosts: those that photos were enrolled from, as `paths.host_of` spells them.
    """

    allowed: bool = False
    hosts: frozenset[str] = frozenset()

    def read(self, url: str, *, max_bytes: int) -> bytes:
        """As `remote.read`; a redirect is followed to a host that may be fetched from, and to no other.

        Raises:
            NotFetched: fetching is not allowed.
            UnreadableImage: the host is none of `hosts`; or as `remote.read`.
            MissingDependency: as `check`.
        """
        if not self.allowed:
            raise NotFetched(Reason.UNREACHABLE, "it lies at an address; --fetch allows fetching it")
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


# What reads no address at all.
NOTHING_FETCHED: Final = Fetching()


class _Redirected(Exception):
    """A server says that a file is elsewhere."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


def check_address(url: str) -> None:
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
        raise _said(error) from error


def read(url: str, *, max_bytes: int) -> bytes:
    """A remote file's bytes, at most `max_bytes` of them.

    Raises:
        UnreadableImage: as `opened`, or empty, or too many bytes.
        MissingDependency: as `check`.
    """
    return _read(url, max_bytes, _NO_OPTIONS)


def _read(url: str, max_bytes: int, options: Mapping[str, Any]) -> bytes:
    parts: list[bytes] = []
    left = max_bytes + 1
    with _opened(url, options) as file:
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


async def _strict_client(**options: Any) -> Any:
    """A client for fsspec that raises `_Redirected` where a server answers with a redirect."""
    import aiohttp
    from fsspec.implementations.http import get_client

    async def refuse(_session: Any, _context: Any, answered: Any) -> None:
        if 300 <= answered.response.status < 400:
            raise _Redirected(answered.response.headers.get("Location", ""))

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(refuse)
    return await get_client(**options, trace_configs=[trace])


def _said(error: Exception) -> Exception:
    """What a library that reads from a network raised, which may be anything."""
    # fsspec says of whatever goes wrong over http that there is no such file.
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
