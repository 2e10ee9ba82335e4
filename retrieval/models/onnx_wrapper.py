"""The graph of an imported model: a network from elsewhere, between uint8 pixels and the embedding.

The file is extended field by field, without the `onnx` package: the same file and options give the same
bytes with every version of every package, so that a fingerprint can cover them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval.system.onnx_graph import (
    Node,
    attribute,
    field,
    fields,
    node,
    raw_fields,
    standard_opset,
    tensor,
    tensor_value,
    texts,
)

ChannelOrder = Literal["rgb", "bgr"]
Layout = Literal["nchw", "nhwc"]

# Element types of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, with their names for people.
FLOAT: Final = 1
KINDS: Final = {
    FLOAT: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}

# Field numbers of the same file.
_MODEL_IR_VERSION: Final = 1
_MODEL_GRAPH: Final = 7
_MODEL_OPSET: Final = 8
_GRAPH_NODE: Final = 1
_GRAPH_INITIALIZER: Final = 5
_GRAPH_INPUT: Final = 11
_GRAPH_OUTPUT: Final = 12
_GRAPH_VALUES: Final = 13
_GRAPH_QUANTIZATION: Final = 14
_GRAPH_SPARSE_INITIALIZER: Final = 15
_NODE_INPUT: Final = 1
_NODE_OUTPUT: Final = 2
_TENSOR_TYPE: Final = 2
_TENSOR_NAME: Final = 8
_SPARSE_VALUES: Final = 1
_VALUE_NAME: Final = 1
_VALUE_TYPE: Final = 2
_TYPE_TENSOR: Final = 1
_TENSOR_TYPE_ELEMENT: Final = 1
_TENSOR_TYPE_SHAPE: Final = 2
_SHAPE_DIMENSION: Final = 1
_DIMENSION_VALUE: Final = 1

# From this version of the format on, an initializer need not be an input too, and onnxruntime folds it.
_MIN_IR_VERSION: Final = 4
# The names of a network's tensors get this prefix, so that none is that of a tensor around it.
_PREFIX: Final = b"network/"


@dataclass(frozen=True)
class NetworkInput:
    """How a network takes pictures: (x - mean) / std, for x of 0 to 255.

    Attributes:
        size: side of the square in pixels.
        colour: the order of the channels, "rgb" or "bgr".
        mean, std: for each channel, in that order.
        layout: "nchw" or "nhwc".
        mirrored: whether it takes the mirror image of each picture too, right after it.
    """

    size: int
    colour: ChannelOrder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: Layout
    mirrored: bool = False


@dataclass(frozen=True)
class Port:
    """An input or output of a network.

    Attributes:
        name: of the tensor.
        kind: its element type, a key of KINDS or another number of ONNX.
        shape: as stated, None for each dimension that is not; None where no shape is stated.
    """

    name: str
    kind: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Signature:
    """What a network takes and gives.

    Attributes:
        inputs: without initializers.
        outputs: as stated.
        tensors: the names of what its nodes compute.
        opset: the version of the standard operators.
        normalizes: whether the first thing that happens to its input is a subtraction and a multiplication.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    tensors: frozenset[str]
    opset: int
    normalizes: bool


def signature(network: bytes) -> Signature:
    """Returns what a network takes and gives, as its file states it.

    Args:
        network: a file that `onnx_graph.check_graph` passes.
    """
    opset, graph = 0, memoryview(b"")
    for number, value, _ in raw_fields(memoryview(network)):
        if number == _MODEL_GRAPH:
            graph = value
        elif number == _MODEL_OPSET:
            opset = max(opset, standard_opset(value))
    inputs: list[Port] = []
    outputs: list[Port] = []
    initializers: set[str] = set()
    nodes: list[Node] = []
    for number, value, _ in raw_fields(graph):
        if number == _GRAPH_NODE:
            nodes.append(Node.of(value))
        elif number == _GRAPH_INPUT:
            inputs.append(_port(value))
        elif number == _GRAPH_OUTPUT:
            outputs.append(_port(value))
        elif number in (_GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER):
            initializers.add(_initializer_name(number, value))
    inputs = [one for one in inputs if one.name not in initializers]
    return Signature(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        tensors=frozenset(name for one in nodes for name in one.outputs if name),
        opset=opset,
        normalizes=len(inputs) == 1 and _operators_after(inputs[0].name, nodes, 2) == ["Sub", "Mul"],
    )


