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

# The variable of prometheus_client for a folder that several processes share. The process that starts several
# workers sets it for them: each writes its metrics there, and the one that is asked adds up those of all.
FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

# Upper bounds of the classes of the histograms: of seconds, and of queries.
_SECONDS_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_QUERIES_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128)

# The metric that only a follower has: a service of a copy that `faceprint follow` keeps up to date.
AGE: Final = "faceprint_gallery_age_seconds"


class Metrics:
    """Counters of requests and of the stages of answering; labels never hold a name or a path of a person.

    With several workers, each worker counts its own requests, and what is read here is the sum over all.

    Attributes:
        requests, seconds, pending: of requests; `service.gate` counts them.
        batch, stage_seconds: of the stages; see `observe_batch`.
    """

    def __init__(self, gallery: Gallery) -> None:
        """Starts all counters at 0; `gallery` is asked for its size when the metrics are read."""
        self._gallery = gallery
        self._registry = registry = CollectorRegistry()
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
            buckets=_SECONDS_BOUNDS,
            registry=registry,
        )
        self.pending = Gauge(
            "faceprint_pending_requests",
            "Requests that are read or answered now.",
            registry=registry,
            multiprocess_mode="livesum",  # of the workers that live: one that was killed has no requests
        )
        self.batch = Histogram(
            "faceprint_batch_queries",
            "Queries that passed a stage together.",
            ("stage",),
            buckets=_QUERIES_BOUNDS,
            registry=registry,
        )
        self.stage_seconds = Counter(
            "faceprint_stage_seconds",
            "Time that a stage worked, over all its threads.",
            ("stage",),
            registry=registry,
        )

    def observe_batch(self, stage: str, queries: int, seconds: float) -> None:
        """Counts a batch that passed a stage.

        Args:
            stage: its name, such as "embed".
            queries: how many queries passed together.
            seconds: the time that the stage took for them.
        """
        self.batch.labels(stage).observe(queries)
        self.stage_seconds.labels(stage).inc(seconds)

    def answered(self, *routes: str) -> tuple[int, float]:
        """Returns how many requests of some routes were answered, and the sum of their seconds."""
        registry = self._registry_of_all_workers()

        def total(name: str) -> float:
            values = (registry.get_sample_value(name, {"route": route}) for route in routes)
            return sum(value or 0.0 for value in values)

        return int(total("faceprint_request_seconds_count")), total("faceprint_request_seconds_sum")

    def text(self) -> bytes:
        """Returns all metrics, of all workers and of the gallery, in the format of `CONTENT_TYPE`."""
        # Two registries: the counters of several workers are read from files, and what is read from the
        # gallery when it is asked for would be missing there.
        of_gallery = CollectorRegistry()
        of_gallery.register(_GalleryMetrics(self._gallery))
        return generate_latest(self._registry_of_all_workers()) + generate_latest(of_gallery)

    def _registry_of_all_workers(self) -> CollectorRegistry:
        if FOLDER_VARIABLE not in os.environ:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry


class _GalleryMetrics(Collector):
    """The size, revision and age of the gallery, read from its tables whenever they are asked for."""

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
