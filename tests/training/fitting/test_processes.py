"""Two processes that train together, with gloo on the CPU, learn what one process learns."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retrieval.errors import InputError, Interrupted
from retrieval.models.network import Network
from tests.training.fitting.together import CONFIG, OPTIONS, FixedStatistics, fitted
from training import run
from training.data.dataset import EpochBatches
from training.fitting.processes import Processes

ONE = Processes()
PROGRAM = "tests.training.fitting.together"


def variables(**more: object) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in more.items()}}


@pytest.fixture(scope="module")
def folder(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of three networks, one of which goes on from one process's first epoch."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(Interrupted):
        fitted(FixedStatistics, faces, ONE, checkpoint=folder / "begun", stop=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", PROGRAM, "equal", faces, folder]
    done = subprocess.run(command, env=variables(**shared), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_learn_what_one_learns_where_batch_norms_keep_their_statistics(
    folder: Path, faces: Path
) -> None:
    network, history = fitted(FixedStatistics, faces, ONE)
    for name in ("fixed", "resumed"):
        stored = json.loads((folder / f"{name}-0.json").read_text())
        for field in ("losses", "accuracies"):
            np.testing.assert_allclose(stored[field], getattr(history, field), rtol=1e-4, atol=1e-5)
        for one, other in zip(stored["epochs"], asdict(history)["epochs"], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
        tensors = load_file(folder / f"{name}-0.safetensors")
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5)


def test_all_processes_end_with_the_same_network_and_history(folder: Path, faces: Path) -> None:
    for name in ("fixed", "resumed", "normal"):
        first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
        assert (folder / f"{name}-0.json").read_text() == (folder / f"{name}-1.json").read_text()
    _, history = fitted(Network, faces, ONE)
    stored = json.loads((folder / "normal-0.json").read_text())
    # Batch norms of 4 and of 3 photos are not those of 7: that is all that differs.
    assert stored["losses"] != list(history.losses)
    assert stored["losses"][0] == pytest.approx(history.losses[0], rel=0.2)


def test_all_processes_end_with_the_leaders_error(folder: Path) -> None:
    said = [(folder / f"told-{rank}.txt").read_text() for rank in (0, 1)]
    assert said == ["InputError 2: It is in use.", "LeaderFailed 2: It is in use."]


def test_the_package_is_the_command_for_torchrun() -> None:
    command = [sys.executable, "-m", "training", "train", "--help"]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True, check=True)
    assert "Fine-tune ResNet50" in done.stdout


def test_a_killed_process_ends_the_rest_with_a_sentence_and_one_process_goes_on(
    faces: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", PROGRAM, "killed", faces, tmp_path], env=variables(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ProcessLost: Another of the 2 processes of this run ended, so process 0 ends, too" in done.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == [run.CHECKPOINT]
    epochs: list[int] = []
    observer = run.Observer(on_epoch=lambda epoch: epochs.append(epoch.epoch))
    with pytest.raises(InputError, match="holds an unfinished run"):
        run.train(faces, tmp_path / "model", config=CONFIG, options=OPTIONS)
    resumed = replace(OPTIONS, resume=True)
    result = run.train(faces, tmp_path / "model", config=CONFIG, options=resumed, observer=observer)
    assert epochs == [2, 3]
    assert len(result.history.epochs) == 3


def test_shares_of_a_batch_have_each_photo_once() -> None:
    whole = list(EpochBatches(24, batch_size=7, seed=0, epoch=1))
    shares = [list(EpochBatches(24, batch_size=7, seed=0, epoch=1, rank=n, processes=3)) for n in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(chain.from_iterable(parts)) == sorted(batch)
        assert {len(part) for part in parts} == {2, 3}
    shared = [Processes(n, 3).share([1, 2, 3, 4, 5, 6, 7]) for n in range(3)]
    assert shared == [[1, 4, 7], [2, 5], [3, 6]]


def test_more_processes_than_a_batch_has_pairs_of_photos_are_refused(faces: Path) -> None:
    with pytest.raises(InputError, match="4 processes need batches of at least 8 photos"):
        fitted(Network, faces, Processes(0, 4, 0, 4))


def test_the_processes_are_those_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.of_environment() == ONE
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert Processes.of_environment() == Processes(5, 8, 1, 4)
    assert not Processes.of_environment().leads
