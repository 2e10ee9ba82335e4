"""Distances by one matrix product are no farther off than they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.index.brute_force import expanded, squared_lengths


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(deadline=None)
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
