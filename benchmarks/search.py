"""Times exact searches of a growing gallery, and scans of the same vectors in memory.

    python -m benchmarks.search [--rows 1000000] [--vectors FILE.npy | --model MODEL --photos FOLDER
        [--cache FILE.npy]] [--strangers FILE.npy] [--kinds realistic,isotropic] [--sizes 10000,100000]
        [--folder FOLDER] [--peers]

There are two kinds of vectors: realistic ones are real embeddings grown to any number of rows
(`benchmarks.growth`), isotropic ones, of 2048 numbers, are the hardest case. Searches are for grown vectors,
and with --strangers for real embeddings of other people as well, which have nothing near them. One gallery of
each kind grows from size to size. At each size it is optimized, then searched through its vector layer, which
is comparable to an index, and through `Gallery.search_by_vectors`, which also looks up rows. FAISS's
IndexFlatL2 and, with --peers, usearch's exact search scan the same vectors, held in memory once. All systems
take turns in one process, so that noise affects them equally; every call has new queries. The answers are
compared with those of IndexFlatL2 and of a brute force in float64. Prints one table for each kind and one
JSON line. A million rows need 17 GB of memory, of which half is the page cache, and 12 GB in FOLDER (by
default a temporary one), deleted afterwards. Sizes without enough memory or disk space are skipped.
"""

import argparse
import importlib
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.galleries import faces, model
from benchmarks.growth import Growth, Vectors, embeddings, isotropic
from retrieval.gallery.gallery import Gallery
from retrieval.index.knn import Explanation
from retrieval.storage.any_vault import State
from retrieval.system.cpu import usable_cores

ISOTROPIC_DIMENSION = 2048
KINDS = ("realistic", "isotropic")
SIZES = (10_000, 100_000, 1_000_000)
NEIGHBOURS = (1, 10, 100)
# Queries in a call: number of calls of faceprint, of the scans, and of the scans at a million rows.
CALLS = {1: (100, 12, 3), 16: (12, 3, 1), 256: (5, 2, 1)}
# The calls of faceprint are limited to this total time in seconds, but not to fewer than LEAST_CALLS.
SECONDS, LEAST_CALLS = 20, 3
MANY_ROWS = 1_000_000
# Number of queries with answers compared with those of IndexFlatL2, and how many of these with a brute force.
COMPARED, PROVEN = 32, 20
# Memory and disk space that must stay free beside the vectors, in bytes.
SPARE_MEMORY, SPARE_DISK = 2 * 2**30, 2**30

# The columns of the table and their widths.
COLUMNS = {
    "rows": 10,
    "for": 11,
    "queries": 9,
    "k": 5,
    "faceprint (p99)": 20,
    "gallery (p99)": 20,
    "IndexFlatL2 (p99)": 21,
    "ratio": 8,
    "usearch (p99)": 21,
    "ratio ": 8,
    "candidates": 12,
}

Search = Callable[[Vectors, int], Any]
Ids = NDArray[np.int64]


