"""Costs of a growing gallery: enrolling, opening, refreshing readers, forgetting, verifying, backing up.

    python -m benchmarks.store [--rows 1000000] [--folder FOLDER] [--singles 1000]

The vectors are 2048 random numbers, because the costs do not depend on their values. Every row becomes
durable by the same calls that a pipeline makes. Prints one table, a column for each size, and one JSON line.
A million rows need 20 GB in FOLDER (by default a temporary one), and are deleted afterwards.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.galleries import faces, model
from retrieval.bulk.ingest import ingest_embeddings
from retrieval.embedding.outcome import Outcome
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.system.cpu import usable_cores
from retrieval.transfer.vector_files import write_embeddings

DIMENSION = 2048
BLOCK = 8192
PERSON = "Person with many photos"

OPEN = """
import json, sys, time
import numpy as np
from retrieval.embedding.outcome import Outcome
from retrieval.gallery.gallery import Gallery
before = time.perf_counter()
gallery = Gallery.open(sys.argv[1])
opened = time.perf_counter() - before
with gallery.vault.store.read() as reader:
    state = gallery.vault.state(reader)
before = time.perf_counter()
state.vectors.blocks()
mapped = time.perf_counter() - before
times = []
for _ in range(2000):
    before = time.perf_counter()
    with gallery.vault.store.read() as reader:
        gallery.vault.state(reader)
    times.append(time.perf_counter() - before)
lines = open("/proc/self/smaps_rollup").read().splitlines()
private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
print(json.dumps({"open_ms": 1e3 * opened, "map_ms": 1e3 * mapped, "private_mb": private / 1024,
                  "notice_us": 1e6 * sorted(times)[len(times) // 2]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--singles", type=int, default=1000, help="photos that are enrolled one by one")
    parser.add_argument("--folder", type=Path, help="where the gallery is made")
    options = parser.parse_args()
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size < options.rows] + [options.rows]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="faceprint-store-") as name:
        rows = list(_measured(Path(name), sizes, options.singles))
    _print(rows)
    print(json.dumps({"sizes": rows, "cores": usable_cores(), "python": platform.python_version()}))


def _measured(folder: Path, sizes: list[int], singles: int) -> Iterator[dict[str, Any]]:
    """Yields the costs at each size of one growing gallery."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((BLOCK, DIMENSION), np.float32)
    with Gallery.create(folder / "gallery", model(folder / "model", DIMENSION)) as gallery:
        number = 0
        for size in sizes:
            found: dict[str, Any] = {"rows": size}
            with _timed(found, "bulk_seconds"):
                first = number
                while number < size:
                    count = min(BLOCK, size - number)
                    gallery.enroll_vectors(faces(number, count), _vectors(pool, number)[:count])
                    number += count
            found["bulk_rows_per_second"] = (size - first) / found.pop("bulk_seconds")
            found |= _from_parquet(gallery, folder, pool)
            found |= _one_by_one(gallery, pool, singles)
            found |= json.loads(
                subprocess.run(
                    [sys.executable, "-c", OPEN, os.fspath(gallery.folder)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            with _timed(found, "forget_1000_seconds"):
                gallery.forget(PERSON)
            found |= _backed_up(gallery, folder)
            with _timed(found, "verify_seconds"):
                assert verify(gallery.folder).whole
            with _timed(found, "compact_seconds"):
                gallery.compact()
            info = gallery.info()
            found |= {"vector_files": info.segments, "database_mb": info.database_bytes / 2**20}
            print(f"measured {size:,} rows", file=sys.stderr)
            yield found


def _vectors(pool: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Returns different vectors for each seed, without drawing 16 million random numbers each time."""
    return np.roll(pool, seed % DIMENSION + 1, axis=1) + np.float32(seed % 1009)


def _from_parquet(gallery: Gallery, folder: Path, pool: NDArray[np.float32]) -> dict[str, Any]:
    """Measures `ingest --embeddings` with two blocks of rows from a file; forgets them afterwards.

    The rows are durable before their codes for faster searches are made, which is timed by itself.
    """
    path, rows = folder / "embeddings.parquet", 2 * BLOCK
    batches = (
        (faces(first, BLOCK, kind="parquet", identity="From a file"), _vectors(pool, first + 7))
        for first in range(0, rows, BLOCK)
    )
    fingerprint = gallery.bundle.fingerprint
    write_embeddings(path, batches, fingerprint=fingerprint, dimension=DIMENSION)
    durable = started = time.perf_counter()

    def note(_: Outcome) -> None:
        nonlocal durable
        durable = time.perf_counter()

    report = ingest_embeddings(gallery, path, on_outcome=note)
    codes = time.perf_counter() - durable
    assert report.enrolled == rows
    gallery.forget("From a file")
    path.unlink()
    return {"parquet_rows_per_second": rows / (durable - started), "codes_seconds": codes}


def _one_by_one(gallery: Gallery, pool: NDArray[np.float32], singles: int) -> dict[str, Any]:
    """Measures photos enrolled one at a time: the time of each commit, and the bytes written for it."""
    photos = faces(0, singles, kind=f"single {time.monotonic_ns()}", identity=PERSON)[:singles]
    vectors = _vectors(pool, 5)
    times, written = [], _written()
    for row, face in enumerate(photos):
        started = time.perf_counter()
        gallery.enroll_vectors([face], vectors[row % BLOCK][None])
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "single_ms_median": statistics.median(times),
        "single_ms_p99": sorted(times)[int(0.99 * len(times))],
        "single_kb_written_mean": (_written() - written) / len(photos) / 1024,
    }


def _written() -> int:
    """Returns the number of bytes that this process has passed to write calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def _backed_up(gallery: Gallery, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with _timed(found, "backup_seconds"):
        gallery.backup(folder / "backup")
    with _timed(found, "backup_again_seconds"):
        again = gallery.backup(folder / "backup")
    assert again.segments_copied == 0
    shutil.rmtree(folder / "backup")
    return found


@contextmanager
def _timed(found: dict[str, Any], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found[name] = time.perf_counter() - started


def _print(rows: list[dict[str, Any]]) -> None:
    for name in rows[0]:
        values = [
            f"{row[name]:,.{0 if row[name] >= 1000 or isinstance(row[name], int) else 2}f}" for row in rows
        ]
        print(f"{name.replace('_', ' '):26}" + "".join(f"{value:>14}" for value in values))


if __name__ == "__main__":
    main()
