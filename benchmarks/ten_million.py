"""A gallery of ten million faces: its size, its searches, a commit and an opening.

    python -m benchmarks.ten_million --vectors FILE.npy [--strangers FILE.npy] [--rows 10000000]
                                     --folder FOLDER

Grows real embeddings (`benchmarks.growth`) to a gallery in FOLDER, which stays there: a run that was stopped
goes on where it was, and a second one measures again. Prints what was measured, one value a line, and one
JSON line. Ten million rows of 512 numbers need 30 GB of disk. The answers to some queries are compared with a
brute force in float64, which reads every vector once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.galleries import faces, model
from benchmarks.growth import Growth, Vectors
from benchmarks.search import p99
from benchmarks.store import OPEN
from retrieval.gallery.gallery import Gallery
from retrieval.system.cpu import usable_cores

BLOCK = 8192
NEIGHBOURS = 10
SINGLES = 200
# Number of faces from which the codes are learned at first; `ingest` does that at the end of a run.
LEARNED = 100_000
# Queries in a call, and the number of calls.
CALLS = {1: 40, 16: 8, 256: 3}
# Number of queries with answers compared with a brute force.
PROVEN = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=Path, required=True, help="real embeddings: float32 (n, d)")
    parser.add_argument("--strangers", type=Path, help="embeddings of other people than those of --vectors")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the gallery is, or will be")
    options = parser.parse_args()
    growth = Growth.of(np.asarray(np.load(options.vectors), np.float32))
    dimension = growth.real.shape[1]
    folder: Path = options.folder / "gallery"
    if not folder.exists():
        Gallery.create(folder, model(options.folder / "model", dimension)).close()
    with Gallery.open(folder) as gallery:
        found = shown({"rows": options.rows, "dimension": dimension})
        found |= shown(grown(gallery, growth, options.rows))
        found |= shown(sizes(gallery))
        found |= shown(commits(gallery, next(growth.blocks(SINGLES, seed=5))))
    found |= shown(opening(folder))
    asked = {"enrolled": np.concatenate(list(growth.blocks(PROVEN + _query_count(), seed=2)))}
    if options.strangers is not None:
        strangers = np.asarray(np.load(options.strangers), np.float32)
        asked["strangers"] = strangers[np.resize(np.arange(len(strangers)), PROVEN + _query_count())]
    with Gallery.open(folder, read_only=True) as gallery:
        for name, queries in asked.items():
            times = searches(gallery, queries[PROVEN:])
            found |= shown({f"{name}: {key}": value for key, value in times.items()})
        # Now the codes are in memory, and little else.
        found |= shown({"memory of the process, MB": _anonymous_bytes() / 2**20})
        proven = np.concatenate([queries[:PROVEN] for queries in asked.values()])
        wrong = wrong_answers(gallery, proven)
        found |= shown(
            {"ids compared": len(proven) * NEIGHBOURS, "ids other than those of a brute force": wrong}
        )
    print(json.dumps(found | {"cores": usable_cores()}))


def grown(gallery: Gallery, growth: Growth, rows: int) -> dict[str, Any]:
    """Enrolls grown vectors until there are `rows` faces; returns the pace of this run and of its end."""
    first = gallery.info().faces
    paces: list[float] = []
    number, began = first, time.perf_counter()
    while number < rows:
        if number < LEARNED <= number + BLOCK:
            gallery.optimize()  # from here on, segments are written with their codes
        count, started = min(BLOCK, rows - number), time.perf_counter()
        gallery.enroll_vectors(faces(number, count), next(growth.blocks(count, seed=1000 + number)))
        number += count
        paces.append(count / (time.perf_counter() - started))
        if len(paces) % 100 == 0:
            _progress(f"{number:,} rows, {number - first:,} in {time.perf_counter() - began:.0f} s")
    found: dict[str, Any] = {}
    if paces:
        found["enrolled in this run"] = number - first
        found["rows/s of it"] = (number - first) / (time.perf_counter() - began)
        found["rows/s at its end, median of 50 batches"] = statistics.median(paces[-50:])
    started = time.perf_counter()
    optimized = gallery.optimize()
    if optimized.learned or optimized.encoded:
        found["optimize, s"] = time.perf_counter() - started
        _progress(f"optimized in {found['optimize, s']:.0f} s")
    return found


def sizes(gallery: Gallery) -> dict[str, Any]:
    """Returns what is on disk, in GB, and the numbers of files and of coordinates."""
    info = gallery.info()
    vectors = sum(path.stat().st_size for path in (gallery.folder / "vectors").glob("*.faiss"))
    return {
        "vectors on disk, GB": vectors / 2**30,
        "codes on disk, GB": info.codes_bytes / 2**30,
        "coordinates of a code": info.coordinates,
        "database, GB": info.database_bytes / 2**30,
        "files of vectors": info.segments,
    }


def commits(gallery: Gallery, vectors: Vectors) -> dict[str, Any]:
    """Returns the times of committing single faces, which are forgotten again."""
    person = "Person of single photos"
    times = []
    photos = faces(0, len(vectors), kind=f"single {time.monotonic_ns()}", identity=person)
    for face, vector in zip(photos, vectors, strict=True):
        started = time.perf_counter()
        gallery.enroll_vectors([face], vector[None])
        times.append(1e3 * (time.perf_counter() - started))
    started = time.perf_counter()
    gallery.forget(person)
    forgotten = time.perf_counter() - started
    return {
        "a commit of one face, ms": statistics.median(times),
        "a commit of one face, p99, ms": p99(times),
        f"forget of {len(vectors)} faces, s": forgotten,
    }


def opening(folder: Path) -> dict[str, Any]:
    """Returns the times of opening the gallery in a new process."""
    command = [sys.executable, "-c", OPEN, os.fspath(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    opened = json.loads(done.stdout)
    return {
        "opening, ms": opened["open_ms"],
        "mapping every segment, ms": opened["map_ms"],
        "private memory after that, MB": opened["private_mb"],
        "detecting that nothing changed, us": opened["notice_us"],
    }


def searches(gallery: Gallery, queries: Vectors) -> dict[str, Any]:
    """Returns milliseconds per query for each number of queries in a call; each call has new queries."""
    found: dict[str, Any] = {}
    started = time.perf_counter()
    gallery.search_by_vectors(queries[:1], NEIGHBOURS)
    found["first search, which reads the codes, s"] = time.perf_counter() - started
    start = 1
    for together, calls in CALLS.items():
        times = []
        for _ in range(calls):
            asked = queries[start : start + together]
            start += together
            began = time.perf_counter()
            gallery.search_by_vectors(asked, NEIGHBOURS)
            times.append(1e3 * (time.perf_counter() - began) / together)
        found[f"{together} together, ms per query"] = statistics.median(times)
        found[f"{together} together, p99, ms per query"] = p99(times)
    return found


def wrong_answers(gallery: Gallery, queries: Vectors) -> int:
    """Returns how many ids of the answers differ from those of a brute force in float64."""
    with gallery.vault.store.read() as reader:
        state = gallery.vault.state(reader)
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(queries)
    squares: list[NDArray[np.float64]] = [np.empty(0)] * len(queries)
    wide = queries.astype(np.float64)
    for part in state.vectors.blocks():
        for start in range(0, len(part), BLOCK):
            block = part.matrix[start : start + BLOCK].astype(np.float64)
            known = part.ids[start : start + BLOCK]
            for place, query in enumerate(wide):
                moved = block - query
                both = np.concatenate([squares[place], np.einsum("ij,ij->i", moved, moved)])
                candidates = np.concatenate([ids[place], known])
                order = np.lexsort((candidates, both))[:NEIGHBOURS]
                squares[place], ids[place] = both[order], candidates[order]
    answers = gallery.search_by_vectors(queries, NEIGHBOURS)
    given = [[match.face.id for match in matches] for matches in answers]
    return sum(
        one != int(other)
        for mine, true in zip(given, ids, strict=True)
        for one, other in zip(mine, true, strict=True)
    )


def _query_count() -> int:
    return 1 + sum(together * calls for together, calls in CALLS.items())


def _anonymous_bytes() -> int:
    """Returns the memory of this process that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return 1024 * int(kilobytes)


def _progress(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """Prints what was measured, and returns it."""
    for name, value in found.items():
        if isinstance(value, float):
            value = f"{value:,.{0 if value >= 1000 else 2}f}"
        print(f"{name:52} {value}", flush=True)
    return found


if __name__ == "__main__":
    main()
