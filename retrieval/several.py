"""Several devices: a process for each with an engine of its own, pixels and answers in shared memory.

Each process has two lanes, so that it computes one pass while the pixels of the next one are written. A lane
is a block of shared memory for pixels, one for the answer, and a pipe over which only a few bytes go.
"""

import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.bundle import ModelBundle
from retrieval.engines import Answer, Pixels, PrecisionDrift
from retrieval.errors import FaceprintError, RunError

_LANES: Final = 2
# How many pictures a lane holds. An engine passes them on in passes of its own size.
_LANE_SIZE: Final = 256


@dataclass(frozen=True)
class _Shapes:
    """What a lane's two blocks of shared memory hold."""

    pictures: int
    side: int
    dimension: int
    labels: int

    @property
    def pixel_bytes(self) -> int:
        return self.pictures * self.side * self.side * 3

    @property
    def answer_bytes(self) -> int:
        return self.pictures * (self.dimension + self.labels) * 4

    def pixels(self, memory: SharedMemory) -> Pixels:
        return np.ndarray((self.pictures, self.side, self.side, 3), np.uint8, memory.buf)

    def answer(self, memory: SharedMemory) -> NDArray[np.float32]:
        return np.ndarray((self.pictures, self.dimension + self.labels), np.float32, memory.buf)


@dataclass(frozen=True)
class _Reply:
    """What a process says of a pass. Its vectors lie in shared memory, if there was no error."""

    error: FaceprintError | None = None
    drift: PrecisionDrift | None = None


class SeveralDevices:
    """See `engines.Engine`. The processes only compute: whoever calls it writes to the gallery, alone."""

    def __init__(self, bundle: ModelBundle, devices: list[str], *, precision: str = "float32") -> None:
        """Starts a process for each device and waits until all have loaded the bundle.

        Raises:
            InputError, BundleError, MissingDependency: as `Embedder.open`.
            RunError: a process ended while it started.
        """
        self.drift: PrecisionDrift | None = None
        self.batch_size = _LANE_SIZE * _LANES * len(devices)
        shapes = _Shapes(_LANE_SIZE, bundle.input_size, bundle.dimension, len(bundle.labels))
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._processes: list[BaseProcess] = []
        self._lanes: list[_Lane] = []
        self._threads = ThreadPoolExecutor(_LANES * len(devices), thread_name_prefix="faceprint-device")
        # Runs when close() is called, when nobody has this engine any more, or when Python ends.
        self._end = weakref.finalize(self, _end, self._lanes, self._processes, self._threads)
        try:
            for device in devices:
                self._start(bundle, device, precision, shapes, cores=(os.cpu_count() or 1) // len(devices))
            for lane in self._lanes:
                lane.ready()
        except BaseException:
            self.close()
            raise
        for lane in self._lanes:
            self._free.put(lane)

    def __call__(self, pixels: Pixels) -> Answer:
        """See `engines.Engine`.

        Raises:
            RunError: a process ended, or its device has no memory for a single picture.
        """
        # A share for every lane, if there is enough to share.
        size = min(_LANE_SIZE, max(1, -(-len(pixels) // len(self._lanes))))
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        vectors, probabilities = zip(*self._threads.map(self._one, parts), strict=True)
        return np.concatenate(vectors), np.concatenate(probabilities)

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Nothing: a lane's memory decides how many pictures a process gets at a time."""

    def close(self) -> None:
        """Ends the processes; a second time does nothing."""
        self._end()

    def _start(
        self, bundle: ModelBundle, device: str, precision: str, shapes: _Shapes, *, cores: int
    ) -> None:
        # spawn: CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(_LANES)]
        lanes = [_Lane(device, ours, shapes) for ours, _ in ends]
        self._lanes += lanes
        theirs = [(end, *lane.names) for (_, end), lane in zip(ends, lanes, strict=True)]
        process = context.Process(
            target=_serve,
            args=(bundle, device, precision, shapes, max(1, cores), theirs),
            name=f"faceprint {device}",
            daemon=True,
        )
        process.start()
        self._processes.append(process)
        for _, end in ends:
            # So that the pipe ends when the process does.
            end.close()

    def _one(self, pixels: Pixels) -> Answer:
        lane = self._free.get()
        try:
            reply, answer = lane.embed(pixels)
        finally:
            self._free.put(lane)
        self.drift = self.drift or reply.drift
        return answer


class _Lane:
    """This side of a lane."""

    def __init__(self, device: str, pipe: "Connection[Any, Any]", shapes: _Shapes) -> None:
        self._device = device
        self._pipe = pipe
        self._shapes = shapes
        self._pixels = SharedMemory(create=True, size=shapes.pixel_bytes)
        self._answer = SharedMemory(create=True, size=shapes.answer_bytes)

    @property
    def names(self) -> tuple[str, str]:
        return self._pixels.name, self._answer.name

    def ready(self) -> _Reply:
        """Waits for the model to be loaded."""
        return self._reply()

    def embed(self, pixels: Pixels) -> tuple[_Reply, Answer]:
        count = len(pixels)
        np.copyto(self._shapes.pixels(self._pixels)[:count], pixels)
        try:
            self._pipe.send(count)
        except OSError as error:
            raise self._ended() from error
        reply = self._reply()
        answer = self._shapes.answer(self._answer)[:count]
        dimension = self._shapes.dimension
        return reply, (answer[:, :dimension].copy(), answer[:, dimension:].copy())

    def close(self) -> None:
        # The process ends when its pipes do.
        self._pipe.close()
        for memory in (self._pixels, self._answer):
            memory.close()
            memory.unlink()

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


def _end(lanes: list[_Lane], processes: list[BaseProcess], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=True, cancel_futures=True)
    for lane in lanes:
        lane.close()
    for process in processes:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(
    bundle: ModelBundle,
    device: str,
    precision: str,
    shapes: _Shapes,
    cores: int,
    lanes: "list[tuple[Connection[Any, Any], str, str]]",
) -> None:
    """The process of a device: a thread for each lane, until the other side has gone."""
    # Ctrl-C reaches the whole group of processes; the batch in flight is to be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import torch

        from retrieval.torch_engine import TorchEngine

        torch.set_num_threads(cores)
        engine = TorchEngine.load(bundle, device, precision=precision)
    except FaceprintError as error:
        for pipe, _, _ in lanes:
            pipe.send(_Reply(error))
        return
    threads = [
        threading.Thread(target=_serve_lane, args=(engine, shapes, pipe, pixels, answer))
        for pipe, pixels, answer in lanes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve_lane(
    engine: Any, shapes: _Shapes, pipe: "Connection[Any, Any]", pixels_name: str, answer_name: str
) -> None:
    with _attached(pixels_name) as pixels, _attached(answer_name) as answer:
        pipe.send(_Reply())
        while True:
            try:
                count = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send(_passed(engine, shapes.pixels(pixels)[:count], shapes.answer(answer)[:count]))


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


@contextmanager
def _attached(name: str) -> Iterator[SharedMemory]:
    memory = SharedMemory(name=name)
    try:
        yield memory
    finally:
        memory.close()
