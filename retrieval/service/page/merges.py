"""The pages of the undo of a merge: what comes back and what does not, before and after."""

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.gallery import merges
from retrieval.service.page.rendering import check_form, page
from retrieval.service.routes.common import ServiceOf, change, in_writer, needs
from retrieval.service.routes.merges import MergeId
from retrieval.service.tokens import Scope

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Scope.WRITE))])
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)


@router.get("/merges/{merge}/undo")
async def ask_to_undo(request: Request, service: ServiceOf, merge: MergeId) -> Response:
    """What becomes of two people when their merge is undone."""
    would = await run_in_threadpool(merges.preview, service.gallery.vault, merge)
    return page(request, "undo_merge", would=would)


@writing.post("/merges/{merge}/undo")
async def undo(request: Request, merge: MergeId) -> Response:
    """Makes a merged person one again. The page is not one to load again: the merge is gone then."""
    done = await change(request, lambda gallery: gallery.undo_merge(merge))
    return page(request, "unmerged", done=done)
