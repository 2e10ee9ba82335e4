"""Several devices: here two processes that compute on the CPU, with the narrow network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import retrieval
from retrieval.errors import BundleError, InputError, RunError
from retrieval.images import pixels
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder


@pytest.fixture(scope="module")
def photos(faces: Any) -> NDArray[np.uint8]:
    """The drawn faces, (36, 32, 32, 3)."""
    return np.stack([pixels.read(path, size=32) for path in sorted(faces.glob("*/*.jpg"))])


@pytest.fixture(scope="module")
def two(bundle: ModelBundle) -> Iterator[Embedder]:
    with Embedder.open(bundle, device="cpu,cpu", precision="bf16") as embedder:
        yield embedder


def processes() -> list[int]:
    """The processes of this one that compute on a device."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"retrieval.models.multi_device" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def test_two_processes_give_one_devices_answers_in_the_photos_order(
    two: Embedder, bundle: ModelBundle, photos: NDArray[np.uint8]
) -> None:
    assert len(processes()) == 2
    found = two.embed(photos)
    expected = Embedder.open(bundle, device="cpu", precision="bf16").embed(photos)
    # bf16 rounds what batches of other sizes add up in another order.
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0.05, atol=0.02)
    nearest = np.linalg.norm(found.vectors[:, None] - expected.vectors[None], axis=2).argmin(1)
    assert nearest.tolist() == list(range(len(photos)))


def test_what_a_process_measures_of_the_drift_comes_back(two: Embedder, photos: NDArray[np.uint8]) -> None:
    two.embed(photos)
    assert two.drift is not None
    assert two.drift.precision == "bf16"
    assert 0 < two.drift.largest < 0.1


@pytest.mark.parametrize("count", [1, 3, 700, 1100])
def test_fewer_pictures_than_lanes_and_more_than_they_hold(
    two: Embedder, photos: NDArray[np.uint8], count: int
) -> None:
    batch = np.resize(photos, (count, *photos.shape[1:]))
    answer = two.embed(batch)
    assert (answer.vectors.shape, answer.probabilities.shape) == ((count, 2048), (count, 6))
    np.testing.assert_allclose(answer.vectors[-1], two.embed(batch[-1:]).vectors[0], rtol=0.05, atol=0.02)


def test_threads_share_the_processes(two: Embedder, photos: NDArray[np.uint8]) -> None:
    expected = two.embed(photos).vectors
    with ThreadPoolExecutor(6) as threads:
        for found in threads.map(lambda _: two.embed(photos).vectors, range(12)):
            np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.02)


def test_a_batch_in_flight_outlives_ctrl_c_in_the_processes(two: Embedder, photos: NDArray[np.uint8]) -> None:
    for process in processes():
        os.kill(process, signal.SIGINT)
    assert len(two.embed(photos).vectors) == len(photos)


def test_a_device_that_is_not_there_is_said_so_and_no_process_is_left(bundle: ModelBundle) -> None:
    before = set(processes())
    with pytest.raises(InputError, match="There is no device cuda:99 here"):
        Embedder.open(bundle, device="cpu,cuda:99")
    assert set(processes()) == before


def test_weights_that_are_damaged_are_said_so(bundle: ModelBundle, tmp_path: Path) -> None:
    copy = bundle.save(tmp_path / "copy")
    copy.weights_path.write_bytes(b"not a model")
    with pytest.raises(BundleError, match="copy the model whole again"):
        Embedder.open(copy, device="cpu,cpu")


def test_a_process_that_is_killed_is_a_run_error_and_closing_still_ends(
    bundle: ModelBundle, photos: NDArray[np.uint8]
) -> None:
    before = set(processes())
    with Embedder.open(bundle, device="cpu,cpu") as embedder:
        embedder.embed(photos)
        ours = set(processes()) - before
        os.kill(min(ours), signal.SIGKILL)
        # More parts than lanes: one of them comes to the process that is gone.
        with pytest.raises(RunError, match="The process that computes on cpu has ended; what was enrolled"):
            embedder.embed(np.resize(photos, (1100, *photos.shape[1:])))
    assert set(processes()) == before


@pytest.fixture(scope="module")
def caller(
    bundle: ModelBundle, photos: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], str]:
    """A program that embedded in a folder of a stranger, and was killed: the folder, and what it printed.

    The folder has photos in it, and modules that are named as those of Python.
    """
    root = tmp_path_factory.mktemp("caller")
    here = root / "photos"
    for name in ("json", "multiprocessing", "runpy", "signal", "socket", "retrieval", "torch", "numpy"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(f"open('ran-{name}', 'w').close()\n")
    np.save(here / "photos.npy", photos[:2])
    # As the command `faceprint`: the folder of its own script is on its path, the current one is not.
    script = root / "caller.py"
    script.write_text(
        "import os, signal, sys, numpy as np\n"
        "from retrieval.models.bundle import ModelBundle\n"
        "from retrieval.models.embedder import Embedder\n"
        "if __name__ == '__main__':\n"
        "    embedder = Embedder.open(ModelBundle.load(sys.argv[1]), device='cpu,cpu')\n"
        "    print(embedder.embed(np.load('photos.npy')).vectors.shape)\n"
        "    print(*[process.pid for process in embedder._run._processes], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(bundle.folder)],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(Path(retrieval.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return here, done.stdout.splitlines(), done.stderr


def test_when_the_caller_is_killed_its_processes_end(caller: tuple[Path, list[str], str]) -> None:
    ours = caller[1][-1].split()
    assert len(ours) == 2
    while any(map(_runs, ours)):
        time.sleep(0.05)


def test_a_module_in_the_current_folder_is_never_run(caller: tuple[Path, list[str], str]) -> None:
    here, printed, errors = caller
    assert sorted(path.name for path in here.glob("ran-*")) == []
    assert (printed[0], errors) == ("(2, 2048)", "")


def _runs(process: str) -> bool:
    status = Path("/proc") / process / "stat"
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
