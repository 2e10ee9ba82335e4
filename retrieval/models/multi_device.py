"""The engine for several devices: one process each; pixels and outputs go through shared memory.

Each process has two lanes, so that it computes one pass while the pixels of the next are written. A lane is
shared memory for pixels and outputs, and a pipe for messages of a few bytes.

A process is a separate program, since CUDA does not survive a fork. `multiprocessing` is not used: its
processes, and the tracker of its shared memory, import modules from the current folder, which may hold
untrusted files.
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
# Seconds that a process may take to end after its pipes are closed: it finishes its pass.
_CLOSE_SECONDS: Final = 10.0

_LANES_PER_DEVICE: Final = 2
# Pictures in a lane. The engine splits them into passes of its own size.
_LANE_PICTURES: Final = 256


@dataclass(frozen=True)
class _Shapes:
    """The layout of a lane's memory: pixels, then the output."""

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
    """The first message to a process: the model, the device and the layout of its lanes."""

    bundle: ModelBundle
    device: str
    precision: str
    shapes: _Shapes
    cores: int


@dataclass(frozen=True)
class _Reply:
    """The reply of a process to a pass. Without an error, its vectors are in shared memory."""

    error: FaceprintError | None = None
    drift: PrecisionDrift | None = None


def cores_of_each(devices: int) -> int:
    """Returns the number of cores for the process of each device."""
    return max(1, usable_cores() // devices)


class SeveralDevices:
    """The engine for several devices; see `engine.Engine`. Its processes only compute, and write no files."""

    def __init__(self, bundle: ModelBundle, devices: list[str], *, precision: str = "float32") -> None:
        """Starts a process for each device and waits until all have loaded the bundle.

        Raises:
            InputError, BundleError, MissingDependency: as in `Embedder.open`.
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
        # Runs on close(), when this engine is garbage-collected, or when Python ends.
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
        # Split evenly among the lanes, up to the size of a lane.
        size = min(_LANE_PICTURES, max(1, -(-len(pixels) // len(self._lanes))))
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        vectors, probabilities = zip(*self._threads.map(self._embed_part, parts), strict=True)
        return np.concatenate(vectors), np.concatenate(probabilities)

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Does nothing: the size of a lane decides how many pictures a process gets at a time."""

    def close(self) -> None:
        """Ends the processes; a second call does nothing."""
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
                    # Closed here, so that the pipe ends with the process.
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

    def _embed_part(self, pixels: Pixels) -> NetworkOutput:
        lane = self._free.get()
        try:
            reply, answer = lane.embed(pixels)
        finally:
            self._free.put(lane)
        self.drift = self.drift or reply.drift
        return answer


class _Lane:
    """The caller's end of a lane."""

    def __init__(self, device: str, pipe: "Connection[Any, Any]", shapes: _Shapes, file: int) -> None:
        self._device = device
        self._pipe = pipe
        self._shapes = shapes
        self._memory = mmap.mmap(file, shapes.bytes)

    def tell(self, task: _Task) -> None:
        """Sends the task to the process; only the first lane does."""
        try:
            self._pipe.send(task)
        except OSError as error:
            raise self._ended() from error

    def ready(self) -> _Reply:
        """Waits until the model is loaded."""
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
        # The process ends when its pipes are closed.
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
    """Runs the process of a device: one thread for each lane, until the caller has ended.

    Args:
        descriptors: file descriptors: the pipe and the memory of each lane in turn.
    """
    # If Ctrl-C is sent to this process itself, the current batch must be finished.
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
            pipe.send(_run_pass(engine, pixels[:count], answer[:count]))
    except (EOFError, OSError):
        return  # the caller has ended


def _run_pass(engine: Any, pixels: Pixels, answer: NDArray[np.float32]) -> _Reply:
    try:
        vectors, probabilities = engine(pixels)
    except FaceprintError as error:
        return _Reply(error)
    except Exception as error:
        # Exceptions of torch and CUDA can be unpickled only in a process that imported them.
        return _Reply(RunError(f"The device failed: {error}"))
    answer[:, : vectors.shape[1]] = vectors
    answer[:, vectors.shape[1] :] = probabilities
    return _Reply(drift=engine.drift)
