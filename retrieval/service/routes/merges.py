"""The routes of merges: list those that can be undone, and undo one."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool

from retrieval.database.records import Merge
from retrieval.gallery.gallery import Gallery
from retrieval.service import cursors
from retrieval.service.routes.common import REFUSALS, ServiceOf, change, in_writer, needs
from retrieval.service.routes.people import details
from retrieval.service.schemas import MAX_ID, MergesPage, PageOptions, Unmerged
from retrieval.service.tokens import Scope

MergeId = Annotated[int, Path(ge=1, le=MAX_ID, description="The id of a merge.")]

router = APIRouter(prefix="/v1/merges", tags=["people"], responses=REFUSALS)
writing = APIRouter(
    prefix="/v1/merges", tags=["people"], responses=REFUSALS, route_class=in_writer(Scope.WRITE)
)


@router.get("", response_model=MergesPage, dependencies=[Depends(needs(Scope.READ))])
async def list_merges(service: ServiceOf, options: Annotated[PageOptions, Query()]) -> dict[str, Any]:
    """Merges of people that can be undone, the newest first, in pages."""
    return await run_in_threadpool(_page, service.gallery, options)


@writing.post("/{merge}/undo", response_model=Unmerged)
async def undo_merge(request: Request, merge: MergeId) -> dict[str, Any]:
    """Makes a merged person one again, with the id, names, metadata and faces of before.

    Faces that were given to others since stay there, and what was forgotten does not come back.
    """

    def undo(gallery: Gallery) -> dict[str, Any]:
        done = gallery.undo_merge(merge)
        return {
            "merge": _shown(done.merge),
            "person": details(gallery, done.merge.identity_id),
            "into": details(gallery, done.into_id),
            "face_ids": done.face_ids,
            "elsewhere": done.elsewhere,
            "forgotten": done.forgotten,
            "former_names": done.former_names,
            "lost_names": done.lost_names,
            "kept_keys": done.kept_keys,
            "says": done.sentences(),
        }

    return await change(request, undo)


def _page(gallery: Gallery, page: PageOptions) -> dict[str, Any]:
    found = gallery.merges(before=cursors.decoded(page.cursor, MAX_ID), limit=page.limit + 1)
    shown, following = cursors.paged(found, page.limit, lambda merge: merge.id)
    return {"merges": list(map(_shown, shown)), "next": following}


def _shown(merge: Merge) -> dict[str, Any]:
    return {
        "id": merge.id,
        "merged_at": merge.merged_at,
        "person": merge.identity_id,
        "identity": merge.name,
        "into": merge.into_id,
        "into_identity": merge.into,
        "faces": merge.faces,
        "former_names": merge.former_names,
        "metadata": merge.metadata,
        "filled": merge.filled,
    }
