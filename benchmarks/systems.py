"""Adapters of the systems that `benchmarks.peers` compares, each used as its documentation recommends.

    python -m benchmarks.systems fill|ask NAME FOLDER ROWS

Runs in a separate process. FOLDER holds vectors.npy and queries.npy. The system keeps its files in
FOLDER/NAME, and the results, complete or not, go to FOLDER/NAME-fill.json or FOLDER/NAME-ask.json. A system
is imported when it is first used, because its import is part of the time until a new process answers.
"""

import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

K = 10
BATCH = 64
WARM_UP = 10
# Number of rows in one call that stores; Chroma and Milvus have their own limits.
BLOCK = 4096

Vectors = NDArray[np.float32]


class Unavailable(Exception):
    """A system cannot run here; the message has the reason."""


class System(ABC):
    """A system that stores row i of the vectors (n, d) under the id i.

    Attributes:
        packages: the distributions with versions to report.
        modules: modules that it imports; they are imported before storing is timed.
        note: remark for the table.
        stores: whether it has its own files.
        batches: whether it accepts many queries in one call.
    """

    packages: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[str, ...]]
    note: ClassVar[str] = ""
    stores: ClassVar[bool] = True
    batches: ClassVar[bool] = True

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        self.folder = folder
        self.vectors = vectors

    def fill(self) -> None:
        """Stores all rows in the empty folder, and closes the files and connections that it opened."""
        raise NotImplementedError

    @abstractmethod
    def open(self) -> None:
        """Opens the stored rows for searches."""

    @abstractmethod
    def one(self, query: Vectors) -> list[int]:
        """Returns the ids of the K nearest rows to a query (d,), nearest first."""

    def many(self, queries: Vectors) -> list[list[int]]:
        """Returns the answers of `one` to queries (m, d), in one call."""
        raise NotImplementedError

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Vectors]]:
        """Yields blocks of rows, each with the id of its first row."""
        for first in range(0, len(self.vectors), size):
            yield first, self.vectors[first : first + size]


class Faceprint(System):
    packages = ("faceprint", "faiss-cpu", "SQLAlchemy")
    modules = ("retrieval.gallery.gallery", "benchmarks.galleries")
    note = "with a person, a path and a SHA-256 for each row; optimized after the last"

    def fill(self) -> None:
        from benchmarks.galleries import faces, model
        from retrieval.gallery.gallery import Gallery

        bundle = model(self.folder / "model", self.vectors.shape[1])
        with Gallery.create(self.folder / "gallery", bundle) as gallery:
            gallery.enroll_vectors(faces(0, len(self.vectors)), self.vectors)
            gallery.optimize()

    def open(self) -> None:
        from retrieval.gallery.gallery import Gallery

        self.gallery = Gallery.open(self.folder / "gallery")

    def one(self, query: Vectors) -> list[int]:
        return _rows(self.gallery.search_by_vector(query, K))

    def many(self, queries: Vectors) -> list[list[int]]:
        return [_rows(matches) for matches in self.gallery.search_by_vectors(queries, K)]


def _rows(matches: Sequence[Any]) -> list[int]:
    # The ids of faces start at 1.
    return [match.face.id - 1 for match in matches]


class Faiss(System):
    packages = ("faiss-cpu",)
    modules = ("faiss",)
    note = "IndexFlatL2, one file, read into memory; ids are row numbers"

    @property
    def path(self) -> str:
        return os.fspath(self.folder / "flat.faiss")

    def fill(self) -> None:
        import faiss

        index = faiss.IndexFlatL2(self.vectors.shape[1])
        for _, block in self.blocks():
            index.add(block)
        faiss.write_index(index, self.path)

    def open(self) -> None:
        import faiss

        self.index = faiss.read_index(self.path)

    def one(self, query: Vectors) -> list[int]:
        return self.many(query[None])[0]

    def many(self, queries: Vectors) -> list[list[int]]:
        _, ids = self.index.search(queries, K)
        return list(ids.tolist())


class Usearch(System):
    packages = ("usearch",)
    modules = ("usearch.index",)
    note = "stores nothing: searches an array, here a mapped .npy"
    stores = False

    def open(self) -> None:
        from usearch.index import MetricKind, search

        # The default metric is the cosine.
        self.search, self.metric = search, MetricKind.L2sq

    def one(self, query: Vectors) -> list[int]:
        return list(self.search(self.vectors, query, K, self.metric, exact=True).keys.tolist())

    def many(self, queries: Vectors) -> list[list[int]]:
        return list(self.search(self.vectors, queries, K, self.metric, exact=True).keys.tolist())


