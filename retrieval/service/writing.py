"""The `GalleryWriter`: all changes of a gallery by the service, one after the other, in one thread.

Photos that wait to be enrolled are embedded and committed together: one transaction, durable before any of
them is answered. The audit log names the token of the caller.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Final, TypeVar

from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import Prepared
from retrieval.errors import ModelMismatch
from retrieval.gallery.gallery import Gallery
from retrieval.images.decoders import decode_here
from retrieval.images.photo_reader import FaceSelection
from retrieval.service.batching import BatchWorker, reject, resolve
from retrieval.service.engine import Observe
from retrieval.service.photos import check_pixels, require_detector
from retrieval.service.settings import Limits
from retrieval.sources.photos import Photo
from retrieval.storage.any_vault import called_by
from retrieval.system.cpu import reading_threads

_T = TypeVar("_T")

# The most changes that are taken from the queue together.
_BATCH: Final = 32

# How often a photo is read while the gallery switches models.
_ATTEMPTS: Final = 5


@dataclass(slots=True, eq=False)
class _Enrollment:
    photo: Photo
    selection: FaceSelection
    via: str
    future: "Future[Outcome]" = field(default_factory=Future)
    prepared: Prepared | Outcome | None = None
    attempts: int = 0


@dataclass(slots=True, eq=False)
class _Change:
    work: Callable[[Gallery], Any]
    via: str
    future: "Future[Any]" = field(default_factory=Future)


class GalleryWriter:
    """Changes an open gallery, for callers in any thread."""

    def __init__(
        self,
        gallery: Gallery,
        limits: Limits,
        *,
        observe: Observe = lambda stage, items, seconds: None,
    ) -> None:
        """Starts the threads.

        Args:
            gallery: the gallery; it outlives the writer.
            limits: of requests.
            observe: is told of each batch.
        """
        self._gallery = gallery
        self._limits = limits
        self._observe = observe
        self._readers = ThreadPoolExecutor(reading_threads(), thread_name_prefix="faceprint-prepare")
        self._changes = BatchWorker("faceprint-change", self._work, max_items=_BATCH, on_error=_fail)

    def enroll(self, photo: Photo, selection: FaceSelection, *, via: str) -> "Future[Outcome]":
        """Returns the future outcome of a photo, which is durable then.

        The future raises UnreadableImage for a photo with too many pixels, and else as `Gallery.enroll`.

        Args:
            photo: with its bytes in `content`.
            selection: which faces of it, for a model with a face detector.
            via: the caller in the audit log.

        Raises:
            InputError: a selection is of no use with the gallery's model.
        """
        require_detector(self._gallery, selection)
        task = _Enrollment(photo, selection, via)
        self._readers.submit(self._prepare, task)
        return task.future

    def change(self, work: Callable[[Gallery], _T], *, via: str) -> "Future[_T]":
        """Returns the future result of `work` on the gallery, which runs in the thread of the writer."""
        task = _Change(work, via)
        self._changes.put(task)
        return task.future

    def close(self) -> None:
        """Makes the changes that were asked for, and ends the threads."""
        self._readers.shutdown()
        self._changes.close()

    def _prepare(self, task: _Enrollment) -> None:
        """Stage 1, in one of several threads: reads the photo."""
        if task.future.cancelled():
            return
        began = time.perf_counter()
        try:
            if isinstance(task.photo.content, bytes):
                check_pixels(task.photo.content, self._limits)
            decode = partial(decode_here, seconds=self._limits.photo_seconds)
            [task.prepared] = self._gallery.prepare_many(
                [task.photo], decode=decode, selection=task.selection
            )
        except BaseException as error:  # the caller waits for an outcome, whatever happened
            reject(task.future, error)
            return
        self._observe("prepare", 1, time.perf_counter() - began)
        self._changes.put(task)

    def _work(self, tasks: "list[_Enrollment | _Change]") -> None:
        """Stage 2, in one thread: makes the changes in the order in which they came."""
        began = time.perf_counter()
        for via, some in groupby(_not_cancelled(tasks), key=lambda task: task.via):
            with called_by(via):
                for enrolls, same in groupby(some, key=lambda task: isinstance(task, _Enrollment)):
                    if enrolls:
                        self._enroll([task for task in same if isinstance(task, _Enrollment)])
                    else:
                        self._change([task for task in same if isinstance(task, _Change)])
        self._observe("change", len(tasks), time.perf_counter() - began)

    def _enroll(self, tasks: list[_Enrollment]) -> None:
        try:
            outcomes = self._gallery.enroll_prepared([one.prepared for one in tasks if one.prepared])
        except ModelMismatch as error:
            for task in tasks:
                self._prepare_again(task, error)
        except BaseException as error:  # other changes of the batch go on
            _fail(tasks, error)
        else:
            for task, outcome in zip(tasks, outcomes, strict=True):
                resolve(task.future, outcome)

    def _prepare_again(self, task: _Enrollment, error: ModelMismatch) -> None:
        task.attempts += 1
        if task.attempts < _ATTEMPTS:
            self._readers.submit(self._prepare, task)
        else:
            reject(task.future, error)

    def _change(self, tasks: list[_Change]) -> None:
        for task in tasks:
            try:
                resolve(task.future, task.work(self._gallery))
            except BaseException as error:  # other changes of the batch go on
                reject(task.future, error)


def _not_cancelled(tasks: "list[_Enrollment | _Change]") -> "Iterator[_Enrollment | _Change]":
    return (task for task in tasks if not task.future.cancelled())


def _fail(tasks: Any, error: BaseException) -> None:
    for task in tasks:
        reject(task.future, error)
