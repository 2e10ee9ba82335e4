"""The page of enrollment: photos that a browser sends one by one, and jobs on folders of the machine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import FaceprintError
from retrieval.gallery.gallery import Gallery
from retrieval.service.jobs import JobState
from retrieval.service.page.rendering import check_form, page, see
from retrieval.service.refusals import Refusal, of_error, of_validation
from retrieval.service.routes.common import in_writer, service_of
from retrieval.service.routes.faces import enroll_photo, rejection
from retrieval.service.routes.jobs import JobId, begin_job, runner_of
from retrieval.service.schemas import EnrollOptions, IngestJob
from retrieval.service.tokens import Scope

# Folders that the page proposes.
_MAX_FOLDERS: Final = 200

# Jobs are known to the process that runs them alone.
router = APIRouter(include_in_schema=False, route_class=in_writer(Scope.WRITE))
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)


@router.get("/enroll")
async def show_enroll(request: Request) -> Response:
    """Where photos are enrolled."""
    service = service_of(request)
    jobs = runner_of(service)
    return page(
        request,
        "enroll",
        roots=service.settings.sources,
        folders=await run_in_threadpool(_folders, service.settings.sources),
        # Audits are on the page of doubts.
        jobs=[jobs.show(one["id"]) for one in reversed(jobs.all()) if one["kind"] != "audit"],
        is_end=_is_end,
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
    started = await begin_job(request, job)
    return see(f"/enroll#job-{started['id']}")


@router.get("/enroll/jobs/{job}")
async def show_job(request: Request, job: JobId) -> Response:
    """A job, as a part of the page."""
    return page(request, "job", job=runner_of(service_of(request)).show(job), is_end=_is_end)


@writing.post("/enroll/jobs/{job}/cancel")
async def cancel_job(request: Request, job: JobId) -> Response:
    """Stops a job after its current batch."""
    runner_of(service_of(request)).cancel(job)
    return see(f"/enroll#job-{job}")


def _is_end(job: dict[str, Any]) -> bool:
    return JobState(job["state"]).is_end


def _person(gallery: Gallery, outcome: Outcome) -> int | None:
    """Returns the id of the person of a photo that was enrolled; None for no person."""
    with gallery.vault.store.read() as reader:
        return next(iter(reader.identities_of_faces(outcome.face_ids).values()), None)


def _folders(roots: Sequence[Path]) -> list[str]:
    """Returns the folders that jobs may enroll, and those directly in them."""
    found: list[str] = []
    for root in roots:
        found.append(os.fspath(root))
        try:
            found += sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
        except OSError:
            continue  # the job itself says what is wrong with it
    return found[:_MAX_FOLDERS]
