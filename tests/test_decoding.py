"""Processes that decode: the same pixels as `pixels.read`, in order; a bad file is an answer."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval import pixels
from retrieval.decoding import Decoded, DecodingPool
from retrieval.errors import InputError, Reason, RunError


@pytest.fixture(scope="module")
def files(faces: Path) -> list[Path]:
    return sorted(faces.glob("*/*.jpg"))


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodingPool]:
    with DecodingPool(size=32, crop=0.9, batch_size=10, workers=2, ahead=2, held=2) as opened:
        yield opened


def test_batches_are_what_reading_one_by_one_gives_in_order(pool: DecodingPool, files: list[Path]) -> None:
    assert len(files) == 36
    sizes, shas, squares = [], [], []
    for batch in pool.decode_many(files):
        sizes.append(len(batch.photos))
        shas += [photo.sha256 for photo in batch.photos]
        squares.append(batch.pixels.copy())
    assert sizes == [10, 10, 10, 6]
    assert shas == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    expected = np.stack([pixels.read(path, size=32, crop=0.9) for path in files])
    assert np.array_equal(np.concatenate(squares), expected)


def test_as_many_batches_stay_good_as_are_held(pool: DecodingPool, files: list[Path]) -> None:
    before = None
    for number, batch in enumerate(pool.decode_many(files)):
        if before is not None:
            first = 10 * (number - 1)
            expected = [pixels.read(path, size=32, crop=0.9) for path in files[first : first + 10]]
            assert np.array_equal(before.pixels, expected)
        before = batch


def test_bytes_are_jobs_and_bad_ones_are_answers(
    pool: DecodingPool, files: list[Path], tmp_path: Path
) -> None:
    good = files[0].read_bytes()
    (tmp_path / "empty.jpg").write_bytes(b"")
    jobs = [
        good,
        good[: len(good) // 2],
        tmp_path / "empty.jpg",
        tmp_path / "missing.jpg",
        b"<html>",
        files[1],
    ]
    (batch,) = pool.decode_many(jobs)
    assert [photo.reason for photo in batch.photos] == [
        None,
        Reason.TRUNCATED,
        Reason.EMPTY_FILE,
        Reason.MISSING,
        Reason.NOT_AN_IMAGE,
        None,
    ]
    assert batch.photos[3] == Decoded(None, Reason.MISSING, "there is no such file")
    assert batch.photos[1].sha256 == hashlib.sha256(good[: len(good) // 2]).hexdigest()
    assert np.array_equal(batch.pixels[5], pixels.read(files[1], size=32, crop=0.9))


def test_nothing_gives_nothing(pool: DecodingPool) -> None:
    assert list(pool.decode_many([])) == []


def test_jobs_are_taken_no_further_than_is_decoded_ahead(pool: DecodingPool, files: list[Path]) -> None:
    taken: list[Path] = []

    def jobs() -> Iterator[Path]:
        for path in files:
            taken.append(path)
            yield path

    batches = pool.decode_many(jobs())
    next(batches)
    assert len(taken) == 20
    batches.close()


def test_a_process_that_is_killed_is_a_run_error_and_no_shared_memory_is_left(files: list[Path]) -> None:
    before = set(os.listdir("/dev/shm"))
    pool = DecodingPool(size=32, crop=1.0, batch_size=4, workers=1)
    batches = pool.decode_many(files)
    next(batches)
    (process,) = pool._pool._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="A process that decodes photos has ended; what was enrolled is kept"):
        list(batches)
    pool.close()
    assert set(os.listdir("/dev/shm")) <= before


def test_when_the_caller_is_killed_its_processes_end(files: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        "import os, signal, sys\n"
        "from retrieval.decoding import DecodingPool\n"
        "if __name__ == '__main__':\n"
        "    pool = DecodingPool(size=32, crop=1.0, batch_size=2, workers=1)\n"
        "    next(pool.decode_many(sys.argv[1:]))\n"
        "    print(*[process.pid for process in pool._pool._processes.values()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), *map(str, files[:4])], stdout=subprocess.PIPE, text=True, timeout=60
    )
    (process,) = done.stdout.split()
    ends = time.monotonic() + 30
    while time.monotonic() < ends and _runs(process):
        time.sleep(0.05)
    assert not _runs(process)


def _runs(process: str) -> bool:
    status = Path("/proc") / process / "stat"
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("wrong", ["workers", "batch_size", "ahead", "held"])
def test_a_number_below_one_is_an_input_error(wrong: str) -> None:
    options = {"batch_size": 4, "workers": 1, "ahead": 1, "held": 1, wrong: 0}
    with pytest.raises(InputError, match="must be at least 1"):
        DecodingPool(size=32, crop=1.0, **options)
