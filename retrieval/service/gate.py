"""The `Gate`: what every request passes before a route sees it, from its header to its last byte.

It gives the request an id, refuses pages of other sites, asks for the token, admits a bounded number of
requests, and bounds the size and the time of the body. Nothing of a body is read before that.
"""

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval.errors import FaceprintError
from retrieval.service.metrics import Metrics
from retrieval.service.rate_limit import RateLimit
from retrieval.service.refusals import Code, Refusal, of_error
from retrieval.service.sessions import COOKIE, Sessions
from retrieval.service.settings import MIB, Limits, is_loopback
from retrieval.service.tokens import Token, TokenRegistry

ACCESS_LOG: Final = logging.getLogger("faceprint.access")
ERROR_LOG: Final = logging.getLogger("faceprint.service")

# What anyone may ask: it says nothing about the gallery.
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/openapi.json"})
# What a browser needs to show where a token is asked for, and that address itself.
STATIC: Final = "/static/"
SIGN_IN: Final = "/sign-in"
# The most bytes of a form with a token, from callers who are not known yet.
_SIGN_IN_BYTES: Final = 4096

# What is not counted among the pending requests, so that a busy service can still be watched.
_UNCOUNTED_PATHS: Final = OPEN_PATHS | {"/metrics"}

# Those who watch a job wait for long, and cost little.
_EVENTS: Final = re.compile(r"/v1/jobs/[^/]+/events")

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETRY_AFTER: Final = "1"

# What takes a body of any length, line by line: the route bounds the lines and how many it holds.
_STREAMED_PATHS: Final = frozenset({"/v1/search/bulk"})

# What takes photos, and the most bytes of any other body: parsing JSON takes many times its bytes.
_PHOTO_PATHS: Final = _STREAMED_PATHS | {"/v1/search", "/v1/faces", "/search", "/enroll/photos"}
_PLAIN_BYTES: Final = MIB

# How long the rest of the body of a refused request is read and dropped. A connection that is closed with
# unread bytes is reset, and the client would not see the refusal.
_DISCARD_SECONDS: Final = 5.0
_DISCARD_BYTES: Final = 32 * MIB

# Those that a response has already are left as they are.
_HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


# Makes the response of a refusal: (refusal, request id, the request's scope).
Present: TypeAlias = Callable[[Refusal, str, Scope], Response]


