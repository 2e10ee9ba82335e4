"""Tokens: who may ask the service of a gallery, in the file `tokens.json` of the folder of `folder_of`.

The file has the SHA-256 of each token, never the token. Its 256 bits are random, so a plain hash cannot be
reversed by guessing. It is not a table: tables are in backups and exports, and a restored backup would make
revoked tokens valid again. Revoked tokens stay listed, so that a gallery that has had a token is never open
to callers without one.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeVar

from retrieval.database.engines.sqlite_file import LOCK_NAME
from retrieval.database.records import utc_now
from retrieval.database.store import Store
from retrieval.errors import GalleryError, InputError, NotFound, StorageError
from retrieval.storage.layout import TOKENS, TOKENS_USED
from retrieval.system import lock
from retrieval.system.files import Stamp, why, write_durably
from retrieval.system.manifests import read_manifest
from retrieval.system.places import Place

_T = TypeVar("_T")

_FORMAT: Final = 1
_ADVICE: Final = "delete it, and create new tokens with `faceprint token create`"

# The beginning of each token, by which programs that search for leaked secrets know it.
_PREFIX: Final = "fpt_"
_BYTES: Final = 32
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DAYS: Final = re.compile(r"(\d{1,4})d")

_LOCK_SECONDS: Final = 30.0
# How often the last use of a token is written at most.
_USE_SECONDS: Final = 60.0


class Scope(StrEnum):
    """What a token allows; each scope includes those before it."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"

    def includes(self, other: "Scope") -> bool:
        """Returns whether this scope allows what the other one allows."""
        order = list(Scope)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is stored.

    Attributes:
        id: a UUID.
        name: of the caller; it is in the audit log.
        sha256: of the token, in hex.
        scope: what it allows.
        created_at, expires_at, revoked_at: ISO 8601, UTC; None for never.
    """

    id: str
    name: str
    sha256: str
    scope: Scope
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None

    def state(self, now: datetime | None = None) -> str:
        """Returns "valid", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        now = datetime.now(UTC) if now is None else now
        expired = self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= now
        return "expired" if expired else "valid"


@dataclass(frozen=True)
class _File:
    format: int
    tokens: list[Token]