def wrapped(
    network: bytes,
    found: Signature,
    takes: NetworkInput,
    *,
    output: str,
    dimension: int | None = None,
    unit: bool = False,
) -> bytes:
    """Returns a graph that takes `pixels`, uint8 (n, size, size, 3) RGB, and gives `embedding`, float32.

    Shapes that the network states for its tensors are left out: most networks that were exported for one
    picture then take any number.

    Args:
        network: a file that `onnx_graph.check_graph` passes.
        found: its signature, with one input.
        takes: how it takes pictures.
        output: the tensor that is the embedding.
        dimension: the numbers of an embedding, which becomes (n, dimension), the mean of a picture and its
            mirror image where the network takes both; None leaves the tensor as it is.
        unit: whether it is divided by its Euclidean length; only with `dimension`.
    """
    source = found.inputs[0]
    before = _before(source, takes)
    after = _after(output, dimension, mirrored=takes.mirrored, unit=unit)
    parts: list[bytes | memoryview] = []
    version = _MIN_IR_VERSION
    for number, value, raw in raw_fields(memoryview(network)):
        if number == _MODEL_GRAPH:
            parts.append(field(number, _graph(value, before, after, takes.size, dimension)))
        elif number == _MODEL_IR_VERSION:
            version = max(version, *(stated for _, stated in fields(raw) if isinstance(stated, int)))
        else:
            parts.append(raw)
    return b"".join([field(_MODEL_IR_VERSION, version), *parts])


def _graph(graph: memoryview, before: bytes, after: bytes, size: int, dimension: int | None) -> bytes:
    """Returns a graph with prefixed names and with nodes before and after its own, which stay in order."""
    parts: list[bytes | memoryview] = [before]
    for number, value, raw in raw_fields(graph):
        if number == _GRAPH_NODE:
            parts.append(field(number, _renamed(value, (_NODE_INPUT, _NODE_OUTPUT))))
        elif number == _GRAPH_INITIALIZER:
            parts.append(field(number, _renamed(value, (_TENSOR_NAME,))))
        elif number == _GRAPH_SPARSE_INITIALIZER:
            parts.append(field(number, _sparse_renamed(value)))
        elif number not in (_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUES, _GRAPH_QUANTIZATION):
            parts.append(raw)
    pixels = tensor_value("pixels", 2, ["n", size, size, 3])
    embedding = tensor_value("embedding", FLOAT, None if dimension is None else ["n", dimension])
    return b"".join([*parts, after, field(_GRAPH_INPUT, pixels), field(_GRAPH_OUTPUT, embedding)])


def _before(source: Port, takes: NetworkInput) -> bytes:
    """Returns the nodes from `pixels` to the network's input."""
    chain = _Chain(b"pixels", "before")
    chain.add("Cast", to=FLOAT)
    if takes.colour == "bgr":
        chain.add("Gather", np.array([2, 1, 0], "<i8"), axis=3)
    if any(takes.mean):
        chain.add("Sub", np.array(takes.mean, "<f4"))
    if takes.std != (1, 1, 1):
        chain.add("Div", np.array(takes.std, "<f4"))
    # The axes of a batch, by name.
    axes = "nhwc"
    if takes.mirrored:
        # Columns first: after those of a picture come the same in reverse order, which are its mirror image.
        chain.add("Transpose", perm=_permutation(axes, "nwhc"))
        axes, columns = "nwhc", np.arange(takes.size, dtype="<i8")
        chain.add("Gather", np.concatenate([columns, columns[::-1]]), axis=1)
        chain.add("Reshape", np.array([-1, takes.size, takes.size, 3], "<i8"))
    if takes.layout != axes:
        chain.add("Transpose", perm=_permutation(axes, takes.layout))
    if source.kind != FLOAT:
        chain.add("Cast", to=source.kind)
    return chain.ended(_PREFIX + source.name.encode())


def _permutation(axes: str, wanted: str) -> list[int]:
    return [axes.index(axis) for axis in wanted]


