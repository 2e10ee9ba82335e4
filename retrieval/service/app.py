"""The application: routes and handlers around an open gallery."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import retrieval
from retrieval.errors import FaceprintError
from retrieval.gallery.gallery import Gallery
from retrieval.search.answers import answer_json, explained
from retrieval.service import metrics
from retrieval.service.engine import Answered, SearchEngine
from retrieval.service.gate import Gate, refused
from retrieval.service.metrics import Metrics
from retrieval.service.queries import SEARCH_BODY, read_search
from retrieval.service.refusals import Code, Refusal, of_error, of_status, of_validation
from retrieval.service.schemas import Answers, ErrorBody, Health, SearchBody, SearchOptions
from retrieval.service.settings import Limits, Settings
from retrieval.service.tokens import Scope, TokenRegistry

_T = TypeVar("_T")

# The statuses of refusals that any route may answer with.
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503, 504, 507)
}


class Service:
    """An open gallery and all that answers requests about it.

    Attributes:
        gallery, settings: what is served, and how.
        metrics: counters.
        tokens: of the gallery.
        engine: answers searches.
        closing: whether the service is about to stop.
    """

    def __init__(self, settings: Settings, *, needs_token: bool) -> None:
        """Opens the gallery and loads its model, so that the first request does not wait for it.

        Raises:
            FaceprintError: as `Gallery.open`, `Embedder.open` and `TokenRegistry`.
        """
        self.settings = settings
        self.limits: Limits = settings.limits
        self.tokens = TokenRegistry(settings.gallery)
        self.needs_token = needs_token
        self.closing = False
        self.gallery = _opened(settings)
        try:
            _warm(self.gallery)
            self.metrics = Metrics(self.gallery)
            self.engine = SearchEngine(self.gallery, self.limits, observe=self.metrics.observe_batch)
        except BaseException:
            self.gallery.close()
            raise

    def close(self) -> None:
        """Answers what was submitted, and closes the gallery."""
        self.engine.close()
        self.gallery.close()

    def application(self) -> Gate:
        """Returns the ASGI application."""
        return Gate(
            _routes(self),
            limits=self.limits,
            metrics=self.metrics,
            tokens=self.tokens,
            needs_token=self.needs_token,
            access_log=self.settings.access_log,
        )


def document() -> dict[str, Any]:
    """Returns the OpenAPI document, which does not depend on a gallery."""
    return _with_routers(FastAPI(**_ABOUT)).openapi()


_ABOUT: Final[dict[str, Any]] = {
    "title": "faceprint",
    "version": "1",
    "description": "Who is this, and which stored photos are closest?",
    # The pages of the framework load scripts from another site.
    "docs_url": None,
    "redoc_url": None,
}


def _opened(settings: Settings) -> Gallery:
    return Gallery.open(
        settings.gallery,
        device=settings.device,
        precision=settings.precision,
        read_only=not _is_writable(settings.gallery),
        via="faceprint serve",
    )


def _is_writable(folder: Path) -> bool:
    return not folder.is_dir() or os.access(folder, os.W_OK)


def _warm(gallery: Gallery) -> None:
    """Loads the model and the vectors by a search with a grey picture."""
    size = gallery.bundle.input_size
    vectors = gallery.embedder.embed(np.full((1, size, size, 3), 128, np.uint8)).vectors
    gallery.embedder.photo_reader  # noqa: B018  it loads the face detector
    gallery.search_by_vectors(vectors, 1)


def _routes(service: Service) -> FastAPI:
    app = _with_routers(FastAPI(**_ABOUT))
    app.state.service = service
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(FaceprintError, _on_library_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


def _with_routers(app: FastAPI) -> FastAPI:
    app.include_router(_operations)
    app.include_router(_v1)
    return app


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error, request.state.request_id)


async def _on_library_error(request: Request, error: Exception) -> Response:
    return refused(of_error(error), request.state.request_id)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refused(of_validation(error.errors()), request.state.request_id)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(of_status(error.status_code, error.headers or {}), request.state.request_id)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def needs(scope: Scope) -> Callable[[Request], None]:
    """Returns the dependency of a route that only tokens with a scope may call."""

    async def check(request: Request) -> None:
        token = request.state.token
        if token is not None and not token.scope.includes(scope):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                Code.FORBIDDEN,
                f"The token {token.name} has the scope {token.scope}; this takes {scope}.",
            )

    return check  # type: ignore[return-value]


ServiceOf = Annotated[Service, Depends(_service)]

_operations = APIRouter(tags=["operations"], responses=_REFUSALS)
_v1 = APIRouter(prefix="/v1", responses=_REFUSALS)


@_operations.get("/healthz", response_model=Health)
async def healthz() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@_operations.get("/readyz", response_model=Health)
async def readyz(service: ServiceOf) -> dict[str, str]:
    """Whether searches can be answered: the gallery and its model are open, and no stop is under way."""
    if service.closing:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, Code.SHUTTING_DOWN, "The service is about to stop.")
    await run_in_threadpool(service.gallery.model.current)
    return {"status": "ok"}


@_operations.get(
    "/metrics",
    dependencies=[Depends(needs(Scope.READ))],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics_text(service: ServiceOf) -> Response:
    """Counters for Prometheus."""
    text = await run_in_threadpool(service.metrics.text)
    return Response(text, media_type=metrics.CONTENT_TYPE)


@_v1.get("/info", tags=["gallery"], dependencies=[Depends(needs(Scope.READ))])
async def info(service: ServiceOf) -> dict[str, Any]:
    """What the gallery holds, as `faceprint info --json` says it, and the version of the service."""
    facts = await run_in_threadpool(service.gallery.info)
    return {"version": retrieval.__version__, "gallery": asdict(facts)}


@_v1.post(
    "/search",
    tags=["search"],
    dependencies=[Depends(needs(Scope.READ))],
    response_model=Answers,
    openapi_extra=SEARCH_BODY,
)
async def search(
    request: Request, service: ServiceOf, options: Annotated[SearchOptions, Query()]
) -> Response:
    """The closest stored photos, or people, to a photo, a stored face or a vector; exactly.

    A photo comes as a form, as raw bytes, or as base64 in JSON; a stored face and a vector as JSON. There is
    an answer for each face of a photo, as `faceprint search --json` has it.
    """
    query, body = await read_search(request, options, service.limits)
    answered = await _unless_gone(request, service.engine.submit(query), service.limits.answer_seconds)
    return JSONResponse(await run_in_threadpool(_answers_json, answered, body))


def _answers_json(answered: Answered, body: SearchBody) -> dict[str, Any]:
    shown: dict[str, Any] = {"answers": [answer_json(answer) for answer in answered.answers]}
    return {**shown, "explanation": explained(answered.explanation)} if body.explain else shown


async def _unless_gone(request: Request, future: "Future[_T]", seconds: float) -> _T:
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
    """Returns when the client closes the connection; the body was received already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
