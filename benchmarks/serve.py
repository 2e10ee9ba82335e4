"""What the service costs: answers per second and latency for several callers, beside the library alone.

    python -m benchmarks.serve --model MODEL --photos FOLDER [--strangers FOLDER] [--rows 10000]
        [--vectors FILE.npy]

Half of the photos are enrolled, with other embeddings beside them up to --rows faces; the other half and the
photos of strangers are asked about. The other embeddings are real ones by the same model (--vectors, as of
`benchmarks.search`), grown to as many as are needed (`benchmarks.growth`), or else random ones, for which no
codes pay: a search among them is slower than among real ones.

The library answers first, in batches and one by one; then `faceprint serve` on loopback, for each number of
callers, who each send the next photo when the answer to the one before has come. At last more callers than
the service admits. Prints one table and one JSON line: answers per second, their ratio to the library's in
batches, median and 99th percentile in ms, statuses; what the other embeddings are, and the bytes of a code of
theirs; and the memory of the service after a tenth of the requests and at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.galleries import faces
from benchmarks.growth import Growth, Vectors, isotropic
from retrieval.bulk.ingest import ingest_photos
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.sources import photos
from retrieval.system.cpu import usable_cores

_BATCH = 32
_PENDING = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder of a model")
    parser.add_argument("--photos", type=Path, required=True, help="a folder for each person")
    parser.add_argument("--strangers", type=Path, help="photos of people who are not enrolled")
    parser.add_argument("--vectors", type=Path, help="real embeddings by the model: float32 (n, d), .npy")
    parser.add_argument("--rows", type=int, default=10_000, help="faces in the gallery")
    parser.add_argument("--callers", default="1,4,16,64", help="numbers of callers")
    parser.add_argument("--requests", type=int, default=400, help="requests for each number of callers")
    parser.add_argument("--workers", type=int, default=1, help="processes that answer")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faceprint-serve-") as name:
        folder = Path(name) / "gallery"
        queries, gallery = _enrolled(folder, asked)
        rows = [*_library(folder, queries, asked.requests)]
        with _served(folder, asked.workers) as server:
            rows += _service(server, queries, asked)
    batched = rows[0]["answers_per_second"]
    for row in rows:
        row["ratio"] = round(row["answers_per_second"] / batched, 3)
        print(
            f"{row['who']:28}{row['answers_per_second']:9.1f}/s{row['ratio']:7.2f}"
            f"{row['p50_ms']:9.1f} ms{row['p99_ms']:9.1f} ms  {row['statuses']}"
        )
    about = {"rows": asked.rows, "workers": asked.workers, "cores": usable_cores()}
    print(json.dumps({"measured": rows, **about, **gallery, "memory_mb": server.memory}))


def _enrolled(folder: Path, asked: argparse.Namespace) -> tuple[list[bytes], dict[str, Any]]:
    """Makes the gallery; returns the photos to ask about, and what its other vectors are, and their codes."""
    bundle = ModelBundle.load(asked.model)
    description, blocks = other_vectors(asked.vectors, bundle.dimension)
    every = list(photos.scan([asked.photos]))
    with Gallery.create(folder, bundle) as gallery:
        ingest_photos(gallery, every[::2])
        number = gallery.info().faces
        for vectors in blocks(max(0, asked.rows - number)):
            gallery.enroll_vectors(faces(number, len(vectors)), vectors)
            number += len(vectors)
        coordinates = gallery.optimize().coordinates
    strangers = [] if asked.strangers is None else list(photos.scan([asked.strangers]))
    queries = [Path(one.path).read_bytes() for one in (*every[1::2], *strangers) if one.path is not None]
    return queries, {"vectors": description, "coordinates": coordinates}


def other_vectors(path: Path | None, dimension: int) -> tuple[str, Callable[[int], Iterator[Vectors]]]:
    """Returns what the vectors beside the photos are, and a function from a number of rows to their blocks.

    Args:
        path: of real embeddings to grow; None for random ones.
        dimension: of the model.
    """
    if path is None:
        return "random", lambda rows: isotropic(rows, dimension, seed=0)
    real = np.asarray(np.load(path), np.float32)
    if real.ndim != 2 or real.shape[1] != dimension:
        sys.exit(
            f"the embeddings in {path} must have shape (n, {dimension}), as of the model, not {real.shape}"
        )
    growth = Growth.of(real)
    description = f"grown from {len(real):,} embeddings ({path.name}), noise {growth.noise:.3f}"
    return description, lambda rows: growth.blocks(rows, seed=0)


def _library(folder: Path, queries: Sequence[bytes], requests: int) -> Iterator[dict[str, Any]]:
    """Yields the figures of the library: in batches, and one by one."""
    with Gallery.open(folder) as gallery:
        gallery.search_many(queries[:_BATCH])
        for name, size in (("library, batches of 32", _BATCH), ("library, one by one", 1)):
            times = []
            following = cycle(queries)
            for _ in range(-(-requests // size)):
                some = list(islice(following, size))
                began = time.perf_counter()
                gallery.search_many(some)
                times.append(time.perf_counter() - began)
            yield _row(name, len(times) * size, sum(times), times, Counter({200: len(times) * size}))


@dataclass
class _Server:
    url: str
    process: "subprocess.Popen[str]"
    memory: list[float] = field(default_factory=list)

    def remember_memory(self) -> None:
        """Notes the memory of all processes of the service in MiB, shared pages by their share."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        kib = 0
        for pid in [self.process.pid, *children]:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        self.memory.append(round(kib / 1024, 1))


