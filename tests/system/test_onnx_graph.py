"""Graphs that are refused before they run, held to the `onnx` package, which the core does not have."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from retrieval.models.bundle import ModelBundle
from retrieval.system import onnx_graph
from tests.operations import tiny_model

Change = Callable[[onnx.ModelProto], object]


def plain() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "plain",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.ones(1, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def inner() -> onnx.GraphProto:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])
    return helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "inner", [], [value])


def control_flow(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner(), else_branch=inner()))


def loop_without_a_body(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Loop", ["", "c"], ["z"]))


def nested_graphs(model: onnx.ModelProto) -> None:
    node = helper.make_node("Add", ["x", "w"], ["z"])
    node.attribute.append(helper.make_attribute("bodies", [inner()]))
    model.graph.node.append(node)


def another_domain(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Inverse", ["x"], ["z"], domain="com.microsoft"))


def another_opset(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def a_function(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("", "f", ["a"], ["b"], nodes, model.opset_import))


def external_numbers(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="../../secret")


def external_constant(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.ones(1, np.float32), "c")
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def external_sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.data_location = TensorProto.EXTERNAL


def many_nodes(model: onnx.ModelProto) -> None:
    model.graph.node.extend([model.graph.node[0]] * 10_001)


def many_fields(model: onnx.ModelProto) -> None:
    model.graph.doc_string = "x"
    model.metadata_props.extend([onnx.StringStringEntryProto()] * 1_000_001)


def no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (control_flow, "it has control flow (If)"),
        (loop_without_a_body, "it has control flow (Loop)"),
        (nested_graphs, "it has a graph within the graph"),
        (another_domain, "it uses operators of the domain 'com.microsoft'"),
        (another_opset, "it uses operators of the domain 'com.example'"),
        (a_function, "it has functions of its own"),
        (external_numbers, "it keeps numbers in other files"),
        (external_constant, "it keeps numbers in other files"),
        (external_sparse, "it keeps numbers in other files"),
        (many_nodes, "it has 10,002 nodes, and at most 10,000 are allowed"),
        (many_fields, "it has more than 1,000,000 fields"),
        (no_graph, "it is not an ONNX file with one graph"),
    ],
)
def test_a_graph_that_does_more_than_compute_is_refused(change: Change, reason: str) -> None:
    model = plain()
    onnx_graph.check_graph(model.SerializeToString())
    change(model)
    with pytest.raises(onnx_graph.RefusedGraph) as caught:
        onnx_graph.check_graph(model.SerializeToString())
    assert str(caught.value) == reason


def test_a_second_graph_behind_the_first_is_refused() -> None:
    """Protobuf would merge the two."""
    with pytest.raises(onnx_graph.RefusedGraph):
        onnx_graph.check_graph(plain().SerializeToString() * 2)


def test_the_graphs_that_training_exports_pass(bundle: ModelBundle) -> None:
    onnx_graph.check_graph(bundle.graph_path.read_bytes())


def test_the_graph_of_a_small_model_passes(tmp_path: Path) -> None:
    onnx_graph.check_graph(tiny_model(tmp_path / "tiny").graph_path.read_bytes())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_pass_or_are_refused(data: st.DataObject) -> None:
    """Random bytes, and graphs with a few bytes changed: never another exception, never without end."""
    whole = bytearray(plain().SerializeToString())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    for content in (bytes(whole), data.draw(st.binary(max_size=64))):
        try:
            onnx_graph.check_graph(content)
        except onnx_graph.RefusedGraph:
            continue
        # What passes, and onnx can read, has none of what is refused.
        try:
            read = onnx.ModelProto.FromString(content)
        except Exception:
            continue
        assert not read.functions
        assert all(node.op_type not in ("If", "Loop", "Scan") for node in read.graph.node)
        assert all(node.domain in ("", "ai.onnx") for node in read.graph.node)
        assert all(not attribute.HasField("g") for node in read.graph.node for attribute in node.attribute)
        assert all(tensor.data_location == 0 for tensor in read.graph.initializer)


def test_numbers_are_passed_over() -> None:
    """However many there are, they are one field."""
    model = plain()
    model.graph.initializer[0].raw_data = bytes(10**8)
    walk = onnx_graph._Walk()
    onnx_graph._check_graph(walk, memoryview(model.graph.SerializeToString()))
    assert walk._left > 999_000
