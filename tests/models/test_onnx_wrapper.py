"""The graph around a network computes what the network does, and its bytes depend on nothing else."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from retrieval.models.onnx_wrapper import FLOAT, NetworkInput, Port, signature, wrapped
from retrieval.system import onnx_graph
from retrieval.system.onnx_graph import field
from tests.onnx_networks import DIMENSION, SIZE, network

MEAN, STD = (127.5, 100.0, 90.0), (128.0, 64.0, 32.0)
PICTURES = np.random.default_rng(3).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def run(graph: bytes, name: str, pixels: NDArray[Any], output: str) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run([output], {name: pixels})[0]
    return found


def around(model: onnx.ModelProto, takes: NetworkInput, *, unit: bool = False, output: str = "fc1") -> bytes:
    data = model.SerializeToString()
    onnx_graph.check_graph(data)
    return wrapped(data, signature(data), takes, output=output, dimension=DIMENSION, unit=unit)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(
    ("opset", "ir_version"), [(7, 3), (9, 3), (11, 6), (13, 7), (17, 8), (18, 8), (21, 10), (22, 10)]
)
def test_pixels_give_what_the_network_gives_for_numbers_that_numpy_prepares(
    layout: Any, colour: Any, unit: bool, opset: int, ir_version: int
) -> None:
    model = network(layout=layout, opset=opset, ir_version=ir_version)
    graph = around(model, NetworkInput(SIZE, colour, MEAN, STD, layout), unit=unit)
    onnx.checker.check_model(graph, full_check=True)
    ordered = PICTURES[..., ::-1] if colour == "bgr" else PICTURES
    prepared = (ordered.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
    if layout == "nchw":
        prepared = prepared.transpose(0, 3, 1, 2)
    expected = run(model.SerializeToString(), "data", np.ascontiguousarray(prepared), "fc1")
    if unit:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(run(graph, "pixels", PICTURES, "embedding"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(
    ("opset", "ir_version"), [(7, 3), (9, 3), (11, 6), (13, 7), (17, 8), (18, 8), (21, 10), (22, 10)]
)
def test_a_mirrored_network_gives_the_mean_of_pictures_and_their_mirror_images(
    layout: Any, unit: bool, opset: int, ir_version: int
) -> None:
    model = network(layout=layout, opset=opset, ir_version=ir_version)
    takes = NetworkInput(SIZE, "bgr", MEAN, STD, layout)
    plain = around(model, takes)
    expected = run(plain, "pixels", PICTURES, "embedding")
    expected = (expected + run(plain, "pixels", PICTURES[:, :, ::-1].copy(), "embedding")) / 2
    if unit:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    graph = around(model, replace(takes, mirrored=True), unit=unit)
    onnx.checker.check_model(graph, full_check=True)
    np.testing.assert_allclose(run(graph, "pixels", PICTURES, "embedding"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_inputs_of_other_precisions_get_them(kind: int) -> None:
    takes = NetworkInput(SIZE, "rgb", (127.5,) * 3, (128.0,) * 3, "nchw")
    found = run(around(network(kind=kind), takes), "pixels", PICTURES, "embedding")
    expected = run(around(network(), takes), "pixels", PICTURES, "embedding")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_names_of_the_network_may_be_those_around_it() -> None:
    takes = NetworkInput(SIZE, "bgr", MEAN, STD, "nchw")
    plain = run(around(network(), takes), "pixels", PICTURES, "embedding")
    for names in (("pixels", "embedding"), ("embedding", "pixels"), ("before/0", "after/0")):
        graph = around(network(names=names), takes, output=names[1])
        assert np.array_equal(run(graph, "pixels", PICTURES, "embedding"), plain)


def test_a_network_that_states_one_picture_takes_several() -> None:
    takes = NetworkInput(SIZE, "rgb", MEAN, STD, "nchw")
    fixed = network(shape=(1, 3, SIZE, SIZE))
    expected = run(around(network(), takes), "pixels", PICTURES, "embedding")
    assert np.array_equal(run(around(fixed, takes), "pixels", PICTURES, "embedding"), expected)


def test_missing_inputs_of_nodes_and_sparse_numbers_stay_what_they_are() -> None:
    """Clip's least value is left out, which an empty name says; a prefix would make a tensor of it."""
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.float32([2.0]), "shift"),
        numpy_helper.from_array(np.int64([1])),
        [DIMENSION],
    )
    tail = (
        helper.make_node("Clip", ["fc1", "", "most"], ["clipped"]),
        helper.make_node("Add", ["clipped", "shift"], ["shifted"]),
    )
    most = numpy_helper.from_array(np.float32(0.5), "most")
    model = network(tail=tail, constants=(most,), outputs=("shifted",))
    model.graph.sparse_initializer.append(sparse)
    takes = NetworkInput(SIZE, "rgb", MEAN, STD, "nchw")
    found = run(around(model, takes, output="shifted"), "pixels", PICTURES, "embedding")
    plain = run(around(network(), takes), "pixels", PICTURES, "embedding")
    shift = np.float32([0, 2] + [0] * (DIMENSION - 2))
    np.testing.assert_allclose(found, np.minimum(plain, 0.5) + shift, rtol=1e-6)


