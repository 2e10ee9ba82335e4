"""The routes of faces: list, show, show as a picture, enroll, annotate and forget."""

from http import HTTPStatus
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from retrieval.database.filters import Where
from retrieval.database.reader import Reader
from retrieval.database.records import Face
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import NotFound, Reason
from retrieval.gallery.gallery import Gallery
from retrieval.search.answers import rounded
from retrieval.service import cursors
from retrieval.service.photos import thumbnail
from retrieval.service.queries import ENROLL_BODY, read_enrollment
from retrieval.service.refusals import Code, Refusal
from retrieval.service.routes.common import (
    REFUSALS,
    ServiceOf,
    caller,
    change,
    in_writer,
    needs,
    service_of,
    unless_gone,
)
from retrieval.service.schemas import (
    MAX_ID,
    Assigning,
    Enrolled,
    EnrollOptions,
    FaceDetails,
    FacesOptions,
    FacesPage,
    Receipt,
    ThumbnailOptions,
)
from retrieval.service.tokens import Scope
from retrieval.system.paths import composed

FaceId = Annotated[int, Path(ge=1, le=MAX_ID, description="The id of a face.")]

router = APIRouter(prefix="/v1", tags=["faces"], responses=REFUSALS)
writing = APIRouter(prefix="/v1", tags=["faces"], responses=REFUSALS, route_class=in_writer(Scope.WRITE))
forgetting = APIRouter(prefix="/v1", tags=["faces"], responses=REFUSALS, route_class=in_writer(Scope.ADMIN))


@router.get("/faces", response_model=FacesPage, dependencies=[Depends(needs(Scope.READ))])
async def list_faces(service: ServiceOf, options: Annotated[FacesOptions, Query()]) -> dict[str, Any]:
    """Faces by id, in pages: all, those of a person, or those that meet conditions."""
    return await run_in_threadpool(_page, service.gallery, options)


@router.get("/faces/{face}", response_model=FaceDetails, dependencies=[Depends(needs(Scope.READ))])
async def show_face(service: ServiceOf, face: FaceId) -> dict[str, Any]:
    """A face."""
    return await run_in_threadpool(_details, service.gallery, face)