class Lancedb(System):
    packages = ("lancedb", "pyarrow")
    modules = ("lancedb", "pyarrow")
    note = "flat: a table without an index"

    def fill(self) -> None:
        import lancedb
        import pyarrow as pa

        dimension = self.vectors.shape[1]
        schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), dimension))])

        def batches() -> Iterator[Any]:
            for first, block in self.blocks():
                ids = pa.array(range(first, first + len(block)), pa.int64())
                flat = pa.array(block.reshape(-1))
                yield pa.record_batch(
                    [ids, pa.FixedSizeListArray.from_arrays(flat, dimension)], schema=schema
                )

        rows = pa.RecordBatchReader.from_batches(schema, batches())
        lancedb.connect(self.folder).create_table("faces", rows)

    def open(self) -> None:
        import lancedb

        self.table = lancedb.connect(self.folder).open_table("faces")

    def _search(self, query: Vectors) -> Any:
        # LanceDB's l2 is the squared distance, which has the same order.
        search = self.table.search(query).distance_type("l2").bypass_vector_index()
        return search.select(["id", "_distance"]).limit(K).to_arrow()

    def one(self, query: Vectors) -> list[int]:
        return list(self._search(query)["id"].to_pylist())

    def many(self, queries: Vectors) -> list[list[int]]:
        # query_index has the query of a row; the rows are in arbitrary order.
        found = self._search(queries).sort_by([("query_index", "ascending"), ("_distance", "ascending")])
        answers: list[list[int]] = [[] for _ in queries]
        for query, number in zip(found["query_index"].to_pylist(), found["id"].to_pylist(), strict=True):
            answers[query].append(number)
        return answers


class Milvus(System):
    packages = ("milvus-lite", "pymilvus")
    modules = ("pymilvus", "milvus_lite.adapter.grpc.server")
    note = "FLAT, L2; Milvus Lite, through its gRPC server in the same process"

    def _client(self) -> Any:
        from pymilvus import MilvusClient

        return MilvusClient(os.fspath(self.folder / "milvus.db"))

    def fill(self) -> None:
        from pymilvus import DataType

        client = self._client()
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.vectors.shape[1])
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="L2")
        client.create_collection("faces", schema=schema, index_params=index)
        for first, block in self.blocks(1024):
            rows = [{"id": first + row, "vector": vector} for row, vector in enumerate(block)]
            client.insert("faces", rows)
        client.flush("faces")  # before, the rows are in memory and in a log
        client.close()

    def open(self) -> None:
        self.client = self._client()
        self.client.load_collection("faces")

    def one(self, query: Vectors) -> list[int]:
        return self.many(query[None])[0]

    def many(self, queries: Vectors) -> list[list[int]]:
        parameters = {"metric_type": "L2"}
        found = self.client.search("faces", data=list(queries), limit=K, search_params=parameters)
        return [[hit["id"] for hit in hits] for hits in found]


class Qdrant(System):
    packages = ("qdrant-client",)
    modules = ("qdrant_client",)
    note = "local mode, always exact; made for tests and prototypes"

    def _client(self) -> Any:
        from qdrant_client import QdrantClient

        return QdrantClient(path=os.fspath(self.folder / "qdrant"))

    def fill(self) -> None:
        from qdrant_client import models

        client = self._client()
        settings = models.VectorParams(size=self.vectors.shape[1], distance=models.Distance.EUCLID)
        client.create_collection("faces", vectors_config=settings)
        for first, block in self.blocks():
            client.upload_collection("faces", vectors=block, ids=range(first, first + len(block)))
        client.close()

    def open(self) -> None:
        self.client = self._client()

    def one(self, query: Vectors) -> list[int]:
        # Local mode is always exact. It ignores search parameters, with a warning.
        found = self.client.query_points("faces", query=query, limit=K, with_payload=False)
        return [point.id for point in found.points]

    def many(self, queries: Vectors) -> list[list[int]]:
        from qdrant_client import models

        requests = [models.QueryRequest(query=query.tolist(), limit=K) for query in queries]
        answers = self.client.query_batch_points("faces", requests=requests)
        return [[point.id for point in answer.points] for answer in answers]


class Chroma(System):
    packages = ("chromadb",)
    modules = ("chromadb",)
    note = "HNSW as it comes: it has no exact mode"

    def _client(self) -> Any:
        import chromadb
        from chromadb.config import Settings

        return chromadb.PersistentClient(self.folder, settings=Settings(anonymized_telemetry=False))

    def fill(self) -> None:
        client = self._client()
        configuration = {"hnsw": {"space": "l2"}}
        faces = client.create_collection("faces", embedding_function=None, configuration=configuration)
        for first, block in self.blocks(min(BLOCK, client.get_max_batch_size())):
            faces.add(ids=[str(first + row) for row in range(len(block))], embeddings=block)
        client.close()

    def open(self) -> None:
        self.faces = self._client().get_collection("faces", embedding_function=None)

    def one(self, query: Vectors) -> list[int]:
        return self.many(query[None])[0]

    def many(self, queries: Vectors) -> list[list[int]]:
        found = self.faces.query(query_embeddings=queries, n_results=K, include=["distances"])
        return [[int(number) for number in ids] for ids in found["ids"]]


