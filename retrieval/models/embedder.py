"""The `Embedder`: runs a bundle on a device; batches of pixels give embeddings and probabilities.

It has two engines: onnxruntime on a CPU, torch on CUDA or by choice. Their results differ only by float32
rounding (`tests/models/test_embedder.py` compares them). Imported models run on onnxruntime alone.
"""

import importlib.util
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError, MissingDependency
from retrieval.images.photo_reader import PhotoReader
from retrieval.models import self_test
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import PRECISIONS, Engine, PrecisionDrift

ENGINES: Final = ("auto", "onnxruntime", "torch")


@dataclass(frozen=True)
class Embeddings:
    """The output of a model for n pictures.

    Attributes:
        vectors: (n, d) float32, the embeddings, by default avg_pool.
        probabilities: (n, c) float32, softmax over the bundle's labels.
    """

    vectors: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Embedder:
    """A loaded model that embeds pictures. Safe to share between threads. A context manager.

    Attributes:
        bundle: the model.
        device: "cpu", "cuda:0", ... or several, "cuda:0,cuda:1".
        engine: "onnxruntime" or "torch".
        precision: "float32", "bf16" or "fp16".
    """

    def __init__(
        self, bundle: ModelBundle, device: str, engine: str, run: Engine, *, precision: str = "float32"
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.engine = engine
        self.precision = precision
        self._run = run
        self._tuning = threading.Lock()
        self._reading = threading.Lock()
        self._reader: PhotoReader | None = None
        self._tuned = False
        self._threads: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process loads the model again, with the same options.
        return _opened, (self.bundle, self.device, self.engine, self.precision, self._threads)

    @classmethod
    def open(
        cls,
        bundle: ModelBundle,
        *,
        device: str = "auto",
        engine: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
    ) -> "Embedder":
        """Loads a bundle and returns its embedder.

        Args:
            bundle: the model.
            device: "auto" (CUDA where there is a GPU and torch, or onnxruntime-gpu for an imported model;
                else the CPU), "cpu", "cuda", "cuda:1", ... or several, "cuda:0,cuda:1": one process for each,
                not for an imported model.
            engine: "auto" (onnxruntime on a CPU in float32 and for an imported model, torch elsewhere),
                "onnxruntime" or "torch".
            precision: the precision of the torch engine's convolutions: "float32", "bf16" or "fp16". `drift`
                gives the effect on distances.
            threads: the number of cores for the onnxruntime engine; None is all that this process may use.

        Raises:
            InputError: the engine, device or precision does not exist, the engine does not support the device
                or the precision, or `threads` is below 1.
            MissingDependency: the torch engine needs torch, or an imported model on a GPU onnxruntime-gpu.
            BundleError: the weights or the graph cannot be loaded, do not match the card, or fail the
                self-test against the weights of the card's fingerprint.
        """
        _check(engine, precision, threads)
        if bundle.imported:
            return cls._open_imported(bundle, device, engine, precision, threads)
        less = precision != "float32"
        if device == "auto":
            device = "cuda" if engine != "onnxruntime" and _has_gpu() else "cpu"
        if engine == "auto":
            engine = "onnxruntime" if device == "cpu" and not less else "torch"
        if engine == "torch":
            run = _torch_engine(bundle, device, precision)
            return cls(bundle, device, engine, run, precision=precision)._self_tested()
        if device != "cpu":
            raise InputError(
                f"The onnxruntime engine runs on the CPU, not on {device}; use the torch engine."
            )
        if less:
            raise InputError(
                f"The onnxruntime engine computes in float32, not in {precision}; use the torch engine."
            )
        return cls._open_on_cpu(bundle, threads)

    @classmethod
    def _open_imported(
        cls, bundle: ModelBundle, device: str, engine: str, precision: str, threads: int | None
    ) -> "Embedder":
        if engine == "torch":
            raise InputError("An imported model runs on onnxruntime, not on torch; use `engine='auto'`.")
        if precision != "float32":
            raise InputError(f"An imported model runs in float32, not in {precision}; leave `precision` out.")
        if device == "cpu" or (device == "auto" and not _has_onnx_gpu()):
            return cls._open_on_cpu(bundle, threads)
        from retrieval.models.onnx_engine import OnnxGpuEngine, gpu_number

        number = gpu_number("cuda" if device == "auto" else device)
        try:
            run = OnnxGpuEngine(bundle, number)
        except MissingDependency:
            if device != "auto":
                raise
            return cls._open_on_cpu(bundle, threads)
        return cls(bundle, f"cuda:{number}", "onnxruntime", run)._self_tested()

    @classmethod
    def _open_on_cpu(cls, bundle: ModelBundle, threads: int | None) -> "Embedder":
        from retrieval.models.onnx_engine import OnnxEngine

        opened = cls(bundle, "cpu", "onnxruntime", OnnxEngine(bundle, threads=threads))
        opened._threads = threads
        return opened._self_tested()

    @property
    def photo_reader(self) -> PhotoReader:
        """What reads photos for this model; loaded on first use.

        Raises:
            BundleError, StorageError: as `ModelBundle.load_photo_reader`.
        """
        with self._reading:
            if self._reader is None:
                self._reader = self.bundle.load_photo_reader()
            return self._reader

    @property
    def drift(self) -> PrecisionDrift | None:
        """The change of distances between photos of the first batch by `precision`, compared with float32.

        None in float32, and until a batch with two different photos was embedded.
        """
        return self._run.drift

    @property
    def batch_size(self) -> int:
        """The least number of pictures in a call that keeps the device busy."""
        return self._run.batch_size

    def tune(self, sample: NDArray[np.uint8], *, limit: int = 1024) -> int:
        """Finds the size of a pass through the network at which a GPU is fastest; this takes seconds.

        It pays off for thousands of pictures. The size doubles until that is not faster or memory runs out.

        Args:
            sample: one or more pictures, as for `embed`; they are repeated as needed.
            limit: the largest pass to try.

        Returns:
            The new `batch_size`.

        Raises:
            InputError: `sample` has another dtype or shape, or is empty.
        """
        self._check_pixels(sample)
        if not len(sample):
            raise InputError("Finding the best batch size takes at least one picture.")
        with self._tuning:
            self._run.tune(sample, limit=limit)
            self._tuned = True
        return self.batch_size

    @property
    def tuned(self) -> bool:
        """Whether `batch_size` was found by `tune`."""
        return self._tuned

    @property
    def on_gpu(self) -> bool:
        """Whether the device is not the CPU."""
        return self.device != "cpu"

    def embed(self, pixels: NDArray[np.uint8]) -> Embeddings:
        """Returns the embeddings and probabilities of a batch of any size, in passes of bounded memory.

        If a GPU runs out of memory, the pass size is halved and the batch continues.

        Args:
            pixels: uint8 (n, size, size, 3), RGB, as from `pixels.read`.

        Raises:
            InputError: `pixels` has another dtype or shape.
            RunError: the device has no memory for one picture, values do not fit into fp16, or the process of
                one of several devices ended.
        """
        self._check_pixels(pixels)
        if not len(pixels):
            empty = np.empty((0, self.bundle.dimension), np.float32)
            return Embeddings(empty, np.empty((0, len(self.bundle.labels)), np.float32))
        return Embeddings(*self._run(pixels))

    def close(self) -> None:
        """Ends the threads and processes of the engine; they also end with the last reference to it."""
        self._run.close()

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _self_tested(self) -> "Embedder":
        """Returns this embedder after its self-test against the weights."""
        # In lower precision `drift` compares the results with float32.
        if self.precision == "float32":
            try:
                self_test.check_engine(self.bundle, self.engine, self.device, self._run)
            except BaseException:
                self.close()
                raise
        return self

    def _check_pixels(self, pixels: NDArray[np.uint8]) -> None:
        size = self.bundle.input_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise InputError(
                f"This model takes uint8 pixels of shape (n, {size}, {size}, 3), "
                f"not {pixels.dtype} {pixels.shape}."
            )


def may_use_gpu(bundle: ModelBundle, device: str, engine: str = "auto") -> bool:
    """Returns whether `Embedder.open` may use a GPU, as far as can be told without importing torch."""
    if bundle.imported:
        return _has_onnx_gpu() if device == "auto" else device != "cpu"
    return _may_have_gpu() and engine != "onnxruntime" if device == "auto" else device != "cpu"


def _check(engine: str, precision: str, threads: int | None) -> None:
    if engine not in ENGINES:
        raise InputError(f"There is no engine {engine}; choose one of {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise InputError(f"There is no precision {precision}; choose one of {', '.join(PRECISIONS)}.")
    if threads is not None and threads < 1:
        raise InputError("The number of threads must be at least 1.")


def _may_have_gpu() -> bool:
    """Returns whether torch may find an NVIDIA GPU, without importing torch, which takes seconds."""
    return _has_driver() and all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))


