"""The check of ONNX graphs for bundles: walks the protobuf of a file, without the `onnx` package.

Only plain operators of the standard set pass, in one graph, with all tensors in the file itself. So a graph
cannot loop forever, run code of another library, or read other files.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

# Field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
_MODEL_GRAPH: Final = 7
_MODEL_OPSET: Final = 8
_MODEL_TRAINING: Final = 20
_MODEL_FUNCTION: Final = 25
_GRAPH_NODE: Final = 1
_GRAPH_INITIALIZER: Final = 5
_GRAPH_SPARSE_INITIALIZER: Final = 15
_GRAPH_INPUT: Final = 11
_GRAPH_OUTPUT: Final = 12
_GRAPH_VALUES: Final = 13
_VALUE_NAME: Final = 1
_VALUE_TYPE: Final = 2
_TYPE_TENSOR: Final = 1
_TENSOR_ELEMENT: Final = 1
_TENSOR_SHAPE: Final = 2
_SHAPE_SIDE: Final = 1
_SIDE_VALUE: Final = 1
_SIDE_NAME: Final = 2
_NODE_INPUT: Final = 1
_NODE_OUTPUT: Final = 2
_NODE_OPERATOR: Final = 4
_NODE_ATTRIBUTE: Final = 5
_NODE_DOMAIN: Final = 7
_ATTRIBUTE_NAME: Final = 1
_ATTRIBUTE_FLOAT: Final = 2
_ATTRIBUTE_INT: Final = 3
_ATTRIBUTE_INTS: Final = 8
_ATTRIBUTE_TYPE: Final = 20
_ATTRIBUTE_TENSOR: Final = 5
_ATTRIBUTE_GRAPH: Final = 6
_ATTRIBUTE_TENSORS: Final = 10
_ATTRIBUTE_GRAPHS: Final = 11
_ATTRIBUTE_SPARSE: Final = (22, 23)
_SPARSE_PARTS: Final = (1, 2)
_TENSOR_SIDE: Final = 1
_TENSOR_TYPE: Final = 2
_TENSOR_NAME: Final = 8
_TENSOR_BYTES: Final = 9
_TENSOR_EXTERNAL: Final = 13
_TENSOR_LOCATION: Final = 14
_OPSET_DOMAIN: Final = 1
_OPSET_VERSION: Final = 2

_STANDARD_DOMAINS: Final = (b"", b"ai.onnx")
_CONTROL_FLOW: Final = (b"If", b"Loop", b"Scan", b"SequenceMap")

# A ResNet50 has 130 nodes and fewer than 10,000 fields; these bound the walk and the work of a pass.
_MAX_NODES: Final = 10_000
_MAX_FIELDS: Final = 1_000_000

# Field number and value: a number, the bytes of a string or message, or None for a fixed width.
_Field: TypeAlias = tuple[int, int | memoryview | None]


class RefusedGraph(Exception):
    """An ONNX file is refused; the message says why in a few words."""


def check_graph(data: bytes) -> None:
    """Checks a serialized ModelProto. It skips the tensor data, so 100 MB take milliseconds.

    Raises:
        RefusedGraph: it is not an ONNX file, or holds control flow, nested graphs, functions, operators of
            another domain, external data, or more nodes than a network has.
    """
    walk = _Walk()
    graphs = 0
    for number, value in walk.messages(memoryview(data)):
        if number == _MODEL_GRAPH:
            graphs += 1
            _check_graph(walk, value)
        elif number == _MODEL_OPSET:
            for field, domain in walk.messages(value):
                if field == _OPSET_DOMAIN:
                    _check_domain(domain)
        elif number in (_MODEL_FUNCTION, _MODEL_TRAINING):
            raise RefusedGraph("it has functions of its own")
    if graphs != 1:
        raise RefusedGraph("it is not an ONNX file with one graph")


def _check_graph(walk: "_Walk", graph: memoryview) -> None:
    nodes = 0
    for number, value in walk.messages(graph):
        if number == _GRAPH_NODE:
            nodes += 1
            _check_node(walk, value)
        elif number == _GRAPH_INITIALIZER:
            _check_tensor(walk, value)
        elif number == _GRAPH_SPARSE_INITIALIZER:
            _check_sparse(walk, value)
    if nodes > _MAX_NODES:
        raise RefusedGraph(f"it has {nodes:,} nodes, and at most {_MAX_NODES:,} are allowed")


def _check_node(walk: "_Walk", node: memoryview) -> None:
    for number, value in walk.messages(node):
        if number == _NODE_DOMAIN:
            _check_domain(value)
        elif number == _NODE_OPERATOR and bytes(value[:32]) in _CONTROL_FLOW:
            raise RefusedGraph(f"it has control flow ({bytes(value).decode()})")
        elif number == _NODE_ATTRIBUTE:
            _check_attribute(walk, value)


def _check_attribute(walk: "_Walk", attribute: memoryview) -> None:
    for number, value in walk.messages(attribute):
        if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            raise RefusedGraph("it has a graph within the graph")
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _check_tensor(walk, value)
        elif number in _ATTRIBUTE_SPARSE:
            _check_sparse(walk, value)


def _check_sparse(walk: "_Walk", tensor: memoryview) -> None:
    for number, value in walk.messages(tensor):
        if number in _SPARSE_PARTS:
            _check_tensor(walk, value)


def _check_tensor(walk: "_Walk", tensor: memoryview) -> None:
    for number, value in walk.fields(tensor):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            raise RefusedGraph("it keeps numbers in other files")


def _check_domain(domain: memoryview) -> None:
    if bytes(domain[:32]) not in _STANDARD_DOMAINS:
        shown = bytes(domain[:40]).decode("ascii", "replace")
        raise RefusedGraph(f"it uses operators of the domain {shown!r}")


class _Walk:
    """Reads messages field by field, and counts the fields of all of them."""

    def __init__(self) -> None:
        self._left = _MAX_FIELDS

    def messages(self, message: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yields the strings and messages in a message, by field number."""
        for number, value in self.fields(message):
            if isinstance(value, memoryview):
                yield number, value

    def fields(self, message: memoryview) -> Iterator[_Field]:
        """Yields all fields of a message, in order."""
        for number, value, _, _ in self.spans(message):
            yield number, value

    def spans(self, message: memoryview) -> Iterator[tuple[int, int | memoryview | None, int, int]]:
        """Yields all fields of a message, in order, with their first and last positions."""
        position, end = 0, len(message)
        while position < end:
            start = position
            self._left -= 1
            if self._left < 0:
                raise RefusedGraph(f"it has more than {_MAX_FIELDS:,} fields")
            tag, position = _read_varint(message, position)
            if tag >= 2**32:
                raise _not_protobuf()
            kind = tag & 7
            value: int | memoryview | None = None
            if kind == 0:
                value, position = _read_varint(message, position)
            elif kind == 1:
                position += 8
            elif kind == 2:
                size, position = _read_varint(message, position)
                value = message[position : position + size]
                position += size
            elif kind == 5:
                position += 4
            else:
                raise _not_protobuf()
            if position > end:
                raise _not_protobuf()
            yield tag >> 3, value, start, position


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Returns a varint (7 bits a byte, lowest first) and the position after it."""
    found = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _not_protobuf()
        byte = message[position]
        position += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found & (2**64 - 1), position
    raise _not_protobuf()


def _not_protobuf() -> RefusedGraph:
    return RefusedGraph("it is not an ONNX file")


def for_any_size(data: bytes) -> bytes:
    """Returns a checked graph of one picture, (1, 3, height, width), whose sides are left open.

    A convolutional network that was exported for one size of picture then runs at any size. The shapes that
    the graph states for its outputs and values are left out. That of its input is stated with named sides:
    onnxruntime finds faster kernels for it than for a shape that is unknown (0.79 of the time for YuNet),
    with the same results.
    """
    return b"".join(
        field(number, _graph_for_any_size(value)) if number == _MODEL_GRAPH else raw
        for number, value, raw in raw_fields(memoryview(data))
    )


def _graph_for_any_size(graph: memoryview) -> bytes:
    parts: list[bytes | memoryview] = []
    for number, value, raw in raw_fields(graph):
        if number == _GRAPH_INPUT:
            stated = _shape_of([1, 3, "height", "width"])
            parts.append(field(number, _with_shape(value, (_VALUE_TYPE, _TYPE_TENSOR), stated)))
        elif number == _GRAPH_OUTPUT:
            parts.append(field(number, _with_shape(value, (_VALUE_TYPE, _TYPE_TENSOR), b"")))
        elif number != _GRAPH_VALUES:
            parts.append(raw)
    return b"".join(parts)


def _with_shape(message: memoryview, path: tuple[int, ...], shape: bytes) -> bytes:
    """Returns a message with another shape, or none, in the tensor type at a path of field numbers."""
    if not path:
        return b"".join(raw for number, _, raw in raw_fields(message) if number != _TENSOR_SHAPE) + shape
    return b"".join(
        field(number, _with_shape(value, path[1:], shape)) if number == path[0] else raw
        for number, value, raw in raw_fields(message)
    )


def node(operator: str, inputs: Sequence[bytes], output: bytes, attributes: Sequence[bytes] = ()) -> bytes:
    """Returns a node with one output; `attribute` makes attributes."""
    return b"".join(
        [
            *(field(_NODE_INPUT, name) for name in inputs),
            field(_NODE_OUTPUT, output),
            field(_NODE_OPERATOR, operator.encode()),
            *(field(_NODE_ATTRIBUTE, one) for one in attributes),
        ]
    )


def attribute(name: str, value: int | float | list[int]) -> bytes:
    """Returns an attribute of a node: a number, or several whole ones."""
    said = field(_ATTRIBUTE_NAME, name.encode())
    if isinstance(value, int):
        return said + field(_ATTRIBUTE_INT, value) + field(_ATTRIBUTE_TYPE, 2)
    if isinstance(value, float):
        stated = _varint(_ATTRIBUTE_FLOAT << 3 | 5) + struct.pack("<f", value)
        return said + stated + field(_ATTRIBUTE_TYPE, 1)
    return said + b"".join(field(_ATTRIBUTE_INTS, one) for one in value) + field(_ATTRIBUTE_TYPE, 7)


def tensor(name: bytes, kind: int, size: int, content: bytes) -> bytes:
    """Returns a constant of one axis: `size` numbers of an element type of ONNX, in little-endian bytes."""
    return (
        field(_TENSOR_SIDE, size)
        + field(_TENSOR_TYPE, kind)
        + field(_TENSOR_NAME, name)
        + field(_TENSOR_BYTES, content)
    )


def tensor_value(name: str, kind: int, shape: Sequence[int | str] | None) -> bytes:
    """Returns an input or output of a graph, of an element type of ONNX; sides are numbers or names."""
    tensor = field(_TENSOR_ELEMENT, kind) + (b"" if shape is None else _shape_of(shape))
    return field(_VALUE_NAME, name.encode()) + field(_VALUE_TYPE, field(_TYPE_TENSOR, tensor))


def _shape_of(sides: Sequence[int | str]) -> bytes:
    """Returns the field of a tensor type that states a shape."""
    stated = [
        field(_SIDE_NAME, one.encode()) if isinstance(one, str) else field(_SIDE_VALUE, one) for one in sides
    ]
    return field(_TENSOR_SHAPE, b"".join(field(_SHAPE_SIDE, one) for one in stated))


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph: its operator, and the names of its tensors; an empty name is no tensor."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, node: memoryview) -> "Node":
        """Returns a node from its message."""
        found: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_OPERATOR: []}
        for number, value in fields(node):
            if number in found and isinstance(value, memoryview):
                found[number].append(bytes(value).decode("utf-8", "replace"))
        inputs, outputs, operator = found.values()
        return cls("".join(operator), tuple(inputs), tuple(outputs))


def texts(message: memoryview, field_number: int) -> Iterator[str]:
    """Yields the strings of a message's field."""
    for number, value in fields(message):
        if number == field_number and isinstance(value, memoryview):
            yield bytes(value).decode("utf-8", "replace")


def standard_opset(entry: memoryview) -> int:
    """Returns the version of the standard operators in an entry; 0 in one for other operators."""
    stated = dict(fields(entry))
    version, domain = stated.get(_OPSET_VERSION), stated.get(_OPSET_DOMAIN, b"")
    return version if isinstance(version, int) and domain in _STANDARD_DOMAINS else 0


def fields(message: memoryview) -> Iterator[_Field]:
    """Yields the fields of a message, in order: number, and a number or the bytes of a string or message."""
    return _Walk().fields(message)


def raw_fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yields the fields of a message: number, the bytes of a string or message, and the whole field."""
    walk = _Walk()
    for number, value, start, end in walk.spans(message):
        content = value if isinstance(value, memoryview) else memoryview(b"")
        yield number, content, message[start:end]


def field(number: int, content: bytes | int) -> bytes:
    """Returns a field that holds a string, a message or a number of at least 0."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return header(number, len(content)) + content


def header(number: int, size: int) -> bytes:
    """Returns what stands before the bytes of a string or message in its field."""
    return _varint(number << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    """Returns a number as a varint."""
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
