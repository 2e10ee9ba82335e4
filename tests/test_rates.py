"""retrieval.rates: shares, their intervals, and the threshold of a wanted FPIR."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from retrieval import rates


def test_wilson_is_the_textbook_interval() -> None:
    """Of 10 trials with 1 hit the interval is (0.0179, 0.4042): Newcombe 1998, table I's method."""
    rate = rates.wilson(1, 10)
    assert (rate.value, rate.n) == (0.1, 10)
    assert rate.low == pytest.approx(0.0179, abs=1e-4)
    assert rate.high == pytest.approx(0.4042, abs=1e-4)


def test_no_trial_says_nothing() -> None:
    rate = rates.wilson(0, 0)
    assert math.isnan(rate.value)
    assert (rate.low, rate.high) == (0.0, 1.0)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share(trial: tuple[int, int]) -> None:
    rate = rates.wilson(*trial)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=200),
    st.floats(0, 0.99),
)
def test_the_threshold_is_the_largest_that_keeps_the_wanted_fpir(distances: list[int], wanted: float) -> None:
    """Ties included: one more distance let in would pass what was wanted."""
    strangers = np.array(distances, np.float64)
    limit = rates.threshold(strangers, wanted)
    assert rates.fpir(strangers, limit).value <= wanted + 1e-9
    beyond = strangers[strangers > limit].min()
    assert rates.fpir(strangers, beyond).value > wanted


def test_a_mated_search_fails_when_it_is_too_far_or_names_another() -> None:
    distances = np.array([1.0, 2.0, 3.0, 4.0])
    right = np.array([True, False, True, True])
    assert rates.fnir(distances, right, 3.0).value == 0.5
    assert rates.fnir(distances, right, 9.0).value == 0.25
    assert rates.fnir(distances, right, 0.0).value == 1.0


def test_a_det_curve_counts_both_kinds_of_error_at_each_threshold() -> None:
    """By hand: strangers at 2 and 4; enrolled people at 1 (right), 2 (wrong) and 3 (right)."""
    strangers, distances = np.array([4.0, 2.0]), np.array([3.0, 1.0, 2.0])
    named, missed = rates.det(
        strangers, distances, np.array([True, True, False]), np.array([0.0, 1.0, 2.0, 4.0])
    )
    assert named.tolist() == [0, 0, 0.5, 1]
    np.testing.assert_allclose(missed, [1, 2 / 3, 2 / 3, 1 / 3])


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30))
def test_each_point_of_a_det_curve_is_the_fpir_and_the_fnir_there(seed: int, n: int, m: int) -> None:
    random = np.random.default_rng(seed)
    strangers, distances = random.integers(0, 9, n).astype(float), random.integers(0, 9, m).astype(float)
    right = random.random(m) < 0.7
    limits = np.arange(-1.0, 10.0)
    named, missed = rates.det(strangers, distances, right, limits)
    np.testing.assert_allclose(named, [rates.fpir(strangers, limit).value for limit in limits])
    np.testing.assert_allclose(
        missed, [rates.fnir(distances, right, limit).value for limit in limits], atol=1e-12
    )


def test_where_nobody_comes_twice_the_interval_is_wilsons() -> None:
    hits = np.arange(400) < 40
    assert rates.by_identity(hits[:, None], np.arange(400)) == [rates.wilson(40, 400)]


def test_trials_that_repeat_a_person_count_as_that_persons() -> None:
    """Ten people, two of whom hit with all of their fifty trials: the interval is that of ten trials."""
    people = np.repeat(np.arange(10), 50)
    (rate,) = rates.by_identity((people < 2)[:, None], people)
    assert rate.value == 0.2
    assert (rate.low, rate.high) == (0.0, 0.5)
    assert rate == rates.by_identity((people < 2)[:, None], people)[0]


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=60),
)
def test_an_interval_over_identities_is_never_narrower_than_wilsons(
    trials: list[tuple[bool, bool, int]],
) -> None:
    hits = np.array([trial[:2] for trial in trials])
    found = rates.by_identity(hits, np.array([trial[2] for trial in trials]))
    for rate, column in zip(found, hits.T, strict=True):
        alone = rates.wilson(int(column.sum()), len(hits))
        assert rate.value == alone.value
        assert 0 <= rate.low <= alone.low <= alone.high <= rate.high <= 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 30), st.integers(1, 100))
def test_as_many_people_are_drawn_as_there_are_whatever_the_blocks(
    seed: int, people: int, draws: int, cells: int
) -> None:
    (whole,) = rates.resampled(people, draws, seed=seed)
    assert whole.shape == (draws, people)
    assert (whole.sum(1) == people).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_CELLS", cells)
        parts = list(rates.resampled(people, draws, seed=seed, columns=25))
    assert np.array_equal(np.concatenate(parts), whole)
    assert all(len(part) * 25 <= max(cells, 25) for part in parts)