class Admission:
    """Counts the pending requests and the bytes of their bodies; only for the thread of the event loop."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._requests = 0
        self._bytes = 0

    def enter(self) -> None:
        """Admits a request.

        Raises:
            Refusal: too many are pending.
        """
        if self._requests >= self._limits.pending:
            raise _too_many()
        self._requests += 1
        self._metrics.pending.inc()

    def hold(self, number: int) -> None:
        """Admits bytes of a body.

        Raises:
            Refusal: the pending requests would hold too many.
        """
        if self._bytes + number > self._limits.pending_bytes:
            raise _too_many()
        self._bytes += number

    def release(self, number: int) -> None:
        """Gives bytes of a body back."""
        self._bytes -= number

    def leave(self) -> None:
        """Ends a request that was admitted."""
        self._requests -= 1
        self._metrics.pending.dec()


class Gate:
    """The outermost ASGI application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        counts: bool,
        tokens: TokenRegistry,
        sessions: Sessions,
        needs_token: bool,
        access_log: bool,
        present: Present,
    ) -> None:
        """Wraps an application.

        Args:
            app: the application.
            limits: of requests.
            metrics: counts requests, if `counts`.
            counts: whether requests are counted and logged.
            tokens: of the gallery.
            sessions: of those who signed in to the page.
            needs_token: refuse callers without a token even if the gallery has none.
            access_log: log a line for each request.
            present: makes the response of a refusal.
        """
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._counts = counts
        self._tokens = tokens
        self._sessions = sessions
        self._present = present
        self._needs_token = needs_token
        self._access_log = access_log
        self._admission = Admission(limits, metrics)
        self._rate = None if limits.rate is None else RateLimit(limits.rate)
        self._recording: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, token=None, admitted=False)
        streamed = scope["path"] in _STREAMED_PATHS
        limits = _limits_of(scope["path"], self._limits)
        body = _Body(receive, headers, limits, self._admission, streamed=streamed)
        response = _Response(send, body, request_id, self._present)
        began = time.perf_counter()
        entered = False
        try:
            _check_framing(scope, headers)
            self._check_origin(headers)
            if not _is_open(scope["path"]):
                scope["state"]["token"] = await self._authenticated(scope, headers)
            scope["state"]["admitted"] = True
            if self._rate is not None and not _is_unlimited(scope["path"]):
                _check_rate(self._rate, scope)
            if scope["path"] not in _UNCOUNTED_PATHS and not _EVENTS.fullmatch(scope["path"]):
                self._admission.enter()
                entered = True
                body.check_length()
            await self._app(scope, body.receive, response.send)
        except Refusal as refusal:
            await response.refuse(refusal, scope)
        except asyncio.CancelledError:
            # The time for finishing requests before the stop is over.
            body.give_up()
            await response.refuse(_stopping(), scope)
        except Exception as error:
            ERROR_LOG.exception("request %s failed", request_id)
            await response.refuse(of_error(error), scope)
        finally:
            self._admission.release(body.held)
            if entered:
                self._admission.leave()
            if self._counts:
                self._count(scope, response.status, time.perf_counter() - began)

    def _check_origin(self, headers: Headers) -> None:
        """Refuses requests that pages of other sites make a browser send.

        Raises:
            Refusal: it is one.
        """
        host = headers.get("host", "")
        if _is_foreign(headers.get("origin"), host) or headers.get("sec-fetch-site", "none") not in (
            "none",
            "same-origin",
        ):
            raise Refusal(
                HTTPStatus.FORBIDDEN, Code.FOREIGN_ORIGIN, "Pages of other sites may not ask this service."
            )
        # A name of another site may lead to this address; without tokens nothing else would stop its pages.
        if not (self._needs_token or self._tokens.required) and not _is_local_name(host):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                Code.FOREIGN_ORIGIN,
                "Without tokens the service answers to localhost alone; `faceprint token create` makes one.",
            )

    async def _authenticated(self, scope: Scope, headers: Headers) -> Token | None:
        """Returns the token of a request, or of its session; None where none is needed.

        Raises:
            Refusal: it is missing or not valid, or the tokens cannot be read.
        """
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        try:
            token = self._tokens.find(secret.strip()) if scheme.lower() == "bearer" else None
            if token is None and not secret and _takes_sessions(scope):
                cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
                token = self._sessions.token_of(cookie)
            if token is None:
                self._tokens.refresh()
        except FaceprintError as error:
            ERROR_LOG.error("the tokens cannot be read: %s", error)
            raise Refusal(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                Code.INTERNAL_ERROR,
                "The tokens of the gallery cannot be read; the log of the service says why.",
            ) from error
        if token is None and not (self._needs_token or self._tokens.required) and not secret:
            return None
        if token is None:
            raise Refusal(
                HTTPStatus.UNAUTHORIZED,
                Code.UNAUTHORIZED,
                "Send a valid token as `Authorization: Bearer TOKEN`; `faceprint token create` makes one.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._tokens.is_use_due(token):
            recording = asyncio.create_task(run_in_threadpool(self._tokens.record_use, token))
            self._recording.add(recording)
            recording.add_done_callback(self._recording.discard)
        return token

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # The route, not the path: a path may hold a person's name.
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, method, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if self._access_log:
            token, request_id = scope["state"]["token"], scope["state"]["request_id"]
            who = "-" if token is None else token.name
            ACCESS_LOG.info("%s %s %d %.1f ms %s %s", method, route, status, 1e3 * seconds, who, request_id)


_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _Body:
    """The body of a request, received within the limits; of a streamed one, each part is.

    Attributes:
        held: the bytes that count among those of the pending requests.
        complete: whether all of it has been received.
    """

    def __init__(
        self, receive: Receive, headers: Headers, limits: Limits, admission: Admission, *, streamed: bool
    ) -> None:
        self._receive = receive
        self._streamed = streamed
        self._limits = limits
        self._admission = admission
        self._received = 0
        self._given_up = False
        self._deadline: float | None = None
        self._expects = "100-continue" in headers.get("expect", "").lower()
        length = headers.get("content-length", "")
        self._length = int(length) if length.isdigit() else 0
        self.held = 0
        self.complete = "transfer-encoding" not in headers and self._length == 0

    def check_length(self) -> None:
        """Checks the stated length, and holds that many bytes; for a streamed body those of one part.

        Raises:
            Refusal: it is above the limit, or the pending requests hold too many bytes.
        """
        if self._streamed:
            self._hold(self._limits.body_bytes)
            return
        if self._length > self._limits.body_bytes:
            raise self._too_large()
        self._hold(self._length)

    async def receive(self) -> Message:
        """Returns the next message; the messages after the body say that the client has gone.

        Raises:
            Refusal: the body is too large or too slow.
        """
        if self.complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None or self._streamed:
            self._deadline = loop.time() + self._limits.body_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT,
                Code.BODY_TOO_SLOW,
                f"The body did not arrive within {self._limits.body_seconds:g} s.",
            ) from error
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._streamed:
            return message
        self._received += len(message.get("body", b""))
        if self._received > self._limits.body_bytes:
            raise self._too_large()
        if self._received > self.held:
            self._hold(self._received - self.held)
        return message

    async def discard(self) -> None:
        """Reads and drops the rest of a body, as far as that takes little."""
        if self.complete or self._given_up or (self._expects and not self._received):
            return
        left = max(self._limits.body_bytes, _DISCARD_BYTES)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left > 0 and not self.complete:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self.complete = not message.get("more_body", False)

    def give_up(self) -> None:
        """Leaves the rest of the body unread."""
        self._given_up = True

    def _hold(self, number: int) -> None:
        self._admission.hold(number)
        self.held += number

    def _too_large(self) -> Refusal:
        return Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            Code.BODY_TOO_LARGE,
            f"The body has more than {self._limits.body_bytes:,} bytes, which is the limit.",
        )


