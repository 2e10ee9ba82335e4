"""The `JobRunner`: long work on a gallery, one job after the other, in a thread that yields to requests.

What a job does is in `retrieval.service.work`. It is kept in memory: a service that ends stops it after the
current batch, and what was enrolled stays. The same job again enrolls what is left.
"""

import logging
import os
import threading
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final

from retrieval.database.records import utc_now
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import Interrupted, NotFound
from retrieval.gallery.gallery import Gallery
from retrieval.service import uploads
from retrieval.service.photos import require_detector
from retrieval.service.refusals import Code, of_error
from retrieval.service.settings import Limits
from retrieval.service.work import Ingest, UploadIngest, Watch, Work, do, sources_of
from retrieval.storage.any_vault import called_by

_LOG: Final = logging.getLogger("faceprint.service")

# Jobs that wait, and jobs that are remembered after their end.
MAX_WAITING: Final = 16
_MAX_ENDED: Final = 100

# Rejected photos that a job lists.
_MAX_REJECTED: Final = 1000

# How much lower the priority of a job's threads is than that of requests.
_NICE: Final = 10


class JobState(StrEnum):
    """The state of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether the job is over."""
        return self not in (JobState.WAITING, JobState.RUNNING)


@dataclass(slots=True, eq=False)
class Job:
    """A job and how far it is.

    Attributes:
        counts: photos by status, of a job that enrolls or that reads photos of strangers.
        done, total: units of work done and in all; 0 where that is not known.
        rejected: the first of the rejected photos.
        rejected_more: how many more there were.
        report: of the run, when it has ended.
        error: why it failed.
    """

    work: Work
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: JobState = JobState.WAITING
    created_at: str = field(default_factory=utc_now)
    started_at: str | None = None
    ended_at: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    done: int = 0
    total: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    rejected_more: int = 0
    report: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    stopping: bool = False

    def progress(self) -> dict[str, Any]:
        """Returns the job as values for JSON, without the rejected photos and the report."""
        return {
            "id": self.id,
            "kind": self.work.kind,
            "state": self.state,
            "sources": sources_of(self.work),
            "created_at": self.created_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "counts": dict(self.counts),
            "done": self.done,
            "total": self.total,
            "error": self.error,
        }

    def shown(self) -> dict[str, Any]:
        """Returns the whole job as values for JSON."""
        rejected = {"rejected": list(self.rejected), "rejected_more": self.rejected_more}
        return {**self.progress(), **rejected, "report": self.report}


class JobRunner:
    """Runs jobs on an open gallery, for callers in any thread."""

    def __init__(self, gallery: Gallery, limits: Limits) -> None:
        self._gallery = gallery
        self._limits = limits
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        uploads.remove_leftovers()
        self._thread = threading.Thread(target=self._run, name="faceprint-jobs", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> dict[str, Any] | None:
        """Adds a job and returns it; None if too many wait.

        The files of an upload are the job's from then on; without a job they are still the caller's.

        Raises:
            InputError: a selection is of no use with the gallery's model.
        """
        if isinstance(work, Ingest | UploadIngest):
            require_detector(self._gallery, work.selection)
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                return None
            job = Job(work)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify()
            return job.shown()

    def all(self) -> list[dict[str, Any]]:
        """Returns all jobs that are remembered, oldest first, without their details."""
        with self._changed:
            return [job.progress() for job in self._jobs.values()]

    def show(self, number: str) -> dict[str, Any]:
        """Returns a job.

        Raises:
            NotFound: there is none, or it is no longer remembered.
        """
        with self._changed:
            return self._job(number).shown()

    def progress(self, number: str) -> dict[str, Any]:
        """Returns how far a job is; NotFound as `show`."""
        with self._changed:
            return self._job(number).progress()

    def cancel(self, number: str) -> dict[str, Any]:
        """Asks a job to stop, which it does after the current batch; returns the job; NotFound as `show`."""
        with self._changed:
            job = self._job(number)
            job.stopping = True
            if job.state is JobState.WAITING:
                self._waiting.remove(job)
                self._end(job, JobState.CANCELLED)
            return job.shown()

    def stop(self) -> None:
        """Asks all jobs to stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """Stops, and waits for the current batch."""
        self.stop()
        self._thread.join()
        with self._changed:
            for job in self._waiting:
                _release(job.work)

    def _job(self, number: str) -> Job:
        job = self._jobs.get(number)
        if job is None:
            raise no_job(number)
        return job

    def _run(self) -> None:
        # Its threads inherit it. Where threads have no priority of their own, the job competes with requests.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                job = self._waiting.popleft()
                job.state, job.started_at = JobState.RUNNING, utc_now()
            self._do(job)

    def _do(self, job: Job) -> None:
        try:
            with called_by(job.work.via):
                report, interrupted = do(job.work, self._gallery, self._limits, self._watch(job))
        except Interrupted:
            with self._changed:
                self._end(job, JobState.CANCELLED)
            return
        except BaseException as error:  # the job has failed, and the next one goes on
            refusal = of_error(error if isinstance(error, Exception) else RuntimeError(str(error)))
            with self._changed:
                job.error = {"code": refusal.code, "message": refusal.message}
                self._end(job, JobState.FAILED)
            if refusal.code is Code.INTERNAL_ERROR:
                _LOG.exception("job %s failed", job.id)
            return
        with self._changed:
            job.report = report
            self._end(job, JobState.CANCELLED if interrupted else JobState.DONE)

    def _watch(self, job: Job) -> Watch:
        return Watch(partial(self._count, job), partial(self._note, job), partial(self._is_stopping, job))

    def _is_stopping(self, job: Job) -> bool:
        return job.stopping or self._closing

    def _note(self, job: Job, done: int, total: int) -> None:
        with self._changed:
            job.done, job.total = done, total

    def _count(self, job: Job, outcome: Outcome) -> None:
        with self._changed:
            job.counts[outcome.status] = job.counts.get(outcome.status, 0) + 1
            if outcome.status is not Status.REJECTED:
                return
            if len(job.rejected) >= _MAX_REJECTED:
                job.rejected_more += 1
                return
            job.rejected.append({"path": outcome.path, "reason": outcome.reason, "detail": outcome.detail})

    def _end(self, job: Job, state: JobState) -> None:
        _release(job.work)
        job.state, job.ended_at = state, utc_now()
        ended = [one.id for one in self._jobs.values() if one.state.is_end]
        for number in ended[:-_MAX_ENDED]:
            del self._jobs[number]


def _release(work: Work) -> None:
    """Removes the files of a work that is over."""
    if isinstance(work, UploadIngest):
        work.upload.close()


def no_job(number: str) -> NotFound:
    """Returns the error for an unknown job."""
    return NotFound(f"There is no job {number[:80]!a}, or it is no longer remembered.")