def create(
    folder: Path, name: str, scope: Scope, *, expires: str | None = None, now: datetime | None = None
) -> tuple[str, Token]:
    """Adds a token to a gallery.

    Args:
        folder: the gallery's.
        name: of the caller, which no valid token has.
        scope: what it allows.
        expires: a number of days such as "90d", or an ISO 8601 time after now; None for never.
        now: the time; None is the clock's.

    Returns:
        The token, which is not stored and cannot be shown again, and what is stored of it.

    Raises:
        InputError: the name or the time is invalid, or a valid token has the name.
        GalleryError: the file of tokens is damaged.
        GalleryBusy, StorageError: the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"`name` is {name[:80]!a}; it must have 1 to 64 letters, digits, dots, hyphens or underscores, "
            "and begin with a letter or digit."
        )
    now = datetime.now(UTC) if now is None else now
    secret = _PREFIX + secrets.token_urlsafe(_BYTES)
    made = Token(
        id=str(uuid.uuid4()),
        name=name,
        sha256=_hash(secret),
        scope=scope,
        created_at=now.isoformat(timespec="seconds"),
        expires_at=None if expires is None else _time(expires, now).isoformat(timespec="seconds"),
    )

    def add(tokens: list[Token]) -> list[Token]:
        if any(token.name == name and token.state(now) == "valid" for token in tokens):
            raise InputError(f"There is a token {name} already; revoke it first, or choose another `name`.")
        return [*tokens, made]

    _change(folder, add)
    return secret, made


def revoke(folder: Path, name: str) -> Token:
    """Revokes the valid or expired token of a name; the next request with it is refused.

    Raises:
        NotFound: there is no such token.
        GalleryError, GalleryBusy, StorageError: as `create`.
    """
    revoked: list[Token] = []

    def mark(tokens: list[Token]) -> list[Token]:
        changed = [
            dataclasses.replace(token, revoked_at=utc_now())
            if token.name == name and token.revoked_at is None
            else token
            for token in tokens
        ]
        revoked.extend(new for old, new in zip(tokens, changed, strict=True) if old is not new)
        if not revoked:
            raise NotFound(f"There is no token {name[:80]!a} to revoke; `faceprint token list` has all.")
        return changed

    _change(folder, mark)
    return revoked[-1]


def folder_of(place: Place) -> Path:
    """Returns the folder with the tokens of a gallery: its own, or one of this user for one in databases.

    Those who may read the tables, on other machines too, may not read who uses a service of this one. The
    folder is that of the gallery's UUID: an address may be spelled in many ways, and by none of them is a
    gallery that has had a token open to callers without one.

    Raises:
        GalleryError: there is no gallery in the database.
        StorageError: the database cannot be asked, or there is no such folder, and it cannot be made.
    """
    if place.folder is not None:
        # As the gallery does: a link may lead elsewhere while a service runs.
        return Path(os.path.realpath(place.folder))
    with closing(Store.open_at(str(place.database))) as store, store.read() as reader:
        gallery = reader.gallery().uuid
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~")) / ".local" / "state"
    folder = base / "faceprint" / gallery
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made for the tokens of {place}: {why(error)}.") from error
    return folder


def read(folder: Path) -> list[Token]:
    """Returns all tokens of a gallery, oldest first, with the expired and revoked ones.

    Raises:
        GalleryError: the file of tokens is damaged.
        StorageError: it cannot be read.
    """
    path = folder / TOKENS
    if not os.path.lexists(path):
        return []
    if path.is_symlink():
        raise GalleryError(f"{path} is a symbolic link, not a file of tokens; {_ADVICE}.")
    file = read_manifest(path, _File, error=GalleryError, advice=_ADVICE)
    if file.format > _FORMAT:
        raise GalleryError(f"{path} was made by a newer version of faceprint; upgrade faceprint.")
    return file.tokens


def last_uses(folder: Path) -> dict[str, str]:
    """Returns when tokens were used last, by id, to the minute; empty where that is not known."""
    with suppress(GalleryError, StorageError):
        return read_manifest(folder / TOKENS_USED, dict[str, str], error=GalleryError, advice=_ADVICE)
    return {}


class TokenRegistry:
    """The tokens of a gallery for a running service; changes of the file take effect at the next request."""

    def __init__(self, folder: Path) -> None:
        """Reads the tokens.

        Raises:
            GalleryError, StorageError: as `read`.
        """
        self._folder = folder
        self._reading = threading.Lock()
        self._stamp: Stamp | None = None
        self._tokens: list[Token] = []
        self._used: dict[str, float] = {}
        self._required = False
        self.refresh()

    @property
    def required(self) -> bool:
        """Whether callers need a token: the gallery has, or has had, one since the start of the service."""
        return self._required

    def refresh(self) -> None:
        """Reads the file again if it has changed.

        Raises:
            GalleryError, StorageError: as `read`; until the file can be read, every request must be refused.
        """
        try:
            stamp = Stamp.of(os.lstat(self._folder / TOKENS))
        except FileNotFoundError:
            stamp = None
        except OSError as error:
            raise StorageError(f"{self._folder / TOKENS} cannot be read: {why(error)}.") from error
        with self._reading:
            if stamp != self._stamp:
                self._tokens = read(self._folder)
                self._stamp = stamp
            self._required = self._required or bool(self._tokens)

    def find(self, secret: str) -> Token | None:
        """Returns the valid token with this text, or None; the time does not depend on where texts differ.

        Raises:
            GalleryError, StorageError: as `refresh`.
        """
        self.refresh()
        digest = _hash(secret)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found if found is not None and found.state() == "valid" else None

    def with_id(self, number: str) -> Token | None:
        """Returns the valid token with an id, or None; raises as `find`."""
        self.refresh()
        found = next((token for token in self._tokens if token.id == number), None)
        return found if found is not None and found.state() == "valid" else None

    def is_use_due(self, token: Token) -> bool:
        """Returns whether the use of a token is to be recorded, which is so once a minute."""
        now = time.monotonic()
        with self._reading:
            before = self._used.get(token.id)
            if before is not None and now - before < _USE_SECONDS:
                return False
            self._used[token.id] = now
            return True

    def record_use(self, token: Token) -> None:
        """Writes that a token is used now. Failure is ignored: a full disk must not refuse a search."""
        known = {one.id for one in self._tokens}
        uses = {number: at for number, at in last_uses(self._folder).items() if number in known}
        uses[token.id] = utc_now()
        with suppress(OSError):
            write_durably(self._folder / TOKENS_USED, json.dumps(uses).encode(), anything=True)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _time(text: str, now: datetime) -> datetime:
    """Returns the time that a text states.

    Raises:
        InputError: it is neither a number of days nor a time after now.
    """
    days = _DAYS.fullmatch(text.strip())
    try:
        at = now + timedelta(days=int(days[1])) if days else datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise InputError(
            f"`expires` is {text[:80]!a}; give a number of days such as 90d, or a date such as 2030-01-31."
        ) from error
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    if at <= now:
        raise InputError(f"`expires` is {text[:80]!a}, which is over; give a later time.")
    return at


def _change(folder: Path, change: Callable[[list[Token]], list[Token]]) -> None:
    path = folder / TOKENS
    with lock.exclusive(folder / LOCK_NAME, timeout=_LOCK_SECONDS):
        changed = change(read(folder))
        data = {"format": _FORMAT, "tokens": [asdict(token) for token in changed]}
        try:
            write_durably(path, (json.dumps(data, indent=1) + "\n").encode(), anything=True)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {why(error)}.") from error
