"""benchmarks.serve, a toy run: every number of callers gives a line, and nothing but 200 and 429."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serve import other_vectors
from retrieval.models.bundle import ModelBundle

_ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs the memory maps of Linux")
def test_callers_are_answered_or_told_to_come_again(bundle: ModelBundle, faces: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "real.npy", np.random.default_rng(0).normal(size=(60, bundle.dimension)))
    where = ["--model", str(bundle.folder), "--photos", str(faces), "--strangers", str(faces / "Adi")]
    options = [
        "--vectors",
        str(tmp_path / "real.npy"),
        "--rows",
        "100",
        "--callers",
        "1,4",
        "--requests",
        "20",
    ]
    command = [sys.executable, "-m", "benchmarks.serve", *where, *options]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["who"] for row in result["measured"]] == [
        "library, batches of 32",
        "library, one by one",
        "service, 1 callers",
        "service, 4 callers",
        "service, 192 callers",
    ]
    for row in result["measured"][:4]:
        assert set(row["statuses"]) == {"200"}
    assert set(result["measured"][4]["statuses"]) <= {"200", "429"}
    assert len(result["memory_mb"]) == 2
    assert result["vectors"].startswith("grown from 60 embeddings (real.npy)")
    assert result["coordinates"] is None  # too few to learn codes from


def test_real_embeddings_are_grown_to_the_rows_that_are_needed(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """Grown vectors are in the span of the real ones; random ones are not."""
    rng = np.random.default_rng(0)
    real = (rng.normal(size=(60, 3)) @ rng.normal(size=(3, bundle.dimension))).astype(np.float32)
    np.save(tmp_path / "real.npy", real)
    description, blocks = other_vectors(tmp_path / "real.npy", bundle.dimension)
    assert description.startswith("grown from 60 embeddings (real.npy), noise ")
    grown = np.concatenate(list(blocks(9000)))
    assert grown.shape == (9000, bundle.dimension)
    assert np.linalg.matrix_rank(grown[:200], tol=1e-2) == 3
    _, random = other_vectors(None, bundle.dimension)
    assert np.linalg.matrix_rank(np.concatenate(list(random(200)))) == 200

    np.save(tmp_path / "wrong.npy", real[:, :7])
    where = ["--model", str(bundle.folder), "--photos", str(faces), "--vectors", str(tmp_path / "wrong.npy")]
    command = [sys.executable, "-m", "benchmarks.serve", *where]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "must have shape (n, 2048)" in done.stderr
