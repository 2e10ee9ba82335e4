"""benchmarks.serve, a toy run: every number of callers gives a line, and nothing but 200 and 429."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.models.bundle import ModelBundle

_ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs the memory maps of Linux")
def test_callers_are_answered_or_told_to_come_again(bundle: ModelBundle, faces: Path) -> None:
    where = ["--model", str(bundle.folder), "--photos", str(faces), "--strangers", str(faces / "Adi")]
    options = ["--rows", "100", "--callers", "1,4", "--requests", "20"]
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
