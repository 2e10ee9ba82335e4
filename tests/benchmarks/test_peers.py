"""benchmarks.peers: answers are compared with the truth; a system that is missing is a line in the table."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.systems import K


def test_exact_systems_find_every_neighbour_in_order_and_a_missing_one_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the peer is installed, this is found before it.
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "lancedb.py").write_text("raise ModuleNotFoundError(name='lancedb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))
    kind = peers.make(tmp_path, rows=300, queries=20, dimension=32)
    assert kind == "isotropic vectors of 32 numbers"

    faiss, lancedb, faceprint = peers.measure(
        tmp_path, ["faiss", "lancedb", "faceprint"], {"faiss": 200}, seconds=120
    )

    for one, rows in ((faiss, 200), (faceprint, 300)):
        assert "problem" not in one
        assert (one["rows"], one["recall"], one["same"], one["queries"]) == (rows, 1.0, 20, 20)
        assert one["bytes"] > 4 * 32 * rows
    assert (faiss["batch_recall"], faiss["batch_same"]) == (1.0, 20)
    assert lancedb["problem"] == "not installed: lancedb"
    assert "recall" not in lancedb


def test_the_time_limit_is_a_line(tmp_path: Path) -> None:
    peers.make(tmp_path, rows=20, queries=2, dimension=4)
    (one,) = peers.measure(tmp_path, ["faiss"], {}, seconds=0)
    assert one["problem"] == "not done within the time limit"


def test_the_truth_is_the_nearest_by_distance_and_then_by_row() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5000, 8)).astype(np.float32)
    vectors[4500] = vectors[17]
    queries = np.concatenate([rng.standard_normal((20, 8)).astype(np.float32), vectors[17][None]])
    found = peers.brute_force(vectors, queries)
    squares = ((queries[:, None].astype(np.float64) - vectors) ** 2).sum(axis=2)
    assert found.tolist() == np.argsort(squares, axis=1, kind="stable")[:, :K].tolist()
    assert found[-1, :2].tolist() == [17, 4500]
