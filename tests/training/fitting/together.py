"""A program of `test_processes.py`: one of the processes that train together.

equal DATA FOLDER    forks a second process; each fits networks, resumes one from FOLDER/begun, and saves
                     what came of it
killed DATA FOLDER   trains a model into FOLDER/model; process 1 is killed after its first epoch
"""

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from retrieval.errors import FaceprintError, InputError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.network import Network
from retrieval.system.signals import graceful
from training import run
from training.data import dataset
from training.fitting.fit import History, fit
from training.fitting.processes import Processes
from training.fitting.recipes import FitConfig
from training.run import Observer, TrainingOptions

NARROW = "resnet14-narrow"
CPU = torch.device("cpu")
SMALL = Preprocessing(size=32, crop=1.0)
# A batch of 7 photos has shares of 4 and 3.
CONFIG = FitConfig(epochs=3, batch_size=7, label_smoothing=0.1)
OPTIONS = TrainingOptions(weights="none", preprocessing=SMALL, architecture=NARROW, device="cpu")


class FixedStatistics(Network):
    """A network whose batch norms keep their statistics while learning, so that a batch can be divided."""

    def train(self, mode: bool = True) -> "FixedStatistics":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def fitted(
    kind: type[Network],
    data: Path,
    processes: Processes,
    *,
    checkpoint: Path | None = None,
    stop: bool = False,
) -> tuple[Network, History]:
    """Fits a network of a kind; with `stop` only its first epoch, which raises Interrupted."""
    # Other processes than the first get its parameters, whatever they start with.
    torch.manual_seed(processes.rank)
    network = kind(6, architecture=NARROW)
    split = dataset.load(data, validation_fraction=0.3, min_images=None, seed=0)
    history = fit(
        network,
        split,
        PhotoReader(SMALL),
        CONFIG,
        device=CPU,
        checkpoint=checkpoint,
        resume=checkpoint is not None,
        processes=processes,
        should_stop=lambda: stop,
    )
    return network, replace(history, epochs=tuple(replace(one, seconds=0.0) for one in history.epochs))


def equal(data: Path, folder: Path) -> None:
    """Fits three networks in two processes that begin alike; fails where one of them does."""
    # Before torch starts threads: importing it twice would take longer than what is done with it.
    child = os.fork()
    rank = int(child == 0)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    fit_equal(data, folder, Processes.of_environment())
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def fit_equal(data: Path, folder: Path, processes: Processes) -> None:
    """Fits three networks, and saves the tensors and the history of each as this process has them."""
    with processes.joined(CPU):
        for name, kind, checkpoint in (
            ("fixed", FixedStatistics, None),
            ("resumed", FixedStatistics, folder / "begun"),
            ("normal", Network, None),
        ):
            network, history = fitted(kind, data, processes, checkpoint=checkpoint)
            tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            save_file(tensors, folder / f"{name}-{processes.rank}.safetensors")
            (folder / f"{name}-{processes.rank}.json").write_text(json.dumps(asdict(history)))
        try:
            processes.told(refuse)
        except FaceprintError as error:
            said = f"{type(error).__name__} {error.exit_status}: {error}"
            (folder / f"told-{processes.rank}.txt").write_text(said)


def refuse() -> None:
    raise InputError("It is in use.")


def killed(data: Path, folder: Path, processes: Processes) -> None:
    """Trains; process 1 ends itself once the checkpoint of the first epoch is there."""
    out = folder / "model"

    def end_after_an_epoch() -> bool:
        if processes.rank == 1 and (out / run.CHECKPOINT).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    try:
        # As the commands do: torchrun asks the rest to stop by a signal.
        with graceful() as should_stop:
            if processes.leads:
                observer = Observer(should_stop=should_stop)
                run.train(data, out, config=CONFIG, options=OPTIONS, observer=observer)
            else:
                run.take_part(data, out, config=CONFIG, options=OPTIONS, should_stop=end_after_an_epoch)
    except FaceprintError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    if sys.argv[1] == "equal":
        equal(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        killed(Path(sys.argv[2]), Path(sys.argv[3]), Processes.of_environment())