def test_a_signature_says_what_a_file_states() -> None:
    model = network(shape=("n", 3, None, 112), ir_version=3, opset=9)
    found = signature(model.SerializeToString())
    assert found.inputs == (Port("data", FLOAT, (None, 3, None, 112)),)
    assert found.outputs == (Port("fc1", FLOAT, (None, None)),)
    assert found.tensors == {"patches", "active", "flat", "fc1"}
    assert (found.opset, found.normalizes) == (9, False)


def test_a_network_that_normalizes_by_itself_is_known() -> None:
    model = network(names=("normal", "fc1"))
    nodes = [
        helper.make_node("Sub", ["data", "offset"], ["centred"]),
        helper.make_node("Mul", ["centred", "factor"], ["normal"]),
        *model.graph.node,
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.input[0].name = "data"
    assert signature(model.SerializeToString()).normalizes
    model.graph.node[1].op_type = "Add"
    assert not signature(model.SerializeToString()).normalizes


def by_hand() -> bytes:
    """A network, field by field: the numbers 0 to 11, a picture of 2 x 2 pixels flattened and multiplied."""

    def node(operator: bytes, inputs: list[bytes], output: bytes) -> bytes:
        return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, operator)

    def value(name: bytes) -> bytes:
        return field(1, name) + field(2, field(1, field(1, 1)))

    matrix = np.arange(12, dtype="<f4").tobytes()
    tensor = field(1, 12) + field(1, 1) + field(2, 1) + field(8, b"w") + field(9, matrix)
    graph = (
        field(1, node(b"Flatten", [b"x"], b"flat"))
        + field(1, node(b"MatMul", [b"flat", b"w"], b"y"))
        + field(2, b"by hand")
        + field(5, tensor)
        + field(11, value(b"x"))
        + field(12, value(b"y"))
    )
    return field(1, 8) + field(7, graph) + field(8, field(2, 17))


def test_the_bytes_are_always_the_same() -> None:
    """They are part of fingerprints: after a change, a file that is imported again gets another one."""
    data = by_hand()
    takes = NetworkInput(2, "bgr", (127.5,) * 3, (128.0,) * 3, "nchw")
    graph = wrapped(data, signature(data), takes, output="y", dimension=1, unit=True)
    assert run(graph, "pixels", PICTURES[:, :2, :2], "embedding").shape == (3, 1)
    assert (
        hashlib.sha256(graph).hexdigest()
        == "10094b9fb3112ce41c800eddb470e95fd8e802859a9ff6dce1dfe64cb7908c66"
    )
