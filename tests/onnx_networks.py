"""Tiny embedding networks as ONNX files, made with the `onnx` package, which the core does not have."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 16
DIMENSION = 8


def network(
    *,
    layout: str = "nchw",
    shape: tuple[Any, ...] | None = None,
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    ir_version: int = 8,
    names: tuple[str, str] = ("data", "fc1"),
    tail: tuple[onnx.NodeProto, ...] = (),
    constants: tuple[onnx.TensorProto, ...] = (),
    outputs: tuple[str, ...] = (),
    dimension: int = DIMENSION,
) -> onnx.ModelProto:
    """A convolution and a matrix: pictures of SIZE pixels to `dimension` numbers.

    Args:
        layout: of its input.
        shape: stated for its input; None is (n, ...) in this layout.
        kind: element type of its input.
        opset, ir_version: of the file.
        names: of the input and of the embedding.
        tail: more nodes, which follow.
        constants: their initializers.
        outputs: the names of the outputs; the embedding alone if there are none.
        dimension: of the embedding.
    """
    random = np.random.default_rng(7)
    data, fc1 = names
    nodes = []
    last = data
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [last], ["as_float"], to=TensorProto.FLOAT))
        last = "as_float"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [last], ["planes"], perm=[0, 3, 1, 2]))
        last = "planes"
    nodes += [
        helper.make_node("Conv", [last, "filters"], ["patches"], strides=[4, 4], kernel_shape=[4, 4]),
        helper.make_node("Relu", ["patches"], ["active"]),
        helper.make_node("Flatten", ["active"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "matrix"], [fc1]),
        *tail,
    ]
    initializers = [
        numpy_helper.from_array(random.normal(size=(6, 3, 4, 4)).astype(np.float32), "filters"),
        numpy_helper.from_array(random.normal(size=(96, dimension)).astype(np.float32), "matrix"),
        *constants,
    ]
    if shape is None:
        shape = ("n", 3, SIZE, SIZE) if layout == "nchw" else ("n", SIZE, SIZE, 3)
    inputs = [helper.make_tensor_value_info(data, kind, shape)]
    if ir_version < 4:
        # Then every initializer is an input too.
        inputs += [
            helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in initializers
        ]
    graph = helper.make_graph(
        nodes,
        "network",
        inputs,
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], *[None] * 1])
            for name in outputs or (fc1,)
        ],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """The file of a network."""
    path.write_bytes(model.SerializeToString())
    return path
