"""The routes of doubts: list what the last audit found, and confirm, dismiss or reopen one."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool

from retrieval.database.records import DoubtState, Face
from retrieval.gallery.gallery import Gallery
from retrieval.quality import doubts
from retrieval.quality.audit_report import Doubt, group_names
from retrieval.service import cursors
from retrieval.service.routes.common import REFUSALS, ServiceOf, change, in_writer, needs
from retrieval.service.schemas import DoubtShown, DoubtsOptions, DoubtsPage
from retrieval.service.tokens import Scope

DoubtId = Annotated[str, Path(max_length=200, description="The id of a doubt.")]

router = APIRouter(prefix="/v1/doubts", tags=["doubts"], responses=REFUSALS)
writing = APIRouter(
    prefix="/v1/doubts", tags=["doubts"], responses=REFUSALS, route_class=in_writer(Scope.WRITE)
)


@router.get("", response_model=DoubtsPage, dependencies=[Depends(needs(Scope.READ))])
async def list_doubts(service: ServiceOf, options: Annotated[DoubtsOptions, Query()]) -> dict[str, Any]:
    """What the last audit found, open doubts first, in pages; a job of the kind `audit` makes one."""
    return await run_in_threadpool(_page, service.gallery, options)


@router.get("/{doubt}", response_model=DoubtShown, dependencies=[Depends(needs(Scope.READ))])
async def show_doubt(service: ServiceOf, doubt: DoubtId) -> dict[str, Any]:
    """A doubt."""
    return await run_in_threadpool(_details, service.gallery, doubt)


@writing.post("/{doubt}/confirm", response_model=DoubtShown)
async def confirm_doubt(request: Request, doubt: DoubtId) -> dict[str, Any]:
    """Says that a doubt is true, and does what it proposes in `act`; nothing is forgotten."""
    return await change(request, lambda gallery: _all(gallery, [doubts.confirm(gallery, doubt)])[0])


@writing.post("/{doubt}/dismiss", response_model=DoubtShown)
async def dismiss_doubt(request: Request, doubt: DoubtId) -> dict[str, Any]:
    """Says that a doubt is not true: later audits leave it out until other faces or people are involved."""

    def dismiss(gallery: Gallery) -> dict[str, Any]:
        doubts.dismiss(gallery, [doubt])
        return _details(gallery, doubt)

    return await change(request, dismiss)


@writing.post("/{doubt}/reopen", response_model=DoubtShown)
async def reopen_doubt(request: Request, doubt: DoubtId) -> dict[str, Any]:
    """Takes a decision back, and undoes what a confirmation did."""

    def reopen(gallery: Gallery) -> dict[str, Any]:
        before = _details(gallery, doubt)
        doubts.reopen(gallery, doubt)
        return {**before, "state": DoubtState.OPEN, "decided_at": None}

    return await change(request, reopen)


def _page(gallery: Gallery, options: DoubtsOptions) -> dict[str, Any]:
    state = None if options.state is None else DoubtState(options.state)
    after = cursors.decoded(options.cursor, "")
    page = doubts.doubts(gallery, state=state, after=after, limit=options.limit)
    following = cursors.encoded(page.last) if page.last else None
    return {"doubts": _all(gallery, page.doubts), "next": following, "audited_at": page.audited_at}


def _details(gallery: Gallery, doubt: str) -> dict[str, Any]:
    return _all(gallery, [doubts.doubt_of(gallery, doubt)])[0]


def _all(gallery: Gallery, found: Sequence[Doubt]) -> list[dict[str, Any]]:
    """Returns doubts as values for JSON, with the people of their faces today."""
    ids = {face.id for one in found for group in one.groups for face in group}
    with gallery.vault.store.read() as reader:
        owners = reader.identities_of_faces(ids)
        names = reader.names_of_identities({number for one in found for number in one.key.identity_ids})
    return [_shown(one, owners, names) for one in found]


def _shown(one: Doubt, owners: dict[int, int], names: dict[int, str]) -> dict[str, Any]:
    people = [{"id": n, "identity": names[n]} for n in one.key.identity_ids if n in names]
    groups = [
        {"name": name, "faces": [_face(face, owners) for face in group]}
        for name, group in zip(group_names(one), one.groups, strict=True)
    ]
    act = one.act
    proposed = None
    if act is not None:
        proposed = {"does": act.does, "into": act.into_id, "faces": act.face_ids, "person": act.identity_id}
    return {
        "id": one.id,
        "kind": one.kind,
        "state": one.state,
        "score": one.score,
        "distance": one.distance,
        "measured": one.measured,
        "people": people,
        "groups": groups,
        "says": one.says,
        "next": one.next,
        "act": proposed,
        "decided_at": one.decided_at,
    }


def _face(face: Face, owners: dict[int, int]) -> dict[str, Any]:
    return {"face_id": face.id, "person": owners.get(face.id), "identity": face.identity}
