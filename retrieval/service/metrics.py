"""The metrics of the service, in the text format of Prometheus."""

import os
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from retrieval.gallery.gallery import Gallery

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Set by the process that starts several workers: each writes its metrics there, and any of them answers.
FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128)

# The metric that only a follower has.
AGE: Final = "faceprint_gallery_age_seconds"


class Metrics:
    """Counters of requests and of the stages of answering; labels never hold a name or a path of a person."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "faceprint_requests",
            "Requests by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "faceprint_request_seconds",
            "Time from the header of a request to the end of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.pending = Gauge(
            "faceprint_pending_requests",
            "Requests that are read or answered now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.batch = Histogram(
            "faceprint_batch_queries",
            "Queries that passed a stage together.",
            ("stage",),
            buckets=_BATCH,
            registry=registry,
        )
        self.stage_seconds = Counter(
            "faceprint_stage_seconds",
            "Time that a stage worked, over all its threads.",
            ("stage",),
            registry=registry,
        )

    def observe_batch(self, stage: str, queries: int, seconds: float) -> None:
        """Counts a batch of a stage."""
        self.batch.labels(stage).observe(queries)
        self.stage_seconds.labels(stage).inc(seconds)

    def answered(self, *routes: str) -> tuple[int, float]:
        """Returns how many requests of some routes were answered, and their seconds together."""
        registry = self._all()

        def total(name: str) -> float:
            values = (registry.get_sample_value(name, {"route": route}) for route in routes)
            return sum(value or 0.0 for value in values)

        return int(total("faceprint_request_seconds_count")), total("faceprint_request_seconds_sum")

    def text(self) -> bytes:
        """Returns all metrics, of all workers, and the size of the gallery."""
        return generate_latest(self._all()) + self._of_gallery()

    def _all(self) -> CollectorRegistry:
        """Returns the counters of all workers."""
        if FOLDER_VARIABLE not in os.environ:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry

    def _of_gallery(self) -> bytes:
        registry = CollectorRegistry()
        registry.register(_GallerySize(self._gallery))
        return generate_latest(registry)


class _GallerySize(Collector):
    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery

    def collect(self) -> Iterator[Metric]:
        vault = self._gallery.vault
        with vault.store.read() as reader:
            state = vault.state(reader)
        yield GaugeMetricFamily("faceprint_gallery_faces", "Faces in the gallery.", value=state.faces)
        yield GaugeMetricFamily(
            "faceprint_gallery_revision", "Rises with each change of the gallery.", value=state.revision
        )
        if vault.follower is not None:
            yield GaugeMetricFamily(
                AGE,
                "Seconds since the publisher said that this copy is the gallery's state.",
                value=vault.follower.current().age(),
            )