@dataclass
class Grown:
    """A gallery, and the same vectors in memory.

    Attributes:
        gallery: the gallery.
        index: an IndexFlatL2 with the rows in the order of their enrollment.
        ids: (n,) face id of each row.
    """

    gallery: Gallery
    index: Any
    ids: Ids

    @property
    def matrix(self) -> Vectors:
        """A view (n, d) of the memory of the index; invalid once the index has grown."""
        rows, dimension = self.index.ntotal, self.index.d
        view = faiss.rev_swig_ptr(self.index.get_xb(), rows * dimension).reshape(rows, dimension)
        view.flags.writeable = False
        return np.asarray(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=SIZES[-1], help="the largest size")
    parser.add_argument("--sizes", type=_numbers, help="separated by commas, instead of the usual ones")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, separated by commas")
    parser.add_argument("--vectors", type=Path, help="real embeddings: float32 (n, 2048), NumPy's format")
    parser.add_argument("--model", type=Path, help="a bundle that embeds --photos")
    parser.add_argument("--photos", type=Path, help="a folder of photos: real embeddings are made of them")
    parser.add_argument("--cache", type=Path, help="where the embeddings of --photos are kept")
    parser.add_argument("--strangers", type=Path, help="embeddings of other people than those of --vectors")
    parser.add_argument("--folder", type=Path, help="where the galleries are made")
    parser.add_argument("--peers", action="store_true", help="measure usearch too")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := {*kinds} - {*KINDS}:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if (options.model is None) != (options.photos is None):
        parser.error("--model and --photos belong together")
    sizes = options.sizes or [size for size in SIZES if size < options.rows] + [options.rows]
    peers: dict[str, Any] = {}
    if options.peers:
        try:
            peers["usearch"] = importlib.import_module("usearch.index")
        except ImportError as error:
            print(f"usearch: not installed, or not whole ({error})")
    print(f"{_cpu()}, {usable_cores()} cores; milliseconds per query: median (99th percentile) of calls")
    found: dict[str, Any] = {}
    for kind in kinds:
        if kind == "realistic" and options.vectors is None and options.model is None:
            print("realistic: skipped, for want of real embeddings: give --vectors, or --model and --photos")
            continue
        made = _source(kind, options)
        print(f"\n{kind}: {made.description}")
        print(_line(list(COLUMNS)), flush=True)
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="faceprint-search-") as name:
            measured = list(_measured(Path(name), made, sizes, peers))
        for one in measured:
            print(_summary(one))
        found[kind] = {"vectors": made.description, "sizes": measured}
    result = {
        "kinds": found,
        "cores": usable_cores(),
        "cpu": _cpu(),
        "memory_gb": round(_memory("MemTotal") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("faiss-cpu", "numpy", "usearch")},
    }
    print(json.dumps(result))


# Vectors


@dataclass(frozen=True)
class Source:
    """A source of vectors.

    Attributes:
        description: what they are.
        dimension: their number of numbers.
        blocks: a function from (rows, seed) to blocks.
        strangers: (n, d) embeddings of other people.
    """

    description: str
    dimension: int
    blocks: Callable[[int, int], Iterator[Vectors]]
    strangers: Vectors | None = None

    def queries(self, count: int) -> dict[str, Vectors]:
        """Returns queries (count, d) by whom they are for: strangers' are repeated where there are fewer."""
        found = {"enrolled": np.concatenate(list(self.blocks(count, 2)))}
        if self.strangers is not None:
            order = np.random.default_rng(3).permutation(len(self.strangers))
            found["strangers"] = self.strangers[np.resize(order, count)]
        return found


def _source(kind: str, options: argparse.Namespace) -> Source:
    if kind == "isotropic":
        size = ISOTROPIC_DIMENSION
        words = f"vectors of {size} independent standard normal numbers"
        return Source(words, size, lambda rows, seed: isotropic(rows, size, seed=seed))
    if options.vectors is not None:
        real, origin = np.asarray(np.load(options.vectors), np.float32), options.vectors.name
    else:
        real, origin = embeddings(options.model, options.photos, options.cache), options.photos.name
    strangers = None
    if options.strangers is not None:
        strangers = np.asarray(np.load(options.strangers), np.float32)
    for one in (real,) if strangers is None else (real, strangers):
        if one.ndim != 2 or one.shape[1] != real.shape[-1]:
            sys.exit(f"embeddings must have shape (n, d), with one d, not {one.shape}")
    growth = Growth.of(real)
    words = (
        f"grown from {len(real):,} embeddings of {real.shape[1]} numbers ({origin}), noise {growth.noise:.3f}"
    )
    if strangers is not None:
        words += f"; {len(strangers):,} embeddings of strangers"
    return Source(words, real.shape[1], lambda rows, seed: growth.blocks(rows, seed=seed), strangers)


def _cut(blocks: Iterator[Vectors], sizes: Sequence[int]) -> Iterator[tuple[Vectors, bool]]:
    """Cuts blocks at the sizes; yields each part, and whether it reaches a size."""
    number, ends = 0, iter(sizes)
    end = next(ends)
    for block in blocks:
        while len(block):
            part, block = block[: end - number], block[end - number :]
            number += len(part)
            yield part, number == end
            if number == end:
                end = next(ends, sys.maxsize)


