"""Jobs on the page: enrollments on the page of enrollment, the other ones on the page of health."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from retrieval.service.jobs import JobRunner, JobState
from retrieval.service.page.rendering import check_form, page, see
from retrieval.service.routes.common import in_writer, service_of
from retrieval.service.routes.jobs import JobId, runner_of
from retrieval.service.tokens import Scope

ENROLL: Final = "/enroll"
HEALTH: Final = "/health"

# The page that shows the jobs of a kind. Audits are on the page of doubts, in a form of its own.
_PAGES: Final = {
    "ingest": ENROLL,
    "upload": ENROLL,
    "calibrate": HEALTH,
    "reembed": HEALTH,
    "evaluate": HEALTH,
}

# Folders that a form proposes.
_MAX_FOLDERS: Final = 200

# Jobs are known to the process that runs them alone.
router = APIRouter(include_in_schema=False, route_class=in_writer(Scope.READ))
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)


@router.get("/jobs/{job}")
async def show_job(request: Request, job: JobId) -> Response:
    """A job, as a part of the page."""
    return page(request, "job", job=shown(runner_of(service_of(request)).show(job)))


@writing.post("/jobs/{job}/cancel")
async def cancel_job(request: Request, job: JobId) -> Response:
    """Stops a job."""
    return see(address(runner_of(service_of(request)).cancel(job)))


def shown_jobs(runner: JobRunner, on: str) -> list[dict[str, Any]]:
    """Returns the jobs of a page as its template takes them, the newest first."""
    wanted = [one["id"] for one in runner.all() if _PAGES.get(one["kind"]) == on]
    return [shown(runner.show(number)) for number in reversed(wanted)]


def address(job: dict[str, Any]) -> str:
    """Returns where the page shows a job."""
    return f"{_PAGES.get(job['kind'], '/doubts')}#job-{job['id']}"


def shown(job: dict[str, Any]) -> dict[str, Any]:
    """Returns a job as the template takes it: with `is_end`, and with the figures of an evaluation."""
    figures = _figures(job["report"]) if job["kind"] == "evaluate" and job["report"] else []
    return {**job, "is_end": JobState(job["state"]).is_end, "figures": figures}


def folders(roots: Sequence[Path]) -> list[str]:
    """Returns the folders that jobs may read, and those directly in them."""
    found: list[str] = []
    for root in roots:
        found.append(os.fspath(root))
        try:
            found += sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
        except OSError:
            continue  # the job itself says what is wrong with it
    return found[:_MAX_FOLDERS]


def _figures(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the main figures of an evaluation with their names; see `training.evaluation.measurements`."""
    if report["closed"] is not None:
        closed = report["closed"]
        found = [("Closest photo is of the right person", closed["ranking"]["closest"])]
        if closed["classifier"] is not None:
            found.append(("Classifier names the right person", closed["classifier"]["accuracy"]))
        return found
    identification = report["open"]["identification"]
    missed = [
        (f"Enrolled people missed, if {100 * point['rate']:g} % of strangers may get a name", point["missed"])
        for point in identification["points"]
    ]
    return [*missed, ("Closest photo is of the right person", identification["ranking"]["closest"])]
