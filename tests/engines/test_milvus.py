"""Vectors in a real Milvus: its answers are those of float64, whatever its float32 rounds away."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.errors import FaceprintError, GalleryDamaged, GalleryError, InputError, ServerUnavailable
from retrieval.index import milvus as milvus_module
from retrieval.index.knn import Neighbours
from retrieval.index.milvus import TIE, MilvusVectors, hidden_distance

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

D = 48
ROWS = 1500


def brute_force(
    query: NDArray[np.float32],
    stored: NDArray[np.float32],
    ids: NDArray[np.int64],
    *,
    k: int | None = None,
    radius: float = np.inf,
) -> tuple[list[float], list[int]]:
    """Distances in float64 and ids, nearest first, equal ones by id."""
    distances = np.sqrt(((stored.astype(np.float64) - query.astype(np.float64)) ** 2).sum(1))
    order = [n for n in np.lexsort((ids, distances)) if distances[n] <= radius][:k]
    return distances[order].tolist(), ids[order].tolist()


def assert_same(found: Neighbours, expected: tuple[list[float], list[int]]) -> None:
    assert found[1].tolist() == expected[1]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)


def units(rng: np.random.Generator, count: int) -> NDArray[Any]:
    made = rng.normal(size=(count, D))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def family(name: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Stored vectors that are hard in one way."""
    match name:
        case "unit":
            return units(rng, ROWS).astype(np.float32)
        case "crowded":  # differences below what float32 keeps of an expanded square
            return (units(rng, 1) + 3e-4 * units(rng, ROWS)).astype(np.float32)
        case "far away":  # long vectors: an expanded square loses all digits of a distance
            return (1000 * units(rng, 1) + 0.05 * rng.normal(size=(ROWS, D))).astype(np.float32)
        case "twins":  # many equal distances, also of different vectors
            return rng.integers(-1, 2, (ROWS, D)).astype(np.float32)[rng.integers(0, ROWS // 3, ROWS)]
        case "tiny":
            return (1e-18 * rng.normal(size=(ROWS, D))).astype(np.float32)
        case "huge":
            return (1e16 * units(rng, ROWS)).astype(np.float32)
    raise AssertionError(name)


FAMILIES = ["unit", "crowded", "far away", "twins", "tiny", "huge"]


@pytest.fixture(scope="module", params=FAMILIES)
def filled(request: pytest.FixtureRequest, milvus: str) -> Iterator[Any]:
    """Vectors with gaps in their ids, and some that no row names; half of them came later."""
    rng = np.random.default_rng(FAMILIES.index(request.param))
    stored = family(request.param, rng)
    ids = np.sort(rng.choice(np.arange(1, 4 * ROWS), ROWS, replace=False)).astype(np.int64)
    with closing(MilvusVectors.create(f"{milvus}/family_{FAMILIES.index(request.param)}", D)) as vectors:
        half = ROWS // 2
        vectors.put(ids[:half], stored[:half])
        vectors.put(ids[half:], stored[half:])
        named = rng.random(ROWS) < 0.9
        yield vectors, stored[named], ids[named], rng


def queries_of(stored: NDArray[np.float32], rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Stored vectors, close to stored ones, between two, and zero."""
    some = stored[rng.integers(0, len(stored), count)]
    nudged = some * np.float32(1 + 1e-6)
    between = (some + stored[rng.integers(0, len(stored), count)]) / 2
    return np.concatenate([some, nudged, between, np.zeros((1, D))]).astype(np.float32)


@pytest.mark.parametrize("k", [1, 20, 400])
def test_the_nearest_are_those_of_a_brute_force(k: int, filled: Any) -> None:
    """Several queries at a time, and one alone: the engine computes these in different ways."""
    vectors, stored, ids, rng = filled
    asked = queries_of(stored, rng, 4)
    expected = [brute_force(query, stored, ids, k=k) for query in asked]
    for found, answer in zip(vectors.nearest(asked, k, rows=ids), expected, strict=True):
        assert_same(found, answer)
    for number in (0, 5):
        [found] = vectors.nearest(asked[number : number + 1], k, rows=ids)
        assert_same(found, expected[number])


def test_those_within_a_radius_are_those_of_a_brute_force(filled: Any) -> None:
    vectors, stored, ids, rng = filled
    asked = queries_of(stored, rng, 1)
    for place in (0, 300):
        radius = brute_force(asked[0], stored, ids)[0][place] * (1 + 1e-9)
        for query, found in zip(asked, vectors.within(asked, radius, rows=ids), strict=True):
            assert_same(found, brute_force(query, stored, ids, radius=radius))


@pytest.mark.parametrize(("share", "most_listed"), [(0.0, 9), (0.01, 9), (0.7, 9), (0.7, 9999), (1.0, 9999)])
def test_only_the_allowed_are_found_and_the_excluded_are_not(
    share: float, most_listed: int, filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few are fetched, more are listed in the request, and even more are sorted out of its answer."""
    monkeypatch.setattr(milvus_module, "MOST_LISTED", most_listed)
    vectors, stored, ids, rng = filled
    chosen = rng.random(len(ids)) < share
    asked = queries_of(stored, rng, 2)
    nearest = [brute_force(query, stored[chosen], ids[chosen], k=9)[1] for query in asked]
    excluded = [tuple(one[:2]) for one in nearest]
    allowed = np.union1d(ids[chosen], [5 * ROWS])  # also one that no row has
    found = vectors.nearest(asked, 9, rows=ids, allowed=allowed, exclude=excluded)
    for query, gone, answer in zip(asked, excluded, found, strict=True):
        stays = chosen & ~np.isin(ids, gone)
        assert_same(answer, brute_force(query, stored[stays], ids[stays], k=9))


def test_more_rows_than_the_engine_returns_are_found(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_module, "MOST_ROWS", 64)
    vectors, stored, ids, rng = filled
    asked = queries_of(stored, rng, 1)
    for query, found in zip(asked, vectors.nearest(asked, 100, rows=ids), strict=True):
        assert_same(found, brute_force(query, stored, ids, k=100))
    radius = brute_force(asked[0], stored, ids)[0][200] * (1 + 1e-9)
    for query, found in zip(asked, vectors.within(asked, radius, rows=ids), strict=True):
        assert_same(found, brute_force(query, stored, ids, radius=radius))


@pytest.mark.parametrize("length", [0.0, 1e-9, 1.0, 300.0])
def test_no_float32_result_of_a_nearer_row_is_above_the_last(length: float) -> None:
    """The bound, against direct and expanded sums of numpy in float32, for rows around the bound."""
    rng = np.random.default_rng(3)
    query = (length * units(rng, 1)[0]).astype(np.float32)
    for reach in (1e-6, 1e-3, 0.1, 1.0, 30.0):
        others = (query + reach * units(rng, 400)).astype(np.float32)
        true = np.linalg.norm(others.astype(np.float64) - query.astype(np.float64), axis=1)
        direct = ((others - query) ** 2).sum(1)
        expanded = (others**2).sum(1) + (query**2).sum() - 2 * others @ query
        for squares in (direct, expanded):
            for square, distance in zip(squares.tolist(), true.tolist(), strict=True):
                assert hidden_distance(square, query.astype(np.float64)) <= distance


def test_the_engine_exchanges_rows_of_different_segments_only_within_the_margin(collection: str) -> None:
    """The nearer rows come second and have higher ids: what it takes for equal goes by ids."""
    shares = [0.001, 0.01, 0.02, 0.1, 0.5, 1.0]
    first, second = [], []
    for number, share in enumerate(shares):
        first += [[100.0 * number, np.sqrt(share * TIE), 0.0, 0.0]] * 10
        second += [[100.0 * number, 0.0, 0.0, 0.0]] * 10
    with closing(MilvusVectors.create(collection, 4)) as vectors:
        vectors.put(np.arange(1, len(first) + 1), np.array(first, np.float32))
        vectors.put(1000 + np.arange(len(second)), np.array(second, np.float32))
        asked = np.array(second[::10], np.float32)
        hits = list(vectors.hits(asked, 10, None))
        right = [bool((one.ids >= 1000).all()) for one in hits]
        assert right[2:] == [True] * 4, "the margin is too small for this version of Milvus"
        rows = np.concatenate([np.arange(1, len(first) + 1), 1000 + np.arange(len(second))])
        for number, (_, ids) in enumerate(vectors.nearest(asked, 10, rows=rows)):
            assert ids.tolist() == list(range(1000 + 10 * number, 1010 + 10 * number))


def test_what_was_put_comes_back_bit_for_bit_and_what_was_removed_does_not(collection: str) -> None:
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(40, D)).astype(np.float32)
    ids = np.arange(1, 41)
    with closing(MilvusVectors.create(collection, D)) as vectors:
        vectors.put(ids, stored)
        vectors.put(ids[:5], stored[:5])  # as after a write that was repeated
        vectors.remove(np.array([7, 99]))
        assert vectors.ids(1000).tolist() == [n for n in range(1, 41) if n != 7]
        assert vectors.count() == 39
        with pytest.raises(GalleryDamaged, match="lacks the vector of face 7"):
            vectors.fetch(ids)
    with closing(MilvusVectors.open(collection, D)) as vectors:
        back = vectors.fetch(np.array([9, 1, 40]))
        assert back.tobytes() == stored[[8, 0, 39]].tobytes()
        [(_, found)] = vectors.nearest(stored[6:7], 50, rows=np.delete(ids, 6))
        assert sorted(found.tolist()) == [n for n in range(1, 41) if n != 7]
        assert vectors.nearest(stored[:1], 3, rows=np.empty(0, np.int64))[0][1].tolist() == []
        vectors.put(np.array([7]), stored[:1])
        assert vectors.nearest(stored[:1], 2, rows=ids)[0][1].tolist() == [1, 7]


def test_a_vector_that_is_missing_is_damage_and_not_a_shorter_answer(collection: str) -> None:
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(30, D)).astype(np.float32)
    with closing(MilvusVectors.create(collection, D)) as vectors:
        vectors.put(np.arange(1, 31), stored)
        rows = np.arange(1, 32)
        with pytest.raises(GalleryDamaged, match="lacks the vector of face 31"):
            vectors.nearest(stored[:2], 20, rows=rows)


def test_a_collection_says_what_it_is_of_and_can_be_dropped(collection: str) -> None:
    with closing(MilvusVectors.create(collection, D, owner="gallery 4711")) as made:
        assert made.owner() == "gallery 4711"
        made.drop()
    assert "There is no collection" in str(refusal(collection))


def refusal(address: str, dimension: int = D) -> FaceprintError:
    with pytest.raises(FaceprintError) as caught:
        MilvusVectors.open(address, dimension).close()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "secret-word" not in message
    return caught.value


def test_what_cannot_be_opened_is_one_sentence(milvus: str, collection: str) -> None:
    assert type(refusal("milvus://host")) is InputError
    assert type(refusal("milvus://u:secret-word@host/a b")) is InputError
    assert type(refusal("milvus://u:secret-word@host:99999/faces")) is InputError
    assert type(refusal("milvus://host:0/faces")) is InputError
    assert "write it as milvus://HOST:PORT/COLLECTION, and in a password %40 for an @" in str(
        refusal("milvus://u:secret@word@host/faces")
    )
    absent = refusal(collection)
    assert type(absent) is GalleryError
    assert str(absent) == f"There is no collection {collection}; check its name."
    down = refusal("milvus://u:secret-word@127.0.0.1:1/faces")
    assert type(down) is ServerUnavailable
    assert "its server does not answer, or refuses the user and password" in str(down)
    MilvusVectors.create(collection, D).close()
    assert "have not 47 numbers" in str(refusal(collection, 47))
    with pytest.raises(GalleryError, match="exists already"):
        MilvusVectors.create(collection, D)


def test_a_request_that_takes_too_long_is_one_sentence(
    collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(MilvusVectors.create(collection, D)) as vectors:
        monkeypatch.setattr("retrieval.index.milvus._REQUEST_SECONDS", 1e-6)
        with pytest.raises(ServerUnavailable, match="cannot be used: "):
            vectors.count()


def test_an_index_that_may_miss_rows_is_refused(milvus: str, collection: str) -> None:
    from pymilvus import MilvusClient

    MilvusVectors.create(collection, D).close()
    name = collection.rpartition("/")[2]
    client = MilvusClient(uri=milvus.replace("milvus://", "http://"))
    client.release_collection(name)
    client.drop_index(name, "vector")
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type="HNSW", metric_type="L2", params={"M": 8, "efConstruction": 8})
    client.create_index(name, indexes)
    client.close()
    error = refusal(collection)
    assert type(error) is GalleryDamaged
    assert "searches could miss the nearest" in str(error)
