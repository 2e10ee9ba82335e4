"""PReLU in a form that onnxruntime computes quickly on x86-64, with the same bits.

Networks for faces have a PReLU after most convolutions (He et al., "Delving Deep into Rectifiers", 2015): x
where it is positive, and a slope times x elsewhere, with one slope for each channel. The convolutions of
onnxruntime keep 8 or 16 channels side by side. Neither its operator PRelu nor what converters from TensorFlow
make of a PReLU knows that order, so all numbers are moved to the usual order before each activation and back
after it, which can take longer than the convolutions.

    relu(x) + (-slope) * relu(-x)

is the same number. Its products by channel are written as batch normalizations, of which onnxruntime makes
convolutions in its own order, and its sum becomes part of the last one. docs/benchmarks.md has the figures.

What takes the result then gets numbers in that order too, and may round otherwise: an average over a
plane, the sum of a shortcut, a batch normalization. So a PReLU is written in that form if only convolutions
take it, or a Flatten, before which onnxruntime restores the usual order.
"""

import platform
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.system.onnx_graph import (
    Node,
    attribute,
    field,
    fields,
    header,
    node,
    raw_fields,
    standard_opset,
    tensor,
    texts,
)

# Field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
_MODEL_GRAPH: Final = 7
_MODEL_OPSET: Final = 8
_GRAPH_NODE: Final = 1
_GRAPH_INITIALIZER: Final = 5
_GRAPH_OUTPUT: Final = 12
_VALUE_NAME: Final = 1
_TENSOR_DIMENSION: Final = 1
_TENSOR_TYPE: Final = 2
_TENSOR_FLOATS: Final = 4
_TENSOR_NAME: Final = 8
_TENSOR_BYTES: Final = 9

_FLOAT32: Final = 1
_INT64: Final = 7

# Before this version of the operators, a batch normalization may be one over whole planes.
_MIN_OPSET: Final = 9

# Of the names of new tensors.
_PREFIX: Final = "faceprint-prelu/"

# The operators that give the same bits whatever order their input is stored in, and the same order.
_ANY_ORDER: Final = frozenset(("Conv", "Flatten"))


