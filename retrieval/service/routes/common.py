"""What routes share: the service, scopes, the refusals that they document, and waiting for results."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from retrieval.gallery.gallery import Gallery
from retrieval.service.refusals import Code, Refusal
from retrieval.service.schemas import ErrorBody
from retrieval.service.service import VIA, Service
from retrieval.service.tokens import Scope

_T = TypeVar("_T")

# The refusals that any route may answer with.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503, 504, 507)
}


def service_of(request: Request) -> Service:
    """Returns the service that a request was sent to."""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]


def check_scope(request: Request, scope: Scope) -> None:
    """Checks that the token of a request allows what a scope allows.

    Raises:
        Refusal: it does not.
    """
    token = request.state.token
    if token is not None and not token.scope.includes(scope):
        raise Refusal(
            HTTPStatus.FORBIDDEN,
            Code.FORBIDDEN,
            f"The token {token.name} has the scope {token.scope}; this takes {scope}.",
        )


def needs(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """Returns the dependency of a route that only tokens with a scope may call."""

    async def check(request: Request) -> None:
        check_scope(request, scope)

    return check


def in_writer(scope: Scope) -> type[APIRoute]:
    """Returns the class of routes that only tokens with a scope may call, and that one process answers.

    It is the one that changes the gallery; others forward their requests to it.
    """

    class WriterRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_or_forward(request: Request) -> Response:
                check_scope(request, scope)
                forwarder = service_of(request).forwarder
                return await (handle(request) if forwarder is None else forwarder.send(request))

            return handle_or_forward

    return WriterRoute


def caller(request: Request) -> str:
    """Returns the caller of a request for the audit log."""
    token = request.state.token
    return VIA if token is None else f"{VIA}, token {token.name}"


async def change(request: Request, work: Callable[[Gallery], _T]) -> _T:
    """Returns the result of a change, when it is durable.

    Raises:
        Refusal: as `unless_gone`.
        FaceprintError: as the change.
    """
    service = service_of(request)
    assert service.writer is not None  # a process without one forwards the request
    future = service.writer.change(work, via=caller(request))
    return await unless_gone(request, future, service.limits.answer_seconds)


async def unless_gone(request: Request, future: "Future[_T]", seconds: float) -> _T:
    """Returns the result of a future; cancels it when the client has gone, or the time is over.

    Raises:
        Refusal: the time is over, or nobody waits for the response any more.
    """
    result: asyncio.Future[Any] = asyncio.wrap_future(future)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait([result, gone], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if result in done:
            answer: _T = result.result()
            return answer
        if gone in done:
            raise Refusal(HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, "The client has gone.")
        raise Refusal(
            HTTPStatus.GATEWAY_TIMEOUT,
            Code.ANSWER_TIMEOUT,
            f"There was no answer within {seconds:g} s; send the request again.",
        )
    finally:
        gone.cancel()
        result.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client closes the connection; the body was received, or is empty."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
