"""The page of health: size, pace, model, calibration and backups of the gallery, and jobs that measure it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

import retrieval
from retrieval.database.records import AuditEntry, Calibration
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.search.decisions import limit
from retrieval.service.page.jobs import HEALTH, address, folders, shown_jobs
from retrieval.service.page.rendering import check_form, page, see
from retrieval.service.refusals import of_validation
from retrieval.service.routes.common import ServiceOf, in_writer
from retrieval.service.routes.jobs import begin_job, runner_of
from retrieval.service.schemas import EvaluateJob
from retrieval.service.service import Service
from retrieval.service.tokens import Scope

# Entries of the audit log that are shown.
_ENTRIES: Final = 12
# Newest enrollments among which one that took long is looked for.
_ENROLLMENTS: Final = 100
_SEARCHES: Final = ("/v1/search", "/search")
# What changes nothing that a backup of before lacks.
_HARMLESS: Final = frozenset({"backup", "export", "compact", "optimize"})

# The process that runs the jobs shows them.
router = APIRouter(include_in_schema=False, route_class=in_writer(Scope.READ))
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the service is, measured since its start, and how fast photos were enrolled last.

    Attributes:
        searches: requests for a search that were answered.
        mean_ms: milliseconds of one of them, in the mean; None without one.
        enrolled, seconds: faces of the last enrollment that took a second or more, and how long it took; None
            if none of the newest ones did.
    """

    searches: int
    mean_ms: float | None
    enrolled: int | None
    seconds: float | None


@router.get("/health")
async def show_health(request: Request, service: ServiceOf) -> Response:
    """What is known of the gallery and of the service."""
    return page(
        request,
        "health",
        **await run_in_threadpool(_facts, service),
        roots=service.settings.sources,
        folders=await run_in_threadpool(folders, service.settings.sources),
        jobs=shown_jobs(runner_of(service), HEALTH),
    )


@writing.post("/health/evaluations")
async def start_evaluation(request: Request) -> Response:
    """Measures the gallery, or its model, on photos of a folder of the machine."""
    form = await request.form()
    fields = {name: str(form.get(name, "")).strip() for name in ("data", "protocol")}
    try:
        job = EvaluateJob.model_validate({"kind": "evaluate", **fields})
    except ValidationError as error:
        raise of_validation(error.errors(include_input=False, include_url=False)) from error
    return see(address(await begin_job(request, job)))


def _facts(service: Service) -> dict[str, Any]:
    gallery = service.gallery
    with gallery.vault.store.read() as reader:
        log = reader.newest_audit_entries(_ENTRIES)
        enrollments = reader.newest_audit_entries(_ENROLLMENTS, actions=["enroll"])
        backup = _first(reader.newest_audit_entries(1, actions=["backup"]))
        change = _first(reader.newest_audit_entries(1, without=_HARMLESS))
    calibration = gallery.calibration()
    info = gallery.info()
    return {
        "info": info,
        "version": retrieval.__version__,
        "pace": _pace(service, enrollments),
        "bundle": gallery.bundle,
        "card": _card(gallery.bundle),
        "calibration": calibration,
        "point": None if calibration is None else calibration.point(),
        "is_outgrown": _is_outgrown(gallery, calibration, info.faces),
        "backup": backup,
        "changed": None if change is None else change.ended_at,
        "log": log,
    }


def _pace(service: Service, enrollments: Sequence[AuditEntry]) -> Pace:
    searches, seconds = service.metrics.answered(*_SEARCHES)
    enrolled = next((one for one in enrollments if _seconds(one) >= 1), None)
    return Pace(
        searches,
        1e3 * seconds / searches if searches else None,
        None if enrolled is None else enrolled.faces,
        None if enrolled is None else _seconds(enrolled),
    )


def _seconds(entry: AuditEntry) -> float:
    began, ended = map(datetime.fromisoformat, (entry.began_at, entry.ended_at))
    return (ended - began).total_seconds()


def _first(entries: Sequence[AuditEntry]) -> AuditEntry | None:
    return entries[0] if entries else None


def _is_outgrown(gallery: Gallery, calibration: Calibration | None, faces: int) -> bool:
    found = limit(calibration, faces, None, None, gallery.name)
    return found is not None and found.outgrown


def _card(bundle: ModelBundle) -> list[str]:
    """Returns the lines of the model card; none where the model has no card, or it cannot be read."""
    try:
        return bundle.description_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
