"""The processes that fit one network together, as torchrun starts them; without torchrun there is one.

Each process learns from its share of a batch, and torch's DistributedDataParallel averages their gradients
(gloo on CPUs, NCCL on GPUs). The first process, the leader, reads and checks all inputs and writes all files.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from retrieval.errors import FaceprintError, InputError, RunError
from retrieval.models.network import Network
from training.fitting.devices import pick_device

# The others wait while the leader decodes every photo to check it. A process that ends is noticed at once.
_TIMEOUT: Final = timedelta(days=1)

# What errors of gloo and NCCL say when another process ended.
_LOST: Final = ("connection", "gloo", "nccl", "socket", "broken pipe", "peer")

_T = TypeVar("_T")


class ProcessLost(RunError):
    """Another process of the run ended."""


class LeaderFailed(FaceprintError):
    """An error that the leader tells: another process ends with the same exit status, and says nothing."""

    def __init__(self, error: FaceprintError) -> None:
        super().__init__(str(error))
        self.exit_status = error.exit_status


@dataclass(frozen=True)
class Processes:
    """The processes of a training run, as one of them sees it.

    Attributes:
        rank: the number of this process, from 0, the leader.
        count: how many there are.
        local_rank, local_count: the same among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def of_environment(cls) -> "Processes":
        """Returns what torchrun's variables say; one process without them."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not all(os.environ.get(name, "").isdecimal() for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def leads(self) -> bool:
        """Whether this process is the leader."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def device(self, name: str) -> torch.device:
        """Returns the device of a name for this process: of several processes, each has a GPU of its own.

        Raises:
            InputError: this machine has no such device, or fewer GPUs than processes.
        """
        device = pick_device(name)
        if not self.several or device.type != "cuda":
            return device
        if device.index is not None:
            raise InputError(f"Each process has a GPU of its own; use `device='auto'`, not {name}.")
        gpus = torch.cuda.device_count()
        if self.local_count > gpus:
            raise InputError(
                f"There are {self.local_count} processes on this machine, and {gpus} GPUs; start one for "
                "each GPU, or use `device='cpu'`."
            )
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connects the processes until the with statement ends, which waits for all of them.

        Raises:
            ProcessLost: another process ended before.
        """
        if not self.several:
            yield
            return
        from torch import distributed

        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
            yield
            distributed.barrier(device_ids=[self.local_rank] if on_gpu else None)
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            raise ProcessLost(
                f"Another of the {self.count} processes of this run ended, so process {self.rank} ends, too; "
                "its own message says why. Go on with the same command and `resume=True`, with any number of "
                "processes."
            ) from error
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def told(self, make: Callable[[], _T]) -> _T:
        """Returns what the leader makes, to all.

        Raises:
            FaceprintError: of `make`, in the leader; LeaderFailed in the others.
        """
        if not self.several:
            return make()
        from torch import distributed

        said: list[tuple[_T | None, FaceprintError | None]] = [(None, None)]
        if self.leads:
            try:
                said = [(make(), None)]
            except FaceprintError as error:
                said = [(None, error)]
        distributed.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        value, failure = said[0]
        if failure is not None:
            raise self.agreed(failure)
        return value  # type: ignore[return-value]

    def agreed(self, error: FaceprintError) -> FaceprintError:
        """Returns what a process is to raise for an error that all processes find: the leader the error."""
        return error if self.leads else LeaderFailed(error)

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """Returns this process's share of some items: together each item once, and none twice."""
        return items[self.rank :: self.count]

    def sums(self, *values: float) -> tuple[float, ...]:
        """Returns the sum of each value over all processes."""
        if not self.several:
            return values
        from torch import distributed

        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def any(self, holds: bool) -> bool:
        """Returns whether something holds in any process."""
        return self.sums(float(holds))[0] > 0

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Gives all processes the leader's values of some tensors, in place."""
        if not self.several:
            return
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)

    def average_statistics(self, network: Network) -> None:
        """Averages the running statistics of batch norms, which each process has of its share of photos."""
        if not self.several:
            return
        from torch import distributed

        statistics = [
            buffer
            for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        flat = torch.cat([buffer.flatten() for buffer in statistics])
        distributed.all_reduce(flat)
        parts = torch.split(flat / self.count, [buffer.numel() for buffer in statistics])
        for buffer, part in zip(statistics, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def parallel(self, network: Network, device: torch.device) -> nn.Module:
        """Returns a network to learn with, of which all processes have the leader's values.

        The running statistics of batch norms stay those of each process; see `average_statistics`.
        """
        if not self.several:
            return network
        self.spread([*network.parameters(), *network.buffers()])
        parallel = nn.parallel.DistributedDataParallel
        # The first is the newer name of the second; without either, each step takes the leader's statistics.
        names = ("forward_sync_buffers", "broadcast_buffers")
        name = next(name for name in names if name in inspect.signature(parallel).parameters)
        options: dict[str, Any] = {name: False}
        if device.type == "cuda":
            options["device_ids"] = [device]
        wrapped: nn.Module = parallel(network, **options)
        return wrapped


def _is_lost(error: RuntimeError) -> bool:
    from torch import distributed

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    words = str(error).lower()
    return isinstance(error, distributed.DistError) or any(word in words for word in _LOST)
