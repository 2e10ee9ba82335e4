"""Several devices: a process and an engine for each; pixels and answers go through shared memory.

Each process has two lanes, so that it computes one pass while the pixels of the next one are written. A lane
is memory that both share, for pixels and for the answer, and a pipe over which only a few bytes go.

Such a process is a program of its own, since CUDA does not survive a fork. `multiprocessing` is not used: its
processes, and the tracker of its shared memory, import modules from the current folder, which may hold files
of strangers.
"""

import mmap
import os
import queue
import signal
import socket
import subprocess
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import FaceprintError, RunError
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import NetworkOutput, Pixels, PrecisionDrift
from retrieval.system import isolation
from retrieval.system.cpu import usable_cores
from retrieval.system.files import why

_PROGRAM: Final = (
    "import sys; from retrieval.models.multi_device import serve; serve(*map(int, sys.argv[1:]))"
)
# How long a process may take to end once its pipes are closed: it finishes what it computes. In seconds.
_CLOSE_SECONDS: Final = 10.0

_LANES_PER_DEVICE: Final = 2
# How many pictures a lane holds. An engine passes them on in passes of its own size.
_LANE_PICTURES: Final = 256


@dataclass(frozen=True)
class _Shapes:
    """What a lane's memory holds: pixels, and the answer behind them."""

    pictures: int
    side: int
    dimension: int
    labels: int

    @property
    def pixel_bytes(self) -> int:
        return self.pictures * self.side * self.side * 3

    @property
    def bytes(self) -> int:
        return self.pixel_bytes + self.pictures * (self.dimension + self.labels) * 4

    def pixels(self, memory: mmap.mmap) -> Pixels:
        return np.ndarray((self.pictures, self.side, self.side, 3), np.uint8, memory)

    def answer(self, memory: mmap.mmap) -> NDArray[np.float32]:
        shape = (self.pictures, self.dimension + self.labels)
        return np.ndarray(shape, np.float32, memory, offset=self.pixel_bytes)


@dataclass(frozen=True)
class _Task:
    """What a process is told first."""

    bundle: ModelBundle
    device: str
    precision: str
    shapes: _Shapes
    cores: int


@dataclass(frozen=True)
class _Reply:
    """What a process says of a pass. Its vectors lie in shared memory, if there was no error."""

    error: FaceprintError | None = None
    drift: PrecisionDrift | None = None