def _after(output: str, dimension: int | None, *, mirrored: bool, unit: bool) -> bytes:
    """Returns the nodes from a tensor of the network to `embedding`."""
    chain = _Chain(_PREFIX + output.encode(), "after")
    chain.add("Cast", to=FLOAT)
    if dimension is not None:
        chain.add("Flatten", axis=1)
    if dimension is not None and mirrored:
        # The mean of two rows, by an operator that all versions since 7 have in the same form.
        chain.add("Reshape", np.array([-1, 1, 2, dimension], "<i8"))
        chain.add("AveragePool", kernel_shape=[2, 1])
        chain.add("Flatten", axis=1)
    if unit:
        chain.add("LpNormalization", axis=1, p=2)
    return chain.ended(b"embedding")


class _Chain:
    """Nodes of which each takes what the one before gives, and perhaps a constant."""

    def __init__(self, source: bytes, name: str) -> None:
        self._last, self._name = source, name
        self._fields: list[bytes] = []
        self._nodes = 0

    def add(self, operator: str, constant: NDArray[Any] | None = None, **attributes: int | list[int]) -> None:
        """Appends a node."""
        made = f"{self._name}/{self._nodes}".encode()
        inputs = [self._last]
        if constant is not None:
            inputs.append(made + b"/constant")
            self._fields.append(field(_GRAPH_INITIALIZER, _tensor(inputs[1], constant)))
        self._append(node(operator, inputs, made, [attribute(*one) for one in attributes.items()]))
        self._last = made

    def ended(self, target: bytes) -> bytes:
        """Returns the nodes and constants, as fields of a graph; the last node gives `target`."""
        self._append(node("Identity", [self._last], target))
        return b"".join(self._fields)

    def _append(self, node: bytes) -> None:
        self._fields.append(field(_GRAPH_NODE, node))
        self._nodes += 1


def _tensor(name: bytes, value: NDArray[Any]) -> bytes:
    kind = {"<f4": FLOAT, "<i8": 7}[value.dtype.str]
    return tensor(name, kind, len(value), value.tobytes())


def _renamed(message: memoryview, names: tuple[int, ...]) -> bytes:
    """Returns a message with the prefix before the names in some fields; an empty name is no tensor."""
    return b"".join(
        field(number, _PREFIX + bytes(value)) if number in names and len(value) else raw
        for number, value, raw in raw_fields(message)
    )


def _sparse_renamed(tensor: memoryview) -> bytes:
    return b"".join(
        field(number, _renamed(value, (_TENSOR_NAME,))) if number == _SPARSE_VALUES else raw
        for number, value, raw in raw_fields(tensor)
    )


def _operators_after(name: str, nodes: list[Node], count: int) -> list[str]:
    """Returns the operators of the first nodes that a tensor passes."""
    found: list[str] = []
    for one in nodes:
        if len(found) < count and name in one.inputs and one.outputs:
            found.append(one.operator)
            name = one.outputs[0]
    return found


def _initializer_name(number: int, value: memoryview) -> str:
    tensors = [value]
    if number == _GRAPH_SPARSE_INITIALIZER:
        tensors = [part for one, part, _ in raw_fields(value) if one == _SPARSE_VALUES]
    return "".join(name for tensor in tensors for name in texts(tensor, _TENSOR_NAME))


def _port(value: memoryview) -> Port:
    kind, shape = 0, None
    for described in _parts(value, _VALUE_TYPE, _TYPE_TENSOR):
        for number, content in fields(described):
            if number == _TENSOR_TYPE_ELEMENT and isinstance(content, int):
                kind = content
            elif number == _TENSOR_TYPE_SHAPE and isinstance(content, memoryview):
                shape = tuple(_dimension(one) for one in _parts(content, _SHAPE_DIMENSION))
    return Port("".join(texts(value, _VALUE_NAME)), kind, shape)


def _parts(message: memoryview, *path: int) -> Iterator[memoryview]:
    """Yields the messages in a message at a path of field numbers."""
    for number, value, _ in raw_fields(message):
        if number == path[0]:
            yield from _parts(value, *path[1:]) if len(path) > 1 else iter([value])


def _dimension(stated: memoryview) -> int | None:
    """Returns a dimension of a shape; None where it has a name, or a number that is no size."""
    found = [value for number, value in fields(stated) if number == _DIMENSION_VALUE]
    return next((one for one in found if isinstance(one, int) and 0 < one < 2**31), None)
