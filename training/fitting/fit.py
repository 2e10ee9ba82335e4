"""The training loop: SGD with momentum, as in the paper; interruptible, resumable with the same result."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from retrieval.errors import InputError, Interrupted, RunError, StorageError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.network import CosineClassifier, Network
from retrieval.system.files import other_than_file, path_in_utf8, why, write_durably
from retrieval.system.manifests import parse_tree
from training.data.dataset import (
    AugmentedPhotographs,
    EpochBatches,
    Photographs,
    Split,
    augmented_batches,
    plain_batches,
)
from training.fitting.processes import Processes
from training.fitting.recipes import FitConfig

_EVALUATION_BATCH: Final = 64


# Advice in errors about a checkpoint that cannot be used.
_ANEW: Final = "remove it and train from the start"


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch, a pass over the training photos.

    Attributes:
        epoch: number, counted from 1.
        loss: mean training loss (the recipe's cross-entropy) over the epoch's steps, measured while learning.
        accuracy: share of correctly classified training photos (augmented), measured while learning.
        validation_loss: mean cross-entropy on the held-out photos, after the epoch.
        validation_accuracy: share of correctly classified held-out photos, after the epoch.
        seconds: wall-clock time, validation included; summed over the sessions of a resumed run.
    """

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """Progress: one step was done; loss and accuracy are those of its batch."""

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class History:
    """The history of a run: its epochs, and loss and accuracy of every step."""

    epochs: tuple[Epoch, ...] = ()
    losses: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()


@dataclass
class _Progress:
    """The state of a run, beside its tensors. A checkpoint holds both."""

    epoch: int = 0
    step: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    network: Network,
    split: Split,
    reader: PhotoReader,
    config: FitConfig,
    *,
    device: torch.device,
    precision: str = "fp32",
    workers: int = 0,
    weights: str = "none",
    checkpoint: Path | None = None,
    resume: bool = False,
    processes: Processes = Processes(),
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> History:
    """Trains `network` in place.

    With several processes each calls this with the same arguments; only the leader's `checkpoint`, `on_step`
    and `on_epoch` count. They learn what one process learns, but for batch norms, which normalize each share
    of a batch by its own statistics.

    Args:
        network: its parameters are changed, and it is moved to `device`.
        split: trained on `train`, measured on `validation` after every epoch.
        reader: turns photos into pixels.
        config: the recipe.
        device: CPU or CUDA; for CUDA, loaders pin their memory.
        precision: "fp32", or "bf16" for mixed precision while learning; validation is in float32.
        workers: number of processes that read photos; 0 reads them in this process.
        weights: the source of the network's parameters, recorded in the checkpoint.
        checkpoint: a file that is rewritten after every epoch and on stopping.
        resume: continue from `checkpoint` if it exists; any number of processes may have written it.
        processes: those that train together, connected.
        on_step, on_epoch: called after every step and every epoch.
        should_stop: called after every step; True, in any process, ends the run with a checkpoint.

    Raises:
        Interrupted: `should_stop` returned True.
        InputError: the checkpoint belongs to another run, or a batch has fewer than two photos a process.
        RunError: the loss became infinite or not a number.
    """
    run = _Run(network, split, reader, config, device, precision, workers, weights, processes)
    run.begin(checkpoint if resume else None)
    kept = checkpoint if processes.leads else None
    while run.progress.epoch < config.epochs:
        try:
            run.one_epoch(on_step, should_stop)
        except Interrupted:
            processes.average_statistics(network)
            if kept:
                run.save(kept)
            raise
        if kept:
            run.save(kept)
        on_epoch(run.progress.epochs[-1])
        if processes.any(should_stop()) and run.progress.epoch < config.epochs:
            raise Interrupted(f"Stopped after epoch {run.progress.epoch}.")
    progress = run.progress
    return History(tuple(progress.epochs), tuple(progress.losses), tuple(progress.accuracies))


