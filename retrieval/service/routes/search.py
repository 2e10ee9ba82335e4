"""The route of searches."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from retrieval.search.answers import answer_json, explained
from retrieval.service.engine import Answered
from retrieval.service.queries import SEARCH_BODY, read_search
from retrieval.service.routes.common import REFUSALS, ServiceOf, needs, unless_gone
from retrieval.service.schemas import Answers, SearchBody, SearchOptions
from retrieval.service.tokens import Scope

router = APIRouter(prefix="/v1", tags=["search"], responses=REFUSALS)


@router.post(
    "/search",
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
    answered = await unless_gone(request, service.engine.submit(query), service.limits.answer_seconds)
    return JSONResponse(await run_in_threadpool(answers_json, answered, body))


def answers_json(answered: Answered, body: SearchBody) -> dict[str, Any]:
    """Returns the body of a response with answers."""
    shown: dict[str, Any] = {"answers": [answer_json(answer, full=body.full) for answer in answered.answers]}
    return {**shown, "explanation": explained(answered.explanation)} if body.explain else shown
