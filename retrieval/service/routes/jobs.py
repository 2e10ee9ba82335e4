"""The routes of jobs: start them, watch, cancel."""

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from retrieval.errors import NotFound
from retrieval.service.jobs import JobRunner, JobState, no_job
from retrieval.service.queries import UPLOAD_BODY, read_upload
from retrieval.service.refusals import Code, Refusal
from retrieval.service.routes.common import REFUSALS, caller, check_scope, in_writer, needs, service_of
from retrieval.service.schemas import (
    AuditJob,
    CalibrateJob,
    EvaluateJob,
    IngestJob,
    JobDetails,
    JobList,
    NewJob,
    ReembedJob,
    UploadOptions,
)
from retrieval.service.service import Service
from retrieval.service.tokens import Scope
from retrieval.service.uploads import Upload
from retrieval.service.work import (
    Audit,
    Calibrate,
    Evaluate,
    Ingest,
    Reembed,
    UploadIngest,
    Work,
    allowed_folder,
    allowed_model,
    allowed_sources,
)

EVENTS: Final = "text/event-stream"

# How often a job is looked at for those who watch it, and how often they hear that the service lives.
_LOOK_SECONDS: Final = 0.2
_ALIVE_SECONDS: Final = 15.0

JobId = Annotated[str, Path(max_length=64, description="The id of a job.")]

reading = APIRouter(prefix="/v1", tags=["jobs"], responses=REFUSALS, route_class=in_writer(Scope.READ))
watching = APIRouter(prefix="/v1", tags=["jobs"], responses=REFUSALS)
writing = APIRouter(prefix="/v1", tags=["jobs"], responses=REFUSALS, route_class=in_writer(Scope.WRITE))


@writing.post("/jobs", response_model=JobDetails, status_code=HTTPStatus.ACCEPTED)
async def start_job(request: Request, job: NewJob) -> Response:
    """Enrolls photos; audits, calibrates or measures the gallery; embeds it again; one job after the other.

    Photos and models come from folders and archives below those that `faceprint serve --sources` names.
    Another model takes the scope admin.
    """
    return JSONResponse(await begin_job(request, job), status_code=HTTPStatus.ACCEPTED)


@writing.post(
    "/jobs/uploads",
    response_model=JobDetails,
    status_code=HTTPStatus.ACCEPTED,
    openapi_extra=UPLOAD_BODY,
)
async def start_upload(request: Request, options: Annotated[UploadOptions, Query()]) -> Response:
    """Enrolls several photos, or those of a zip, that are sent in a form.

    Photos get the name `identity`, those of a zip the names of its folders. The files are kept until the job
    has ended; what it has enrolled is durable then.
    """
    service = service_of(request)
    sent, body = await read_upload(request, options, service.limits)
    upload = await run_in_threadpool(Upload, sent)
    try:
        work = UploadIngest(upload, body.identity, body.identity_from, body.selection(), caller(request))
        job = _submitted(service, work)
    except BaseException:
        upload.close()
        raise
    return JSONResponse(job, status_code=HTTPStatus.ACCEPTED)


async def begin_job(request: Request, job: NewJob) -> dict[str, Any]:
    """Returns a new job.

    Raises:
        InputError: as `allowed_sources` and `JobRunner.submit`.
        Refusal: too many jobs wait.
    """
    return _submitted(service_of(request), await _work(request, job))


def _submitted(service: Service, work: Work) -> dict[str, Any]:
    started = runner_of(service).submit(work)
    if started is None:
        raise Refusal(
            HTTPStatus.TOO_MANY_REQUESTS,
            Code.TOO_MANY_REQUESTS,
            "As many jobs wait as the service takes; send this one again when some are done.",
            headers={"Retry-After": "60"},
        )
    return started


@reading.get("/jobs", response_model=JobList)
async def list_jobs(request: Request) -> dict[str, Any]:
    """The jobs since the start of the service, of which it remembers the last hundred."""
    return {"jobs": runner_of(service_of(request)).all()}