def cores_of_each(devices: int) -> int:
    """How many cores the process of one of several devices computes on."""
    return max(1, usable_cores() // devices)


class SeveralDevices:
    """See `engine.Engine`. The processes only compute: whoever calls it writes to the gallery, alone."""

    def __init__(self, bundle: ModelBundle, devices: list[str], *, precision: str = "float32") -> None:
        """Starts a process for each device and waits until all have loaded the bundle.

        Raises:
            InputError, BundleError, MissingDependency: as `Embedder.open`.
            RunError: a process cannot be started, or ended while it started.
        """
        self.drift: PrecisionDrift | None = None
        self.batch_size = _LANE_PICTURES * _LANES_PER_DEVICE * len(devices)
        shapes = _Shapes(_LANE_PICTURES, bundle.input_size, bundle.dimension, len(bundle.labels))
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lanes: list[_Lane] = []
        self._threads = ThreadPoolExecutor(
            _LANES_PER_DEVICE * len(devices), thread_name_prefix="faceprint-device"
        )
        # Runs when close() is called, when nobody has this engine any more, or when Python ends.
        self._end = weakref.finalize(self, _end, self._lanes, self._processes, self._threads)
        try:
            for device in devices:
                self._start(_Task(bundle, device, precision, shapes, cores_of_each(len(devices))))
            for lane in self._lanes:
                lane.ready()
        except BaseException:
            self.close()
            raise
        for lane in self._lanes:
            self._free.put(lane)

    def __call__(self, pixels: Pixels) -> NetworkOutput:
        """See `engine.Engine`.

        Raises:
            RunError: a process ended, or its device has no memory for a single picture.
        """
        # A share for every lane, if there is enough to share.
        size = min(_LANE_PICTURES, max(1, -(-len(pixels) // len(self._lanes))))
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        vectors, probabilities = zip(*self._threads.map(self._one, parts), strict=True)
        return np.concatenate(vectors), np.concatenate(probabilities)

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Nothing: a lane's memory decides how many pictures a process gets at a time."""

    def close(self) -> None:
        """Ends the processes; a second time does nothing."""
        self._end()

    def _start(self, task: _Task) -> None:
        with ExitStack() as theirs:
            lanes: list[_Lane] = []
            descriptors: list[int] = []
            try:
                for _ in range(_LANES_PER_DEVICE):
                    file = isolation.nameless_file(task.shapes.bytes)
                    theirs.callback(os.close, file)
                    ours, other = socket.socketpair()
                    # So that the pipe ends when the process does.
                    theirs.enter_context(other)
                    lanes.append(_Lane(task.device, Connection(ours.detach()), task.shapes, file))
                    descriptors += other.fileno(), file
                self._processes.append(isolation.start(_PROGRAM, *descriptors, descriptors=descriptors))
            except OSError as error:
                raise RunError(
                    f"A process that computes on {task.device} cannot be started ({why(error)}); try again, "
                    "or with fewer devices."
                ) from error
            finally:
                self._lanes += lanes
        lanes[0].tell(task)

    def _one(self, pixels: Pixels) -> NetworkOutput:
        lane = self._free.get()
        try:
            reply, answer = lane.embed(pixels)
        finally:
            self._free.put(lane)
        self.drift = self.drift or reply.drift
        return answer


class _Lane:
    """This side of a lane."""

    def __init__(self, device: str, pipe: "Connection[Any, Any]", shapes: _Shapes, file: int) -> None:
        self._device = device
        self._pipe = pipe
        self._shapes = shapes
        self._memory = mmap.mmap(file, shapes.bytes)

    def tell(self, task: _Task) -> None:
        """Says what the process is to do; only the first lane does."""
        try:
            self._pipe.send(task)
        except OSError as error:
            raise self._ended() from error

    def ready(self) -> _Reply:
        """Waits for the model to be loaded."""
        return self._reply()

    def embed(self, pixels: Pixels) -> tuple[_Reply, NetworkOutput]:
        count = len(pixels)
        np.copyto(self._shapes.pixels(self._memory)[:count], pixels)
        try:
            self._pipe.send(count)
        except OSError as error:
            raise self._ended() from error
        reply = self._reply()
        answer = self._shapes.answer(self._memory)[:count]
        dimension = self._shapes.dimension
        return reply, (answer[:, :dimension].copy(), answer[:, dimension:].copy())

    def close(self) -> None:
        # The process ends when its pipes do.
        self._pipe.close()
        self._memory.close()

    def _reply(self) -> _Reply:
        try:
            reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if reply.error is not None:
            raise reply.error
        return _Reply(None, reply.drift)

    def _ended(self) -> RunError:
        return RunError(
            f"The process that computes on {self._device} has ended; what was enrolled is kept, run the "
            "command again."
        )


def _end(lanes: list[_Lane], processes: "list[subprocess.Popen[bytes]]", threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=True, cancel_futures=True)
    for lane in lanes:
        lane.close()
    for process in processes:
        isolation.end(process, _CLOSE_SECONDS)


def serve(*descriptors: int) -> None:
    """The program of a device's process: a thread for each lane, until the other side has gone.

    Args:
        descriptors: of files: of each lane its pipe and its memory.
    """
    # Whoever sends Ctrl-C to the process itself: the batch in flight is to be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipes: list[Connection[Any, Any]] = [Connection(pipe) for pipe in descriptors[::2]]
    try:
        task = pipes[0].recv()
    except (EOFError, OSError):
        return
    try:
        import torch

        from retrieval.models.torch_engine import TorchEngine

        torch.set_num_threads(task.cores)
        engine = TorchEngine.load(task.bundle, task.device, precision=task.precision)
    except FaceprintError as error:
        for pipe in pipes:
            pipe.send(_Reply(error))
        return
    threads = [
        threading.Thread(target=_serve_lane, args=(engine, task.shapes, pipe, file))
        for pipe, file in zip(pipes, descriptors[1::2], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve_lane(engine: Any, shapes: _Shapes, pipe: "Connection[Any, Any]", file: int) -> None:
    memory = mmap.mmap(file, shapes.bytes)
    pixels, answer = shapes.pixels(memory), shapes.answer(memory)
    try:
        pipe.send(_Reply())
        while True:
            count = pipe.recv()
            pipe.send(_passed(engine, pixels[:count], answer[:count]))
    except (EOFError, OSError):
        return  # the other side has gone


def _passed(engine: Any, pixels: Pixels, answer: NDArray[np.float32]) -> _Reply:
    try:
        vectors, probabilities = engine(pixels)
    except FaceprintError as error:
        return _Reply(error)
    except Exception as error:
        # Torch and CUDA have exceptions that only a process that loaded them could read.
        return _Reply(RunError(f"The device failed: {error}"))
    answer[:, : vectors.shape[1]] = vectors
    answer[:, vectors.shape[1] :] = probabilities
    return _Reply(drift=engine.drift)
