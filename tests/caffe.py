"""A ResNet50 as Caffe runs it, written out with functions: the reference for the network in Caffe's form."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def caffe_embedding(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Returns avg_pool, (n, c) float64, of normalised pixels (n, 3, H, W), channels in conv1's order."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}

    def layer(x: Tensor, conv: str, norm: str, stride: int) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, variance, scale, shift = (
            weights[f"{norm}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = layer(x.double(), "conv1", "bn1", 2).relu()
    x = _max_pool(x)
    for stage in (1, 2, 3, 4):
        block = 0
        while (name := f"layer{stage}.{block}") + ".conv1.weight" in weights:
            stride = 2 if stage > 1 and block == 0 else 1
            inner = layer(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            inner = layer(inner, f"{name}.conv2", f"{name}.bn2", 1).relu()
            inner = layer(inner, f"{name}.conv3", f"{name}.bn3", 1)
            if block == 0:
                x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + inner).relu()
            block += 1
    return x.mean((2, 3))


def _max_pool(x: Tensor) -> Tensor:
    """Windows of 3 x 3, two apart, each cut at the edge; as many as it takes to see every pixel."""
    rows, columns = (range(0, max(size - 2, 0) + (size % 2 == 0), 2) for size in x.shape[2:])
    return torch.stack(
        [
            torch.stack([x[:, :, top : top + 3, left : left + 3].amax((2, 3)) for left in columns], 2)
            for top in rows
        ],
        2,
    )
