"""The page of enrollment: photos that a browser sends one by one, and jobs on folders of the machine.

Also one face of a search without an answer, which is enrolled from its card under the name that is typed.
"""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import FaceprintError, InputError
from retrieval.gallery.gallery import Gallery
from retrieval.service.chosen_face import embed_face, parse_box
from retrieval.service.page.jobs import ENROLL, address, folders, shown_jobs
from retrieval.service.page.rendering import check_form, page, see
from retrieval.service.queries import read_enrollment
from retrieval.service.refusals import Refusal, of_error, of_validation
from retrieval.service.routes.common import caller, change, in_writer, service_of, unless_gone
from retrieval.service.routes.faces import enroll_photo, rejection
from retrieval.service.routes.jobs import begin_job, runner_of
from retrieval.service.schemas import EnrollOptions, IngestJob
from retrieval.service.tokens import Scope

# Jobs are known to the process that runs them alone.
router = APIRouter(include_in_schema=False, route_class=in_writer(Scope.WRITE))
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)


@router.get("/enroll")
async def show_enroll(request: Request) -> Response:
    """Where photos are enrolled."""
    service = service_of(request)
    return page(
        request,
        "enroll",
        roots=service.settings.sources,
        folders=await run_in_threadpool(folders, service.settings.sources),
        jobs=shown_jobs(runner_of(service), ENROLL),
        most=service.limits.body_bytes,
    )


@writing.post("/enroll/photos")
async def enroll(request: Request) -> Response:
    """Enrolls a photo, which is durable when the response comes, and says in a line what was done with it."""
    try:
        outcome = await enroll_photo(request, EnrollOptions())
    except (FaceprintError, Refusal) as error:
        refusal = error if isinstance(error, Refusal) else of_error(error)
        return page(request, "enrolled", status=refusal.status, outcome=None, refusal=refusal, person=None)
    if outcome.status is Status.REJECTED:
        refusal = rejection(outcome)
        return page(request, "enrolled", status=refusal.status, outcome=None, refusal=refusal, person=None)
    person = await run_in_threadpool(_person, service_of(request).gallery, outcome)
    return page(request, "enrolled", outcome=outcome, refusal=None, person=person)


@writing.post("/enroll/face")
async def enroll_face(request: Request, box: Annotated[str | None, Query(max_length=200)] = None) -> Response:
    """Enrolls one face of a photo that was searched for; `box` says which, for a model that finds faces."""
    service = service_of(request)
    photo, selection = await read_enrollment(request, EnrollOptions(), service.limits)
    photo = replace(photo, identity=(photo.identity or "").strip())
    if not photo.identity:
        raise InputError("There is no name; type whose face it is.")
    if box is None:
        assert service.writer is not None  # a process without one forwards the request
        future = service.writer.enroll(photo, selection, via=caller(request))
        outcome = await unless_gone(request, future, service.limits.answer_seconds)
    else:
        found = await run_in_threadpool(embed_face, service.gallery, photo, parse_box(box), service.limits)
        outcome = await change(request, found.enroll_into)
    if outcome.status is Status.REJECTED:
        raise rejection(outcome)
    person = await run_in_threadpool(_person, service.gallery, outcome)
    return page(request, "face_enrolled", outcome=outcome, person=person)


@writing.post("/enroll/jobs")
async def start_job(request: Request) -> Response:
    """Starts a job on folders of the machine."""
    form = await request.form()
    fields: dict[str, Any] = {
        "sources": [str(text).strip() for text in form.getlist("source")],
        "identity_from": str(form.get("identity_from", "")) or None,
    }
    try:
        job = IngestJob.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error.errors(include_input=False, include_url=False)) from error
    return see(address(await begin_job(request, job)))


def _person(gallery: Gallery, outcome: Outcome) -> int | None:
    """Returns the id of the person of a photo that was enrolled; None for no person."""
    with gallery.vault.store.read() as reader:
        return next(iter(reader.identities_of_faces(outcome.face_ids).values()), None)