class _Response:
    """The response to a request, with the headers of every response.

    Attributes:
        status: the HTTP status; 500 until the response starts.
    """

    def __init__(self, send: Send, body: _Body, request_id: str, present: Present) -> None:
        self._send = send
        self._body = body
        self._request_id = request_id
        self._present = present
        self._started = False
        self.status = int(HTTPStatus.INTERNAL_SERVER_ERROR)

    async def send(self, message: Message) -> None:
        """Sends a message of the application."""
        if message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
            refused_early = self.status >= HTTPStatus.BAD_REQUEST and not self._body.complete
            if refused_early:
                await self._body.discard()
            given = list(message.get("headers", []))
            own = {name.lower() for name, _ in given}
            more = [(b"x-request-id", self._request_id.encode())]
            more += [header for header in _HEADERS if header[0] not in own]
            if refused_early and not self._body.complete:
                more.append((b"connection", b"close"))
            message = {**message, "headers": [*given, *more]}
        await self._send(message)

    async def refuse(self, refusal: Refusal, scope: Scope) -> None:
        """Sends a refusal, unless a response has started."""
        if not self._started:
            response = self._present(refusal, self._request_id, scope)
            await response(scope, self._body.receive, self.send)


def refused(refusal: Refusal, request_id: str) -> JSONResponse:
    """Returns the response of a refusal to a program."""
    headers: Mapping[str, Any] = refusal.headers
    return JSONResponse(refusal.body(request_id), status_code=refusal.status, headers=dict(headers))


def _too_many() -> Refusal:
    return Refusal(
        HTTPStatus.TOO_MANY_REQUESTS,
        Code.TOO_MANY_REQUESTS,
        "The service has as many requests as it takes at a time; send this one again a little later.",
        headers={"Retry-After": _RETRY_AFTER},
    )


def _check_rate(limit: RateLimit, scope: Scope) -> None:
    """Counts a request of a token, or without tokens of an address.

    Raises:
        Refusal: there were too many.
    """
    token: Token | None = scope["state"]["token"]
    caller = f"token {token.id}" if token is not None else (scope["client"] or ("unknown",))[0]
    seconds = limit.wait(caller)
    if seconds:
        raise Refusal(
            HTTPStatus.TOO_MANY_REQUESTS,
            Code.TOO_MANY_REQUESTS,
            "The service takes no more requests per second of one caller; send this one again later.",
            headers={"Retry-After": str(math.ceil(seconds))},
        )


def _stopping() -> Refusal:
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE,
        Code.SHUTTING_DOWN,
        "The service stops, and there was no time left for this request; send it again.",
        headers={"Retry-After": _RETRY_AFTER},
    )


def _limits_of(path: str, limits: Limits) -> Limits:
    """Returns the limits of requests for a path."""
    if path in _PHOTO_PATHS:
        return limits
    most = _SIGN_IN_BYTES if path == SIGN_IN else _PLAIN_BYTES
    return replace(limits, body_bytes=min(most, limits.body_bytes))


def _check_framing(scope: Scope, headers: Headers) -> None:
    """Refuses a request that may end elsewhere for a proxy than for this service (request smuggling).

    Raises:
        Refusal: it has a length and chunks, or chunks in HTTP/1.0; the connection is closed.
    """
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Code.BAD_REQUEST,
            "Send either a `Content-Length` or, in HTTP/1.1, a chunked body, not both.",
            headers={"Connection": "close"},
        )


def _is_open(path: str) -> bool:
    """Returns whether anyone may ask for a path."""
    return path in OPEN_PATHS or path == SIGN_IN or path.startswith(STATIC)


def _is_unlimited(path: str) -> bool:
    """Returns whether requests for a path are not counted among those per second of a caller."""
    return path in _UNCOUNTED_PATHS or path.startswith(STATIC)


def _takes_sessions(scope: Scope) -> bool:
    """Returns whether a request may come from the page: /v1 is changed with a token in the header alone."""
    return scope["method"] in ("GET", "HEAD") or not scope["path"].startswith("/v1/")


def _is_foreign(origin: str | None, host: str) -> bool:
    """Returns whether a request comes from a page of another site."""
    try:
        return origin is not None and urlsplit(origin).netloc != host
    except ValueError:  # no browser sends such an origin
        return True


def _is_local_name(host: str) -> bool:
    """Returns whether the Host header of a request names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or is_loopback(name)
    except ValueError:
        return False