class _Run:
    """One training run: the network, its optimizer and its progress."""

    def __init__(
        self,
        network: Network,
        split: Split,
        reader: PhotoReader,
        config: FitConfig,
        device: torch.device,
        precision: str,
        workers: int,
        weights: str,
        processes: Processes = Processes(),
    ) -> None:
        self.processes = processes
        self.network = network.to(device=device, memory_format=torch.channels_last)
        self.model: nn.Module = self.network
        self.config = config
        self.device = device
        self.precision = precision
        self.workers = workers
        self.train = AugmentedPhotographs(
            Photographs(split.train, reader), config.augmentation, seed=config.seed
        )
        self.validation = Photographs(processes.share(split.validation), reader)
        self.held_out = len(split.validation)
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.progress = _Progress()
        self.identity = _run_identity(
            split, reader.preprocessing, config, precision, weights, network.architecture
        )

    def begin(self, checkpoint: Path | None) -> None:
        """Starts from a checkpoint, if it exists, and gives all processes the same state.

        Raises:
            InputError: the checkpoint is damaged or belongs to another run, or there are too many processes.
        """
        least = 2 * self.processes.count
        if self.processes.several and min(self.config.batch_size, len(self.train)) < least:
            raise self.processes.agreed(
                InputError(
                    f"{self.processes.count} processes need batches of at least {least} photos, two for "
                    "each; raise `batch_size`, or start fewer."
                )
            )
        self.progress, moving = self.processes.told(lambda: self._begun(checkpoint))
        self.model = self.processes.parallel(self.network, self.device)
        for name, parameter in self.network.named_parameters():
            if name in moving:
                state = self.optimizer.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.empty_like(parameter)
                self.processes.spread([state["momentum_buffer"]])

    def _begun(self, checkpoint: Path | None) -> tuple[_Progress, list[str]]:
        """Restores a checkpoint, if it exists; returns the progress, and which parameters have a momentum."""
        if checkpoint and checkpoint.exists():
            self.restore(checkpoint)
        named = self.network.named_parameters()
        return self.progress, [name for name, one in named if "momentum_buffer" in self.optimizer.state[one]]

    def one_epoch(self, on_step: Callable[[Step], None], should_stop: Callable[[], bool]) -> None:
        """Trains from the current step to the end of the epoch, and validates.

        Raises:
            Interrupted: `should_stop` returned True before the epoch's last step.
            RunError: the loss became infinite or not a number.
        """
        started = time.monotonic()
        progress, config = self.progress, self.config
        batches = EpochBatches(
            len(self.train),
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=progress.epoch,
            start=progress.step,
            rank=self.processes.rank,
            processes=self.processes.count,
        )
        loader = augmented_batches(self.train, batches, workers=self.workers, pin=self.device.type == "cuda")
        self.network.train()
        for pixels, labels in loader:
            loss, accuracy = self._step(pixels, labels, batches)
            progress.step += 1
            progress.losses.append(loss)
            progress.accuracies.append(accuracy)
            on_step(Step(progress.epoch + 1, progress.step, batches.steps, loss, accuracy))
            if self.processes.any(should_stop()) and progress.step < batches.steps:
                progress.seconds += time.monotonic() - started
                raise Interrupted(f"Stopped in epoch {progress.epoch + 1} after step {progress.step}.")
        self._finish_epoch(batches.steps, started)

    def _step(self, pixels: Tensor, labels: Tensor, batches: EpochBatches) -> tuple[float, float]:
        """Learns from this process's share of a batch; returns loss and accuracy of the whole batch."""
        steps = batches.steps
        rate = self._rate(self.progress.epoch * steps + self.progress.step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            _, logits = self.model(pixels.to(self.device, non_blocking=True))
            loss = self._loss(logits, labels)
        hits = (logits.argmax(1) == labels).float().mean()
        # The mean over the batch is the sum of the means over its shares, each by its part of the photos.
        part = len(labels) / batches.batch_size
        value, accuracy = self.processes.sums(loss.item() * part, hits.item() * part)
        self._finite(value)
        if self.processes.several:
            loss = loss * (part * self.processes.count)  # gradients are averaged over the processes
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return value, accuracy

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.margin:
            own = nn.functional.one_hot(labels, logits.shape[1])
            logits = logits - CosineClassifier.scale * config.margin * own
        return nn.functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise self.processes.agreed(
                RunError(
                    f"Training diverged in epoch {self.progress.epoch + 1} (the loss is {loss}); "
                    "lower `learning_rate`."
                )
            )
        return loss

    def _rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step of the whole run: a linear warm-up, then the schedule."""
        config = self.config
        rise = config.warmup_epochs * steps
        if step + 1 < rise:
            return config.learning_rate * (step + 1) / rise
        if config.schedule == "constant":
            return config.learning_rate
        done = (step - rise) / max(1.0, config.epochs * steps - rise)
        return config.learning_rate * (1 + math.cos(math.pi * max(0.0, done))) / 2

    def _finish_epoch(self, steps: int, started: float) -> None:
        progress = self.progress
        self.processes.average_statistics(self.network)
        validation_loss, validation_accuracy = self._validate()
        self._finite(validation_loss)  # no later training loss would show that the last step diverged
        progress.epoch, progress.step = progress.epoch + 1, 0
        seconds = progress.seconds + time.monotonic() - started
        progress.seconds = 0.0
        losses, accuracies = progress.losses[-steps:], progress.accuracies[-steps:]
        progress.epochs.append(
            Epoch(
                epoch=progress.epoch,
                loss=sum(losses) / steps,
                accuracy=sum(accuracies) / steps,
                validation_loss=validation_loss,
                validation_accuracy=validation_accuracy,
                seconds=seconds,
            )
        )

    def _validate(self) -> tuple[float, float]:
        loss = hits = 0.0
        for _, logits, labels in outputs(self.network, self.validation, workers=self.workers):
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            hits += (logits.argmax(1) == labels).sum().item()
        loss, hits = self.processes.sums(loss, hits)
        return loss / self.held_out, hits / self.held_out

    def save(self, path: Path) -> None:
        """Writes everything that the rest of the run depends on into one file, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        # safetensors stores plain row-major tensors; channels-last is restored on loading.
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        state = {"progress": json.dumps(asdict(self.progress)), "identity": self.identity}
        try:
            write_durably(path, save(plain, metadata=state))
        except OSError as error:
            raise StorageError(f"The checkpoint cannot be written to {path}: {why(error)}.") from error

    def restore(self, path: Path) -> None:
        """Restores the state of the run from a checkpoint.

        Raises:
            InputError: the file is damaged, or belongs to another run.
        """
        from safetensors import SafetensorError, safe_open

        if (other := other_than_file(path)) is not None:
            raise InputError(f"The checkpoint {path} is {other}, not a file; {_ANEW}.")
        try:
            with (
                path_in_utf8(path) as name,
                safe_open(name, framework="pt", device=str(self.device)) as file,
            ):
                state = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            progress, identity = _progress(state["progress"], path), state["identity"]
            parse_tree(identity, dict[str, Any], name=path, error=InputError, advice=_ANEW)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"The checkpoint {path} is damaged; {_ANEW}.") from error
        if identity != self.identity:
            raise InputError(
                f"The checkpoint {path} was made {_difference(identity, self.identity)}; "
                "resume with the same data and options, or train into another folder."
            )
        momentum = _below("momentum.", tensors)
        try:
            self.network.load_state_dict(_below("network.", tensors))
            for name, parameter in self.network.named_parameters():
                if name in momentum:
                    kept = torch.empty_like(parameter).copy_(momentum[name])
                    self.optimizer.state[parameter]["momentum_buffer"] = kept
        except RuntimeError as error:
            raise InputError(f"The checkpoint {path} holds another network; {_ANEW}.") from error
        self.progress = progress


