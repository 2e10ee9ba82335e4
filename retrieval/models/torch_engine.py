"""The torch engine for the `Embedder`: a network on one device, in float32 or lower precision.

On CUDA a pass is copied as uint8 from pinned memory on the stream of its lane, computed on the one compute
stream, and copied back on the lane's stream. There are two lanes, so that the next pass is copied while the
current one is computed. The kernels of a frequent pass size are recorded once and replayed (a CUDA graph),
which saves launching a few hundred kernels one by one.
"""

import copy
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import Bottleneck

from retrieval.errors import BundleError, InputError, RunError
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import NetworkOutput, Pixels, PrecisionDrift, drift_between
from retrieval.models.network import Network

_DTYPES: Final = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Pass sizes before `tune`.
_CPU_PASS_SIZE: Final = 16
_GPU_PASS_SIZE: Final = 64
# `tune` continues to double the pass size while a doubling is faster by at least this factor.
_MIN_SPEEDUP: Final = 1.03
_GPU_LANES: Final = 2
_DRIFT_PHOTOS: Final = 32
# The number of passes of one size after which it is recorded as a graph, and the most graphs that are kept.
_PASSES_BEFORE_RECORDING: Final = 3
_MAX_GRAPHS: Final = 4


def has_gpu() -> bool:
    """Returns whether torch can use an NVIDIA GPU."""
    return torch.cuda.is_available()