@contextmanager
def _served(folder: Path, workers: int) -> Iterator[_Server]:
    command = [sys.executable, "-m", "retrieval.cli.app", "serve", os.fspath(folder), "--port", "0"]
    options = ["--workers", str(workers), "--max-pending", str(_PENDING)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield _Server(process.stdout.readline().split(" at ")[1].split(";")[0], process)
    finally:
        process.terminate()
        process.communicate()


def _service(
    server: _Server, queries: Sequence[bytes], asked: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields the figures of the service for each number of callers, and for more than it admits."""
    _called(server, queries, callers=1, requests=max(1, asked.requests // 10))
    server.remember_memory()
    for callers in map(int, asked.callers.split(",")):
        yield _called(server, queries, callers=callers, requests=asked.requests)
    yield _called(server, queries, callers=3 * _PENDING * asked.workers, requests=asked.requests)
    server.remember_memory()


def _called(server: _Server, queries: Sequence[bytes], *, callers: int, requests: int) -> dict[str, Any]:
    times: list[float] = []
    statuses: Counter[int] = Counter()
    remaining = iter(range(requests))
    taking = threading.Lock()

    def call(client: httpx.Client) -> None:
        while True:
            with taking:
                number = next(remaining, None)
            if number is None:
                return
            began = time.perf_counter()
            response = client.post("/v1/search", files={"image": queries[number % len(queries)]})
            spent = time.perf_counter() - began
            with taking:
                statuses[response.status_code] += 1
                if response.is_success:
                    times.append(spent)

    with ExitStack() as stack, ThreadPoolExecutor(callers) as threads:
        # Before the clock starts: making a client takes longer than many an answer.
        clients = [
            stack.enter_context(httpx.Client(base_url=server.url, timeout=600, trust_env=False, verify=False))
            for _ in range(callers)
        ]
        began = time.perf_counter()
        for one in [threads.submit(call, client) for client in clients]:
            one.result()
        seconds = time.perf_counter() - began
    return _row(f"service, {callers} callers", len(times), seconds, times, statuses)


def _row(
    who: str, answers: int, seconds: float, times: Sequence[float], statuses: "Counter[int]"
) -> dict[str, Any]:
    return {
        "who": who,
        "answers_per_second": round(answers / seconds, 2),
        "p50_ms": round(1e3 * float(np.quantile(times, 0.5)), 2),
        "p99_ms": round(1e3 * float(np.quantile(times, 0.99)), 2),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
    }


if __name__ == "__main__":
    main()