@reading.get("/jobs/{job}", response_model=JobDetails)
async def show_job(request: Request, job: JobId) -> dict[str, Any]:
    """A job: how far it is, the rejected photos and their reasons, and at its end the report."""
    return runner_of(service_of(request)).show(job)


@writing.post("/jobs/{job}/cancel", response_model=JobDetails)
async def cancel_job(request: Request, job: JobId) -> dict[str, Any]:
    """Stops a job after its current batch; what it has enrolled stays."""
    return runner_of(service_of(request)).cancel(job)


@watching.get(
    "/jobs/{job}/events",
    dependencies=[Depends(needs(Scope.READ))],
    response_class=Response,
    responses={200: {"content": {EVENTS: {"schema": {"type": "string"}}}}},
)
async def watch_job(request: Request, job: JobId) -> Response:
    """Server-sent events: `progress` whenever the job has gone on, and `end` when it is over."""
    first = await _progress(request, job)  # an unknown job is an error, not a stream
    return StreamingResponse(_events(request, job, first), media_type=EVENTS)


async def _work(request: Request, job: NewJob) -> Work:
    """Returns the work of a job.

    Raises:
        InputError: a source or a model is not below the folders of the service.
        Refusal: the token does not allow the work.
    """
    via, roots = caller(request), service_of(request).settings.sources
    match job:
        case AuditJob():
            return Audit(job.sample, job.seed, job.limit, via)
        case CalibrateJob():
            named = job.strangers or []
            sources = await run_in_threadpool(allowed_sources, named, roots, field="strangers")
            return Calibrate(sources, job.fpir, job.sample, job.seed, via)
        case ReembedJob():
            check_scope(request, Scope.ADMIN)
            bundle = await run_in_threadpool(allowed_model, job.model, roots)
            return Reembed(bundle, job.switch, job.give_up, via)
        case EvaluateJob():
            data = await run_in_threadpool(allowed_folder, job.data, roots, field="data")
            settings = service_of(request).settings
            device, precision = settings.device, settings.precision
            return Evaluate(
                data, job.protocol, job.val_fraction, job.min_images, job.seed, device, precision, via
            )
        case IngestJob():
            sources = await run_in_threadpool(allowed_sources, job.sources, roots)
            return Ingest(sources, job.identity_from, job.selection(), via)


def runner_of(service: Service) -> JobRunner:
    """Returns what runs the jobs of a service."""
    assert service.jobs is not None  # a process without jobs forwards the request
    return service.jobs


async def _progress(request: Request, job: str) -> dict[str, Any]:
    """Returns how far a job is, from this process or from the one that runs it.

    Raises:
        NotFound: there is no such job.
        Refusal: the other process cannot say it.
    """
    service = service_of(request)
    if service.forwarder is None:
        return runner_of(service).progress(job)
    told = await service.forwarder.get(request, "/v1/jobs")
    if told.status_code != HTTPStatus.OK:
        error = json.loads(bytes(told.body))["error"]
        raise Refusal(told.status_code, Code(error["code"]), error["message"])
    for one in json.loads(bytes(told.body))["jobs"]:
        if one["id"] == job:
            progress: dict[str, Any] = one
            return progress
    raise no_job(job)


async def _events(request: Request, job: str, progress: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yields an event whenever the job has gone on, until it is over or the service stops."""
    service = service_of(request)
    known, silent = None, 0.0
    while not service.closing:
        is_over = JobState(progress["state"]).is_end
        if progress != known:
            known, silent = progress, 0.0
            yield _event("end" if is_over else "progress", progress)
        elif silent >= _ALIVE_SECONDS:
            silent = 0.0
            yield b": the service lives\n\n"
        if is_over:
            return
        await asyncio.sleep(_LOOK_SECONDS)
        silent += _LOOK_SECONDS
        try:
            progress = await _progress(request, job)
        except (NotFound, Refusal):
            return  # the process with the job has ended, and the job with it


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