# Measuring


def _measured(
    folder: Path, source: Source, sizes: Sequence[int], peers: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the measurements at each size of one growing gallery."""
    queries = source.queries(COMPARED + _query_count())
    with Gallery.create(folder / "gallery", model(folder / "model", source.dimension)) as gallery:
        grown = Grown(gallery, faiss.IndexFlatL2(source.dimension), np.empty(0, np.int64))
        next_sizes = iter(sorted(sizes))
        size = next(next_sizes)
        if shortage := _shortage(folder, source, 0, size):
            yield {"rows": size, "skipped": shortage}
            return
        started = time.perf_counter()
        for block, reached in _cut(source.blocks(max(sizes), 0), sorted(sizes)):
            _enroll(grown, block)
            if not reached:
                continue
            found: dict[str, Any] = {"rows": size, "build_seconds": time.perf_counter() - started}
            _progress(f"enrolled {size:,} rows")
            started = time.perf_counter()
            optimized = gallery.optimize()
            found |= {
                "optimize_seconds": time.perf_counter() - started,
                "coordinates": optimized.coordinates,
                "basis_learned": optimized.learned,
            }
            _progress(f"optimized in {found['optimize_seconds']:.1f} s")
            found["searches"] = [
                one for name, asked in queries.items() for one in _timed(grown, name, asked[COMPARED:], peers)
            ]
            _progress(f"measured {size:,} rows")
            found["compared"] = {name: _compared(grown, asked[:COMPARED]) for name, asked in queries.items()}
            yield found
            before, size = size, next(next_sizes, 0)
            if size and (shortage := _shortage(folder, source, before, size)):
                yield {"rows": size, "skipped": shortage}
                return
            started = time.perf_counter()


def _enroll(grown: Grown, block: Vectors) -> None:
    outcomes = grown.gallery.enroll_vectors(faces(len(grown.ids), len(block)), block)
    added = [outcome.face_id for outcome in outcomes if outcome.face_id is not None]
    assert len(added) == len(block)
    grown.ids = np.concatenate([grown.ids, np.array(added, np.int64)])
    grown.index.add(block)


def _layer(gallery: Gallery) -> Callable[..., Any]:
    """Returns the search of the gallery's vector layer, on its current snapshot."""
    with gallery.vault.store.read() as reader:
        state: State = gallery.vault.state(reader)

    def search(queries: Vectors, k: int, explanation: Explanation | None = None) -> Any:
        return state.vectors.nearest(queries, k, explanation=explanation)

    return search


def _searches(grown: Grown, peers: dict[str, Any]) -> dict[str, Search]:
    """Returns the searches to measure, by name."""
    searches: dict[str, Search] = {
        "faceprint": _layer(grown.gallery),
        "gallery": lambda queries, k: grown.gallery.search_by_vectors(queries, k),
        "IndexFlatL2": lambda queries, k: grown.index.search(queries, k),
    }
    if "usearch" in peers:
        usearch = peers["usearch"]
        matrix, metric = grown.matrix, usearch.MetricKind.L2sq
        searches["usearch"] = lambda queries, k: usearch.search(matrix, queries, k, metric, exact=True)
    return searches


def _query_count() -> int:
    """Returns the number of queries to draw: every call has new ones, and so has one untimed call before."""
    return len(NEIGHBOURS) * sum(queries * (1 + max(calls)) for queries, calls in CALLS.items())


def _timed(grown: Grown, asked_for: str, queries: Vectors, peers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the times of calls, in milliseconds, for each number of queries in a call and each k."""
    searches, layer = _searches(grown, peers), _layer(grown.gallery)
    for search in searches.values():
        # One-time work, such as mapping files or starting threads, is not timed.
        search(queries[-2:], 1)
    start = 0
    for together, (ours, some, few) in CALLS.items():
        theirs = few if grown.index.ntotal >= MANY_ROWS else some
        calls = {name: ours if name in ("faceprint", "gallery") else theirs for name in searches}
        for k in NEIGHBOURS:
            asked = queries[start : start + together * (1 + ours)].reshape(1 + ours, together, -1)
            start += together * (1 + ours)
            explanation = Explanation()
            began = time.perf_counter()
            layer(asked[0], k, explanation)
            rounds = max(LEAST_CALLS, min(ours, int(SECONDS / (time.perf_counter() - began))))
            times = _in_turn(searches, calls, asked[1 : 1 + rounds], k)
            one: dict[str, Any] = {"rows": grown.index.ntotal, "for": asked_for, "queries": together, "k": k}
            for name, taken in times.items():
                one[name] = {
                    "calls": len(taken),
                    "ms_median": statistics.median(taken),
                    "ms_p99": p99(taken),
                }
            one |= {
                "candidates_per_query": explanation.candidates / together,
                "mb_read": explanation.bytes_read / 2**20,
                "method": explanation.method,
                "stage_ms": {stage: 1e3 * seconds for stage, seconds in explanation.seconds.items()},
            }
            print(_line(_cells(one)), flush=True)
            yield one


def p99(times: Sequence[float]) -> float:
    """Returns the 99th percentile: the least of the times that 99 of 100 do not exceed."""
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


def _in_turn(
    searches: dict[str, Search], calls: dict[str, int], asked: NDArray[np.float32], k: int
) -> dict[str, list[float]]:
    """Returns the milliseconds of each call; the calls of a system are spread evenly among the others'."""
    rounds = len(asked)
    calls = {name: min(number, rounds) for name, number in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in searches}
    for number in range(rounds):
        for place, (name, search) in enumerate(searches.items()):
            if (number + 1) * calls[name] // rounds == number * calls[name] // rounds:
                continue
            # In one round each system gets other queries, so that none profits from what another just read.
            queries = asked[(number + place * rounds // len(searches)) % rounds]
            began = time.perf_counter()
            search(queries, k)
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


# Comparing


def _compared(grown: Grown, queries: Vectors) -> dict[str, Any]:
    """Counts the ids of the answers that differ from those of IndexFlatL2 and of the brute force."""
    k = min(max(NEIGHBOURS), grown.index.ntotal)
    answers = _layer(grown.gallery)(queries, k)
    ours = np.stack([np.searchsorted(grown.ids, ids) for _, ids in answers])
    matrix = grown.matrix

    # The largest rounding error of FAISS's squared distances (Higham, as in retrieval.index.kernels).
    theirs = grown.index.search(queries, k)[1]
    longest = np.sqrt(max(float(np.einsum("j,j", row, row)) for row in matrix[theirs.ravel()]))
    lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries, dtype=np.float64))
    rounding = (queries.shape[1] + 16) * 2.0**-24 * (lengths + longest) ** 2
    gaps = np.abs(_squares(matrix, queries, theirs) - _squares(matrix, queries, ours))
    differ = ours != theirs
    beyond = differ & (gaps > 2 * rounding[:, None])

    proven = queries[:PROVEN]
    true = _brute_force(matrix, proven, k)
    wrong = ours[:PROVEN] != true
    right, given = _squares(matrix, proven, true), _squares(matrix, proven, ours[:PROVEN])
    # Equal squares are ordered by id; float64 rounding may make equal ones differ.
    wrong &= np.abs(right - given) > 1e-12 * right
    return {
        "compared_answers": ours.size,
        "other_than_indexflatl2": int(differ.sum()),
        "largest_relative_gap": float((gaps / _squares(matrix, queries, ours)).max()),
        "other_beyond_rounding": int(beyond.sum()),
        "proven_answers": true.size,
        "mismatches": int(wrong.sum()),
    }


def _squares(matrix: Vectors, queries: Vectors, rows: Ids) -> NDArray[np.float64]:
    """Returns the squared distances, in float64, of queries (n, d) to their own rows (n, k)."""
    found = np.empty(rows.shape)
    for number, query in enumerate(queries.astype(np.float64)):
        differences = matrix[rows[number]] - query
        found[number] = np.einsum("ij,ij->i", differences, differences)
    return found


def _brute_force(matrix: Vectors, queries: Vectors, k: int) -> Ids:
    """Returns the k rows nearest to each query, by distances in float64; ties by row number."""
    squares = np.empty((len(queries), len(matrix)))
    wide = queries.astype(np.float64)
    # Blocks of 64 rows: their differences fit in a core's cache.
    for start in range(0, len(matrix), 64):
        block = matrix[start : start + 64].astype(np.float64)
        for number, query in enumerate(wide):
            differences = block - query
            squares[number, start : start + 64] = np.einsum("ij,ij->i", differences, differences)
    return np.stack([np.argsort(one, kind="stable")[:k] for one in squares])


# Room


def _shortage(folder: Path, source: Source, before: int, size: int) -> str | None:
    """Returns why a gallery cannot grow to a size here, as text; None if it can."""
    row = 4 * source.dimension
    # The index grows. The gallery's files need room in the page cache, or the benchmark measures the disk.
    memory = (size - before + size) * row + SPARE_MEMORY
    if (free := _memory("MemAvailable")) < memory:
        return f"needs {memory / 2**30:.1f} GB more memory, {free / 2**30:.1f} GB are available"
    # Merging and codes temporarily need a quarter more.
    disk = (size - before) * row * 5 // 4 + SPARE_DISK
    if (free := shutil.disk_usage(folder).free) < disk:
        return f"needs {disk / 2**30:.1f} GB more on the disk, {free / 2**30:.1f} GB are free"
    return None


def _memory(name: str) -> int:
    """Returns a value of /proc/meminfo, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


# Showing


def _line(cells: Sequence[str]) -> str:
    return "".join(map(str.rjust, cells, COLUMNS.values()))


def _cells(one: dict[str, Any]) -> list[str]:
    def took(name: str) -> str:
        if name not in one:
            return "–"
        median, most = (one[name][which] / one["queries"] for which in ("ms_median", "ms_p99"))
        return f"{median:,.{_digits(median)}f} ({most:,.{_digits(most)}f})"

    def ratio(name: str) -> str:
        return f"{one[name]['ms_median'] / one['faceprint']['ms_median']:,.1f}" if name in one else "–"

    return [
        f"{one['rows']:,}",
        one["for"],
        f"{one['queries']}",
        f"{one['k']}",
        took("faceprint"),
        took("gallery"),
        took("IndexFlatL2"),
        ratio("IndexFlatL2"),
        took("usearch"),
        ratio("usearch"),
        f"{one['candidates_per_query']:,.0f}",
    ]


def _digits(milliseconds: float) -> int:
    return 0 if milliseconds >= 1000 else 1 if milliseconds >= 100 else 2 if milliseconds >= 1 else 3


def _summary(one: dict[str, Any]) -> str:
    """Returns, as text, the measurements of a size that the table does not have."""
    if "skipped" in one:
        return f"{one['rows']:,} rows: skipped; {one['skipped']}"
    search = next(search for search in one["searches"] if (search["queries"], search["k"]) == (1, 10))
    coordinates = one["coordinates"]
    codes = {None: "too few rows to learn codes", 0: "codes do not pay"}.get(
        coordinates, f"{coordinates} coordinates"
    )
    compared = "; ".join(
        f"{name}: of {found['compared_answers']:,} ids {found['other_than_indexflatl2']} are not "
        f"IndexFlatL2's, {found['other_beyond_rounding']} beyond float32's rounding; "
        f"of {found['proven_answers']:,} {found['mismatches']} are not the float64 brute force's"
        for name, found in one["compared"].items()
    )
    return (
        f"{one['rows']:,} rows: enrolled the new ones in {one['build_seconds']:,.1f} s, optimized in "
        f"{one['optimize_seconds']:,.1f} s ({codes}); 1 query, k = 10: {search['method']}, "
        f"{search['candidates_per_query']:,.0f} candidates, {search['mb_read']:,.1f} MB read; {compared}"
    )


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
