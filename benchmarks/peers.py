"""Compares faceprint with other systems that store vectors and search them exactly, on the same data.

    python -m benchmarks.peers [--rows 50000] [--vectors FILE.npy] [--systems faiss,milvus]

Needs the environment that `make bench-peers` sets up. Every system runs in separate processes, with its own
choice of threads. One process stores the rows durably; a new one opens them and answers each query with the
10 nearest rows, which are compared with those of a brute force in float64. A system that is not installed,
fails or takes longer than --minutes has a row in the table with the reason. A system that is too slow for
--rows is measured with fewer rows (--limit). Prints one table and one JSON line.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.growth import Growth, Vectors, isotropic
from benchmarks.systems import BATCH, SYSTEMS, K
from retrieval.system.cpu import usable_cores

DIMENSION = 2048
QUERIES = 200
# The largest number of rows for systems that would need most or all of the time limit with all rows.
LIMITS = {"qdrant": 5000}

# The columns of the table and their widths; a note follows.
COLUMNS = {
    "system": 11,
    "rows": 10,
    "rows/s in": 11,
    "ms": 9,
    "p99": 9,
    f"ms in {BATCH}s": 11,
    f"recall@{K}": 11,
    "same": 9,
    f"same in {BATCH}s": 13,
    "MB on disk": 12,
    "open, s": 9,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--vectors", type=Path, help="float32 (n, 2048), grown to --rows; default: isotropic")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which, separated by commas")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="SYSTEM=ROWS", help="measure a system at fewer rows"
    )
    parser.add_argument("--minutes", type=float, default=10, help="how long a system may take")
    parser.add_argument("--folder", type=Path, help="where everything is stored meanwhile")
    options = parser.parse_args()
    limits = LIMITS | {name: int(rows) for name, rows in (limit.split("=") for limit in options.limit)}
    names = options.systems.split(",")
    if unknown := {*names, *limits} - {*SYSTEMS}:
        parser.error(f"no such system: {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="faceprint-peers-") as name:
        folder = Path(name)
        kind = make(folder, options.rows, QUERIES, options.vectors)
        print(f"{kind}; {usable_cores()} cores; the {K} nearest to each of {QUERIES} queries")
        print(_line([*COLUMNS, ""]), flush=True)
        measured = []
        for one in measure(folder, names, limits, seconds=60 * options.minutes):
            measured.append(one)
            print(_line(_cells(one)), flush=True)
    packages = sorted({package for name in names for package in SYSTEMS[name].packages} | {"numpy"})
    result = {
        "vectors": kind,
        "queries": QUERIES,
        "k": K,
        "systems": measured,
        "versions": {package: _version(package) for package in packages},
        "cores": usable_cores(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


def make(folder: Path, rows: int, queries: int, real: Path | None = None, dimension: int = DIMENSION) -> str:
    """Writes vectors.npy and queries.npy; returns a description of them."""
    if real is None:
        kind = f"isotropic vectors of {dimension} numbers"
        stored, asked = isotropic(rows, dimension, seed=0), isotropic(queries, dimension, seed=2)
    else:
        embeddings = np.asarray(np.load(real), np.float32)
        count, dimension = embeddings.shape
        kind = f"vectors of {dimension} numbers grown from {count:,} embeddings of {real.name}"
        growth = Growth.of(embeddings)
        stored, asked = growth.blocks(rows, seed=0), growth.blocks(queries, seed=2)
    shape = (rows, dimension)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", dtype=np.float32, shape=shape)
    start = 0
    for block in stored:
        vectors[start : start + len(block)] = block
        start += len(block)
    vectors.flush()
    np.save(folder / "queries.npy", np.concatenate(list(asked)))
    return kind


def measure(
    folder: Path, names: Sequence[str], limits: dict[str, int], *, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yields the measurements of each system on the vectors of a folder, one after the other.

    Args:
        folder: made by `make`.
        names: of systems.
        limits: largest number of rows of a system, by name.
        seconds: time limit of a system.
    """
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    queries = np.load(folder / "queries.npy")
    truths: dict[int, list[list[int]]] = {}
    for name in names:
        rows = min(len(vectors), limits.get(name, len(vectors)))
        if rows not in truths:
            truths[rows] = brute_force(vectors[:rows], queries).tolist()
        yield {"system": name, "rows": rows} | _measured(folder, name, rows, truths[rows], seconds)


