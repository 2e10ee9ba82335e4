"""The route of bulk searches: a line of JSON for each query, and a line for each answer, in their order."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from retrieval.service.engine import Answered
from retrieval.service.gate import ERROR_LOG
from retrieval.service.queries import read_line
from retrieval.service.refusals import Code, Refusal, of_error
from retrieval.service.routes.common import REFUSALS, ServiceOf, needs
from retrieval.service.routes.search import answers_json
from retrieval.service.schemas import SearchBody
from retrieval.service.service import Service
from retrieval.service.tokens import Scope as TokenScope

LINES: Final = "application/x-ndjson"

# The queries of a request that are answered at the same time.
_WINDOW: Final = 32

_SCHEMA: Final[dict[str, Any]] = {"schema": {"type": "string", "description": "A line of JSON each."}}

router = APIRouter(prefix="/v1", tags=["search"], responses=REFUSALS)


@router.post(
    "/search/bulk",
    dependencies=[Depends(needs(TokenScope.READ))],
    response_class=Response,
    responses={200: {"content": {LINES: _SCHEMA}}},
    openapi_extra={"requestBody": {"required": True, "content": {LINES: _SCHEMA}}},
)
async def search_in_bulk(request: Request, service: ServiceOf) -> Response:
    """Searches for many queries. Each line is a query as `/v1/search` takes it as JSON.

    For each there is a line with the response to it, in the same order: `answers`, or `error`. Lines come
    while others are still sent: read them meanwhile, or send at most 32 queries.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != LINES:
        raise Refusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, Code.UNSUPPORTED_MEDIA_TYPE, f"Send the queries as {LINES}."
        )
    return _BulkResponse(request, service)


class _Failed:
    """A line that is no query, in place of its answer."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A query that is being answered, and the bytes of its line."""

    future: "Future[Answered]"
    body: SearchBody
    size: int


_BLANK_LINES: Final = re.compile(rb"\n\s*\n")

# A query, or a line that is none; None at the end.
_Entry = _Submitted | _Failed | None


class Room:
    """The bytes of lines that wait for their answers; one more waits until there is room for it.

    Only for the thread of the event loop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._given_back = asyncio.Event()

    async def take(self, number: int) -> None:
        """Takes bytes when there is room for them, or nothing else is held."""
        while self._held and self._held + number > self._most:
            self._given_back.clear()
            await self._given_back.wait()
        self._held += number

    def give_back(self, number: int) -> None:
        """Gives bytes back."""
        self._held -= number
        self._given_back.set()


class _BulkResponse(Response):
    """Reads the lines of a request while it sends the answers."""

    media_type = LINES

    def __init__(self, request: Request, service: Service) -> None:
        super().__init__()
        self._request = request
        self._service = service
        self._room = Room(service.limits.body_bytes)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        entries: asyncio.Queue[_Entry] = asyncio.Queue(_WINDOW)
        reading = asyncio.create_task(self._read(entries))
        try:
            while (entry := await entries.get()) is not None:
                line = json.dumps(await self._answer(entry), ensure_ascii=False).encode() + b"\n"
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
            while not entries.empty():
                left = entries.get_nowait()
                if isinstance(left, _Submitted):
                    left.future.cancel()

    async def _read(self, entries: "asyncio.Queue[_Entry]") -> None:
        """Submits the queries; an error that ends the request is the last entry."""
        try:
            async for line in _lines(self._request, self._service.limits.body_bytes):
                if self._service.closing:
                    raise _stopping()
                await self._room.take(len(line))
                await entries.put(await self._submitted(line))
        except Refusal as error:
            await entries.put(_Failed(error))
        await entries.put(None)

    async def _submitted(self, line: bytes) -> _Entry:
        try:
            query, body = await run_in_threadpool(read_line, line, self._service.limits)
            return _Submitted(self._service.engine.submit(query), body, len(line))
        except Exception as error:  # of one query: the others go on
            self._room.give_back(len(line))
            return _Failed(error)

    async def _answer(self, entry: _Submitted | _Failed) -> dict[str, Any]:
        if isinstance(entry, _Failed):
            return self._refused(entry.error)
        try:
            async with asyncio.timeout(self._service.limits.answer_seconds):
                return answers_json(await asyncio.wrap_future(entry.future), entry.body)
        except TimeoutError:
            return self._refused(
                Refusal(HTTPStatus.GATEWAY_TIMEOUT, Code.ANSWER_TIMEOUT, "There was no answer in time.")
            )
        except Exception as error:  # of one query: the others go on
            return self._refused(error)
        finally:
            self._room.give_back(entry.size)

    def _refused(self, error: Exception) -> dict[str, Any]:
        refusal = error if isinstance(error, Refusal) else of_error(error)
        request_id = self._request.state.request_id
        if refusal.code is Code.INTERNAL_ERROR:
            ERROR_LOG.error("request %s failed", request_id, exc_info=error)
        return refusal.body(request_id)


async def _lines(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yields the lines of a request that are not blank.

    Raises:
        Refusal: a line has more bytes than `most`, or the client has gone or is too slow.
    """
    held = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Refusal(HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, "The client has gone.")
        more = message.get("more_body", False)
        # A body may be nothing but ends of lines: each would cost as much as a line.
        begun, *others = _BLANK_LINES.sub(b"\n", message.get("body", b"")).split(b"\n")
        held += begun
        lines = []
        for part in others:
            lines.append(held)
            held = bytearray(part)
        if not more:
            lines.append(held)
        if max(map(len, (*lines, held))) > most:
            raise _too_long(most)
        for line in lines:
            if line.strip():
                yield bytes(line)


def _too_long(most: int) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        Code.BODY_TOO_LARGE,
        f"A line has more than {most:,} bytes, which is the limit; the rest is not read.",
    )


def _stopping() -> Refusal:
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE,
        Code.SHUTTING_DOWN,
        "The service stops; send this query and those after it again.",
    )