@router.get(
    "/thumbnails/{face}",
    dependencies=[Depends(needs(Scope.READ))],
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def show_thumbnail(
    service: ServiceOf, face: FaceId, options: Annotated[ThumbnailOptions, Query()]
) -> Response:
    """A face as a small JPEG, from its photo, as long as that is where it was enrolled from, unchanged."""
    data = await run_in_threadpool(
        _thumbnail, service.gallery, face, options, seconds=service.limits.photo_seconds
    )
    return Response(data, media_type="image/jpeg")


@writing.post(
    "/faces",
    response_model=Enrolled,
    openapi_extra=ENROLL_BODY,
    responses={201: {"model": Enrolled}, 409: REFUSALS[400]},
)
async def enroll_face(request: Request, options: Annotated[EnrollOptions, Query()]) -> Response:
    """Enrolls a photo, which is durable when the response comes: 201 for a new one, 200 for a known one.

    A photo comes as a form, as raw bytes, or as base64 in JSON. The service keeps its embedding, not the
    photo.
    """
    outcome = await enroll_photo(request, options)
    if outcome.status is Status.REJECTED:
        raise rejection(outcome)
    status = HTTPStatus.CREATED if outcome.status is Status.ENROLLED else HTTPStatus.OK
    return JSONResponse(_enrolled(outcome), status_code=status)


async def enroll_photo(request: Request, options: EnrollOptions) -> Outcome:
    """Returns what was done with the photo of a request, which is durable then; raises as `change`."""
    service = service_of(request)
    assert service.writer is not None  # a process without one forwards the request
    photo, selection = await read_enrollment(request, options, service.limits)
    future = service.writer.enroll(photo, selection, via=caller(request))
    return await unless_gone(request, future, service.limits.answer_seconds)


@writing.put("/faces/{face}/metadata", response_model=FaceDetails)
async def annotate_face(
    request: Request, face: FaceId, metadata: Annotated[dict[str, Any], Body()]
) -> dict[str, Any]:
    """Replaces the metadata of a face; an empty object removes them."""

    def annotate(gallery: Gallery) -> dict[str, Any]:
        gallery.annotate(faces={face: metadata})
        return _details(gallery, face)

    return await change(request, annotate)


@writing.put("/faces/{face}/identity", response_model=FaceDetails)
async def assign_face(request: Request, face: FaceId, to: Assigning) -> dict[str, Any]:
    """Says whose a face is, as `faceprint assign-identity` does; null makes it nobody's."""

    def assign(gallery: Gallery) -> dict[str, Any]:
        gallery.assign_identity([face], None if to.identity is None else composed(to.identity))
        return _details(gallery, face)

    return await change(request, assign)


@forgetting.delete("/faces/{face}", response_model=Receipt, response_model_exclude_none=True)
async def forget_face(request: Request, face: FaceId) -> dict[str, Any]:
    """Erases a face, as `faceprint forget --face` does; it cannot be undone. Returns the receipt."""

    def forget(gallery: Gallery) -> dict[str, Any]:
        return gallery.vault.told(gallery.forget(face_id=face))

    return await change(request, forget)


def _page(gallery: Gallery, options: FacesOptions) -> dict[str, Any]:
    last = cursors.decoded(options.cursor, 0)
    with gallery.vault.store.read() as reader:
        ids, following = cursors.paged(
            _ids(reader, gallery, options, last), options.limit, lambda number: number
        )
        return {"faces": _shown(reader, ids), "next": following}


def _ids(reader: Reader, gallery: Gallery, options: FacesOptions, last: int) -> list[int]:
    """Returns the ids of the faces of a page, and of one more if there are more.

    Raises:
        NotFound: there is no such person.
        InputError: a condition cannot be parsed.
    """
    if options.person is None and not options.where:
        return reader.face_ids_after(last, options.limit + 1)
    where = Where.parse(options.where)
    if options.person is not None:
        person = reader.people_by_id([options.person]).get(options.person)
        if person is None:
            raise NotFound(f"There is no person {options.person} in {gallery.name}.")
        where = where.among([person.name])
    found = reader.face_ids_where(where)
    start = int(np.searchsorted(found, last, side="right"))
    return [int(number) for number in found[start : start + options.limit + 1]]


def _details(gallery: Gallery, number: int) -> dict[str, Any]:
    with gallery.vault.store.read() as reader:
        found = _shown(reader, [number])
    if not found:
        raise _no_face(gallery, number)
    return found[0]


def _shown(reader: Reader, ids: list[int]) -> list[dict[str, Any]]:
    people = reader.identities_of_faces(ids)
    return [_face_shown(face, people.get(face.id)) for face in reader.faces(ids).values()]


def _face_shown(face: Face, person: int | None) -> dict[str, Any]:
    return {
        "id": face.id,
        "identity": face.identity,
        "person": person,
        "path": face.path,
        "box": None if face.box is None else rounded(face.box),
        "enrolled_at": face.enrolled_at,
        "metadata": face.metadata,
    }


def _no_face(gallery: Gallery, number: int) -> NotFound:
    return NotFound(f"There is no face {number} in {gallery.name}.")


def _thumbnail(gallery: Gallery, number: int, options: ThumbnailOptions, *, seconds: float) -> bytes:
    with gallery.vault.store.read() as reader:
        face = reader.faces([number]).get(number)
    if face is None:
        raise _no_face(gallery, number)
    return thumbnail(gallery, face, side=options.side, whole=options.part == "photo", seconds=seconds)


def _enrolled(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "face_ids": outcome.face_ids,
        "identity": outcome.identity,
        "detail": outcome.detail,
    }


def rejection(outcome: Outcome) -> Refusal:
    """Returns the refusal of a photo that was rejected."""
    conflict = outcome.reason is Reason.IDENTITY_CONFLICT
    return Refusal(
        HTTPStatus.CONFLICT if conflict else HTTPStatus.UNPROCESSABLE_ENTITY,
        Code.IDENTITY_CONFLICT if conflict else Code.REJECTED,
        f"The photo was rejected: {outcome.detail or outcome.reason} ({outcome.reason}).",
        reason=outcome.reason,
    )
