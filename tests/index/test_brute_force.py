"""Brute force in blocks gives the answers of a naive loop; products are no farther off than they say."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.index import brute_force
from retrieval.index.brute_force import expanded, nearest, squared_lengths


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 300), near=st.sampled_from([1.0, 1e-3, 1e-8, 0.0]))
def test_the_bound_holds_even_where_vectors_lost_digits_before(
    dtype: type, seed: int, d: int, near: float
) -> None:
    """Others lie around one of the queries, as near as their last digits."""
    random = np.random.default_rng(seed)
    exact_queries = random.normal(size=(3, d)) * 10.0 ** random.integers(-3, 4)
    exact_others = exact_queries[0] + near * random.normal(size=(7, d))
    queries, others = exact_queries.astype(dtype), exact_others.astype(dtype)
    squares, off = expanded(queries, others, squared_lengths(others))
    assert (squares.dtype, off.dtype) == (dtype, dtype)
    apart = exact_queries.astype(np.longdouble)[:, None] - exact_others.astype(np.longdouble)
    assert (np.abs(squares - (apart**2).sum(2)) <= off[:, None]).all()


@pytest.fixture(params=[0, brute_force.DIRECT_PAIRS], ids=["products", "pairs"], autouse=True)
def direct_pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pairs are compared one by one, unless it is forbidden."""
    monkeypatch.setattr(brute_force, "DIRECT_PAIRS", request.param)


def naive(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The k nearest, one pair at a time in float64; of equally near rows the first."""
    distances, rows = [], []
    for query in queries.astype(np.float64):
        pairs = sorted(
            (float(np.sqrt(((query - row) ** 2).sum())), number)
            for number, row in enumerate(gallery.astype(np.float64))
        )[:k]
        distances.append([distance for distance, _ in pairs])
        rows.append([number for _, number in pairs])
    return np.array(distances), np.array(rows, np.int64)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 9),
    m=st.integers(1, 20),
    d=st.integers(1, 9),
    k=st.integers(1, 25),
)
def test_nearest_is_the_naive_loop_ties_included(seed: int, n: int, m: int, d: int, k: int) -> None:
    """Coordinates are 0, 1 or 2: nearly every query has rows at the same distance."""
    random = np.random.default_rng(seed)
    queries = random.integers(0, 3, (n, d)).astype(np.float32)
    gallery = random.integers(0, 3, (m, d)).astype(np.float32)
    distances, rows = nearest(queries, gallery, k)
    expected_distances, expected_rows = naive(queries, gallery, k)
    assert rows.shape == (n, min(k, m))
    assert np.array_equal(rows, expected_rows.reshape(rows.shape))
    assert np.array_equal(distances, expected_distances.reshape(rows.shape))


@pytest.mark.parametrize("noise", [1e-2, 1e-7])
def test_of_many_copies_of_a_row_the_first_are_nearest(noise: float) -> None:
    """In up to as many dimensions as embeddings have; a matrix product may tell copies apart."""
    random = np.random.default_rng(1)
    for _ in range(100):
        originals = random.normal(size=(5, random.integers(3, 2049))).astype(np.float32)
        gallery = originals[random.integers(0, 5, random.integers(10, 60))]
        queries = originals + (noise * random.normal(size=originals.shape)).astype(np.float32)
        distances, rows = nearest(queries, gallery, 3)
        expected_distances, expected_rows = naive(queries, gallery, 3)
        assert np.array_equal(rows, expected_rows)
        np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 30])
def test_vectors_that_differ_in_their_last_bits_are_told_apart(k: int) -> None:
    """Thirty at 0 to 29 of the smallest steps: squared, far below the rounding of their squared lengths."""
    random = np.random.default_rng(2)
    for _ in range(20):
        large, small = random.uniform(1e3, 2e3, 64), random.uniform(0, 1, 64)
        query = np.concatenate([large, small]).astype(np.float32)
        steps = random.permutation(30)
        gallery = np.tile(query, (30, 1))
        gallery[np.arange(30), np.arange(30)] += steps * np.spacing(np.float32(1e3))
        distances, rows = nearest(query[None], gallery, k)
        expected_distances, expected_rows = naive(query[None], gallery, k)
        assert np.array_equal(rows, expected_rows)
        np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


def test_blocks_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    queries = random.normal(size=(23, 7)).astype(np.float32)
    gallery = random.normal(size=(31, 7)).astype(np.float32)
    whole = nearest(queries, gallery, 5)
    for name, size in (("DIRECT_PAIRS", 0), ("QUERY_BLOCK", 4), ("ROW_BLOCK", 3), ("PAIR_BLOCK", 2)):
        monkeypatch.setattr(brute_force, name, size)
    blocks = nearest(queries, gallery, 5)
    assert np.array_equal(blocks[1], whole[1])
    assert np.array_equal(blocks[1], naive(queries, gallery, 5)[1])
    assert np.array_equal(blocks[0], whole[0])


def test_more_neighbours_than_rows_are_all_rows() -> None:
    gallery = np.array([[3.0], [1.0]], np.float32)
    distances, rows = nearest(np.array([[0.0], [2.5]], np.float32), gallery, 9)
    assert rows.tolist() == [[1, 0], [0, 1]]
    assert distances.tolist() == [[1.0, 3.0], [0.5, 1.5]]


def test_no_queries_have_no_neighbours() -> None:
    distances, rows = nearest(np.empty((0, 4), np.float32), np.ones((3, 4), np.float32), 2)
    assert (distances.shape, distances.dtype) == ((0, 2), np.float64)
    assert (rows.shape, rows.dtype) == ((0, 2), np.int64)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    m=st.integers(1, 20),
    k=st.integers(1, 5),
    sizes=st.tuples(st.sampled_from([0, 60]), *[st.integers(1, 9)] * 3),
    offset=st.sampled_from([0.0, 1000.0]),
)
def test_rows_that_are_not_allowed_are_no_answers(
    seed: int, n: int, m: int, k: int, sizes: tuple[int, int, int, int], offset: float
) -> None:
    """Whatever the blocks; infinity and -1 fill up where fewer are allowed than are asked for."""
    random = np.random.default_rng(seed)
    queries, gallery = ((random.integers(0, 4, (rows, 3)) + offset).astype(np.float32) for rows in (n, m))
    allowed = random.random((n, m)) < random.choice([0.1, 0.6])
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("DIRECT_PAIRS", "QUERY_BLOCK", "ROW_BLOCK", "PAIR_BLOCK"), sizes, strict=True):
            patch.setattr(brute_force, name, size)
        distances, rows = nearest(queries, gallery, k, allowed=lambda some, of: allowed[some, of])
    for query in range(n):
        stays = np.flatnonzero(allowed[query])
        expected = np.full(min(k, m), np.inf), np.full(min(k, m), -1)
        if len(stays):
            far, near = naive(queries[query : query + 1], gallery[stays], k)
            expected[0][: far.size], expected[1][: far.size] = far[0], stays[near[0]]
        assert np.array_equal(distances[query], expected[0])
        assert np.array_equal(rows[query], expected[1])
