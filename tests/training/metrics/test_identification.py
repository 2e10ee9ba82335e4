"""Figures from arrays, against what a person would count by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.metrics import identification


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


@pytest.mark.parametrize(
    ("predicted", "actual", "share"),
    [([1, 2, 3, 4], [1, 2, 3, 4], 1.0), ([1, 2, 3, 4], [1, 0, 3, 0], 0.5), ([0], [1], 0.0)],
)
def test_accuracy_is_the_share_of_equal_labels(predicted: list[int], actual: list[int], share: float) -> None:
    assert identification.accuracy(np.array(predicted), np.array(actual)) == share


def test_the_accuracy_of_nothing_is_no_number() -> None:
    assert math.isnan(identification.accuracy(np.empty(0, np.int64), np.empty(0, np.int64)))


@settings(deadline=None)
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
    distances, rows = identification.nearest(queries, gallery, k)
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
        distances, rows = identification.nearest(queries, gallery, 3)
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
        distances, rows = identification.nearest(query[None], gallery, k)
        expected_distances, expected_rows = naive(query[None], gallery, k)
        assert np.array_equal(rows, expected_rows)
        np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)


def test_blocks_of_queries_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    queries = random.normal(size=(23, 7)).astype(np.float32)
    gallery = random.normal(size=(31, 7)).astype(np.float32)
    whole = identification.nearest(queries, gallery, 5)
    monkeypatch.setattr(identification, "_CELLS", 4 * 31)
    blocks = identification.nearest(queries, gallery, 5)
    assert np.array_equal(blocks[1], whole[1])
    assert np.array_equal(blocks[1], naive(queries, gallery, 5)[1])
    np.testing.assert_allclose(blocks[0], whole[0], rtol=1e-14)


def test_more_neighbours_than_rows_are_all_rows() -> None:
    gallery = np.array([[3.0], [1.0]], np.float32)
    distances, rows = identification.nearest(np.array([[0.0], [2.5]], np.float32), gallery, 9)
    assert rows.tolist() == [[1, 0], [0, 1]]
    assert distances.tolist() == [[1.0, 3.0], [0.5, 1.5]]


def test_no_queries_have_no_neighbours() -> None:
    distances, rows = identification.nearest(np.empty((0, 4), np.float32), np.ones((3, 4), np.float32), 2)
    assert (distances.shape, distances.dtype) == ((0, 2), np.float64)
    assert (rows.shape, rows.dtype) == ((0, 2), np.int64)


def test_confusions_are_counted_and_the_most_frequent_come_first() -> None:
    actual, predicted = [0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 0, 0, 1, 2, 2]
    assert identification.confusions(predicted, actual) == [(0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 1, 1)]
    names = ["Ada", "Bob", "Cid"]
    named = identification.confusions([names[one] for one in predicted], [names[one] for one in actual])
    assert named == [("Ada", "Bob", 2), ("Bob", "Ada", 1), ("Cid", "Ada", 1), ("Cid", "Bob", 1)]


def test_without_mistakes_there_are_no_confusions() -> None:
    assert identification.confusions([1, 2], [1, 2]) == []
    assert identification.confusions(list[int](), list[int]()) == []


def test_the_true_label_is_among_the_k_likeliest_or_not() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], np.float32)
    actual = np.array([1, 0, 1])
    assert identification.top_k(probabilities, actual, 1).tolist() == [False, False, False]
    assert identification.top_k(probabilities, actual, 2).tolist() == [True, False, True]
    assert identification.top_k(probabilities, actual, 3).tolist() == [True, True, True]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 20), c=st.integers(1, 8))
def test_top_one_is_accuracy_and_top_all_is_everything(seed: int, n: int, c: int) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.integers(0, 4, (n, c)).astype(np.float32)
    actual = random.integers(0, c, n)
    assert identification.top_k(probabilities, actual, 1).mean() == identification.accuracy(
        probabilities.argmax(1), actual
    )
    assert identification.top_k(probabilities, actual, c).all()


def test_ranks_are_those_that_a_person_would_count() -> None:
    """Ada's photos are 2nd and 4th from the query, behind one of Bob's and then one of Cid's."""
    gallery = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    labels = np.array([1, 0, 2, 0])
    found = identification.ranks(np.zeros((2, 1), np.float32), np.array([0, 9]), gallery, labels)
    assert found.place.tolist() == [2, 0]
    assert found.precision[0] == (1 / 2 + 2 / 4) / 2
    assert math.isnan(found.precision[1])
    assert (found.row.tolist(), found.distance.tolist()) == ([0, 0], [1.0, 1.0])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 6),
    m=st.integers(1, 20),
    d=st.integers(1, 5),
    block=st.integers(1, 60),
)
def test_ranks_are_the_naive_loop_ties_and_blocks_included(
    seed: int, n: int, m: int, d: int, block: int
) -> None:
    random = np.random.default_rng(seed)
    queries, asked = random.integers(0, 3, (n, d)).astype(np.float32), random.integers(0, 4, n)
    gallery, labels = random.integers(0, 3, (m, d)).astype(np.float32), random.integers(0, 4, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identification, "_CELLS", block)
        found = identification.ranks(queries, asked, gallery, labels)
    _, orders = naive(queries, gallery, m)
    for index, order in enumerate(orders.reshape(n, m)):
        people = list(dict.fromkeys(labels[order].tolist()))
        place = people.index(asked[index]) + 1 if asked[index] in people else 0
        hits = np.flatnonzero(labels[order] == asked[index])
        precisions = [(number + 1) / (position + 1) for number, position in enumerate(hits)]
        assert found.place[index] == place
        assert found.row[index] == order[0]
        np.testing.assert_allclose(found.precision[index], np.mean(precisions) if place else np.nan)


def test_average_precision_is_scikit_learns() -> None:
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(4)
    gallery, labels = random.normal(size=(60, 8)).astype(np.float32), random.integers(0, 5, 60)
    queries, asked = random.normal(size=(9, 8)).astype(np.float32), random.integers(0, 5, 9)
    found = identification.ranks(queries, asked, gallery, labels)
    for query, label, precision in zip(queries, asked, found.precision, strict=True):
        nearness = -np.linalg.norm(query.astype(np.float64) - gallery.astype(np.float64), axis=1)
        assert precision == pytest.approx(average_precision_score(labels == label, nearness))


def test_copies_of_a_photo_under_two_names_are_ranked_by_row() -> None:
    """In 2,048 dimensions, where a matrix product may tell equal rows apart."""
    random = np.random.default_rng(5)
    for _ in range(50):
        photo = random.normal(size=(1, 2048)).astype(np.float32)
        gallery = np.concatenate([random.normal(size=(20, 2048)), np.tile(photo, (9, 1))]).astype(np.float32)
        labels = np.array([9] * 20 + [1, 2, 3, 4, 5, 6, 7, 8, 0])
        found = identification.ranks(photo, np.array([0]), gallery, labels)
        assert (found.place.tolist(), found.row.tolist()) == ([9], [20])
