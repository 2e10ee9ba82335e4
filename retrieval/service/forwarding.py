"""The `Forwarder`: sends changes of a gallery to the one process that makes them."""

from http import HTTPStatus
from pathlib import Path
from typing import Final

import httpx
from starlette.requests import Request
from starlette.responses import Response

from retrieval.service.refusals import Code, Refusal
from retrieval.service.sessions import FORM_TOKEN_HEADER
from retrieval.service.settings import Limits

# The headers that the other process needs of a request, and the caller of its response.
_SENT: Final = ("authorization", "cookie", "content-type", "host", "accept", "hx-request", FORM_TOKEN_HEADER)
_RETURNED: Final = (
    "content-type",
    "retry-after",
    "www-authenticate",
    "location",
    "hx-redirect",
    "content-security-policy",
    "referrer-policy",
)

# How much longer than for an answer the process is waited for: it says itself that an answer takes too long.
_MARGIN_SECONDS: Final = 5.0


class Forwarder:
    """Sends requests to a process on this machine, through a socket that only its user can open."""

    def __init__(self, socket: Path, limits: Limits) -> None:
        seconds = limits.body_seconds + limits.answer_seconds + _MARGIN_SECONDS
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket)), timeout=seconds, trust_env=False
        )

    async def send(self, request: Request) -> Response:
        """Returns the response of the other process.

        Raises:
            Refusal: it ended before it answered, so that it is unknown whether the change was made.
        """
        target = request.scope["raw_path"] + _query(request)
        return await self._send(request, request.method, target, await request.body())

    async def get(self, request: Request, path: str) -> Response:
        """Returns the response of the other process to a GET of another path, for the caller of a request.

        Raises:
            Refusal: as `send`.
        """
        return await self._send(request, "GET", path.encode(), b"")

    async def _send(self, request: Request, method: str, target: bytes, body: bytes) -> Response:
        headers = {name: request.headers[name] for name in _SENT if name in request.headers}
        try:
            found = await self._client.request(
                method,
                httpx.URL("http://writer", raw_path=target),
                headers={**headers, "x-request-id": request.state.request_id},
                content=body,
            )
        except httpx.HTTPError as error:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                Code.INTERRUPTED,
                "The process that changes the gallery ended during this request, which may have been done or "
                "not; look, or send it again.",
                headers={"Retry-After": "1"},
            ) from error
        returned = {name: found.headers[name] for name in _RETURNED if name in found.headers}
        return Response(found.content, found.status_code, headers=returned)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


def _query(request: Request) -> bytes:
    text: bytes = request.scope["query_string"]
    return b"?" + text if text else b""
