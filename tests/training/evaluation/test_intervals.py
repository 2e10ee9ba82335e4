"""Figures and their intervals: resampling against a naive loop, and the rules for too few."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import rates
from training.evaluation import intervals
from training.evaluation.intervals import difference, operating_points, share

MANY = np.repeat(np.arange(40), 5)


def outcomes(seed: int, share_right: float = 0.8) -> np.ndarray:
    """200 photos of 40 people, of whom some are harder than others."""
    random = np.random.default_rng(seed)
    ease = random.beta(4 * share_right, 4 * (1 - share_right), 40)
    return random.random(200) < ease[MANY]


def drawn_people(number: int, *, seed: int) -> np.ndarray:
    """How often each of some people is drawn, in each resample."""
    return np.concatenate(list(rates.resampled(number, intervals.RESAMPLES, seed=seed))).astype(int)


def test_a_share_is_the_mean_and_its_interval_that_of_a_naive_loop() -> None:
    """People are drawn with the same draws, and their photos laid out one by one."""
    right = outcomes(0)
    figure = share(right, MANY, seed=7)
    means = []
    for drawn in drawn_people(40, seed=7):
        photos = np.concatenate([right[person == MANY] for person in np.repeat(np.arange(40), drawn)])
        means.append(photos.mean())
    assert len(means) == intervals.RESAMPLES
    assert (figure.value, figure.n) == (right.mean(), 200)
    np.testing.assert_allclose((figure.low, figure.high), np.percentile(means, [2.5, 97.5]))
    assert figure.method == "bootstrap over 40 identities"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(30, 200), people=st.integers(1, 60))
def test_an_interval_holds_its_value_and_is_a_share(seed: int, n: int, people: int) -> None:
    random = np.random.default_rng(seed)
    figure = share(random.random(n) < random.random(), random.integers(0, people, n), seed=seed)
    assert figure.value is not None
    assert figure.low is not None
    assert figure.high is not None
    assert 0 <= figure.low <= figure.value <= figure.high <= 1


def test_names_and_the_size_of_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    right = outcomes(1)
    figure = share(right, MANY, seed=3)
    assert share(right, np.char.add("person", np.char.zfill(MANY.astype(str), 2)), seed=3) == figure
    monkeypatch.setattr(rates, "_CELLS", 40 * 7)
    assert share(right, MANY, seed=3) == figure


def test_photos_that_are_alike_within_a_person_widen_the_interval() -> None:
    """Whole people right or wrong: as if there were 40 trials and not 200."""
    figure = share((np.arange(40) < 30)[MANY], MANY, seed=0)
    by_photo = rates.wilson(150, 200)
    assert figure.high is not None
    assert figure.low is not None
    assert figure.high - figure.low > 1.8 * (by_photo.high - by_photo.low)


def test_intervals_hold_the_truth_about_95_times_in_a_hundred() -> None:
    """Hard and easy people, 120 samples of 40 of them; by photo, Wilson's would hold it in far fewer."""
    random = np.random.default_rng(0)
    held = 0
    for trial in range(120):
        ease = random.beta(1.6, 0.4, 40)
        figure = share(random.random(200) < ease[MANY], MANY, seed=trial)
        assert figure.low is not None
        assert figure.high is not None
        held += figure.low <= 0.8 <= figure.high
    assert 0.90 <= held / 120 <= 0.98


def test_fewer_than_30_trials_are_too_few() -> None:
    figure = share(np.ones(29), np.arange(29), seed=0)
    assert (figure.value, figure.low, figure.high, figure.n) == (None, None, None, 29)
    assert figure.method == "too few: 29, and it takes 30"


@pytest.mark.parametrize(
    ("right", "identities", "expected"),
    [
        (np.ones(60), np.arange(60) % 20, rates.wilson(20, 20)),
        (np.arange(60) % 2, np.arange(60) % 9, rates.wilson(4.5, 9)),
    ],
)
def test_where_drawing_says_nothing_each_identity_counts_as_one_trial(
    right: np.ndarray, identities: np.ndarray, expected: rates.Rate
) -> None:
    figure = share(right, identities, seed=0)
    assert (figure.low, figure.high) == (expected.low, expected.high)
    assert figure.method.startswith("Wilson, as if each of")


def test_the_difference_of_an_evaluation_with_itself_is_nothing_give_or_take() -> None:
    right = outcomes(2)
    figure = difference(right, right, MANY, seed=0)
    reach = rates.wilson(0, 40).high
    assert (figure.value, figure.low, figure.high) == (0.0, -reach, reach)


def test_a_difference_is_much_surer_than_the_two_figures_that_it_is_of() -> None:
    """Of 200 photos the second has 10 more right, spread over people, and none fewer."""
    first = outcomes(3)
    second = first.copy()
    second[np.flatnonzero(~first)[::3][:10]] = True
    figure, alone = difference(first, second, MANY, seed=0), share(first, MANY, seed=0)
    assert figure.value == pytest.approx(0.05)
    assert figure.low is not None
    assert figure.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert 0 < figure.low < 0.05 < figure.high
    assert figure.high - figure.low < 0.6 * (alone.high - alone.low)