def in_blocked_form(graph: bytes) -> bytes:
    """Returns a graph with each PReLU of a convolution in the form above; the same graph if it has none.

    A PReLU is the operator PRelu, or relu(x) + a * (x - |x|), which is what converters from TensorFlow write.
    Where there is anything that this module does not know, or bits might change, the graph stays as it is.

    Args:
        graph: a file that `onnx_graph.check_graph` passes.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return graph
    found = _Graph(graph)
    if found.opset < _MIN_OPSET or found.has_odd_names:
        return graph
    activations = [one for one in map(found.activation, range(len(found.nodes))) if one is not None]
    if not activations:
        return graph
    # Slices, joined once: a network may have hundreds of megabytes.
    parts: list[bytes | memoryview] = []
    for number, value, raw in raw_fields(memoryview(graph)):
        if number == _MODEL_GRAPH:
            inner = _rewritten(value, activations)
            parts += [header(number, sum(map(len, inner))), *inner]
        else:
            parts.append(raw)
    return b"".join(parts)


@dataclass(frozen=True)
class _Activation:
    """A PReLU: the places of its nodes in the graph, its input and output, and its slopes by channel."""

    places: tuple[int, ...]
    source: str
    target: str
    slopes: NDArray[np.float32]


class _Graph:
    """The nodes of a graph, what they take, and the version of their operators."""

    def __init__(self, model: bytes) -> None:
        self.nodes: list[Node] = []
        self.opset = 0
        graph = memoryview(b"")
        for number, message, _ in raw_fields(memoryview(model)):
            if number == _MODEL_GRAPH:
                graph = message
            elif number == _MODEL_OPSET:
                self.opset = max(self.opset, standard_opset(message))
        self._tensors: dict[str, memoryview] = {}
        self._uses: Counter[str] = Counter()
        self._takers: defaultdict[str, set[str]] = defaultdict(set)
        for number, value in fields(graph):
            if not isinstance(value, memoryview):
                continue
            if number == _GRAPH_NODE:
                self.nodes.append(Node.of(value))
            elif number == _GRAPH_INITIALIZER:
                self._tensors["".join(texts(value, _TENSOR_NAME))] = value
            elif number == _GRAPH_OUTPUT:
                self._uses.update(texts(value, _VALUE_NAME))
        self._places = {name: place for place, one in enumerate(self.nodes) for name in one.outputs}
        for one in self.nodes:
            self._uses.update(one.inputs)
            for name in one.inputs:
                self._takers[name].add(one.operator)
        names = (*self._tensors, *self._places)
        # The second stands for bytes that are not in UTF-8, which cannot be written again.
        self.has_odd_names = any(name.startswith(_PREFIX) or "\ufffd" in name for name in names)

    def activation(self, last: int) -> _Activation | None:
        """Returns the PReLU whose last node is at a place, or None."""
        end = self.nodes[last]
        found: tuple[str, str, int, tuple[int, ...]] | None = None
        if end.operator == "PRelu" and len(end.inputs) == 2:
            found = (end.inputs[0], end.inputs[1], 1, (last,))
        elif end.operator == "Add" and len(end.inputs) == 2:
            found = self._spelled_out(last)
        if found is None:
            return None
        source, factors, times, places = found
        if not self._takers.get(end.outputs[0], set()) <= _ANY_ORDER:
            return None
        slopes = self._by_channel(factors)
        if slopes is None or self._channels(source) != len(slopes):
            return None
        with np.errstate(over="ignore"):
            slopes = np.float32(times) * slopes
        # 0 times another slope is no number.
        return _Activation(places, source, end.outputs[0], slopes) if np.isfinite(slopes).all() else None

    def _spelled_out(self, last: int) -> tuple[str, str, int, tuple[int, ...]] | None:
        """Returns the parts of relu(x) + a * (x - |x|): x, a, by what to multiply it for slopes, places."""
        for relu, product in (self.nodes[last].inputs, self.nodes[last].inputs[::-1]):
            if (x := self._sole("Relu", relu)) is None or (pair := self._sole("Mul", product)) is None:
                continue
            source = x.inputs[0]
            for factors, difference in (pair.inputs, pair.inputs[::-1]):
                minus = self._sole("Sub", difference)
                if minus is None or minus.inputs[0] != source:
                    continue
                absolute = self._sole("Abs", minus.inputs[1])
                if absolute is not None and absolute.inputs[0] == source:
                    names = (relu, product, difference, minus.inputs[1])
                    # x - |x| is 2 x where x is negative.
                    return source, factors, 2, (*(self._places[name] for name in names), last)
        return None

    def _sole(self, operator: str, name: str) -> Node | None:
        """Returns the node that gives a tensor, if it has that operator and one other node alone takes it."""
        place = self._places.get(name)
        if place is None or self._uses[name] != 1 or self.nodes[place].operator != operator:
            return None
        return self.nodes[place]

    def _channels(self, name: str) -> int | None:
        """Returns how many channels a tensor of pictures has, if a convolution gives it; else None."""
        place = self._places.get(name)
        if place is not None and self.nodes[place].operator == "BatchNormalization":
            # One, of which onnxruntime makes a part of the convolution, or a convolution.
            place = self._places.get(self.nodes[place].inputs[0])
        if place is None:
            return None
        giver = self.nodes[place]
        if giver.operator != "Conv" or giver.inputs[1] not in self._tensors:
            return None
        shape = _shape(self._tensors[giver.inputs[1]])
        return shape[0] if len(shape) == 4 else None

    def _by_channel(self, name: str) -> NDArray[np.float32] | None:
        """Returns numbers of which each belongs to a channel; None for others."""
        place = self._places.get(name)
        if place is None:
            shape = _shape(self._tensors[name]) if name in self._tensors else ()
        else:
            giver = self.nodes[place]
            if giver.operator != "Reshape" or not set(giver.inputs) <= self._tensors.keys():
                return None
            name, sides = giver.inputs
            shape = _integers(self._tensors[sides])
        channels = int(np.prod(shape))
        if name not in self._tensors or shape not in ((channels, 1, 1), (1, channels, 1, 1)):
            return None
        numbers = _floats(self._tensors[name])
        return numbers if numbers is not None and len(numbers) == channels else None


def _rewritten(graph: memoryview, activations: list[_Activation]) -> list[bytes | memoryview]:
    """Returns the parts of a graph with other nodes for activations; Reshapes of slopes stay, unused."""
    ends = {one.places[-1]: one for one in activations}
    gone = {place for one in activations for place in one.places}
    parts: list[bytes | memoryview] = []
    place = 0
    for number, _, raw in raw_fields(graph):
        if number == _GRAPH_NODE:
            if place in ends:
                parts += [field(_GRAPH_NODE, one) for one in _nodes(ends[place], place)]
            elif place not in gone:
                parts.append(raw)
            place += 1
        else:
            parts.append(raw)
    for place, activation in ends.items():
        count = len(activation.slopes)
        constants = {
            "zeros": np.zeros(count, "<f4"),
            "ones": np.ones(count, "<f4"),
            "minus": np.full(count, -1, "<f4"),
            "slopes": -activation.slopes.astype("<f4"),
        }
        for name, value in constants.items():
            stored = tensor(_named(place, name), _FLOAT32, count, value.tobytes())
            parts.append(field(_GRAPH_INITIALIZER, stored))
    return parts


def _nodes(activation: _Activation, place: int) -> list[bytes]:
    """Returns the nodes of relu(x) + (-slope) * relu(-x)."""

    def scaled(source: bytes, factors: str, target: str) -> bytes:
        zeros, ones = _named(place, "zeros"), _named(place, "ones")
        inputs = [source, _named(place, factors), zeros, zeros, ones]
        return node("BatchNormalization", inputs, _named(place, target), [attribute("epsilon", 0.0)])

    x = activation.source.encode()
    return [
        node("Relu", [x], _named(place, "positive")),
        scaled(x, "minus", "turned"),
        node("Relu", [_named(place, "turned")], _named(place, "negative")),
        scaled(_named(place, "negative"), "slopes", "product"),
        node("Add", [_named(place, "positive"), _named(place, "product")], activation.target.encode()),
    ]


def _named(place: int, name: str) -> bytes:
    return f"{_PREFIX}{place}/{name}".encode()


def _shape(tensor: memoryview) -> tuple[int, ...]:
    return tuple(
        value for number, value in fields(tensor) if number == _TENSOR_DIMENSION and isinstance(value, int)
    )


def _floats(tensor: memoryview) -> NDArray[np.float32] | None:
    """Returns the numbers of a float32 tensor, flat; None for another type or another way to store them."""
    stored = dict(fields(tensor))
    content = stored.get(_TENSOR_BYTES, stored.get(_TENSOR_FLOATS))
    if stored.get(_TENSOR_TYPE) != _FLOAT32 or not isinstance(content, memoryview) or len(content) % 4:
        return None
    return np.frombuffer(content, "<f4").astype(np.float32)


def _integers(tensor: memoryview) -> tuple[int, ...]:
    """Returns the numbers of an int64 tensor; none for another type or another way to store them."""
    stored = dict(fields(tensor))
    content = stored.get(_TENSOR_BYTES)
    if stored.get(_TENSOR_TYPE) != _INT64 or not isinstance(content, memoryview) or len(content) % 8:
        return ()
    return tuple(np.frombuffer(content, "<i8").tolist())
