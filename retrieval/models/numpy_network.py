"""The reference network for the self-test: computes a bundle's outputs by numpy alone.

It is slow, and independent of all engines: it uses neither the graph nor torch, only the tensors that the
fingerprint covers. `retrieval.models.self_test` runs it once for each model and runtime.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from retrieval.models.bundle import LAYERS, Embedding

# Always float32, which numpy's stubs lose in every product.
Array: TypeAlias = Any

# As torch.nn.BatchNorm2d, torch.nn.functional.normalize and retrieval.models.network have them.
_BATCH_NORM_EPSILON: Final = 1e-5
_NORMALIZE_EPSILON: Final = 1e-12
_GEM_EXPONENT: Final = 3.0
_GEM_FLOOR: Final = 1e-6
_COSINE_SCALE: Final = 16.0

# The architectures of `embed`: ResNets of bottleneck blocks; the weights' names give the number of blocks.
_CAFFES: Final = frozenset(
    {"resnet50-caffe", "resnet50-caffe-cosine", "resnet14-narrow-caffe", "resnet14-narrow-caffe-cosine"}
)
ARCHITECTURES: Final = _CAFFES | {
    "resnet50",
    "resnet50-cosine",
    "resnet14-narrow",
    "resnet14-narrow-cosine",
}

_BLOCK: Final = re.compile(r"(layer\d)\.(\d+)\.conv1\.weight")


def embed(
    tensors: Mapping[str, NDArray[Any]],
    embedding: Embedding,
    picture: NDArray[np.uint8],
    *,
    architecture: str,
) -> tuple[Array, Array]:
    """Returns the embedding and probabilities of one picture by a ResNet of bottleneck blocks.

    Args:
        tensors: the weights, under torchvision's key names.
        embedding: the conversion of activations to an embedding.
        picture: uint8 (size, size, 3).
        architecture: one of ARCHITECTURES; decides strides and padding.

    Returns:
        (d,) and (c,) float32.

    Raises:
        KeyError, ValueError: the tensors are not those of such a network.
    """
    caffe = architecture in _CAFFES
    network = _Network(tensors, stride_first=caffe)
    x = (picture - network.vector("mean")) / network.vector("std")
    x = np.maximum(network.convolve(x, "conv1", "bn1", stride=2), 0)
    x = _max_pool(x, caffe=caffe)
    blocks = sorted((found[1], int(found[2])) for name in tensors if (found := _BLOCK.fullmatch(name)))
    maps: dict[str, Array] = {}
    for layer, number in blocks:
        stride = 2 if number == 0 and layer != LAYERS[0] else 1
        x = maps[layer] = network.block(x, f"{layer}.{number}", stride)
    pooled = x.mean((0, 1))
    features = np.concatenate([_pool(maps[layer], embedding.pooling) for layer in embedding.layers])
    if embedding.dimensions is not None:
        features = network.get("projection_matrix") @ (features - network.get("projection_mean"))
    if embedding.length == "unit":
        features = _normalize(features)
    return features, _softmax(network.logits(pooled))


class _Network:
    def __init__(self, tensors: Mapping[str, NDArray[Any]], *, stride_first: bool) -> None:
        self._tensors = tensors
        self._stride_first = stride_first

    def get(self, name: str) -> Array:
        return np.asarray(self._tensors[name], np.float32)

    def vector(self, name: str) -> Array:
        return self.get(name).reshape(-1)

    def convolve(self, x: Array, name: str, norm: str, *, stride: int = 1) -> Array:
        """Returns a convolution, padded by half its kernel, followed by batch normalisation."""
        scale = self.vector(f"{norm}.weight") / np.sqrt(
            self.vector(f"{norm}.running_var") + np.float32(_BATCH_NORM_EPSILON)
        )
        shift = self.vector(f"{norm}.bias") - self.vector(f"{norm}.running_mean") * scale
        return _convolution(x, self.get(f"{name}.weight"), stride) * scale + shift

    def block(self, x: Array, name: str, stride: int) -> Array:
        """Returns the output of a bottleneck block; its stride is that of the first or middle convolution."""
        first, middle = (stride, 1) if self._stride_first else (1, stride)
        inner = np.maximum(self.convolve(x, f"{name}.conv1", f"{name}.bn1", stride=first), 0)
        inner = np.maximum(self.convolve(inner, f"{name}.conv2", f"{name}.bn2", stride=middle), 0)
        inner = self.convolve(inner, f"{name}.conv3", f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self._tensors:
            x = self.convolve(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
        return np.maximum(inner + x, 0)

    def logits(self, pooled: Array) -> Array:
        if "fc.bias" in self._tensors:
            return self.get("fc.weight") @ pooled + self.get("fc.bias")
        weight = self.get("fc.weight")
        lengths = np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), _NORMALIZE_EPSILON)
        return np.float32(_COSINE_SCALE) * ((weight / lengths) @ _normalize(pooled))


def _convolution(x: Array, weight: Array, stride: int) -> Array:
    """Returns the convolution (h', w', o) of x (h, w, i) with weight (o, i, k, k)."""
    outputs, inputs, size, _ = weight.shape
    if size == 1:
        return x[::stride, ::stride] @ weight[:, :, 0, 0].T
    half = size // 2
    padded = np.pad(x, ((half, half), (half, half), (0, 0)))
    windows = sliding_window_view(padded, (size, size), (0, 1))[::stride, ::stride]
    height, width = windows.shape[:2]
    columns = windows.reshape(height * width, inputs * size * size)
    return (columns @ weight.reshape(outputs, -1).T).reshape(height, width, outputs)


def _max_pool(x: Array, *, caffe: bool) -> Array:
    """Returns max pooling, 3 x 3 with stride 2, of values that are not negative.

    It is padded by 1 on all sides; in Caffe's form only below and on the right, by what the last windows
    lack.
    """
    before, after = (0, [(size - 3) % 2 for size in x.shape[:2]]) if caffe else (1, [1, 1])
    padded = np.pad(x, ((before, after[0]), (before, after[1]), (0, 0)))
    found: Array = sliding_window_view(padded, (3, 3), (0, 1))[::2, ::2].max((-2, -1))
    return found


def _pool(x: Array, pooling: str) -> Array:
    if pooling == "avg":
        return x.mean((0, 1))
    powers = np.maximum(x, np.float32(_GEM_FLOOR)) ** np.float32(_GEM_EXPONENT)
    return powers.mean((0, 1)) ** np.float32(1 / _GEM_EXPONENT)


def _normalize(x: Array) -> Array:
    return x / np.float32(max(float(np.linalg.norm(x)), _NORMALIZE_EPSILON))


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