def outputs(
    network: Network, photographs: Photographs, *, workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields embeddings (n, d) and logits (n, c), both float32, and labels (n,) of photos, batch by batch.

    Computes in full precision, on the network's device, with batch normalisation's running statistics.
    """
    device = network.mean.device
    loader = plain_batches(
        photographs, batch_size=_EVALUATION_BATCH, workers=workers, pin=device.type == "cuda"
    )
    network.eval()
    with torch.inference_mode():
        for pixels, labels in loader:
            embeddings, logits = network(pixels.to(device, non_blocking=True))
            yield embeddings, logits, labels.to(device)


def _progress(text: str, path: Path) -> _Progress:
    """Parses the progress in a checkpoint. Losses may be NaN, which the parser accepts.

    Raises:
        InputError: a field has another type.
    """
    tree = parse_tree(text, _Progress, name=path, error=InputError, advice=_ANEW)
    return replace(_Progress(**tree), epochs=[Epoch(**epoch) for epoch in tree.get("epochs", [])])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _run_identity(
    split: Split,
    preprocessing: Preprocessing,
    config: FitConfig,
    precision: str,
    weights: str,
    architecture: str,
) -> str:
    """Returns, as JSON, everything that must be equal for a run to resume from another's checkpoint."""
    import hashlib

    photos = hashlib.sha256()
    for samples in (split.train, split.validation):
        for sample in samples:
            photos.update(f"{sample.path.name}\n{sample.label}\n".encode())
    parts: dict[str, Any] = {
        **config.plain(),
        **preprocessing.stated(),
        "precision": precision,
        "weights": weights,
        "architecture": architecture,
        "photos": photos.hexdigest(),
    }
    return json.dumps(parts, sort_keys=True)


def _difference(stored: str, wanted: str) -> str:
    """Describes how the run of a checkpoint differs from the requested one, for an error message."""
    before, now = json.loads(stored), json.loads(wanted)
    names = [name for name in now if before.get(name) != now[name]]
    parts = [f"with {name} {before.get(name)} (now {now[name]})" for name in names if name != "photos"]
    return " and ".join(parts) or "from other photos"