class TorchEngine:
    """The engine for one device; see `engine.Engine`."""

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        precision: str = "float32",
        pass_size: int | None = None,
    ) -> None:
        """Copies a network to a device.

        Args:
            network: in float32 and in evaluation mode.
            device: the device to run on.
            precision: the precision of the convolutions, "float32", "bf16" or "fp16". Normalisation, the
                steps from activations to the embedding, and the classifier stay in float32.
            pass_size: the number of pictures in a pass; None is the default of the device.

        Raises:
            RuntimeError, AssertionError: from torch, where the device does not exist.
        """
        on_gpu = device.type == "cuda"
        self.pass_size = pass_size or (_GPU_PASS_SIZE if on_gpu else _CPU_PASS_SIZE)
        self.drift: PrecisionDrift | None = None
        self._precision = precision
        exact = _on_device(network, device, torch.float32)
        less = precision != "float32"
        # Kept until the drift is measured.
        self._exact: _Lane | None = _Lane(exact, device) if less else None
        self._measuring = threading.Lock()
        chosen = _on_device(network, device, _DTYPES[precision]) if less else exact
        self._lanes: queue.SimpleQueue[_AnyLane] = queue.SimpleQueue()
        for lane in _gpu_lanes(chosen, device) if on_gpu else [_Lane(chosen, device)] * _GPU_LANES:
            self._lanes.put(lane)

    @classmethod
    def load(cls, bundle: ModelBundle, device_name: str, *, precision: str = "float32") -> "TorchEngine":
        """Loads a bundle's weights.

        Raises:
            InputError: the device does not exist.
            BundleError: the weights cannot be loaded, or this version does not know their architecture.
        """
        try:
            network = Network(
                len(bundle.labels), architecture=bundle.architecture, embedding=bundle.embedding
            )
        except KeyError as error:
            raise BundleError(
                f"This version of faceprint has no architecture {bundle.architecture}; upgrade faceprint."
            ) from error
        try:
            device = torch.device(device_name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"There is no device {device_name} here; use `device='auto'` or `device='cpu'`."
            ) from error
        try:
            network.load_state_dict(bundle.load_weights(_tensors))
        except BundleError:
            raise
        except Exception as error:
            # safetensors and torch raise their own exceptions for damaged and for other files.
            raise BundleError(
                f"{bundle.weights_path} cannot be loaded; copy the model whole again."
            ) from error
        if device.type == "cuda":
            # cuDNN's default, TensorFloat-32, keeps 10 of float32's 23 bits; the CPU keeps them all.
            torch.backends.cudnn.allow_tf32 = False
        return cls(network.eval(), device, precision=precision)

    def __call__(self, pixels: Pixels) -> NetworkOutput:
        """See `engine.Engine`.

        Raises:
            RunError: the device has no memory for a single picture, or numbers do not fit into fp16.
        """
        answer = self._embed(pixels)
        if self._exact is not None:
            self._measure_drift(pixels[:_DRIFT_PHOTOS], answer[0][:_DRIFT_PHOTOS])
        return answer

    @property
    def batch_size(self) -> int:
        """One pass for each lane; see `engine.Engine`."""
        return _GPU_LANES * self.pass_size

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Doubles the pass size until that is not faster or memory runs out; keeps the best. See `Engine`."""
        best, best_pace, size = self.pass_size, 0.0, self.pass_size
        while size <= limit:
            pace = self._pace(sample, size)
            # If memory ran out, the pass size was reduced below the requested one.
            if pace < best_pace * _MIN_SPEEDUP or self.pass_size < size:
                break
            best, best_pace, size = size, pace, 2 * size
        self.pass_size = min(best, self.pass_size)

    def resident(self, pixels: Pixels) -> Callable[[int], None]:
        """Returns a function for benchmarks that runs the network n times on pixels on the device."""
        lane = self._lanes.get()
        self._lanes.put(lane)
        return lane.resident(pixels)

    def close(self) -> None:
        """Does nothing: garbage collection releases all resources."""

    def _pace(self, sample: Pixels, size: int) -> float:
        """Returns the pictures per second in passes of a size."""
        self.pass_size = size
        batch = np.resize(sample, (_PASSES_BEFORE_RECORDING * size, *sample.shape[1:]))
        self._embed(batch)  # chooses kernels, and records them
        start = time.perf_counter()
        self._embed(batch)
        return len(batch) / (time.perf_counter() - start)

    def _embed(self, pixels: Pixels) -> NetworkOutput:
        """Embeds in passes; starts the next pass before it waits for the one before."""
        answers: list[NetworkOutput] = []
        under_way: deque[_Pass] = deque()
        start = 0
        try:
            while start < len(pixels):
                part = pixels[start : start + self.pass_size]
                try:
                    under_way.append(_Pass(self._free_lane(under_way, answers), part, self._lanes))
                    start += len(part)
                except torch.OutOfMemoryError as error:
                    # Passes under way release their memory first.
                    _finish(under_way, answers)
                    self._shrink(len(part), error)
            _finish(under_way, answers)
        finally:
            # Empty, unless a pass failed. Callers would wait forever for lanes that are not returned.
            for left in under_way:
                self._lanes.put(left.lane)
        vectors, probabilities = zip(*answers, strict=True)
        return np.concatenate(vectors), np.concatenate(probabilities)

    def _free_lane(self, under_way: "deque[_Pass]", answers: list[NetworkOutput]) -> "_AnyLane":
        """Returns a free lane. It finishes own passes first, so that callers never wait for each other."""
        while under_way:
            try:
                return self._lanes.get_nowait()
            except queue.Empty:
                answers.append(under_way.popleft().answer())
        return self._lanes.get()

    def _shrink(self, failed: int, error: Exception) -> None:
        if failed <= 1:
            raise RunError(
                "The device has no memory left for a single picture; end other programs that use it, "
                "or use `device='cpu'`."
            ) from error
        self.pass_size = min(self.pass_size, failed // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measure_drift(self, pixels: Pixels, found: NDArray[np.float32]) -> None:
        with self._measuring:
            if self._exact is None or len(pixels) < 2:
                return
            if not np.isfinite(found).all():
                raise RunError(
                    f"This model's numbers do not fit into {self._precision}; "
                    "use `precision='bf16'` or `precision='float32'`."
                )
            small = range(0, len(pixels), 8)
            exact = np.concatenate([self._exact.start(pixels[start : start + 8])()[0] for start in small])
            self.drift = drift_between(self._precision, found, exact)
            if self.drift is not None:
                self._exact = None


def _tensors(weights: str | bytes) -> dict[str, Tensor]:
    return load(weights) if isinstance(weights, bytes) else load_file(weights)


def _on_device(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """Returns a copy on a device, with batch norms fused into the convolutions, and these in `dtype`."""
    placed: Network = copy.deepcopy(network)
    placed.conv1, placed.bn1 = fuse_conv_bn_eval(placed.conv1, placed.bn1), nn.Identity()
    for block in placed.modules():
        if isinstance(block, Bottleneck):
            for number in "123":
                convolution, norm = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
                setattr(block, f"conv{number}", fuse_conv_bn_eval(convolution, norm))
                setattr(block, f"bn{number}", nn.Identity())
            if block.downsample is not None:
                block.downsample = nn.Sequential(fuse_conv_bn_eval(*block.downsample))
    for module in placed.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    placed.to(device=device, memory_format=torch.channels_last)
    return placed


def _finish(under_way: "deque[_Pass]", answers: list[NetworkOutput]) -> None:
    while under_way:
        answers.append(under_way.popleft().answer())


class _AnyLane(Protocol):
    def start(self, pixels: Pixels) -> Callable[[], NetworkOutput]:
        """Starts a pass; returns a function that waits for its output."""
        ...

    def resident(self, pixels: Pixels) -> Callable[[int], None]:
        """See `TorchEngine.resident`."""
        ...


class _Pass:
    """A started pass on a lane; it returns the lane when it is finished or cannot start."""

    def __init__(self, lane: _AnyLane, pixels: Pixels, lanes: "queue.SimpleQueue[_AnyLane]") -> None:
        self.lane = lane
        self._lanes = lanes
        try:
            self._wait = lane.start(pixels)
        except BaseException:
            lanes.put(lane)
            raise

    def answer(self) -> NetworkOutput:
        """Waits for the output and returns it. May be called once."""
        try:
            return self._wait()
        finally:
            self._lanes.put(self.lane)


_OnDevice: TypeAlias = tuple[Tensor, Tensor]


def _tensor(pixels: Pixels) -> Tensor:
    # Torch accepts no arrays that are read-only or have negative strides.
    return torch.from_numpy(np.require(pixels, requirements=("C", "W")))


def _forward(network: Network, batch: Tensor) -> _OnDevice:
    vectors, logits = network(batch)
    return vectors, torch.softmax(logits, 1)


class _Lane:
    """A lane with synchronous passes, for the CPU and for measuring drift."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network = network
        self._device = device

    def start(self, pixels: Pixels) -> Callable[[], NetworkOutput]:
        with torch.inference_mode():
            vectors, probabilities = _forward(self._network, _tensor(pixels).to(self._device))
            answer = vectors.cpu().numpy(), probabilities.cpu().numpy()
        return lambda: answer

    def resident(self, pixels: Pixels) -> Callable[[int], None]:
        batch = _tensor(pixels).to(self._device)

        def run(times: int) -> None:
            with torch.inference_mode():
                for _ in range(times):
                    _forward(self._network, batch)

        return run


