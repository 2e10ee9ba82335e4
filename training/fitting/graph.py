"""The ONNX graph of a network, written layer by layer.

torch's own exporter traces any network, which takes 10 s for a ResNet50; this family has six kinds of layers.
The same weights give the same bytes with every version of torch. Batch normalization is folded into the
convolutions before it, as torch's exporter and onnxruntime do.
"""

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from retrieval.models.bundle import LAYERS
from retrieval.models.network import GEM_EXPONENT, GEM_FLOOR, CosineClassifier, Network

_OPSET: Final = 18
# The version of the file format that came with these operators.
_IR_VERSION: Final = 8

# As torch.nn.functional.normalize has it.
_NORMALIZE_EPSILON: Final = 1e-12


def graph_of(network: Network, size: int) -> bytes:
    """Returns the network as ONNX: `pixels` uint8 (n, size, size, 3) to `embedding` and `probabilities`.

    Args:
        network: on the CPU, in evaluation mode.
        size: side of a picture in pixels.
    """
    graph = _Graph()
    x = graph.add("Cast", graph.add("Transpose", "pixels", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    x = graph.add("Sub", x, graph.constant("mean", _numbers(network.mean)))
    x = graph.add("Div", x, graph.constant("std", _numbers(network.std)))
    x = graph.add("Relu", graph.convolution("conv1", x, network.conv1, network.bn1))
    x = graph.max_pooling(x, network.maxpool)
    maps = {}
    for layer in LAYERS:
        for number, block in enumerate(getattr(network, layer)):
            x = graph.block(f"{layer}.{number}", x, block)
        maps[layer] = x
    pooled = graph.mean(x)
    graph.finish(network, maps, pooled)
    graph.classify(network.fc, pooled)
    labels = network.fc.out_features
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            network.architecture,
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", size, size, 3])],
            [
                helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", network.dimension]),
                helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", labels]),
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="faceprint",
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class _Graph:
    """The nodes and constants of a graph that grows; methods add layers and return the names of outputs."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def convolution(self, name: str, x: str, layer: nn.Conv2d, norm: nn.BatchNorm2d) -> str:
        """Adds a convolution and the batch normalization after it, folded in float64."""
        assert layer.bias is None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance, weight, bias = (
            _numbers(part).astype(np.float64)
            for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        scale = weight / np.sqrt(variance + norm.eps)
        weights = _numbers(layer.weight) * scale[:, None, None, None]
        return self.add(
            "Conv",
            x,
            self.constant(f"{name}.weight", weights.astype(np.float32)),
            self.constant(f"{name}.bias", (bias - mean * scale).astype(np.float32)),
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=list(layer.padding) * 2,
        )

    def max_pooling(self, x: str, layer: nn.MaxPool2d) -> str:
        """Adds a max pooling with the same kernel, stride and padding on both sides."""
        return self.add(
            "MaxPool",
            x,
            kernel_shape=[layer.kernel_size] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
            ceil_mode=int(layer.ceil_mode),
        )

    def block(self, name: str, x: str, block: Bottleneck) -> str:
        shortcut = x
        if block.downsample is not None:
            shortcut = self.convolution(f"{name}.downsample", x, *block.downsample)
        x = self.add("Relu", self.convolution(f"{name}.conv1", x, block.conv1, block.bn1))
        x = self.add("Relu", self.convolution(f"{name}.conv2", x, block.conv2, block.bn2))
        x = self.convolution(f"{name}.conv3", x, block.conv3, block.bn3)
        return self.add("Relu", self.add("Add", x, shortcut))

    def mean(self, x: str) -> str:
        """Adds the mean over the places of a map."""
        return self.add("Flatten", self.add("GlobalAveragePool", x))

    def finish(self, network: Network, maps: dict[str, str], pooled: str) -> None:
        """Adds the steps from the maps of all layers to `embedding`, as `Network.forward` has them."""
        chosen = network.embedding
        if chosen.pooling == "gem":
            floor = self.constant("gem.floor", np.array(GEM_FLOOR, np.float32))
            power = self.constant("gem.exponent", np.array(GEM_EXPONENT, np.float32))
            root = self.constant("gem.root", np.array(1 / GEM_EXPONENT, np.float32))
            parts = [
                self.add("Pow", self.mean(self.add("Pow", self.add("Max", maps[layer], floor), power)), root)
                for layer in chosen.layers
            ]
        else:
            parts = [pooled if layer == LAYERS[-1] else self.mean(maps[layer]) for layer in chosen.layers]
        x = parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=1)
        if network.projection_mean is not None and network.projection_matrix is not None:
            x = self.add("Sub", x, self.constant("projection.mean", _numbers(network.projection_mean)))
            matrix = self.constant("projection.matrix", _numbers(network.projection_matrix))
            x = self.add("Gemm", x, matrix, transB=1)
        if chosen.length == "unit":
            x = self.normalized(x)
        self.add("Identity", x, output="embedding")

    def normalized(self, x: str) -> str:
        """Adds the division of each row by its length."""
        # onnxruntime warns of constants without a use, so they come with the first.
        if all(one.name != "least_length" for one in self.constants):
            self.constant("columns", np.array([1], np.int64))
            self.constant("least_length", np.array(_NORMALIZE_EPSILON, np.float32))
        return self.add("Div", x, self.add("Max", self.add("ReduceL2", x, "columns"), "least_length"))

    def classify(self, layer: nn.Linear, pooled: str) -> None:
        """Adds the last layer and `probabilities`."""
        if isinstance(layer, CosineClassifier):
            weights = nn.functional.normalize(layer.weight) * layer.scale
            x = self.add(
                "Gemm", self.normalized(pooled), self.constant("fc.weight", _numbers(weights)), transB=1
            )
        else:
            weight, bias = (
                self.constant("fc.weight", _numbers(layer.weight)),
                self.constant("fc.bias", _numbers(layer.bias)),
            )
            x = self.add("Gemm", pooled, weight, bias, transB=1)
        self.add("Softmax", x, output="probabilities", axis=1)


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = tensor.detach().numpy()
    return numbers
