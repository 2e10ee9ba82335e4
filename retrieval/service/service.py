"""The `Service`: an open gallery, and all that answers requests about it."""

import os
from pathlib import Path

import numpy as np

from retrieval.gallery.gallery import Gallery
from retrieval.service.engine import SearchEngine
from retrieval.service.forwarding import Forwarder
from retrieval.service.jobs import JobRunner
from retrieval.service.metrics import Metrics
from retrieval.service.sessions import Sessions, new_key
from retrieval.service.settings import Settings
from retrieval.service.tokens import TokenRegistry, folder_of
from retrieval.service.writing import GalleryWriter

VIA = "faceprint serve"


class Service:
    """An open gallery and all that answers requests about it.

    Attributes:
        gallery, settings, limits: what is served, and how.
        metrics: counters.
        tokens: of the gallery.
        sessions: of the people who signed in to the page.
        needs_token: whether callers without a token are refused even if the gallery has none.
        engine: answers searches.
        writer, jobs: change the gallery; None in a process that leaves that to another one.
        forwarder: sends changes to that process; None in the process that makes them.
        counts: whether requests are counted here, and not by the process that forwards them.
        closing: whether the service is about to stop.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        needs_token: bool,
        writer_at: Path | None = None,
        counts: bool = True,
        session_key: str | None = None,
    ) -> None:
        """Opens the gallery and loads its model, so that the first request does not wait for it.

        Args:
            settings: what is served, and how.
            needs_token: refuse callers without a token.
            writer_at: the socket of the process that changes the gallery; None for this one.
            counts: count requests.
            session_key: signs the sessions of the page; the same in all processes. None makes one.

        Raises:
            FaceprintError: as `Gallery.open`, `Embedder.open` and `TokenRegistry`.
        """
        self.settings = settings
        self.limits = settings.limits
        self.tokens = TokenRegistry(folder_of(settings.place))
        self.sessions = Sessions(session_key or new_key(), self.tokens)
        self.needs_token = needs_token
        self.counts = counts
        self.closing = False
        self.gallery = _opened(settings)
        try:
            _warm(self.gallery)
        except BaseException:
            self.gallery.close()
            raise
        self.metrics = Metrics(self.gallery)
        observe = self.metrics.observe_batch
        self.engine = SearchEngine(self.gallery, self.limits, observe=observe)
        self.forwarder = None if writer_at is None else Forwarder(writer_at, self.limits)
        self.writer: GalleryWriter | None = None
        self.jobs: JobRunner | None = None
        if writer_at is None:
            self.writer = GalleryWriter(self.gallery, self.limits, observe=observe)
            self.jobs = JobRunner(self.gallery, self.limits)

    def begin_to_stop(self) -> None:
        """Says that the service is about to stop, so that jobs and streams end."""
        self.closing = True
        if self.jobs is not None:
            self.jobs.stop()

    def refresh(self) -> None:
        """Follows changes of the gallery by other processes, as a search does.

        A process that nobody asks would keep erased vectors in memory, and their disk space.
        """
        vault = self.gallery.vault
        with vault.store.read() as reader:
            vault.state(reader)

    def close(self) -> None:
        """Answers what was submitted, and closes the gallery."""
        self.engine.close()
        if self.jobs is not None:
            self.jobs.close()
        if self.writer is not None:
            self.writer.close()
        self.gallery.close()


def _opened(settings: Settings) -> Gallery:
    folder = settings.place.folder
    return Gallery.open(
        settings.place,
        device=settings.device,
        precision=settings.precision,
        read_only=folder is not None and folder.is_dir() and not os.access(folder, os.W_OK),
        via=VIA,
    )


def _warm(gallery: Gallery) -> None:
    """Loads the model and the vectors by a search with a grey picture."""
    size = gallery.bundle.input_size
    vectors = gallery.embedder.embed(np.full((1, size, size, 3), 128, np.uint8)).vectors
    gallery.embedder.photo_reader  # noqa: B018  it loads the face detector
    gallery.search_by_vectors(vectors, 1)
