"""A gallery in PostgreSQL and Milvus beside one in a folder: enrolling, searching, forgetting, copying.

    python -m benchmarks.databases --rows-at 'postgresql+psycopg://USER@HOST/DATABASE?schema=NAME' \
        --vectors-at milvus://HOST:PORT/COLLECTION [--sizes 10000 50000] [--dimension 512] [--queries 100]

Both are filled with the same random vectors of unit length, and every answer is compared. The schema must be
empty, and the collection must not exist; both are left filled. Prints one table, a column for each size.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.galleries import faces, model
from retrieval.gallery.gallery import Gallery

# Rows of one transaction.
BLOCK = 10_000


def main() -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows-at", required=True)
    parser.add_argument("--vectors-at", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=100)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_measured(wanted, Path(folder)))
    for name in rows[0]:
        print(f"{name:52}" + "".join(f"{row[name]:>14,.1f}" for row in rows))
    print(json.dumps(rows))


def _measured(wanted: argparse.Namespace, folder: Path) -> Iterator[dict[str, float]]:
    bundle = model(folder / "model", wanted.dimension)
    with (
        Gallery.create(folder / "gallery", bundle) as one,
        Gallery.create(wanted.rows_at, bundle, vectors=wanted.vectors_at) as other,
    ):
        galleries = {"folder": one, "databases": other}
        number = 0
        for size in wanted.sizes:
            found: dict[str, float] = {"rows": size}
            spent = dict.fromkeys(galleries, 0.0)
            first = number
            while number < size:
                count = min(BLOCK, size - number)
                vectors = _units(np.random.default_rng(number), count, wanted.dimension)
                for name, gallery in galleries.items():
                    began = time.perf_counter()
                    gallery.enroll_vectors(faces(number, count)[:count], vectors)
                    spent[name] += time.perf_counter() - began
                number += count
            found |= {f"{name}: rows a second in": (size - first) / spent[name] for name in galleries}
            one.optimize()
            yield found | _searched(galleries, wanted.dimension, wanted.queries) | _changed(galleries, wanted)
            print(f"measured {size:,} rows", file=sys.stderr)


def _units(rng: np.random.Generator, count: int, dimension: int) -> NDArray[np.float32]:
    made = rng.standard_normal((count, dimension), np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def _searched(galleries: dict[str, Gallery], dimension: int, queries: int) -> dict[str, float]:
    """Measures searches for 10 neighbours, one query at a time and 100 at once; checks that answers agree."""
    asked = _units(np.random.default_rng(10**9), queries, dimension)
    found: dict[str, float] = {}
    answers: list[Any] = []
    for name, gallery in galleries.items():
        gallery.search_by_vectors(asked[:1], 10)  # opens what it needs
        times = []
        for query in asked:
            began = time.perf_counter()
            gallery.search_by_vectors(query[None], 10)
            times.append(time.perf_counter() - began)
        found[f"{name}: ms a query, one at a time (median)"] = 1e3 * statistics.median(times)
        began = time.perf_counter()
        together = gallery.search_by_vectors(asked, 10)
        found[f"{name}: ms a query, {queries} at once"] = 1e3 * (time.perf_counter() - began) / queries
        answers.append([[(match.face.id, match.distance) for match in one] for one in together])
    for one, other in zip(*answers, strict=True):
        assert [face for face, _ in one] == [face for face, _ in other]
        np.testing.assert_allclose([d for _, d in one], [d for _, d in other], rtol=1e-12)
    return found


def _changed(galleries: dict[str, Gallery], wanted: argparse.Namespace) -> dict[str, float]:
    """Measures one photo that is enrolled alone, the search that finds it, and forgetting it."""
    found: dict[str, float] = {}
    [face] = faces(0, 1, kind=f"single {time.monotonic_ns()}", identity="Alone")[:1]
    vector = _units(np.random.default_rng(5), 1, wanted.dimension)
    for name, gallery in galleries.items():
        began = time.perf_counter()
        [outcome] = gallery.enroll_vectors([face], vector)
        enrolled = time.perf_counter()
        assert gallery.search_by_vectors(vector, 1)[0][0].face.id == outcome.face_id
        searched = time.perf_counter()
        gallery.forget("Alone")
        found[f"{name}: ms for one face, to its commit"] = 1e3 * (enrolled - began)
        found[f"{name}: ms for the first search after it"] = 1e3 * (searched - enrolled)
        found[f"{name}: ms to forget it"] = 1e3 * (time.perf_counter() - searched)
    return found


if __name__ == "__main__":
    main()
