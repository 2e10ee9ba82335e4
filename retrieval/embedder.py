"""Embedder: a bundle on a device; batches of pixels -> embeddings and probabilities.

Two engines: onnxruntime on a CPU, torch on CUDA or by choice. Which one answers does not show in the
answers beyond float32 rounding (`tests/test_embedder.py` holds them to each other).
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.bundle import ModelBundle
from retrieval.errors import BundleError, InputError, MissingDependency

ENGINES: Final = ("auto", "onnxruntime", "torch")

# How many pictures go through the network at a time.
_PASS: Final = 64


@dataclass(frozen=True)
class Embeddings:
    """What a model says of n pictures.

    Attributes:
        vectors: (n, d) float32, the avg_pool activations.
        probabilities: (n, c) float32, softmax over the bundle's labels.
    """

    vectors: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class _Engine(Protocol):
    def __call__(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...


class Embedder:
    """A model ready to embed. Safe to share between threads.

    Attributes:
        bundle: the model.
        device: "cpu", "cuda:0", ...
        engine: "onnxruntime" or "torch".
    """

    def __init__(self, bundle: ModelBundle, device: str, engine: str, run: _Engine) -> None:
        self.bundle = bundle
        self.device = device
        self.engine = engine
        self._run = run

    @classmethod
    def open(cls, bundle: ModelBundle, *, device: str = "auto", engine: str = "auto") -> "Embedder":
        """Loads a bundle's weights.

        Args:
            bundle: the model.
            device: "auto" (CUDA where there is a GPU and torch, else the CPU), "cpu", "cuda", "cuda:1", ...
            engine: "auto" (onnxruntime on a CPU, torch elsewhere), "onnxruntime" or "torch".

        Raises:
            InputError: no such engine or device, or an engine that does not run on the device.
            MissingDependency: the torch engine without torch.
            BundleError: the weights or the graph cannot be loaded.
        """
        if engine not in ENGINES:
            raise InputError(f"There is no engine {engine}; choose one of {', '.join(ENGINES)}.")
        if device == "auto":
            device = "cuda" if engine != "onnxruntime" and _has_gpu() else "cpu"
        if engine == "auto":
            engine = "onnxruntime" if device == "cpu" else "torch"
        if engine == "onnxruntime":
            if device != "cpu":
                raise InputError(
                    f"The onnxruntime engine runs on the CPU, not on {device}; use the torch engine."
                )
            return cls(bundle, "cpu", engine, _onnx_engine(bundle))
        return cls(bundle, device, engine, _torch_engine(bundle, device))

    def embed(self, pixels: NDArray[np.uint8]) -> Embeddings:
        """Embeds a batch; however large it is, memory is that of passes of 64 pictures.

        Args:
            pixels: uint8 (n, size, size, 3), RGB, as `pixels.read` gives them.

        Raises:
            InputError: another dtype or shape.
        """
        size = self.bundle.input_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise InputError(
                f"This model takes uint8 pixels of shape (n, {size}, {size}, 3), "
                f"not {pixels.dtype} {pixels.shape}."
            )
        if not len(pixels):
            empty = np.empty((0, self.bundle.dimension), np.float32)
            return Embeddings(empty, np.empty((0, len(self.bundle.labels)), np.float32))
        parts = [self._run(pixels[start : start + _PASS]) for start in range(0, len(pixels), _PASS)]
        vectors, probabilities = zip(*parts, strict=True)
        return Embeddings(np.concatenate(vectors), np.concatenate(probabilities))


def _has_gpu() -> bool:
    """Whether torch could find an NVIDIA GPU, without the seconds that importing torch takes."""
    if importlib.util.find_spec("torch") is None:
        return False
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() or os.name == "nt"):
        return False
    import torch

    return torch.cuda.is_available()


def _onnx_engine(bundle: ModelBundle) -> _Engine:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(bundle.graph_path, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime has a dozen exception classes and no common one.
        raise BundleError(f"{bundle.graph_path} cannot be loaded; copy the model whole again.") from error

    def run(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        vectors, probabilities = session.run(["embedding", "probabilities"], {"pixels": pixels})
        return vectors, probabilities

    return run


def _torch_engine(bundle: ModelBundle, device_name: str) -> _Engine:
    try:
        import torch
        from safetensors.torch import load_file

        from training.model import Network
    except ImportError as error:
        raise MissingDependency(
            "The torch engine needs torch; install it with pip install 'faceprint[gpu]', or use --device cpu."
        ) from error
    try:
        device = torch.device(device_name)
        network = Network(len(bundle.labels), architecture=bundle.architecture).to(device)
    except KeyError as error:
        raise BundleError(
            f"This version of faceprint has no architecture {bundle.architecture}; upgrade faceprint."
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"There is no device {device_name} here; use --device auto or --device cpu."
        ) from error
    try:
        network.load_state_dict(load_file(bundle.weights_path))
    except Exception as error:
        # safetensors and torch have exceptions of their own for damaged and for foreign files.
        raise BundleError(f"{bundle.weights_path} cannot be loaded; copy the model whole again.") from error
    network.eval()
    network = network.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        # cuDNN's default, TensorFloat-32, keeps 10 of float32's 23 bits; the CPU keeps them all.
        torch.backends.cudnn.allow_tf32 = False

    def run(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            # Torch takes no arrays that are read-only or that run backwards.
            batch = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).to(device)
            vectors, logits = network(batch)
            probabilities: Any = torch.softmax(logits, 1)
            return vectors.cpu().numpy(), probabilities.cpu().numpy()

    return run
