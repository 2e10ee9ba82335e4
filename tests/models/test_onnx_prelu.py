"""PReLU in onnxruntime's own order of channels: the same bits, from other operators."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from retrieval.models.embedder import Embedder
from retrieval.models.importing import import_model
from retrieval.models.onnx_prelu import in_blocked_form
from tests.onnx_networks import saved

CHANNELS = 24
SLOPES = np.random.default_rng(3).normal(size=CHANNELS).astype(np.float32) * 4
SLOPES[:4] = [0, 1, -1, 1e-30]


@pytest.fixture(autouse=True)
def _on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the module does on other processors, it does here too."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def operator(x: str, name: str, slopes: NDArray[Any] = SLOPES) -> tuple[list[Any], list[Any]]:
    """The nodes and constants of a PReLU by the operator; the output is `name`."""
    constant = numpy_helper.from_array(slopes.reshape(-1, 1, 1), f"{name}/slopes")
    return [helper.make_node("PRelu", [x, f"{name}/slopes"], [name])], [constant]


def spelled_out(x: str, name: str, *, turned: bool = False) -> tuple[list[Any], list[Any]]:
    """The same as converters from TensorFlow write it; `turned` swaps what may be swapped."""
    product = [f"{name}/factors", f"{name}/minus"][:: -1 if turned else 1]
    total = [f"{name}/relu", f"{name}/product"][:: -1 if turned else 1]
    nodes = [
        helper.make_node("Relu", [x], [f"{name}/relu"]),
        helper.make_node("Abs", [x], [f"{name}/abs"]),
        helper.make_node("Sub", [x, f"{name}/abs"], [f"{name}/minus"]),
        helper.make_node("Reshape", [f"{name}/half", f"{name}/sides"], [f"{name}/factors"]),
        helper.make_node("Mul", product, [f"{name}/product"]),
        helper.make_node("Add", total, [name]),
    ]
    constants = [
        numpy_helper.from_array(SLOPES / 2, f"{name}/half"),
        numpy_helper.from_array(np.array([1, CHANNELS, 1, 1]), f"{name}/sides"),
    ]
    return nodes, constants


def network(
    *activations: Callable[[str, str], tuple[list[Any], list[Any]]],
    opset: int = 17,
    outputs: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Convolutions, each with a batch normalization and an activation, and a matrix."""
    random = np.random.default_rng(1)
    nodes: list[Any] = []
    constants = [
        numpy_helper.from_array(random.normal(size=CHANNELS).astype(np.float32), "scale"),
        numpy_helper.from_array(random.normal(size=CHANNELS).astype(np.float32), "mean"),
        numpy_helper.from_array(random.random(CHANNELS).astype(np.float32) + 1, "variance"),
        numpy_helper.from_array(random.normal(size=(CHANNELS * 256, 8)).astype(np.float32), "matrix"),
    ]
    last, depth = "data", 3
    for number, activation in enumerate(activations):
        weights = random.normal(size=(CHANNELS, depth, 3, 3)).astype(np.float32) / 9
        constants.append(numpy_helper.from_array(weights, f"weights{number}"))
        conv, normal, last_ = f"conv{number}", f"normal{number}", f"active{number}"
        nodes.append(helper.make_node("Conv", [last, f"weights{number}"], [conv], pads=[1, 1, 1, 1]))
        nodes.append(
            helper.make_node("BatchNormalization", [conv, "scale", "mean", "mean", "variance"], [normal])
        )
        more, numbers = activation(normal, last_)
        nodes += more
        constants += numbers
        last, depth = last_, CHANNELS
    nodes.append(helper.make_node("Flatten", [last], ["flat"], axis=1))
    nodes.append(helper.make_node("MatMul", ["flat", "matrix"], ["fc1"]))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [
            helper.make_tensor_value_info("fc1", TensorProto.FLOAT, ["n", 8]),
            *(
                helper.make_tensor_value_info(one, TensorProto.FLOAT, ["n", CHANNELS, 16, 16])
                for one in outputs
            ),
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def answers(model: bytes, count: int = 5) -> list[NDArray[np.float32]]:
    pictures = np.random.default_rng(5).normal(size=(count, 3, 16, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: list[NDArray[np.float32]] = session.run(None, {"data": pictures})
    return found


def operators(model: bytes) -> Counter[str]:
    return Counter(one.op_type for one in onnx.load_from_string(model).graph.node)


def test_both_ways_to_write_a_prelu_give_the_same_bits_from_other_operators() -> None:
    model = network(operator, spelled_out, lambda x, name: spelled_out(x, name, turned=True), operator)
    before = model.SerializeToString()
    after = in_blocked_form(before)
    onnx.checker.check_model(onnx.load_from_string(after))
    assert operators(after)["Conv"] == 4
    assert not {"PRelu", "Abs", "Sub", "Mul"} & operators(after).keys()
    assert np.array_equal(answers(after)[0], answers(before)[0])
    # Already in that form.
    assert in_blocked_form(after) is after


def test_slopes_may_be_stored_number_by_number() -> None:
    def by_numbers(x: str, name: str) -> tuple[list[Any], list[Any]]:
        nodes, _ = operator(x, name)
        sides = [1, CHANNELS, 1, 1]
        return nodes, [helper.make_tensor(f"{name}/slopes", TensorProto.FLOAT, sides, SLOPES.tolist())]

    before = network(by_numbers).SerializeToString()
    after = in_blocked_form(before)
    assert "PRelu" not in operators(after)
    assert np.array_equal(answers(after)[0], answers(before)[0])


def _one_slope(x: str, name: str) -> tuple[list[Any], list[Any]]:
    return operator(x, name, SLOPES[:1])


def _slopes_of_places(x: str, name: str) -> tuple[list[Any], list[Any]]:
    constant = numpy_helper.from_array(np.full((1, 16, 16), 0.5, np.float32), f"{name}/slopes")
    return operator(x, name)[0], [constant]


def _of_a_sum(x: str, name: str) -> tuple[list[Any], list[Any]]:
    nodes, constants = operator(f"{name}/sum", name)
    return [helper.make_node("Add", [x, x], [f"{name}/sum"]), *nodes], constants


def _computed_slopes(x: str, name: str) -> tuple[list[Any], list[Any]]:
    nodes, constants = operator(x, name)
    constants[0].name = f"{name}/before"
    return [helper.make_node("Abs", [f"{name}/before"], [f"{name}/slopes"]), *nodes], constants


@pytest.mark.parametrize("activation", [_one_slope, _slopes_of_places, _of_a_sum, _computed_slopes])
def test_another_activation_stays_as_it_is(
    activation: Callable[[str, str], tuple[list[Any], list[Any]]],
) -> None:
    before = network(activation).SerializeToString()
    answers(before)
    assert in_blocked_form(before) is before


def _infinite_slopes(x: str, name: str) -> tuple[list[Any], list[Any]]:
    return operator(x, name, np.where(SLOPES > 0, np.float32(np.inf), SLOPES))


def _slopes_that_are_no_numbers(x: str, name: str) -> tuple[list[Any], list[Any]]:
    return operator(x, name, np.where(SLOPES > 0, np.float32(np.nan), SLOPES))


def _after_many_normalizations(x: str, name: str) -> tuple[list[Any], list[Any]]:
    nodes, constants = operator(f"{name}/1999", name)
    names = [x, *(f"{name}/{number}" for number in range(2000))]
    more = [
        helper.make_node("BatchNormalization", [before, "ones", "mean", "mean", "ones"], [after])
        for before, after in pairwise(names)
    ]
    return [*more, *nodes], [*constants, numpy_helper.from_array(np.ones(CHANNELS, np.float32), "ones")]


def _a_plane_s_average(x: str, name: str) -> tuple[list[Any], list[Any]]:
    nodes, constants = operator(x, f"{name}/active")
    averages = helper.make_node("GlobalAveragePool", [f"{name}/active"], [f"{name}/averages"])
    return [*nodes, averages, helper.make_node("Mul", [x, f"{name}/averages"], [name])], constants


def _a_normalization_after_it(x: str, name: str) -> tuple[list[Any], list[Any]]:
    """The first activation of an iResNet."""
    nodes, constants = operator(x, f"{name}/active")
    inputs = [f"{name}/active", "scale", "mean", "mean", "variance"]
    return [*nodes, helper.make_node("BatchNormalization", inputs, [name])], constants


def _a_shortcut(x: str, name: str) -> tuple[list[Any], list[Any]]:
    nodes, constants = operator(x, f"{name}/active")
    weights = np.random.default_rng(6).normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    constants += [
        numpy_helper.from_array(weights, f"{name}/weights"),
        numpy_helper.from_array(SLOPES, f"{name}/bias"),
    ]
    inputs = [f"{name}/active", f"{name}/weights", f"{name}/bias"]
    nodes.append(helper.make_node("Conv", inputs, [f"{name}/conv"], pads=[1, 1, 1, 1]))
    return [*nodes, helper.make_node("Add", [f"{name}/conv", f"{name}/active"], [name])], constants


@pytest.mark.parametrize(
    "activation",
    [
        _infinite_slopes,
        _slopes_that_are_no_numbers,
        _after_many_normalizations,
        _a_plane_s_average,
        _a_normalization_after_it,
        _a_shortcut,
    ],
)
def test_an_activation_of_which_another_form_might_change_bits_stays_as_it_is(
    activation: Callable[[str, str], tuple[list[Any], list[Any]]],
) -> None:
    """What follows may sum in another order; other activations of the network are written anew."""
    before = network(activation, spelled_out).SerializeToString()
    after = in_blocked_form(before)
    assert operators(after)["PRelu"] == 1
    assert "Abs" not in operators(after)
    assert np.array_equal(answers(after)[0], answers(before)[0], equal_nan=True)


def test_a_graph_that_has_the_new_names_stays_as_it_is() -> None:
    def twice(x: str, name: str) -> tuple[list[Any], list[Any]]:
        nodes, constants = operator(x, name)
        made = set(produced(in_blocked_form(network(operator).SerializeToString())))
        taken = sorted(made - set(produced(network(operator).SerializeToString())))
        return [*nodes, *(helper.make_node("Relu", [x], [one]) for one in taken)], constants

    before = network(twice).SerializeToString()
    answers(in_blocked_form(before))
    assert in_blocked_form(before) is before


def test_a_graph_with_names_that_are_not_in_utf_8_stays_as_it_is() -> None:
    before = network(operator).SerializeToString().replace(b"normal0", b"norm\xe9l0")
    answers(before)
    answers(in_blocked_form(before))
    assert in_blocked_form(before) is before


def produced(model: bytes) -> list[str]:
    return [name for one in onnx.load_from_string(model).graph.node for name in one.output]


@pytest.mark.parametrize("kept", ["relu", "abs", "minus", "product"])
def test_a_part_of_an_activation_that_is_an_output_too_stays(kept: str) -> None:
    before = network(spelled_out, outputs=(f"active0/{kept}",)).SerializeToString()
    assert in_blocked_form(before) is before


def test_operators_of_an_older_version_and_other_processors_keep_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = network(operator, opset=8).SerializeToString()
    assert in_blocked_form(old) is old
    new = network(operator, opset=9).SerializeToString()
    assert in_blocked_form(new) is not new
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert in_blocked_form(new) is new


def test_an_imported_model_embeds_to_the_bits_that_its_file_gives(tmp_path: Path) -> None:
    file = saved(network(operator, spelled_out), tmp_path / "network.onnx")
    bundle = import_model(file, tmp_path / "model", colour="rgb", mean=127.5, std=128)
    pixels = np.random.default_rng(2).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)
    session = onnxruntime.InferenceSession(bundle.graph_path, providers=["CPUExecutionProvider"])
    wanted = session.run(["embedding"], {"pixels": pixels})[0]
    with Embedder.open(bundle, device="cpu") as embedder:
        assert np.array_equal(embedder.embed(pixels).vectors, wanted)
        for number in range(9):
            assert np.array_equal(embedder.embed(pixels[number : number + 1]).vectors[0], wanted[number])