def _has_driver() -> bool:
    """Returns whether there may be a driver of an NVIDIA GPU."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() or os.name == "nt"


def _has_onnx_gpu() -> bool:
    """Returns whether onnxruntime may find an NVIDIA GPU."""
    if not _has_driver():
        return False
    from retrieval.models.onnx_engine import has_cuda

    return has_cuda()


def _has_gpu() -> bool:
    if not _may_have_gpu():
        return False
    from retrieval.models.torch_engine import has_gpu

    return has_gpu()


def _torch_engine(bundle: ModelBundle, device: str, precision: str) -> Engine:
    try:
        from retrieval.models.torch_engine import TorchEngine
    except ImportError as error:
        raise MissingDependency(
            "The torch engine needs torch; install it with pip install 'faceprint[gpu]', or use "
            "`device='cpu'`."
        ) from error
    devices = [name.strip() for name in device.split(",")]
    if len(devices) == 1:
        return TorchEngine.load(bundle, device, precision=precision)
    from retrieval.models.multi_device import SeveralDevices

    return SeveralDevices(bundle, devices, precision=precision)


def _opened(bundle: ModelBundle, device: str, engine: str, precision: str, threads: int | None) -> Embedder:
    return Embedder.open(bundle, device=device, engine=engine, precision=precision, threads=threads)