class SqliteVec(System):
    packages = ("sqlite-vec",)
    modules = ("sqlite_vec",)
    note = "a vec0 table"
    batches = False

    def _connection(self) -> Any:
        import sqlite3

        import sqlite_vec

        connection = sqlite3.connect(self.folder / "vectors.db")
        if not hasattr(connection, "enable_load_extension"):
            raise Unavailable("this Python's sqlite3 was built without the loading of extensions")
        connection.enable_load_extension(True)
        sqlite_vec.load(connection)
        return connection

    def fill(self) -> None:
        connection = self._connection()
        dimension = self.vectors.shape[1]
        connection.execute(
            f"CREATE VIRTUAL TABLE faces USING vec0(id INTEGER PRIMARY KEY, vector FLOAT[{dimension}])"
        )
        for first, block in self.blocks():
            rows = ((first + row, vector.tobytes()) for row, vector in enumerate(block))
            with connection:
                connection.executemany("INSERT INTO faces (id, vector) VALUES (?, ?)", rows)
        connection.close()

    def open(self) -> None:
        self.connection = self._connection()

    def one(self, query: Vectors) -> list[int]:
        rows = self.connection.execute(
            "SELECT id FROM faces WHERE vector MATCH ? AND k = ? ORDER BY distance", (query.tobytes(), K)
        )
        return [number for (number,) in rows]


SYSTEMS: dict[str, type[System]] = {
    "faceprint": Faceprint,
    "faiss": Faiss,
    "usearch": Usearch,
    "lancedb": Lancedb,
    "sqlite-vec": SqliteVec,
    "milvus": Milvus,
    "qdrant": Qdrant,
    "chroma": Chroma,
}


def main() -> None:
    verb, name, folder, rows = sys.argv[1:]
    _limit_memory()
    report = Path(folder) / f"{name}-{verb}.json"
    vectors = np.load(Path(folder) / "vectors.npy", mmap_mode="r")[: int(rows)]
    system = SYSTEMS[name](Path(folder) / name, vectors)
    found: dict[str, Any] = {}
    try:
        if verb == "fill":
            _fill(system, found)
        else:
            queries = np.load(Path(folder) / "queries.npy")
            for _ in _searched(system, queries, found):
                _write(report, found)
    except ModuleNotFoundError as error:
        found["problem"] = f"not installed: {error.name}"
    except Unavailable as error:
        found["problem"] = str(error)
    except Exception as error:
        found["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    _write(report, found)


def _write(report: Path, found: dict[str, Any]) -> None:
    """Writes the report atomically: the process may be killed at any time."""
    part = report.with_suffix(".part")
    part.write_text(json.dumps(found))
    os.replace(part, report)


def _limit_memory() -> None:
    """Limits this process to half of the memory, so that a system fails before the machine does."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _fill(system: System, found: dict[str, Any]) -> None:
    for module in system.modules:
        import_module(module)
    system.folder.mkdir()
    started = time.perf_counter()
    system.fill()
    # Not all systems wait for the disk; with this fsync all do.
    for place, _, names in os.walk(system.folder):
        for path in [place, *(os.path.join(place, name) for name in names)]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    found["seconds"] = time.perf_counter() - started
    found["bytes"] = sum(path.stat().st_size for path in system.folder.rglob("*") if path.is_file())


def _searched(system: System, queries: Vectors, found: dict[str, Any]) -> Iterator[None]:
    """Measures the searches. Yields after each step, so that its results are kept if a later step fails."""
    started = time.perf_counter()
    system.open()
    system.one(queries[0])
    found["first_answer_seconds"] = time.perf_counter() - started
    for query in queries[:WARM_UP]:
        system.one(query)
    found["answers"], found["ms"] = [], []
    for query in queries:
        started = time.perf_counter()
        answer = system.one(query)
        found["ms"].append(1e3 * (time.perf_counter() - started))
        found["answers"].append(answer)
    yield
    if not system.batches:
        return
    system.many(queries[:BATCH])
    batch_answers, batch_ms = [], []
    # Full batches only, unless there are fewer queries than a batch has.
    for first in range(0, max(1, len(queries) // BATCH * BATCH), BATCH):
        batch = queries[first : first + BATCH]
        started = time.perf_counter()
        batch_answers += system.many(batch)
        batch_ms.append(1e3 * (time.perf_counter() - started) / len(batch))
    found["batch_answers"], found["batch_ms"] = batch_answers, batch_ms
    yield


if __name__ == "__main__":
    main()