def brute_force(vectors: Vectors, queries: Vectors) -> NDArray[np.int64]:
    """Returns the rows of the K nearest vectors (n, d) to each query, by distances in float64; ties by row.

    Inner products select the candidate rows; the distances of the candidates are sums of squared differences.
    Both are in float64, so that rounding errors are far smaller than the differences between distances.
    """
    asked = queries.astype(np.float64)
    rows = np.empty((len(queries), 0), np.int64)
    squares = np.empty((len(queries), 0))
    for start in range(0, len(vectors), 4096):
        block = vectors[start : start + 4096].astype(np.float64)
        near = np.einsum("ij,ij->i", block, block) - 2 * asked @ block.T
        likely = np.argsort(near, axis=1)[:, : 2 * K]
        exact = [((block[few] - query) ** 2).sum(axis=1) for few, query in zip(likely, asked, strict=True)]
        rows = np.concatenate([rows, start + likely], axis=1)
        squares = np.concatenate([squares, exact], axis=1)
        order = np.lexsort((rows, squares))[:, :K]
        rows, squares = np.take_along_axis(rows, order, axis=1), np.take_along_axis(squares, order, axis=1)
    return rows


def _measured(folder: Path, name: str, rows: int, truth: list[list[int]], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    result: dict[str, Any] = {"note": SYSTEMS[name].note}
    if SYSTEMS[name].stores:
        filled = _child("fill", name, folder, rows, deadline)
        if "problem" in filled:
            return result | {"problem": filled["problem"]}
        result |= {"rows_per_second": rows / filled["seconds"], "bytes": filled["bytes"]}
    asked = _child("ask", name, folder, rows, deadline)
    if "answers" in asked:
        result |= {
            "first_answer_seconds": asked["first_answer_seconds"],
            "ms_median": statistics.median(asked["ms"]),
            "ms_p99": sorted(asked["ms"])[int(0.99 * len(asked["ms"]))],
            "queries": len(truth),
            "recall": _recall(asked["answers"], truth),
            "same": _same(asked["answers"], truth),
        }
    if "batch_answers" in asked:
        result |= {
            "batch_ms_median": statistics.median(asked["batch_ms"]),
            "batch_queries": len(asked["batch_answers"]),
            "batch_recall": _recall(asked["batch_answers"], truth),
            "batch_same": _same(asked["batch_answers"], truth),
        }
    if "problem" in asked:
        result["problem"] = ("in batches: " if "answers" in asked else "") + asked["problem"]
    return result


def _child(verb: str, name: str, folder: Path, rows: int, deadline: float) -> dict[str, Any]:
    """Returns the report of a process of `benchmarks.systems`; a failure is under "problem"."""
    command = [sys.executable, "-m", "benchmarks.systems", verb, name, os.fspath(folder), str(rows)]
    log = folder / f"{name}-{verb}.log"
    started = time.monotonic()
    with open(log, "wb") as output:
        # A new session, so that the processes that it starts can be killed with it.
        child = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        problem = None
        try:
            code = child.wait(max(0.0, deadline - started))
            if code:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                problem = ": ".join([why, *last])[:200]
        except subprocess.TimeoutExpired:
            problem = "not done within the time limit"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    report = folder / f"{name}-{verb}.json"
    found: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    # A process that has reported its results but does not end still counts as successful.
    done = (
        "seconds" in found or "batch_answers" in found or ("answers" in found and not SYSTEMS[name].batches)
    )
    if problem is not None and not done:
        found.setdefault("problem", problem)
    return found


def _recall(answers: list[list[int]], truth: list[list[int]]) -> float:
    """Returns the share of the true neighbours that were found, in any order."""
    pairs = list(zip(answers, truth, strict=False))
    return sum(len({*answer} & {*true}) for answer, true in pairs) / sum(len(true) for _, true in pairs)


def _same(answers: list[list[int]], truth: list[list[int]]) -> int:
    """Counts the answers that are the true neighbours in the true order."""
    return sum(answer == true for answer, true in zip(answers, truth, strict=False))


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    def shown(name: str, form: str, scale: float = 1) -> str:
        return format(one[name] * scale, form) if name in one else "–"

    return (
        one["system"],
        shown("rows", ",d"),
        shown("rows_per_second", ",.0f"),
        shown("ms_median", ".2f"),
        shown("ms_p99", ".2f"),
        shown("batch_ms_median", ".2f"),
        shown("recall", ".4f"),
        f"{one['same']}/{one['queries']}" if "same" in one else "–",
        f"{one['batch_same']}/{one['batch_queries']}" if "batch_same" in one else "–",
        shown("bytes", ",.1f", 1 / 2**20),
        shown("first_answer_seconds", ".2f"),
        "; ".join(filter(None, [one.get("problem"), one["note"]])),
    )


def _line(cells: Sequence[str]) -> str:
    first, *others, note = cells
    width, *widths = COLUMNS.values()
    return f"{first:{width}}" + "".join(map(str.rjust, others, widths)) + f"   {note}".rstrip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
