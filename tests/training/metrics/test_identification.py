"""Figures from arrays, against what a person would count by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.index import brute_force
from tests.index.test_brute_force import naive
from training.metrics import identification


@pytest.mark.parametrize(
    ("predicted", "actual", "share"),
    [([1, 2, 3, 4], [1, 2, 3, 4], 1.0), ([1, 2, 3, 4], [1, 0, 3, 0], 0.5), ([0], [1], 0.0)],
)
def test_accuracy_is_the_share_of_equal_labels(predicted: list[int], actual: list[int], share: float) -> None:
    assert identification.accuracy(np.array(predicted), np.array(actual)) == share


def test_the_accuracy_of_nothing_is_no_number() -> None:
    assert math.isnan(identification.accuracy(np.empty(0, np.int64), np.empty(0, np.int64)))


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
        patch.setattr(brute_force, "RANKED_CELLS", block)
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
