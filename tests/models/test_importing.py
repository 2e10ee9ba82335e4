"""Models of imported networks: complete, reproducible, and refused with a sentence where they cannot work."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from retrieval.errors import BundleError, InputError, MissingDependency
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.detectors import open_detector
from retrieval.models.embedder import Embedder, may_use_gpu
from retrieval.models.importing import PRESETS, import_model
from retrieval.models.onnx_wrapper import NetworkInput, signature, wrapped
from tests.onnx_networks import DIMENSION, SIZE, network, saved

HOW: dict[str, Any] = {"colour": "rgb", "mean": 127.5, "std": 128}
PICTURES = np.random.default_rng(5).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)

node = helper.make_node


def constant(name: str, value: Any, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def imported_from(model: onnx.ModelProto, folder: Path, **changes: Any) -> ModelBundle:
    return import_model(saved(model, folder / "network.onnx"), folder / "model", **{**HOW, **changes})


def failure(act: Callable[[], object], kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def test_a_model_is_complete_and_says_what_was_imported(imported: ModelBundle) -> None:
    loaded = ModelBundle.load(imported.folder)
    assert loaded == imported
    loaded.verify()
    assert sorted(path.name for path in loaded.folder.iterdir()) == [
        "MODELCARD.md",
        "bundle.json",
        "model.onnx",
    ]
    assert (loaded.labels, loaded.dimension, loaded.input_size) == ((), DIMENSION, SIZE)
    assert loaded.embedding == Embedding("unit")
    card = json.loads((loaded.folder / "bundle.json").read_text())
    assert (card["format"], card["architecture"]) == (5, "onnx")
    assert loaded.recipe["network"] == "network.onnx"
    assert loaded.recipe["mean"] == [127.5] * 3
    described = loaded.description_path.read_text()
    for words in (
        loaded.fingerprint,
        loaded.recipe["network_sha256"],
        "`network.onnx`",
        "`fc1`",
        "| 127.5 |",
    ):
        assert words in described
    onnx.checker.check_model(onnx.load(loaded.graph_path), full_check=True)


def test_an_embedder_runs_it_and_gives_no_probabilities(imported: ModelBundle) -> None:
    data = network().SerializeToString()
    takes = NetworkInput(SIZE, "rgb", (127.5,) * 3, (128.0,) * 3, "nchw")
    graph = wrapped(data, signature(data), takes, output="fc1", dimension=DIMENSION, unit=True)
    assert imported.graph_path.read_bytes() == graph
    with Embedder.open(imported, threads=2) as embedder:
        assert (embedder.engine, embedder.device) == ("onnxruntime", "cpu")
        found, none = embedder.embed(PICTURES), embedder.embed(PICTURES[:0])
        alone = np.concatenate([embedder.embed(one[None]).vectors for one in PICTURES])
    assert (found.vectors.shape, found.probabilities.shape) == ((5, DIMENSION), (5, 0))
    assert (none.vectors.shape, none.probabilities.shape) == ((0, DIMENSION), (0, 0))
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.vectors, alone, atol=1e-6)


def test_the_same_file_and_options_give_the_same_fingerprint(imported: ModelBundle, tmp_path: Path) -> None:
    again = import_model(saved(network(), tmp_path / "renamed.onnx"), tmp_path / "model", **HOW)
    assert again.fingerprint == imported.fingerprint
    assert again.files == imported.files


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "bgr"},
        {"mean": 127.0},
        {"mean": (127.5, 127.5, 127.0)},
        {"std": 127.5},
        {"length": "raw"},
        {"output": "flat"},
        {"mirrored": True},
    ],
    ids=str,
)
def test_another_option_gives_another_fingerprint(
    imported: ModelBundle, change: dict[str, Any], tmp_path: Path
) -> None:
    other = imported_from(network(), tmp_path, **change)
    assert other.fingerprint != imported.fingerprint


def test_a_mirrored_model_embeds_a_picture_and_its_mirror_image_alike(tmp_path: Path) -> None:
    made = imported_from(network(), tmp_path, mirrored=True, length="raw")
    assert made.recipe["mirrored"] is True
    assert "the mean of a picture and its mirror image" in made.description_path.read_text()
    with Embedder.open(made) as embedder:
        found = embedder.embed(PICTURES).vectors
        mirrored = embedder.embed(np.ascontiguousarray(PICTURES[:, :, ::-1])).vectors
    assert found.shape == (5, DIMENSION)
    np.testing.assert_allclose(found, mirrored, rtol=1e-5, atol=1e-5)


def test_an_older_model_in_the_folder_is_replaced(bundle: ModelBundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "model")
    made = imported_from(network(), tmp_path)
    assert not made.weights_path.exists()
    assert ModelBundle.load(tmp_path / "model") == made
    saved_again = made.save(tmp_path / "copy")
    assert ModelBundle.load(tmp_path / "copy") == saved_again


def test_an_embedding_with_two_more_dimensions_of_one_is_flattened(tmp_path: Path) -> None:
    tail = (node("Reshape", ["fc1", "shape"], ["fc2"]),)
    shape = (constant("shape", [-1, DIMENSION, 1, 1], np.int64),)
    made = imported_from(network(tail=tail, constants=shape, outputs=("fc2",)), tmp_path)
    plain = imported_from(network(), tmp_path)
    assert made.reference == plain.reference


def test_the_size_and_the_layout_are_what_the_file_states(tmp_path: Path) -> None:
    made = imported_from(network(layout="nhwc"), tmp_path)
    assert (made.input_size, made.recipe["layout"]) == (SIZE, "nhwc")
    unknown = network(shape=("n", "c", "h", "w"))
    assert "does not state where its channels are; give `layout`" in failure(
        lambda: imported_from(unknown, tmp_path)
    )
    assert "does not state the size of its pictures; give `size`" in failure(
        lambda: imported_from(unknown, tmp_path, layout="nchw")
    )
    assert imported_from(unknown, tmp_path, layout="nchw", size=SIZE).input_size == SIZE


def test_a_preset_gives_what_is_left_out_and_options_override_it(tmp_path: Path) -> None:
    model = network()
    for name, preset in PRESETS.items():
        found = import_model(saved(model, tmp_path / "n.onnx"), tmp_path / "m", preset=name, size=SIZE).recipe
        assert (found["preset"], found["colour"]) == (name, preset.colour)
        assert (found["mean"], found["std"]) == ([preset.mean] * 3, [preset.std] * 3)
    changed = import_model(
        tmp_path / "n.onnx", tmp_path / "m", preset="arcface", size=SIZE, colour="bgr", std=1, length="raw"
    )
    assert (changed.recipe["colour"], changed.recipe["mean"], changed.recipe["std"]) == (
        "bgr",
        [127.5] * 3,
        [1.0] * 3,
    )
    assert changed.embedding.length == "raw"


def test_a_network_that_normalizes_by_itself_takes_0_to_255_with_the_arcface_preset(tmp_path: Path) -> None:
    model = network(
        names=("normal", "fc1"), constants=(constant("offset", 127.5), constant("factor", 1 / 128))
    )
    model.graph.input[0].name = "data"
    model.graph.node.insert(0, node("Mul", ["centred", "factor"], ["normal"]))
    model.graph.node.insert(0, node("Sub", ["data", "offset"], ["centred"]))
    made = import_model(saved(model, tmp_path / "n.onnx"), tmp_path / "m", preset="arcface", size=SIZE)
    assert (made.recipe["mean"], made.recipe["std"]) == ([0.0] * 3, [1.0] * 3)
    plain = imported_from(network(), tmp_path)
    assert made.reference is not None
    assert plain.reference is not None
    np.testing.assert_allclose(made.reference, plain.reference, rtol=1e-4, atol=1e-6)


def two_outputs() -> onnx.ModelProto:
    return network(tail=(node("Relu", ["fc1"], ["norm"]),), outputs=("fc1", "norm"))


def one_picture_at_a_time() -> onnx.ModelProto:
    tail = (node("Reshape", ["fc1", "shape"], ["fc2"]),)
    return network(
        tail=tail,
        constants=(constant("shape", [1, DIMENSION], np.int64),),
        outputs=("fc2",),
        shape=(1, 3, 16, 16),
    )


def across_the_batch() -> onnx.ModelProto:
    tail = (node("ReduceMean", ["fc1"], ["mean"], axes=[0]), node("Add", ["fc1", "mean"], ["fc2"]))
    return network(tail=tail, outputs=("fc2",))


def always_the_same() -> onnx.ModelProto:
    tail = (node("Mul", ["fc1", "zero"], ["nothing"]), node("Add", ["nothing", "one"], ["fc2"]))
    return network(tail=tail, constants=(constant("zero", 0), constant("one", 1)), outputs=("fc2",))


def not_finite() -> onnx.ModelProto:
    tail = (node("Log", ["fc1"], ["fc2"]),)
    return network(tail=tail, outputs=("fc2",))


def a_map() -> onnx.ModelProto:
    return network(outputs=("active",))


def grey() -> onnx.ModelProto:
    return network(shape=("n", 1, SIZE, SIZE))


def no_square() -> onnx.ModelProto:
    return network(shape=("n", 3, SIZE, 2 * SIZE))


def vectors_in() -> onnx.ModelProto:
    return network(shape=("n", 512))


def two_inputs() -> onnx.ModelProto:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n"]))
    return model


def bytes_in() -> onnx.ModelProto:
    return network(kind=TensorProto.UINT8)


def control_flow() -> onnx.ModelProto:
    model = network()
    model.graph.node.append(node("Loop", ["", "c"], ["z"]))
    return model


def other_files() -> onnx.ModelProto:
    model = network()
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    return model


def unknown_operator() -> onnx.ModelProto:
    return network(tail=(node("NoSuchThing", ["fc1"], ["fc2"]),), outputs=("fc2",))


def old_operators() -> onnx.ModelProto:
    return network(opset=6)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (two_outputs, {}, "The outputs of {} are fc1, norm; name the embedding as `output`."),
        (two_outputs, {"output": "fc3"}, "computes no fc3; its outputs are fc1, norm: name one as `output`."),
        (
            one_picture_at_a_time,
            {},
            "takes one picture at a time; export the network with a dynamic batch dimension.",
        ),
        (
            across_the_batch,
            {},
            "gives a picture other numbers in a batch than alone; export the network for inference, without "
            "dynamic quantization.",
        ),
        (
            always_the_same,
            {},
            "gives different pictures the same numbers; check `mean`, `std` and `output`.",
        ),
        (
            not_finite,
            {},
            "gives numbers that are not finite; check `mean`, `std` and `output`, or export the network "
            "again.",
        ),
        (
            a_map,
            {},
            "The output active of {} is (1, 6, 4, 4) for one picture, not one embedding (1, d); name "
            "another `output`.",
        ),
        (grey, {}, "takes (n, 1, 16, 16) and not pictures of 3 channels; give another network."),
        (vectors_in, {}, "takes (n, 512) and not pictures of 3 channels; give another network."),
        (no_square, {}, "takes pictures of (n, 3, 16, 32), which are no squares; give another network."),
        (two_inputs, {}, "must take one image, and its inputs are data, mask; give another network."),
        (
            bytes_in,
            {},
            "The input of {} is uint8, not float32, float16 or float64; export the network with an input of "
            "one of these.",
        ),
        (
            control_flow,
            {},
            "cannot be imported: it has control flow (Loop); export the network as one ONNX file of standard "
            "operators.",
        ),
        (
            other_files,
            {},
            "cannot be imported: it keeps numbers in other files; export the network as one ONNX file of "
            "standard operators.",
        ),
        (
            old_operators,
            {},
            "has operators of version 6, and 7 is the oldest that runs; export the network again.",
        ),
        (network, {"size": 32}, "takes pictures of 16 pixels, not of 32; give that `size`."),
        (network, {"layout": "nhwc"}, "takes (n, 3, 16, 16), which is `layout='nchw'`; give that."),
        (network, {"layout": "hwc"}, "`layout` is hwc; choose of nchw, nhwc."),
        (network, {"colour": "grey"}, "`colour` is grey; choose of rgb, bgr."),
        (network, {"length": "short"}, "`length` is short; choose of raw, unit."),
        (network, {"preset": "mine"}, "There is no preset mine; choose of arcface, sface, adaface."),
        (network, {"std": 0}, "`std` is 0 and pixels are divided by it; give another number."),
        (network, {"mean": (1, 2)}, "`mean` is (1, 2); give one number, or three: one for each channel."),
        (
            network,
            {"mean": float("nan")},
            "`mean` is nan; give one number, or three: one for each channel.",
        ),
        (
            network,
            {"std": None},
            "The file does not say how the network takes pictures: give `std`, or a `preset` (arcface, "
            "sface, adaface).",
        ),
        (
            network,
            {"margin": 0.1},
            "A `margin` lies around faces that a `detector` finds; give one, or leave it out.",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(
    model: Callable[[], onnx.ModelProto], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    whole = said.format(tmp_path / "network.onnx")
    if whole == said and not said.startswith(("`", "There", "The file", "A ")):
        whole = f"{tmp_path / 'network.onnx'} {said}"
    assert failure(lambda: imported_from(model(), tmp_path, **options)) == whole
    assert not (tmp_path / "model").exists()


def test_what_onnxruntime_says_stands_in_the_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "network.onnx"
    how = "pixels in the layout nchw ("
    end = "); give another `size` or `layout`, or export the network again."
    said = failure(lambda: imported_from(unknown_operator(), tmp_path))
    assert said.startswith(f"{path} does not run on pictures of 16 x 16 {how}")
    assert "NoSuchThing" in said
    assert said.endswith(end)
    unknown = network(shape=("n", "c", "h", "w"))
    said = failure(lambda: imported_from(unknown, tmp_path, layout="nchw", size=24))
    assert said.startswith(f"{path} does not run on pictures of 24 x 24 {how}")
    assert said.endswith(end)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("content", "why"), [(None, "no such file"), (b"%PDF", "it is not an ONNX file")])
def test_a_file_that_is_none_is_refused(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    if content is not None:
        path.write_bytes(content)
    assert why in failure(lambda: import_model(path, tmp_path / "model", **HOW))


def test_engines_that_cannot_run_it_say_so(imported: ModelBundle) -> None:
    assert failure(lambda: Embedder.open(imported, engine="torch")) == (
        "An imported model runs on onnxruntime, not on torch; use `engine='auto'`."
    )
    assert failure(lambda: Embedder.open(imported, precision="fp16")) == (
        "An imported model runs in float32, not in fp16; leave `precision` out."
    )
    for device in ("cuda:0,cuda:1", "cuda:x", "warp"):
        assert failure(lambda device=device: Embedder.open(imported, device=device)) == (  # type: ignore[misc]
            f"An imported model runs on one device, cpu, cuda or cuda:1, and not on {device}."
        )


def test_a_gpu_needs_onnxruntimes_cuda_provider(imported: ModelBundle) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    said = failure(lambda: Embedder.open(imported, device="cuda"), MissingDependency)
    assert "install onnxruntime-gpu in place of onnxruntime" in said
    assert not may_use_gpu(imported, "auto")
    assert Embedder.open(imported, device="auto").device == "cpu"


def test_what_takes_a_trained_model_refuses_it(imported: ModelBundle) -> None:
    said = failure(lambda: imported.load_weights(lambda data: data))
    assert said == (
        f"The model {imported.folder} was imported and cannot be loaded as weights; name a model of "
        "`faceprint train`."
    )


def copied(bundle: ModelBundle, folder: Path, **changes: Any) -> ModelBundle:
    """A copy with changes in its card."""
    bundle.save(folder)
    changed = dataclasses.replace(ModelBundle.load(folder), **changes)
    changed.rewrite_card()
    return ModelBundle.load(folder)


def test_another_graph_is_told_by_the_fingerprint(imported: ModelBundle, tmp_path: Path) -> None:
    other = imported_from(network(), tmp_path, colour="bgr")
    forged = copied(imported, tmp_path / "forged", files=other.files)
    shutil.copy(other.graph_path, forged.graph_path)
    said = f"{forged.folder / 'bundle.json'} states another fingerprint than its graph has."
    assert failure(forged.verify, BundleError) == said
    assert failure(lambda: Embedder.open(forged), BundleError) == said


def test_another_answer_than_at_the_import_is_told_by_the_self_test(
    imported: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert imported.reference is not None
    turned = copied(imported, tmp_path / "turned", reference=imported.reference[::-1])
    assert failure(lambda: Embedder.open(turned), BundleError).startswith(
        f"The model {turned.folder} does not answer here as it did where it was imported: "
    )


@pytest.mark.parametrize("reference", ["", "AAAA", "no base64!", "AADAfw==" * DIMENSION])
def test_a_card_with_another_reference_is_damaged(
    reference: str, imported: ModelBundle, tmp_path: Path
) -> None:
    imported.save(tmp_path / "copy")
    path = tmp_path / "copy" / "bundle.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "reference": reference}))
    said = "the field reference: it is not the embedding of a picture"
    assert said in failure(lambda: ModelBundle.load(tmp_path / "copy"), BundleError)
    path.write_text(json.dumps({**card, "labels": ["Ada"]}))
    assert "an imported model has none" in failure(lambda: ModelBundle.load(tmp_path / "copy"), BundleError)


def test_a_detector_travels_with_the_model_and_makes_it_another(
    imported: ModelBundle, shared: Path, tmp_path: Path
) -> None:
    detector = open_detector(shared / "weights" / "yunet_s_640_640.onnx")
    made = imported_from(network(), tmp_path, detector=detector, margin=0.25)
    assert made.fingerprint != imported.fingerprint
    assert made.preprocessing.faces is not None
    assert (made.preprocessing.faces.detector, made.preprocessing.faces.margin) == (detector.sha256, 0.25)
    assert sorted(made.files) == ["face_detector.onnx", "model.onnx"]
    photo = shared / "data" / "lfw" / "Aaron_Peirsol" / "Aaron_Peirsol_0001.jpg"
    assert ModelBundle.load(made.folder).load_photo_reader().square(photo).shape == (SIZE, SIZE, 3)


def test_a_network_of_somebody_is_imported_and_tells_two_people_apart(shared: Path, tmp_path: Path) -> None:
    weights = shared / "weights"
    made = import_model(
        weights / "mobilefacenet192.onnx",
        tmp_path / "model",
        **HOW,
        detector=open_detector(weights / "yunet_s_640_640.onnx"),
    )
    assert (made.dimension, made.input_size, made.recipe["layout"]) == (192, 112, "nchw")
    reader, lfw = made.load_photo_reader(), shared / "data" / "lfw"
    names = [f"{who}/{who}_000{number}.jpg" for who in ("Aaron_Peirsol", "Abdullah_Gul") for number in (1, 2)]
    with Embedder.open(made) as embedder:
        first, second, other, _ = embedder.embed(
            np.stack([reader.square(lfw / name) for name in names])
        ).vectors
    assert np.linalg.norm(first - second) < 1 < np.linalg.norm(first - other)
