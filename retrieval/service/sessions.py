"""Sessions of the page: a signed cookie in place of the token that a person signed in with.

The cookie has the id of the token and when the session ends, signed with a key that all processes of a
service share and that ends with the service. It has nothing that the token could be computed from, and it is
checked with the tokens at each request: a token that is revoked or expires ends its sessions.
"""

import hashlib
import hmac
import secrets
import time
from typing import Final

from retrieval.service.tokens import Token, TokenRegistry

COOKIE: Final = "faceprint-session"
FORM_TOKEN_HEADER: Final = "x-form-token"

# After this time a person signs in again.
SECONDS: Final = 12 * 60 * 60

_KEY_BYTES: Final = 32


def new_key() -> str:
    """Returns a key for the sessions of a service, in hex."""
    return secrets.token_hex(_KEY_BYTES)


class Sessions:
    """Makes and checks the cookies of a service, and the tokens of its forms."""

    def __init__(self, key: str, tokens: TokenRegistry) -> None:
        self._key = bytes.fromhex(key)
        self._tokens = tokens

    def begun(self, token: Token, *, now: float | None = None) -> str:
        """Returns the cookie of a new session of a token."""
        ends = int(time.time() if now is None else now) + SECONDS
        return f"{token.id}.{ends}.{self._signature(token, ends)}"

    def token_of(self, cookie: str, *, now: float | None = None) -> Token | None:
        """Returns the valid token of a session; None where the cookie is none of this service, or is over.

        Raises:
            GalleryError, StorageError: as `TokenRegistry.find`.
        """
        number, _, rest = cookie.partition(".")
        end, _, signature = rest.partition(".")
        token = self._tokens.with_id(number)
        if token is None or not (end.isascii() and end.isdigit()) or len(end) > len(str(2**63)):
            return None
        is_ours = _is_same(self._signature(token, int(end)), signature)
        return token if is_ours and int(end) > (time.time() if now is None else now) else None

    def form_token(self, cookie: str) -> str:
        """Returns what the forms of a session send, which pages of other sites cannot know.

        Args:
            cookie: of the session; empty where no token is needed.
        """
        return self._mac(f"form {cookie}")

    def is_form_token(self, text: str, cookie: str) -> bool:
        """Returns whether a form was sent by a page of this session."""
        return _is_same(self.form_token(cookie), text)

    def _signature(self, token: Token, ends: int) -> str:
        return self._mac(f"session {token.id} {token.sha256} {ends}")

    def _mac(self, text: str) -> str:
        return hmac.digest(self._key, text.encode("utf-8", "replace"), hashlib.sha256).hex()


def _is_same(expected: str, given: str) -> bool:
    """Returns whether two texts are equal; the time does not depend on where they differ."""
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace"))
