"""The page of a face: its photo, what is stored of it, its person, and forgetting it."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.errors import NotFound
from retrieval.gallery.gallery import Gallery
from retrieval.service.engine import Asked, Query
from retrieval.service.page.rendering import CLOSEST, check_form, page, see
from retrieval.service.routes.common import ServiceOf, change, in_writer, needs, unless_gone
from retrieval.service.routes.faces import FaceId
from retrieval.service.tokens import Scope

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Scope.READ))])
forgetting = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.ADMIN), dependencies=[Depends(check_form)]
)


@router.get("/faces/{face}")
async def show_face(request: Request, service: ServiceOf, face: FaceId) -> Response:
    """A face, with the photos that are closest to it."""
    facts = await run_in_threadpool(_facts, service.gallery, face)
    closest = service.engine.submit(Query(f"face {face}", face, Asked(k=CLOSEST)))
    [answer] = (await unless_gone(request, closest, service.limits.answer_seconds)).answers
    return page(request, "face", matches=answer.matches, **facts)


@router.get("/faces/{face}/forget", dependencies=[Depends(needs(Scope.ADMIN))])
async def ask_to_forget(request: Request, service: ServiceOf, face: FaceId) -> Response:
    """What is lost with a face."""
    return page(request, "forget_face", **await run_in_threadpool(_facts, service.gallery, face))


@forgetting.post("/faces/{face}/forget")
async def forget(request: Request, face: FaceId) -> Response:
    """Erases a face."""
    receipt = await change(request, lambda gallery: gallery.forget(face_id=face))
    return see(f"/receipts/{receipt.id}")


def _facts(gallery: Gallery, number: int) -> dict[str, Any]:
    with gallery.vault.store.read() as reader:
        face = reader.faces([number]).get(number)
        if face is None:
            raise NotFound(f"There is no face {number} in {gallery.name}; perhaps it was forgotten.")
        person = reader.people_by_id(reader.identities_of_faces([number]).values())
        shared = bool(reader.in_shared_photos([number]))
    return {"face": face, "person": next(iter(person.values()), None), "is_shared": shared}
