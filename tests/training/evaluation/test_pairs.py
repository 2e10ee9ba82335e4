"""Telling pairs apart: thresholds across folds, and LFW's file of pairs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.errors import InputError
from training.evaluation.pairs import Pair, read_pairs
from training.metrics.verification import across_folds, best_threshold, roc


@pytest.mark.parametrize(
    ("distances", "same", "limit"),
    [
        ([1.0, 2.0, 3.0, 4.0], [1, 1, 0, 0], 2.5),
        ([1.0, 2.0, 3.0], [1, 1, 1], 3.5),
        ([1.0, 2.0, 3.0], [0, 0, 0], 0.5),
        ([1.0, 1.0, 1.0, 2.0], [1, 0, 1, 0], 1.5),
        ([1.0, 2.0, 3.0], [1, 0, 1], 1.5),
    ],
)
def test_the_best_threshold_lies_between_two_distances(
    distances: list[float], same: list[int], limit: float
) -> None:
    assert best_threshold(np.array(distances), np.array(same, bool)) == limit


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40))
def test_no_other_threshold_tells_more_pairs_rightly(pairs: list[tuple[int, bool]]) -> None:
    distances = np.array([float(distance) for distance, _ in pairs])
    same = np.array([one for _, one in pairs])
    limit = best_threshold(distances, same)
    best = ((distances <= limit) == same).sum()
    assert all(((distances <= other) == same).sum() <= best for other in np.arange(-1, 14, 0.5))


def test_a_folds_threshold_comes_from_the_others() -> None:
    """Fold 0 would be told perfectly by its own threshold (5.5), and is not by fold 1's (2.5)."""
    distances = np.array([5.0, 6.0, 2.0, 3.0])
    same = np.array([True, False, True, False])
    folds, right = across_folds(distances, same, np.array([0, 0, 1, 1]))
    assert folds.thresholds.tolist() == [2.5, 5.5]
    assert right.tolist() == [False, True, True, False]
    assert (folds.mean, folds.standard_error) == (0.5, 0.0)


def test_the_standard_error_is_the_deviation_of_the_folds_over_the_root_of_their_number() -> None:
    from training.metrics.verification import Folds

    folds = Folds(np.array([0.8, 0.9]), np.zeros(2))
    assert folds.standard_error == pytest.approx(np.sqrt(0.005) / np.sqrt(2))


def test_a_roc_curve_rises_with_the_distance() -> None:
    false, true, limits = roc(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, False]))
    assert (np.diff(limits) > 0).all()
    for far, tar, limit in zip(false, true, limits, strict=True):
        assert tar == (np.array([1.0, 3.0]) <= limit).mean()
        assert far == (np.array([2.0, 4.0]) <= limit).mean()


TEXT = "2\t2\nAda\t1\t4\nAda\t2\t3\nBob\t1\tCid\t12\nBob\t2\tAda\t1\n" * 1
TEXT += "Dan\t1\t2\nDan\t1\t3\nEve\t1\tDan\t2\nEve\t1\tDan\t3\n"


def test_pairs_are_read_as_lfw_writes_them(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text(TEXT)
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs[0] == Pair("Ada/Ada_0001", "Ada/Ada_0004", 0)
    assert pairs[2] == Pair("Bob/Bob_0001", "Cid/Cid_0012", 0)
    assert [pair.same for pair in pairs] == [True, True, False, False] * 2
    assert [pair.fold for pair in pairs] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: no such file"),
        ("", "must say how many folds"),
        ("Ada 1 2\n", "must say how many folds"),
        ("500\n", "has one fold"),
        (TEXT + "Ada 1 2\n", "has 9 pairs, but its first line says 8"),
        (TEXT.replace("Ada\t1\t4", "Ada\tx\t4"), "Line 2 of"),
        (TEXT.replace("Cid\t12", "Cid"), "Line 4 of"),
    ],
)
def test_what_is_no_file_of_pairs_is_one_sentence(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        read_pairs(tmp_path / "pairs.txt")


def test_lfws_own_pairs_are_ten_folds_of_300_and_300(shared: Path) -> None:
    pairs = read_pairs(shared / "data" / "lfw_protocol" / "pairs.txt")
    for fold in range(10):
        kinds = [pair.same for pair in pairs if pair.fold == fold]
        assert kinds == [True] * 300 + [False] * 300


def test_pairs_from_a_device_that_has_no_end_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be read: it is a device, not a file"):
        read_pairs(Path("/dev/zero"))
