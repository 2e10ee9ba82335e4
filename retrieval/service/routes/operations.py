"""Routes for those who run the service: whether it lives and can answer, its metrics, and what it serves."""

from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

import retrieval
from retrieval.service import metrics
from retrieval.service.refusals import Code, Refusal
from retrieval.service.routes.common import REFUSALS, ServiceOf, needs
from retrieval.service.schemas import Health, Readiness
from retrieval.service.tokens import Scope

router = APIRouter(tags=["operations"], responses=REFUSALS)


@router.get("/healthz", response_model=Health)
async def healthz() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Readiness, response_model_exclude_none=True)
async def readyz(service: ServiceOf) -> dict[str, Any]:
    """Whether searches can be answered: the gallery and its model are open, and no stop is under way.

    Of a gallery in databases, both servers are asked. A copy of a published gallery says its age, and is not
    ready when it is older than it may be.
    """
    if service.closing:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, Code.SHUTTING_DOWN, "The service is about to stop.")
    await run_in_threadpool(service.gallery.model.current)
    vault = service.gallery.vault
    await run_in_threadpool(vault.check_vectors)
    if vault.follower is None:
        return {"status": "ok"}
    await run_in_threadpool(vault.check_age)
    return {"status": "ok", "age_seconds": vault.follower.current().age()}


@router.get(
    "/metrics",
    dependencies=[Depends(needs(Scope.READ))],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics_text(service: ServiceOf) -> Response:
    """Counters for Prometheus."""
    text = await run_in_threadpool(service.metrics.text)
    return Response(text, media_type=metrics.CONTENT_TYPE)


@router.get("/v1/info", dependencies=[Depends(needs(Scope.READ))])
async def info(service: ServiceOf) -> dict[str, Any]:
    """What the gallery holds, as `faceprint info --json` says it, and the version of the service."""
    facts = await run_in_threadpool(service.gallery.info)
    return {"version": retrieval.__version__, "gallery": asdict(facts)}
