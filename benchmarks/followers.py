"""Time from a commit to an answer by a follower: publishing a growing gallery, and following it.

    python -m benchmarks.followers [--rows 10000,1000000] [--dimension 512] [--folder FOLDER] [--address
    ADDRESS]

The vectors are random numbers. A face is enrolled, the gallery is published, the follower brought in step,
and a gallery that is open on the follower searched for the face; then a person with 20 photos is forgotten in
the same way. Polling comes on top: half of `--every` of the publisher and of the follower, on average. Prints
one table, a column for each size, and one JSON line. A million rows of 512 numbers need 8 GB in FOLDER.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.galleries import faces, model
from retrieval.gallery.gallery import Gallery
from retrieval.replication.follow import FollowerFolder
from retrieval.replication.publish import Publisher
from retrieval.system.cpu import usable_cores

BLOCK = 8192
COMMITS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="10000,1000000", help="sizes, ascending")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where everything is made")
    parser.add_argument("--address", help="where to publish, instead of a folder there")
    options = parser.parse_args()
    sizes = [int(size) for size in options.rows.split(",")]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="faceprint-followers-") as name:
        address = options.address or os.fspath(Path(name) / "store")
        rows = list(_measured(Path(name), sizes, options.dimension, address))
    _print(rows)
    print(json.dumps({"sizes": rows, "cores": usable_cores(), "python": platform.python_version()}))


def _measured(folder: Path, sizes: list[int], dimension: int, address: str) -> Iterator[dict[str, Any]]:
    """Yields the costs at each size of one growing gallery."""
    rng = np.random.default_rng(0)
    with Gallery.create(folder / "gallery", model(folder / "model", dimension)) as gallery:
        publisher = Publisher(gallery.vault, address)
        number = 0
        for size in sizes:
            while number < size:
                count = min(BLOCK, size - number)
                gallery.enroll_vectors(
                    faces(number, count), rng.standard_normal((count, dimension), np.float32)
                )
                number += count
            gallery.optimize()
            found: dict[str, Any] = {"rows": size}
            with _timed(found, "first_publish_seconds"):
                done = publisher.publish()
            found["first_publish_mb"] = done.bytes_written / 2**20
            with FollowerFolder(address, folder / "copy") as following:
                with _timed(found, "first_sync_seconds"):
                    following.sync()
                with Gallery.open(folder / "copy") as copy:
                    found |= _commits(gallery, publisher, following, copy, rng)
                    found |= _forgotten(gallery, publisher, following, copy, f"Person {size // 40:06d}")
            found["database_mb"] = gallery.info().database_bytes / 2**20
            print(f"measured {size:,} rows", file=sys.stderr)
            yield found


def _commits(
    gallery: Gallery,
    publisher: Publisher,
    following: FollowerFolder,
    copy: Gallery,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Measures faces that are enrolled one at a time, until a search on the follower finds each."""
    times: dict[str, list[float]] = {
        name: [] for name in ("commit", "publish", "sync", "search", "commit_to_answer")
    }
    published, fetched = [], []
    for commit in range(COMMITS):
        [one] = faces(commit, 1, kind=f"single {time.monotonic_ns()}", identity="Newcomer")
        vector = rng.standard_normal((1, gallery.bundle.dimension), np.float32)
        began = time.perf_counter()
        gallery.enroll_vectors([one], vector)
        committed = time.perf_counter()
        published.append(publisher.publish().bytes_written)
        sent = time.perf_counter()
        fetched.append(following.sync().bytes_fetched)
        synced = time.perf_counter()
        [[match]] = copy.search_by_vectors(vector, 1)
        answered = time.perf_counter()
        assert match.distance == 0
        for name, seconds in (
            ("commit", committed - began),
            ("publish", sent - committed),
            ("sync", synced - sent),
            ("search", answered - synced),
            ("commit_to_answer", answered - committed),
        ):
            times[name].append(seconds)
    found = {f"{name}_seconds": statistics.median(all_times) for name, all_times in times.items()}
    return found | {
        "published_mb": statistics.median(published) / 2**20,
        "fetched_mb": statistics.median(fetched) / 2**20,
    }


def _forgotten(
    gallery: Gallery, publisher: Publisher, following: FollowerFolder, copy: Gallery, person: str
) -> dict[str, Any]:
    """Measures a person with 20 photos that is forgotten, until the follower has confirmed it."""
    found: dict[str, Any] = {}
    with _timed(found, "forget_seconds"):
        gallery.forget(person)
    with _timed(found, "forget_publish_seconds"):
        found["forget_published_mb"] = publisher.publish().bytes_written / 2**20
    with _timed(found, "forget_sync_seconds"):
        following.sync()
    assert copy.info().erasures == gallery.info().erasures
    return found


@contextmanager
def _timed(found: dict[str, Any], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    found[name] = time.perf_counter() - began


def _print(rows: list[dict[str, Any]]) -> None:
    width = max(map(len, rows[0]))
    for name in rows[0]:
        print(f"{name:<{width}}", *(f"{row[name]:>12,.3f}" for row in rows))


if __name__ == "__main__":
    main()
