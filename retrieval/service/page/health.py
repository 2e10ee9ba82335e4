"""The page of health: how large and how fast the gallery is, its model, its calibration and its backups."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

import retrieval
from retrieval.database.records import AuditEntry, Calibration
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.search.decisions import limit
from retrieval.service.page.rendering import page
from retrieval.service.routes.common import ServiceOf, needs
from retrieval.service.service import Service
from retrieval.service.tokens import Scope

# Entries of the audit log that are shown.
_ENTRIES: Final = 12
_SEARCHES: Final = ("/v1/search", "/search")
# What changes nothing that a backup of before lacks.
_HARMLESS: Final = frozenset({"backup", "export", "compact", "optimize"})

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Scope.READ))])


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the service is, measured since its start, and how fast photos were enrolled last.

    Attributes:
        searches: requests for a search that were answered.
        mean_ms: milliseconds of one of them, in the mean; None without one.
        enrolled, seconds: faces of the last enrollment of the audit log that took a second or more, and how
            long it took; None without one.
    """

    searches: int
    mean_ms: float | None
    enrolled: int | None
    seconds: float | None


@router.get("/health")
async def show_health(request: Request, service: ServiceOf) -> Response:
    """What is known of the gallery and of the service."""
    return page(request, "health", **await run_in_threadpool(_facts, service))


def _facts(service: Service) -> dict[str, Any]:
    gallery = service.gallery
    log = gallery.audit_log()
    calibration = gallery.calibration()
    info = gallery.info()
    return {
        "info": info,
        "version": retrieval.__version__,
        "pace": _pace(service, log),
        "bundle": gallery.bundle,
        "card": _card(gallery.bundle),
        "calibration": calibration,
        "point": None if calibration is None else calibration.point(),
        "is_outgrown": _is_outgrown(gallery, calibration, info.faces),
        "backup": _last(log, "backup"),
        "changed": next((one.ended_at for one in reversed(log) if one.action not in _HARMLESS), None),
        "log": log[: -_ENTRIES - 1 : -1],
    }


def _pace(service: Service, log: Sequence[AuditEntry]) -> Pace:
    searches, seconds = service.metrics.answered(*_SEARCHES)
    enrolled = next((one for one in reversed(log) if one.action == "enroll" and _seconds(one) >= 1), None)
    return Pace(
        searches,
        1e3 * seconds / searches if searches else None,
        None if enrolled is None else enrolled.faces,
        None if enrolled is None else _seconds(enrolled),
    )


def _seconds(entry: AuditEntry) -> float:
    began, ended = map(datetime.fromisoformat, (entry.began_at, entry.ended_at))
    return (ended - began).total_seconds()


def _last(log: Sequence[AuditEntry], action: str) -> AuditEntry | None:
    return next((one for one in reversed(log) if one.action == action), None)


def _is_outgrown(gallery: Gallery, calibration: Calibration | None, faces: int) -> bool:
    found = limit(calibration, faces, None, None, str(gallery.folder))
    return found is not None and found.outgrown


def _card(bundle: ModelBundle) -> list[str]:
    """Returns the lines of the model card; none where the model has no card, or it cannot be read."""
    try:
        return bundle.description_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
