"""Whether probabilities mean what they say, against sums done by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics import reliability


def test_the_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    """Two photos at 0.95, one right: a gap of 0.45. Two at 0.50, both right: a gap of 0.50."""
    confidence = np.array([0.95, 0.95, 0.5, 0.5])
    right = np.array([True, False, True, True])
    assert reliability.calibration_error(confidence, right) == pytest.approx((0.45 * 2 + 0.5 * 2) / 4)


def test_whoever_is_right_as_often_as_he_says_has_no_calibration_error() -> None:
    confidence, right = np.full(10, 0.7), np.arange(10) < 7
    assert reliability.calibration_error(confidence, right) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "number"),
    [(0.0, 0), (1 / 15, 0), (0.0667, 1), (0.5, 7), (14 / 15, 13), (0.95, 14), (1.0, 14)],
)
def test_a_bin_holds_its_upper_end(confidence: float, number: int) -> None:
    assert reliability.bin_of(np.array([confidence])).tolist() == [number]


def test_a_reliability_diagram_has_the_mean_of_each_bin() -> None:
    found = reliability.reliability(np.array([0.91, 0.93, 0.1]), np.array([True, False, False]))
    assert found.counts.tolist() == [0, 1] + [0] * 11 + [2, 0]
    assert (found.confidence[13], found.accuracy[13]) == (pytest.approx(0.92), 0.5)
    assert np.isnan(found.accuracy[0])


def test_a_temperature_divides_the_logits() -> None:
    logits = np.array([[2.0, 0.0, -1.0]])
    probabilities = (np.exp(logits) / np.exp(logits).sum()).astype(np.float32)
    expected = np.exp(logits / 3) / np.exp(logits / 3).sum()
    np.testing.assert_allclose(reliability.at_temperature(probabilities, 3.0), expected, rtol=1e-6)


def test_a_loss_is_the_negative_logarithm_of_the_true_labels_probability() -> None:
    probabilities = np.array([[0.25, 0.75], [0.5, 0.5]])
    assert reliability.losses(probabilities, np.array([0, 1])) == pytest.approx([np.log(4), np.log(2)])


def test_a_classifier_that_is_three_times_too_sure_has_temperature_three() -> None:
    """Labels are drawn from the softmax of logits, and the classifier shows thrice these logits."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 4))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    actual = (honest.cumsum(1) < random.random((len(logits), 1))).sum(1)
    boasting = np.exp(3 * logits) / np.exp(3 * logits).sum(1, keepdims=True)
    assert reliability.fitted_temperature(boasting.astype(np.float32), actual) == pytest.approx(3, rel=0.05)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), c=st.integers(2, 6))
def test_no_other_temperature_has_a_smaller_loss(seed: int, n: int, c: int) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(c, 0.5), n).astype(np.float32)
    actual = random.integers(0, c, n)
    best = reliability.fitted_temperature(probabilities, actual)
    least = reliability.losses(reliability.at_temperature(probabilities, best), actual).mean()
    for other in (0.06, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0):
        loss = reliability.losses(reliability.at_temperature(probabilities, other), actual).mean()
        assert least <= loss + 1e-5


def test_a_probability_of_nothing_at_all_is_no_infinite_loss() -> None:
    assert np.isfinite(reliability.losses(np.array([[1.0, 0.0]]), np.array([1]))).all()
    assert np.isfinite(reliability.fitted_temperature(np.array([[1.0, 0.0]], np.float32), np.array([1])))