def test_no_trial_of_anybody_says_nothing() -> None:
    (rate,) = rates.by_identity(np.empty((0, 1), bool), np.empty(0, np.int64))
    assert (rate.low, rate.high, rate.n) == (0.0, 1.0, 0)


def population(
    rng: np.random.Generator, people: int, photos: int | None, alike: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of people with random effects, of which `alike` is the intraclass correlation, and whose.

    Everybody has so many photos; None is 3 on average, mostly one.
    """
    sizes = rng.geometric(0.3, people) if photos is None else np.full(people, photos)
    place = np.repeat(np.arange(people), sizes)
    own = math.sqrt(alike) * rng.standard_normal(people)
    return own[place] + math.sqrt(1 - alike) * rng.standard_normal(len(place)), place


@pytest.mark.parametrize(
    ("people", "photos", "alike"),
    [(10, 30, 0.6), (10, 5, 0.9), (30, None, 0.3), (65, 30, 0.9), (300, 1, 0.0)],
)
def test_the_next_strangers_are_within_what_was_predicted_as_often_as_is_said(
    people: int, photos: int | None, alike: float
) -> None:
    """Calibrations with a known truth: 95 in a hundred hold, give or take; those of the long run do not."""
    rng = np.random.default_rng(people)
    held, held_in_the_long_run, trials = 0, 0, 0
    for seed in range(150):
        (distances, whose), (others, _) = (population(rng, people, photos, alike) for _ in range(2))
        wanted = [one for one in (0.1, 0.03, 0.01) if one * len(distances) >= 1.5]
        limits = np.array([rates.threshold(distances, one) for one in wanted])
        seen = rates.by_identity(distances[:, None] <= limits, whose, seed=seed)
        found = rates.upcoming(distances, whose, limits, searches=len(others), seed=seed)
        for limit, rate, next_ones in zip(limits, seen, found, strict=True):
            named = int((others <= limit).sum())
            held += next_ones.low <= named <= next_ones.high
            held_in_the_long_run += rate.low <= named / len(others) <= rate.high
            trials += 1
    assert 0.92 <= held / trials <= 0.99
    assert held_in_the_long_run / trials < 0.9


@pytest.mark.parametrize(("n", "k", "searches"), [(100, 1, 100), (300, 9, 300), (200, 20, 50)])
def test_where_nobody_comes_twice_the_prediction_is_that_of_exceedances(
    n: int, k: int, searches: int
) -> None:
    """Which is beta-binomial, whatever the distances are; within the noise of the draws."""
    distances = np.random.default_rng(0).permutation(n).astype(float)
    limit = rates.threshold(distances, k / n)
    (found,) = rates.upcoming(distances, np.arange(n), np.array([limit]), searches=searches)
    low, high = stats.betabinom(searches, k + 1, n - k).ppf([0.025, 0.975])
    assert found.n == searches
    assert found.low == pytest.approx(low, abs=1 + 0.1 * low)
    assert found.high == pytest.approx(high, abs=1 + 0.1 * high)


def test_a_prediction_holds_what_was_seen_and_is_the_same_for_the_same_seed() -> None:
    distances, whose = population(np.random.default_rng(0), 40, 5, 0.5)
    limits = np.array([rates.threshold(distances, one) for one in (0.1, 0.03)])
    found = rates.upcoming(distances, whose, limits, seed=3)
    assert found == rates.upcoming(distances, whose, limits, seed=3)
    for limit, one in zip(limits, found, strict=True):
        assert 0 <= one.low <= (distances <= limit).sum() <= one.high <= one.n == 200
    assert "of the next 200 strangers' searches between " in found[0].in_words()


def test_of_one_person_nothing_is_predicted_for_others() -> None:
    limit = np.array([rates.threshold(np.arange(50.0), 0.1)])
    assert rates.upcoming(np.arange(50.0), np.zeros(50, np.int64), limit) == [rates.Upcoming(50, 0, 50)]


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 4), st.integers(1, 60))
def test_a_prediction_of_few_people_and_ties_is_a_range_of_counts(
    seed: int, people: int, photos: int, searches: int
) -> None:
    rng = np.random.default_rng(seed)
    distances = rng.integers(0, 4, people * photos).astype(float)
    limits = np.array([rates.threshold(distances, one) for one in (0.0, 0.3)])
    for one in rates.upcoming(distances, np.repeat(np.arange(people), photos), limits, searches=searches):
        assert 0 <= one.low <= one.high <= searches
