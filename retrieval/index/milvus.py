"""`MilvusVectors`: the vectors of one generation in a collection of a Milvus server, searched exactly.

    milvus://USER:PASSWORD@HOST:PORT/COLLECTION

The collection has the vectors by face id, in an index of the kind FLAT, which compares a query with all of
them in float32. Every request has the consistency level Strong: it sees all that was acknowledged before.

How a float32 engine gives the answers of float64: it is asked for k rows and a margin, with their vectors,
and their distances are computed in float64. Let s be the largest squared distance that it returned, g the
error bound of a float32 sum (`kernels.relative_rounding`), q the query, y a row that it did not return, and D
the true distance of y. Its float32 result for y is at least s. An engine may add up squared differences, or
expand |q|² + |y|² - 2qy; in both cases, in any order of summation, the error is at most g (|q| + |y|)², and
|y| is at most |q| + D. So D² + g (2|q| + D)² >= s, which gives a lower bound on D. Once the k-th distance in
float64 is below it, no hidden row is nearer, nor as near. Otherwise it is asked for twice as many.

Milvus itself orders squared distances of different segments that are nearly equal by their ids, so its result
for y may also be less than s, by `TIE` at most. Vectors so short that this hides everything are all fetched.

Ids without a row in the tables are left out: the collection may hold vectors that a killed writer left.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import (
    GalleryDamaged,
    GalleryError,
    InputError,
    MissingDependency,
    ServerUnavailable,
    StorageError,
)
from retrieval.index.blocks import Block, Floats, Ids
from retrieval.index.candidates import Exclude
from retrieval.index.explanation import Explanation, count
from retrieval.index.kernels import (
    FLOAT64_SLACK,
    pair_squares_float64,
    relative_rounding,
    underflow,
)
from retrieval.index.knn import MAX_DISTANCE, Neighbours
from retrieval.index.searched import check_count, check_radius, checked_vectors

_ADDRESS: Final = re.compile(
    r"milvus://(?:(?P<user>[^:/@]+):(?P<password>[^/@]*)@)?(?P<host>[\w.-]+)(?::(?P<port>\d{1,5}))?"
    r"/(?P<collection>[A-Za-z_]\w{0,254})",
    re.ASCII,
)
_PORT: Final = 19530

# Seconds to wait for a connection, and for the answer to a request.
_CONNECT_SECONDS: Final = 10.0
_REQUEST_SECONDS: Final = 600.0

# In what pymilvus and grpc say of a server that does not answer, or is not yet ready.
_AWAY: Final = ("fail connecting", "unavailable", "retry", "deadline", "timeout", "not ready")

# How long a check that no vector is missing holds, in seconds: the server may be restored meanwhile.
_CHECK_SECONDS: Final = 60.0

# Rows beyond k that are asked for first.
MARGIN: Final = 12

# The most rows that Milvus returns for a query.
MOST_ROWS: Final = 16384

# When it merges the results of segments, Milvus 2.3.5 orders rows by id if their squared distances differ by
# less than 1.2e-8 (measured: it does at 1.18e-8, not at 1.2e-8). The rest is for chains of such comparisons.
TIE: Final = 1e-6

# Bytes of vectors in a request or in an answer.
_WRITE_BYTES: Final = 4 * 2**20
_READ_BYTES: Final = 32 * 2**20

# The most ids that a request lists; with more, all rows are asked for and the others left out.
MOST_LISTED: Final = 65_536

# Bytes of vectors up to which all allowed rows are fetched, instead of a search among them.
DIRECT_BYTES: Final = 128 * 2**10

# Answers name it so whatever it is called, up to Milvus 2.3.
_ID: Final = "id"
_VECTOR: Final = "vector"
_STRONG: Final = "Strong"
# Does not wait for the server's clock, and may miss what was written just before.
_EVENTUALLY: Final = "Eventually"

# What an error says where the collection is not in the server's memory.
_NOT_LOADED: Final = "collection not loaded"


class MilvusVectors:
    """The vectors of a collection. Safe to share between threads.

    Attributes:
        name: the address without a password, for messages.
        dimension: d.
    """

    def __init__(self, address: str, dimension: int) -> None:
        """Connects to the server; `create` and `open` also see to the collection.

        Raises:
            InputError: the address is none of Milvus.
            MissingDependency: pymilvus is not installed.
            StorageError: the server cannot be reached.
        """
        parts = _ADDRESS.fullmatch(address)
        if parts is None or int(parts["port"] or _PORT) not in range(1, 2**16):
            raise InputError(
                "This is no address of a Milvus collection; write it as milvus://HOST:PORT/COLLECTION, and "
                "in a password %40 for an @ and %2F for a slash."
            )
        place = f"{parts['host']}:{parts['port'] or _PORT}"
        self.name = f"milvus://{place}/{parts['collection']}"
        self.dimension = dimension
        self._collection = parts["collection"]
        token = "" if parts["user"] is None else f"{unquote(parts['user'])}:{unquote(parts['password'])}"
        self._client = _connected(f"http://{place}", token, self.name)

    @classmethod
    def create(cls, address: str, dimension: int, *, owner: str = "") -> "MilvusVectors":
        """Creates an empty collection.

        Args:
            address: as in the text of this module.
            dimension: d.
            owner: says what the collection is of, for `owner`.

        Raises:
            InputError, MissingDependency, StorageError: as of `MilvusVectors`.
            GalleryError: the collection exists.
        """
        made = cls(address, dimension)
        try:
            with made._translated():
                if made._client.has_collection(made._collection):
                    raise GalleryError(f"The collection {made.name} exists already; give another name.")
                made._make(owner)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def create_unfinished(cls, address: str, dimension: int, *, owner: str) -> "MilvusVectors":
        """Creates an empty collection that is marked as unfinished, or opens one that is, of the same owner.

        Raises:
            InputError, MissingDependency, StorageError: as of `MilvusVectors`.
            GalleryError: there is a collection that is not marked so, or that is of another owner.
        """
        with closing(cls(address, dimension)) as made, made._translated():
            if made._client.has_collection(made._collection):
                if made._mark not in made._marks() or made.owner() != owner:
                    raise GalleryError(
                        f"The collection {made.name} exists already, and is not an unfinished copy of this "
                        "gallery and its model; give another name."
                    )
            else:
                made._make(owner)
                made._client.create_alias(made._collection, made._mark, timeout=_REQUEST_SECONDS)
        return cls.open(address, dimension)

    def mark_finished(self) -> None:
        """Removes the mark of `create_unfinished`.

        Raises:
            StorageError: the server refused.
        """
        with self._translated():
            self._client.drop_alias(self._mark, timeout=_REQUEST_SECONDS)

    @property
    def _mark(self) -> str:
        """The alias of a collection that marks it as unfinished."""
        return f"{self._collection}__unfinished"

    def _marks(self) -> list[str]:
        return list(self._client.list_aliases(self._collection, timeout=_REQUEST_SECONDS)["aliases"])

    @classmethod
    def open(cls, address: str, dimension: int) -> "MilvusVectors":
        """Opens a collection.

        Raises:
            InputError, MissingDependency, StorageError: as of `MilvusVectors`.
            GalleryError: there is no such collection.
            GalleryDamaged: it is not as `create` makes it: another dimension, or an index that may miss rows.
        """
        opened = cls(address, dimension)
        try:
            with opened._translated():
                if not opened._client.has_collection(opened._collection):
                    raise GalleryError(f"There is no collection {opened.name}; check its name.")
                opened._check()
                opened._client.load_collection(opened._collection, timeout=_REQUEST_SECONDS)
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def drop(self) -> None:
        """Removes the collection from the server.

        Raises:
            StorageError: the server refused.
        """
        with self._translated():
            self._client.drop_collection(self._collection, timeout=_REQUEST_SECONDS)

    # Writing

    def put(self, ids: Ids, vectors: NDArray[np.float32]) -> None:
        """Stores vectors durably, in place of others with the same ids.

        Args:
            ids: (n,) int64, each once.
            vectors: (n, d) float32, finite, of lengths up to 1e18.

        Raises:
            StorageError: the server refused; some may be stored.
        """
        step = max(1, _WRITE_BYTES // (4 * self.dimension))
        with self._translated():
            for start in range(0, len(ids), step):
                some = slice(start, start + step)
                rows = [
                    {_ID: number, _VECTOR: vector}
                    for number, vector in zip(ids[some].tolist(), vectors[some], strict=True)
                ]
                self._client.upsert(self._collection, rows, timeout=_REQUEST_SECONDS)
            # Acknowledged rows are in the server's log only; a flush writes them to its storage.
            self._client.flush(self._collection, timeout=_REQUEST_SECONDS)

    def remove(self, ids: Ids) -> None:
        """Removes vectors from all later answers; unknown ids are none. Their bytes stay until compactions.

        Raises:
            StorageError: the server refused; some may be removed.
        """
        with self._translated():
            for some in _parts(ids, MOST_ROWS):
                self._client.delete(self._collection, ids=some.tolist(), timeout=_REQUEST_SECONDS)

    # Reading

    def ids(self, end: int) -> Ids:
        """Returns the ids of all stored vectors below `end`, ascending, with or without a row."""
        found = [np.empty(0, np.int64)]
        for first in range(0, end, MOST_ROWS):
            last = min(first + MOST_ROWS, end)
            rows = self._query(f"{_ID} >= {first} and {_ID} < {last}", [_ID])
            found.append(np.array([row[_ID] for row in rows], np.int64))
        return np.unique(np.concatenate(found))

    def ids_from(self, first: int) -> Ids:
        """Returns the ids of stored vectors from `first` on, at most `MOST_ROWS` of them."""
        rows = self._query(f"{_ID} >= {first}", [_ID], limit=MOST_ROWS)
        return np.sort(np.array([row[_ID] for row in rows], np.int64))

    def count(self) -> int:
        """Returns the number of stored vectors, with or without a row."""
        return self._count("", _STRONG)

    def check_complete(self, rows: Ids) -> None:
        """Checks that no row lacks its vector, as after a restore of the server to an earlier state.

        A search finds only what is stored, so a vector that is missing would be missing in its answer. Where
        counts differ, as after a killed writer, all ids are compared.

        Args:
            rows: the ids of all rows, ascending.

        Raises:
            GalleryDamaged: some lack their vector.
            StorageError: the server refused.
        """
        if not len(rows):
            return
        last = int(rows[-1])
        if any(self._has_as_many(len(rows), last, level) for level in (_EVENTUALLY, _STRONG)):
            return
        missing = np.setdiff1d(rows, self.ids(last + 1), assume_unique=True)
        if len(missing):
            raise self._lacks(missing.tolist())

    def is_exactly(self, rows: int, last: int) -> bool:
        """Returns whether the stored vectors are those of the rows, as far as counts can tell.

        Args:
            rows: the number of rows.
            last: the last id of a row; 0 without rows.
        """
        return self.count() == rows and (not rows or self._has_as_many(rows, last, _STRONG))

    def _has_as_many(self, rows: int, last: int, level: str) -> bool:
        """Returns whether there are as many vectors as rows up to the last row, and that of the last row.

        They differ after a loss of vectors, and where one server was restored to another state than the
        other, also if as many faces were enrolled as forgotten in between.
        """
        stored, newest = self._count(f"{_ID} <= {last}", level), self._count(f"{_ID} == {last}", level)
        return stored == rows and newest == 1

    def check_answers(self) -> None:
        """Checks that the server answers, in a request that does not wait for its clock.

        Raises:
            StorageError: it does not.
        """
        self._count(f"{_ID} == 0", _EVENTUALLY)

    def owner(self) -> str:
        """Returns what `create` was told that the collection is of."""
        with self._translated():
            return str(self._client.describe_collection(self._collection).get("description", ""))

    def fetch(self, ids: Ids) -> NDArray[np.float32]:
        """Returns the vectors of some ids, (n, d), in their order.

        Raises:
            GalleryDamaged: one is not there.
            StorageError: the server refused.
        """
        vectors = np.empty((len(ids), self.dimension), np.float32)
        step = max(1, min(MOST_ROWS, _READ_BYTES // (4 * self.dimension)))
        for start in range(0, len(ids), step):
            some = ids[start : start + step].tolist()
            rows = self._query(f"{_ID} in {some}", [_ID, _VECTOR])
            known = {row[_ID]: row[_VECTOR] for row in rows}
            if missing := [number for number in some if number not in known]:
                raise self._lacks(missing)
            vectors[start : start + len(some)] = [known[number] for number in some]
        return vectors

    def nearest(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        rows: Ids,
        allowed: Ids | None = None,
        exclude: Exclude = None,
    ) -> list[Neighbours]:
        """Returns the k nearest rows to each query, as `knn.nearest` does.

        Args:
            queries: (n, d) float32, finite, of lengths up to 1e18.
            k: at least 1; with fewer rows, all are returned.
            rows: the ids that exist, ascending; no other is in the result.
            allowed: the only ids of them that may be in the result, ascending; None is all.
            exclude: for each query the ids that may not be in its result, which are few.

        Returns:
            For each query: Euclidean distances ascending, float64, and ids; equal distances by id.

        Raises:
            GalleryDamaged: the vector of a row was found missing.
            StorageError: the server refused.
        """
        return _Search(self, queries, rows, allowed, exclude, k=k, radius=np.inf).answers()

    def within(
        self,
        queries: NDArray[np.float32],
        radius: float,
        *,
        rows: Ids,
        allowed: Ids | None = None,
        exclude: Exclude = None,
    ) -> list[Neighbours]:
        """Returns all rows at a distance of at most `radius` from each query; otherwise as `nearest`."""
        limit = min(radius, MAX_DISTANCE)
        return _Search(self, queries, rows, allowed, exclude, k=0, radius=limit).answers()

    def hits(self, queries: NDArray[np.float32], limit: int, only: Ids | None) -> Iterator["Hits"]:
        """Yields for each query the `limit` rows that are nearest in float32.

        Args:
            queries: (n, d).
            limit: at most `MOST_ROWS`.
            only: the only ids to compare; None is all.
        """
        step = max(1, _READ_BYTES // (4 * self.dimension * limit))
        chosen = "" if only is None else f"{_ID} in {only.tolist()}"
        for start in range(0, len(queries), step):
            search = partial(
                self._client.search,
                self._collection,
                data=list(queries[start : start + step]),
                filter=chosen,
                limit=limit,
                output_fields=[_VECTOR],
                search_params={"metric_type": "L2"},
                consistency_level=_STRONG,
                timeout=_REQUEST_SECONDS,
            )
            found = self._answer(search)
            yield from (Hits(one, self.dimension, complete=len(one) < limit) for one in found)

    def _lacks(self, missing: Sequence[int]) -> GalleryDamaged:
        return GalleryDamaged(
            f"The collection {self.name} lacks the vector of face {missing[0]}"
            + (f" and of {len(missing) - 1:,} more" if len(missing) > 1 else "")
            + "; restore it from a backup, or forget these faces, which `faceprint verify --json` lists, and "
            "enroll their photos again."
        )

    def _count(self, chosen: str, level: str) -> int:
        return int(self._query(chosen, ["count(*)"], level)[0]["count(*)"])

    def _query(
        self, chosen: str, fields: list[str], level: str = _STRONG, **options: Any
    ) -> list[dict[str, Any]]:
        query = partial(
            self._client.query,
            self._collection,
            filter=chosen,
            output_fields=fields,
            consistency_level=level,
            timeout=_REQUEST_SECONDS,
            **options,
        )
        return list(self._answer(query))

    def _answer(self, request: Callable[[], Any]) -> Any:
        """Returns the answer to a request; a server that was started again is told to load the collection."""
        from pymilvus.exceptions import MilvusException

        with self._translated():
            try:
                return request()
            except MilvusException as error:
                if _NOT_LOADED not in str(error.message):
                    raise
                self._client.load_collection(self._collection, timeout=_REQUEST_SECONDS)
                return request()

    # The collection

    def _make(self, owner: str) -> None:
        from pymilvus import DataType

        client = self._client
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=owner)
        schema.add_field(_ID, DataType.INT64, is_primary=True)
        schema.add_field(_VECTOR, DataType.FLOAT_VECTOR, dim=self.dimension)
        indexes = client.prepare_index_params()
        indexes.add_index(_VECTOR, index_type="FLAT", metric_type="L2")
        client.create_collection(
            self._collection,
            schema=schema,
            index_params=indexes,
            consistency_level=_STRONG,
            timeout=_REQUEST_SECONDS,
        )

    def _check(self) -> None:
        client, name = self._client, self._collection
        described = client.describe_collection(name)
        fields = {field["name"]: field for field in described["fields"]}
        problem = None
        if fields.keys() != {_ID, _VECTOR} or not fields[_ID].get("is_primary"):
            problem = "its fields are not those that faceprint makes"
        elif int(fields[_VECTOR]["params"].get("dim", 0)) != self.dimension:
            problem = f"its vectors have not {self.dimension} numbers"
        else:
            kinds = [client.describe_index(name, index) for index in client.list_indexes(name)]
            if [(one["index_type"], one["metric_type"]) for one in kinds] != [("FLAT", "L2")]:
                problem = "its index is not FLAT with the metric L2, so searches could miss the nearest"
        if problem is not None:
            raise GalleryDamaged(f"The collection {self.name} cannot be used: {problem}; make it anew.")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translates errors of pymilvus, and of the grpc below it, into faceprint's."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError) as error:
            raise _refused(self.name, error) from error


class SearchedCollection:
    """The vectors of one snapshot in a collection, as `SearchedVectors`: those that have a row.

    Attributes:
        collection: returns the collection, which is opened when it is needed.
        rows: the ids that exist, ascending.
        dimension: d.
    """

    def __init__(self, collection: Callable[[], MilvusVectors], rows: Ids, dimension: int) -> None:
        self.collection = collection
        self.rows = rows
        self.dimension = dimension
        self._checked_at = -math.inf

    def _opened(self) -> MilvusVectors:
        """Returns the collection, after a check that it has all rows, which holds for a minute."""
        opened, now = self.collection(), time.monotonic()
        if now - self._checked_at >= _CHECK_SECONDS:
            opened.check_complete(self.rows)
            self._checked_at = now
        return opened

    def checked(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """See `SearchedVectors`."""
        return checked_vectors(vectors, self.dimension)

    def nearest(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """See `SearchedVectors`."""
        check_count(k)
        checked = self.checked(queries)
        with self._explained(explanation, len(checked), allowed):
            return self._opened().nearest(checked, k, rows=self.rows, allowed=allowed, exclude=exclude)

    def within(
        self,
        queries: NDArray[Any],
        radius: float,
        *,
        allowed: Ids | None = None,
        exclude: Exclude = None,
        explanation: Explanation | None = None,
    ) -> list[Neighbours]:
        """See `SearchedVectors`."""
        check_radius(radius)
        checked = self.checked(queries)
        with self._explained(explanation, len(checked), allowed):
            return self._opened().within(checked, radius, rows=self.rows, allowed=allowed, exclude=exclude)

    def blocks(self) -> list[Block]:
        """See `SearchedVectors`; it fetches all of them."""
        return [Block(self.rows, self.collection().fetch(self.rows))] if len(self.rows) else []

    def some(self, ids: Ids) -> tuple[Ids, NDArray[np.float32]]:
        """See `SearchedVectors`."""
        found = np.intersect1d(self.rows, ids)
        return found, self.collection().fetch(found)

    @contextmanager
    def _explained(
        self, explanation: Explanation | None, queries: int, allowed: Ids | None
    ) -> Iterator[None]:
        """Adds the cost of a search: the server compares all rows, and says nothing about what it reads."""
        explanation = Explanation() if explanation is None else explanation
        rows = len(self.rows) if allowed is None else len(np.intersect1d(self.rows, allowed))
        explanation.queries += queries
        explanation.rows = rows
        count(explanation, scanned_rows=queries * rows, bytes_read=4 * self.dimension * queries * rows)
        with explanation.timed("Milvus"):
            yield


class Hits:
    """The rows that the engine returned for a query.

    Attributes:
        ids: (n,) int64.
        vectors: (n, d) float32.
        last: the largest squared distance that it computed, in float32; 0 without rows.
        complete: whether it returned fewer rows than it was asked for.
    """

    def __init__(self, found: Sequence[Any], dimension: int, *, complete: bool) -> None:
        self.ids = np.array([one[_ID] for one in found], np.int64)
        vectors = [one["entity"][_VECTOR] for one in found]
        self.vectors = np.array(vectors, np.float32).reshape(-1, dimension)
        self.last = max((float(one["distance"]) for one in found), default=0.0)
        self.complete = complete


class _Search:
    """A search for the k nearest rows or, with k = 0, for those within a radius."""

    def __init__(
        self,
        engine: MilvusVectors,
        queries: NDArray[np.float32],
        rows: Ids,
        allowed: Ids | None,
        exclude: Exclude,
        *,
        k: int,
        radius: float,
    ) -> None:
        self._engine = engine
        self._queries = np.ascontiguousarray(queries, np.float32)
        self._exact = self._queries.astype(np.float64)
        self._ids = rows if allowed is None else np.intersect1d(rows, allowed)
        self._share = len(self._ids) / max(1, len(rows))
        self._filtered = allowed is not None
        self._exclude = exclude
        self._k, self._radius = k, radius

    def answers(self) -> list[Neighbours]:
        """Returns the neighbours of each query."""
        answers: list[Neighbours | None] = [None] * len(self._queries)
        left, limit = list(range(len(answers))), self._first_limit()
        most = min(MOST_ROWS, max(1, 2 * _READ_BYTES // (4 * self._engine.dimension)))
        # A few rows are fetched by their ids, without the proof.
        fetched = 4 * self._engine.dimension * len(self._ids)
        few = len(self._ids) <= self._k + MARGIN or (self._filtered and fetched <= DIRECT_BYTES)
        while left and not few and limit <= most:
            found = self._engine.hits(self._queries[left], limit, self._listed())
            for number, hits in zip(list(left), found, strict=True):
                answers[number] = self._proven(number, hits)
            left = [number for number in left if answers[number] is None]
            limit = most if limit < most < 2 * limit else 2 * limit
        if left:
            for number, answer in zip(left, self._scanned(left), strict=True):
                answers[number] = answer
        return [answer for answer in answers if answer is not None]

    def _first_limit(self) -> int:
        excluded = 0 if self._exclude is None else max(map(len, self._exclude), default=0)
        wanted = self._k + excluded + MARGIN
        # Rows that are not listed are returned too, and left out.
        return wanted if self._listed() is not None else math.ceil(wanted / max(self._share, 1e-9))

    def _listed(self) -> Ids | None:
        return self._ids if self._filtered and len(self._ids) <= MOST_LISTED else None

    def _proven(self, number: int, hits: Hits) -> Neighbours | None:
        """Returns the neighbours of a query if no hidden row can be among them; else None."""
        kept = _among(hits.ids, self._ids)
        # Not `hits.complete` alone: the engine drops rows that it finds twice.
        if hits.complete and np.count_nonzero(kept) < len(self._ids):
            return None
        squares, ids = self._ranked(number, hits.ids[kept], hits.vectors[kept])
        if hits.complete:
            return self._cut(squares, ids)
        hidden = hidden_distance(hits.last, self._exact[number])
        if self._k:
            reach = math.sqrt(squares[self._k - 1]) if len(squares) >= self._k else math.inf
        else:
            reach = self._radius
        return self._cut(squares, ids) if reach * FLOAT64_SLACK < hidden else None

    def _ranked(self, number: int, ids: Ids, vectors: NDArray[np.float32]) -> tuple[Floats, Ids]:
        """Returns squared distances in float64 and ids of rows that may be in a result, nearest first."""
        if self._exclude is not None:
            stays = ~np.isin(ids, self._exclude[number])
            ids, vectors = ids[stays], vectors[stays]
        query = np.full(len(ids), number, np.int64)
        squares = pair_squares_float64(self._exact, query, vectors, np.arange(len(ids)))
        order = np.lexsort((ids, squares))
        return squares[order], ids[order]

    def _cut(self, squares: Floats, ids: Ids) -> Neighbours:
        distances = np.sqrt(squares)
        stays = slice(self._k) if self._k else distances <= self._radius
        return distances[stays], ids[stays]

    def _scanned(self, numbers: Sequence[int]) -> list[Neighbours]:
        """Returns the neighbours of queries by comparing all rows that may be in a result, in float64."""
        best = [(np.empty(0), np.empty(0, np.int64)) for _ in numbers]
        for ids in _parts(self._ids, max(1, _READ_BYTES // (4 * self._engine.dimension))):
            vectors = self._engine.fetch(ids)
            for place, number in enumerate(numbers):
                squares, found = self._ranked(number, ids, vectors)
                squares = np.concatenate([best[place][0], squares])
                found = np.concatenate([best[place][1], found])
                order = np.lexsort((found, squares))
                squares, found = squares[order], found[order]
                stays = slice(self._k) if self._k else np.sqrt(squares) <= self._radius
                best[place] = squares[stays], found[stays]
        return [self._cut(squares, ids) for squares, ids in best]


def hidden_distance(last: float, query: Floats) -> float:
    """Returns a lower bound on the distance of each row that a float32 engine did not return.

    It is the root D of D² + g (2|q| + D)² + u + TIE = s, of the text of this module; u bounds underflow.

    Args:
        last: s, the largest squared distance that it returned.
        query: (d,) float64.
    """
    rounding, tiny = relative_rounding(len(query)), underflow(len(query))
    length = float(np.linalg.norm(query)) * FLOAT64_SLACK
    linear = 2 * rounding * length
    rest = last - TIE - 4 * rounding * length**2 - tiny
    if rest <= 0:
        return 0.0
    return (math.sqrt(linear**2 + (1 + rounding) * rest) - linear) / (1 + rounding) / FLOAT64_SLACK


def _among(ids: Ids, ascending: Ids) -> NDArray[np.bool_]:
    """Returns which ids are in a list, which may be much longer."""
    if not len(ascending):
        return np.zeros(len(ids), np.bool_)
    place = np.searchsorted(ascending, ids)
    place[place == len(ascending)] = 0
    found: NDArray[np.bool_] = ascending[place] == ids
    return found


def _parts(ids: Ids, size: int) -> Iterator[Ids]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _connected(uri: str, token: str, name: str) -> Any:
    """Returns a client of a server.

    Raises:
        MissingDependency: pymilvus is not installed.
        StorageError: the server cannot be reached, or refused.
    """
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise MissingDependency(
            "Vectors in Milvus need pymilvus; install it with `pip install 'faceprint[milvus]'`."
        ) from error
    # It prints each error that it also raises, with its stack.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    try:
        return MilvusClient(uri=uri, token=token, timeout=_CONNECT_SECONDS)
    except MilvusException as error:
        if "Fail connecting" in str(error.message):
            # It says the same where the server is down, and where it refuses a password.
            raise ServerUnavailable(
                f"The collection {name} cannot be used: its server does not answer, or refuses the user and "
                "password of `FACEPRINT_VECTORS`; check both."
            ) from error
        raise _refused(name, error) from error


def _refused(name: str, error: Any) -> StorageError:
    # An error of grpc shows its kind in the first line, and what happened in its details.
    details = error.details() if hasattr(error, "details") else ""
    said = str(getattr(error, "message", "") or details or error).strip() or type(error).__name__
    reason = said.splitlines()[0].rstrip(".")
    away = any(word in reason.lower() for word in _AWAY)
    kind = ServerUnavailable if away else StorageError
    return kind(f"The collection {name} cannot be used: {reason}.")
