"""benchmarks.gpu, a toy run on the CPU: every part gives a line. What it says of a GPU is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from retrieval.models.bundle import ModelBundle
from retrieval.sources.photos import scan

_ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def printed(bundle: ModelBundle, faces: Path) -> list[str]:
    where = ["--model", str(bundle.folder), "--photos", str(faces)]
    options = ["--device", "cpu", "--seconds", "0.02", "--copies", "2", "--batches", "1,2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *where, *options],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_command_measures_the_network_the_way_from_jpegs_and_training(printed: list[str]) -> None:
    result = json.loads(printed[-1])
    forward = [(row["precision"], row["batch"]) for row in result["forward"]]
    assert forward == [(name, batch) for name in ("float32", "bf16", "fp16") for batch in (1, 2)]
    for row in result["forward"]:
        assert row["resident_photos_per_second"] > 0
        assert row["engine_photos_per_second"] > 0
        # Of 32 x 32 pixels with three bytes each.
        assert row["bus_mb_per_second"] == pytest.approx(row["engine_photos_per_second"] * 3072e-6, abs=0.06)
        assert (row["largest_drift"] is None) == (row["precision"] == "float32")
    for run in result["from_jpegs"]:
        assert run["photos"] == run["enrolled"] == 72
        assert run["ratio"] == pytest.approx(
            run["photos_per_second"] / run["pure_forward_photos_per_second"], abs=0.01
        )
        assert run["bytes_over_the_bus_per_photo"] == 3072 + 4 * (2048 + 6)
        assert run["gpu_busy"] is None
        assert run["stages"]
    assert [row["batch"] for row in result["training"]] == [10, 64]
    assert result["training"][0]["photos_per_second"] > 0
    assert {row["kind"] for row in result["decoding"]} == {"threads", "processes"}


def test_a_run_on_a_cpu_says_that_it_says_nothing_of_a_gpu(printed: list[str]) -> None:
    assert printed[0] == "A toy run on a CPU: these figures say nothing of a GPU."
    assert json.loads(printed[-1])["machine"]["is_a_gpu"] is False


def test_copies_of_a_photo_are_the_same_picture_in_other_bytes(faces: Path, tmp_path: Path) -> None:
    from retrieval.images import pixels

    found = [Path(photo.path or "") for photo in scan([faces])][:3]
    gpu.copied(found, faces, tmp_path, copies=2)
    copies = [Path(photo.path or "") for photo in scan([tmp_path])]
    assert len({path.read_bytes() for path in copies}) == 6
    assert all(
        (pixels.read(copies[n], size=32) == pixels.read(copies[n + 1], size=32)).all() for n in (0, 2, 4)
    )


@pytest.mark.parametrize(
    ("ratio", "threads", "limit"),
    [
        (0.85, 50.0, "the network"),
        (0.5, 50.0, "decoding: threads alone read 50 photos/s"),
        (0.5, 500.0, "none of decoding and network alone; see storing_seconds"),
    ],
    ids=["network", "decoding", "neither"],
)
def test_what_limits_a_run_is_named(ratio: float, threads: float, limit: str) -> None:
    run = {
        "ratio": ratio,
        "pure_forward_photos_per_second": 100.0,
        "stages": {"waiting_seconds": 1.0, "storing_seconds": 2.0},
    }
    decoding = [{"kind": "threads", "workers": 2, "photos_per_second": threads}]
    assert gpu.limit_of({"decoding": decoding}, run) == limit
