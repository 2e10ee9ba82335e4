"""The application: the routes around a service, the form of its errors, and its OpenAPI document."""

from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from retrieval.errors import FaceprintError
from retrieval.service.gate import Gate, refused
from retrieval.service.page import assets, enroll, health, sign_in
from retrieval.service.page import doubts as doubts_page
from retrieval.service.page import faces as faces_page
from retrieval.service.page import jobs as jobs_page
from retrieval.service.page import merges as merges_page
from retrieval.service.page import people as people_page
from retrieval.service.page import search as search_page
from retrieval.service.page.rendering import is_for_people, refusal_page
from retrieval.service.refusals import Refusal, of_error, of_status, of_validation
from retrieval.service.routes import bulk, doubts, faces, jobs, merges, operations, people, search
from retrieval.service.schemas import EnrollBody, SearchBody
from retrieval.service.service import Service

_ABOUT: Final[dict[str, Any]] = {
    "title": "faceprint",
    "version": "1",
    "description": "Who is this, and which stored photos are closest?",
    # The pages of the framework load scripts from another site.
    "docs_url": None,
    "redoc_url": None,
    # It would lead to the host that the request names.
    "redirect_slashes": False,
}

_ROUTERS: Final = (
    operations.router,
    search.router,
    bulk.router,
    people.router,
    people.writing,
    people.forgetting,
    merges.router,
    merges.writing,
    faces.router,
    faces.writing,
    faces.forgetting,
    doubts.router,
    doubts.writing,
    jobs.reading,
    jobs.watching,
    jobs.writing,
)

# For people; the OpenAPI document has none of them.
_PAGES: Final = (
    assets.router,
    sign_in.router,
    sign_in.changing,
    search_page.router,
    people_page.router,
    people_page.writing,
    people_page.forgetting,
    merges_page.router,
    merges_page.writing,
    faces_page.router,
    faces_page.forgetting,
    doubts_page.router,
    doubts_page.writing,
    enroll.router,
    enroll.writing,
    health.router,
    health.writing,
    jobs_page.router,
    jobs_page.writing,
)


def application(service: Service) -> Gate:
    """Returns the ASGI application of a service."""
    app = _with_routes()
    app.state.service = service
    app.openapi = document  # type: ignore[method-assign]
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(FaceprintError, _on_library_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return Gate(
        app,
        limits=service.limits,
        metrics=service.metrics,
        counts=service.counts,
        tokens=service.tokens,
        sessions=service.sessions,
        needs_token=service.needs_token,
        access_log=service.settings.access_log,
        present=partial(_presented, service),
    )


def document() -> dict[str, Any]:
    """Returns the OpenAPI document, which does not depend on a gallery."""
    described = _with_routes().openapi()
    # The routes read these bodies by themselves, since each takes several types.
    for body in (SearchBody, EnrollBody):
        described["components"]["schemas"][body.__name__] = body.model_json_schema()
    described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{}, {"token": []}]
    return described


def _with_routes() -> FastAPI:
    app = FastAPI(**_ABOUT)
    for router in (*_ROUTERS, *_PAGES):
        app.include_router(router)
    return app


def _presented(service: Service, refusal: Refusal, request_id: str, scope: Scope) -> Response:
    """Returns the response of a refusal: a page for people, JSON for programs."""
    if is_for_people(scope):
        return refusal_page(refusal, request_id, scope, service)
    return refused(refusal, request_id)


def _answered(request: Request, refusal: Refusal) -> Response:
    return _presented(request.app.state.service, refusal, request.state.request_id, request.scope)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _answered(request, error)


async def _on_library_error(request: Request, error: Exception) -> Response:
    return _answered(request, of_error(error))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answered(request, of_validation(error.errors(), skip=1))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answered(request, of_status(error.status_code, error.headers or {}))
