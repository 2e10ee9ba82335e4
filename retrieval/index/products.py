"""Products of codes and queries in whole numbers, exact, on the calling thread's core.

onnxruntime multiplies bytes by the instructions that a CPU has for them (VNNI), several times as fast as
float32 numbers. On CPUs without them it adds pairs of products in 16 bits, which may overflow. So its product
is compared with a plain one first, and where they differ, float32 numbers are multiplied: all sums are whole
numbers below 2^24, so that these are exact too.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.system.onnx_graph import attribute, field, node, tensor_value

# Numbers of protobuf fields and of types in an ONNX file (onnx.proto).
_UINT8, _INT8, _INT32, _FLOAT = 2, 3, 6, 1
_IR_VERSION, _OPSET = 8, 13

# The arguments of `onnx_graph.node` for each node of a graph.
_Nodes: TypeAlias = tuple[tuple[str, tuple[bytes, ...], bytes, tuple[bytes, ...]], ...]

# One graph multiplies bytes, the other one the same numbers as float32.
_IN_BYTES: Final[_Nodes] = (("MatMulInteger", (b"codes", b"queries"), b"products", ()),)
_IN_FLOATS: Final[_Nodes] = (
    ("Cast", (b"codes",), b"rows", (attribute("to", _FLOAT),)),
    ("Cast", (b"queries",), b"columns", (attribute("to", _FLOAT),)),
    ("MatMul", (b"rows", b"columns"), b"sums", ()),
    ("Cast", (b"sums",), b"products", (attribute("to", _INT32),)),
)


def products(codes: NDArray[np.uint8], queries: NDArray[np.int8]) -> NDArray[np.int32]:
    """Returns the products (n, q) of codes (n, m) with queries (m, q), for m up to 256; both in C order."""
    found: NDArray[np.int32] = _session().run(None, {"codes": codes, "queries": queries})[0]
    return found


@cache
def _session() -> Any:
    # Threads that come first at once may each open one, which does no harm.
    session = _opened(_IN_BYTES)
    return session if _is_exact(session) else _opened(_IN_FLOATS)


def _is_exact(session: Any) -> bool:
    return all(
        np.array_equal(
            session.run(None, {"codes": codes, "queries": queries})[0],
            codes.astype(np.int64) @ queries.astype(np.int64),
        )
        for codes, queries in _trials()
    )


def _trials() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int8]]]:
    """Yields codes and queries of several shapes, the largest numbers among them."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (3, 2), (33, 17), (64, 80)):
        for coordinates in (64, 256):
            codes = np.full((rows, coordinates), 255, np.uint8)
            for extreme in (127, -128):
                yield codes, np.full((coordinates, columns), extreme, np.int8)
            mixed = rng.integers(-128, 128, (coordinates, columns)).astype(np.int8)
            yield rng.integers(0, 256, codes.shape).astype(np.uint8), mixed


def _opened(nodes: _Nodes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(_graph(nodes), options, providers=["CPUExecutionProvider"])


def _graph(nodes: _Nodes) -> bytes:
    """Returns an ONNX file of nodes that turn `codes` and `queries` into `products`."""
    parts = [field(1, node(*one)) for one in nodes]
    parts += [
        field(2, b"products"),
        field(11, tensor_value("codes", _UINT8, ["n", "m"])),
        field(11, tensor_value("queries", _INT8, ["m", "q"])),
        field(12, tensor_value("products", _INT32, ["n", "q"])),
    ]
    return field(1, _IR_VERSION) + field(7, b"".join(parts)) + field(8, field(2, _OPSET))