def test_with_few_identities_what_is_no_share_has_no_interval() -> None:
    few = np.arange(60) % 9
    for figure in (
        difference(np.zeros(60), np.arange(60) % 2, few, seed=0),
        intervals.calibration_error(np.full(60, 0.9), np.arange(60) % 2 == 0, few, seed=0),
    ):
        assert figure.value is not None
        assert (figure.low, figure.high) == (None, None)
        assert figure.method == "no interval: 9 identities, and it takes 10"


def test_the_calibration_error_is_that_of_the_pure_function() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.2, 1, 200)
    right = random.random(200) < confidence**2
    figure = intervals.calibration_error(confidence, right, MANY, seed=0)
    assert figure.value == pytest.approx(
        sum(
            abs(right[some].sum() - confidence[some].sum())
            for some in (np.ceil(confidence * 15) == number for number in range(16))
        )
        / 200
    )
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low <= figure.value < figure.high


def test_the_mean_of_folds_has_students_interval() -> None:
    """Ten folds of mean 0.85 and standard deviation 0.02: 0.85 +- 2.262 x 0.02 / sqrt(10)."""
    accuracies = np.array([0.85 + 0.02 * step * math.sqrt(9 / 10) for step in [-1, 1] * 5])
    figure = intervals.fold_mean(accuracies, 6000)
    assert figure.value == pytest.approx(0.85)
    assert figure.high == pytest.approx(0.85 + 2.262157 * 0.02 / math.sqrt(10), abs=1e-6)
    assert (figure.n, figure.method) == (6000, "Student's t over 10 folds")


def sides(seed: int, strangers: int = 400, mated: int = 200) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    false, true = random.normal(5, 1, strangers), random.normal(3, 1, mated)
    true[random.random(mated) < 0.1] = np.inf
    return false, np.arange(strangers) // 2, true, np.arange(mated) // 4


def test_what_is_missed_is_counted_at_the_threshold_of_the_wanted_rate() -> None:
    false, false_people, true, true_people = sides(0)
    ten, one = operating_points(false, false_people, true, true_people, (0.1, 0.01), seed=0)
    for point in (ten, one):
        assert point.threshold == rates.threshold(false, point.rate)
        finite = np.where(np.isfinite(true), true, 0)
        expected = rates.fnir(finite, np.isfinite(true), point.threshold)
        assert point.missed.value == pytest.approx(expected.value)
        assert point.missed.low is not None
        assert point.missed.high is not None
        assert point.missed.low < expected.value < point.missed.high
    assert one.missed.value is not None
    assert ten.missed.value is not None
    assert one.missed.value > ten.missed.value


def test_a_resampled_miss_is_what_the_thresholds_of_the_naive_loop_miss() -> None:
    false, false_people, true, true_people = sides(1, strangers=60, mated=40)
    missed, number = intervals._missed(false, false_people, true, true_people, (0.1,), 5)
    assert number == 10
    strangers = drawn_people(30, seed=5)
    people = drawn_people(10, seed=6)
    for draw in range(0, intervals.RESAMPLES, 100):
        drawn = np.repeat(false, strangers[draw][false_people])
        known = np.repeat(true, people[draw][true_people])
        expected = (known > rates.threshold(drawn, 0.1)).mean()
        assert missed[draw, 0] == pytest.approx(expected)


def test_the_interval_knows_that_the_threshold_too_came_from_a_sample() -> None:
    """With 100 strangers, FPIR 0.01 hangs on the nearest of them; the misses alone would not show that."""
    false, false_people, true, true_people = sides(2, strangers=100)
    (point,) = operating_points(false, false_people, true, true_people, (0.01,), seed=0)
    assert point.threshold is not None
    alone = share(true > point.threshold, true_people, seed=0)
    assert point.missed.low is not None
    assert point.missed.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert point.missed.high - point.missed.low > 1.3 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("strangers", "mated", "rate", "enough"),
    [
        (333, 60, 0.003, False),
        (334, 60, 0.003, True),
        (99, 60, 0.01, False),
        (100, 60, 0.01, True),
        (29, 60, 0.1, False),
        (30, 60, 0.1, True),
        (400, 29, 0.1, False),
    ],
)
def test_a_rate_takes_as_many_strangers_as_one_false_alarm_is_a_share_of(
    strangers: int, mated: int, rate: float, enough: bool
) -> None:
    (point,) = operating_points(*sides(3, strangers, mated), (rate,), seed=0)
    assert point.missed.known is enough
    assert (point.threshold is not None) is enough
    assert enough or point.missed.method.startswith("too few: ")


def test_the_area_is_scikit_learns_and_lies_in_its_interval() -> None:
    from sklearn.metrics import roc_auc_score

    false, false_people, true, true_people = sides(4)
    true = np.where(np.isfinite(true), true, 9.0)
    figure = intervals.area(false, false_people, true, true_people, seed=0)
    labels = np.repeat([0, 1], [len(false), len(true)])
    assert figure.value == pytest.approx(roc_auc_score(labels, -np.concatenate([false, true])))
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < figure.value < figure.high