class _Recorded:
    """The kernels of passes of one size, recorded as a CUDA graph."""

    def __init__(self, network: Network, batch: Tensor, stream: torch.cuda.Stream, pool: Any) -> None:
        self._batch = batch.clone()
        _forward(network, self._batch)  # the setup of a first pass cannot be recorded
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the other lane may copy meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._answer = _forward(network, self._batch)

    def replay(self, batch: Tensor) -> _OnDevice:
        self._batch.copy_(batch)
        self._graph.replay()
        # The next replay overwrites the outputs.
        return self._answer[0].clone(), self._answer[1].clone()


class _Gpu:
    """The compute stream of a device, which the lanes share."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.device = device
        self._network = network
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._turn = threading.Lock()
        self._seen: Counter[int] = Counter()
        self._recorded: dict[int, _Recorded | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def launch(self, batch: Tensor, copied: torch.cuda.Event) -> tuple[_OnDevice, torch.cuda.Event]:
        """Queues a pass after the copy of its batch; returns the output and the event of its completion."""
        with self._turn, torch.cuda.stream(self._stream):
            self._stream.wait_event(copied)
            # Its memory belongs to the lane's stream, which must not reuse it before this stream has read it.
            batch.record_stream(self._stream)
            recorded = self._recording(batch)
            answer = recorded.replay(batch) if recorded else _forward(self._network, batch)
            return answer, self._stream.record_event()

    def _recording(self, batch: Tensor) -> _Recorded | None:
        size = len(batch)
        self._seen[size] += 1
        if size in self._recorded:
            return self._recorded[size]
        if self._seen[size] < _PASSES_BEFORE_RECORDING or len(self._recorded) >= _MAX_GRAPHS:
            return None
        try:
            self._recorded[size] = _Recorded(self._network, batch, self._stream, self._pool)
        except RuntimeError:
            # Out of memory, or unsupported by the driver: single kernels give the same output.
            self._recorded[size] = None
        return self._recorded[size]


class _GpuLane:
    """A lane on a GPU: copies the pixels and outputs of a pass on its own stream."""

    def __init__(self, gpu: _Gpu) -> None:
        self._gpu = gpu
        self._stream = torch.cuda.Stream(gpu.device)  # type: ignore[no-untyped-call]

    def start(self, pixels: Pixels) -> Callable[[], NetworkOutput]:
        with torch.inference_mode(), torch.cuda.device(self._gpu.device):
            with torch.cuda.stream(self._stream):
                batch = _tensor(pixels).pin_memory().to(self._gpu.device, non_blocking=True)
                copied = self._stream.record_event()
            answer, computed = self._gpu.launch(batch, copied)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(computed)
                for part in answer:
                    part.record_stream(self._stream)
                # With non_blocking, torch copies into pinned memory.
                host = [part.to("cpu", non_blocking=True) for part in answer]
                # A blocking event leaves the core to the threads that decode.
                back = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                back.record(self._stream)

        def wait() -> NetworkOutput:
            back.synchronize()
            # Copies: the next pass reuses the pinned memory.
            return host[0].numpy().copy(), host[1].numpy().copy()

        return wait

    def resident(self, pixels: Pixels) -> Callable[[int], None]:
        with torch.inference_mode(), torch.cuda.device(self._gpu.device):
            batch = _tensor(pixels).to(self._gpu.device)
            there = torch.cuda.current_stream().record_event()

        def run(times: int) -> None:
            with torch.inference_mode(), torch.cuda.device(self._gpu.device):
                for _ in range(times):
                    _, computed = self._gpu.launch(batch, there)
                computed.synchronize()

        return run


def _gpu_lanes(network: Network, device: torch.device) -> list[_GpuLane]:
    with torch.cuda.device(device):
        gpu = _Gpu(network, device)
        # The weights were copied on the default stream, for which other streams do not wait.
        torch.cuda.synchronize(device)
        return [_GpuLane(gpu) for _ in range(_GPU_LANES)]
