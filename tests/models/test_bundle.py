"""ModelBundle on disk: whole or not there, proven by its sums, and no pickle in it."""

import dataclasses
import json
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from retrieval.errors import BundleError, InputError, StorageError
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import FORMAT, Embedding, ModelBundle, Relabel, fingerprint_of
from training.reports.model_card import describe

FILES = ("bundle.json", "model.onnx", "model.safetensors")


def tensors() -> dict[str, NDArray[Any]]:
    """Of every kind that a network has: filters, vectors and a counter."""
    random = np.random.default_rng(0)
    return {
        "conv1.weight": random.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "bn1.bias": np.arange(4, dtype=np.float32),
        "bn1.num_batches_tracked": np.array(7, np.int64),
    }


def parts() -> dict[str, Any]:
    return {
        "tensors": tensors(),
        "graph": b"a graph, as far as a bundle is concerned",
        "architecture": "resnet50",
        "labels": ("Ada", "Zoë"),
        "preprocessing": Preprocessing(size=64, crop=0.75),
        "dimension": 2048,
        "recipe": {"epochs": 6, "seed": 0},
        "split": {"train": ["Ada/1.jpg"], "validation": ["Zoë/2.jpg"]},
        "figures": {"validation_accuracy": 0.96},
        "versions": {"torch": "2.6"},
        "created_at": "2026-01-02T03:04:05+00:00",
    }


def create(folder: Path, **changes: Any) -> ModelBundle:
    return ModelBundle.create(folder, **(parts() | changes))


@pytest.fixture
def made(tmp_path: Path) -> ModelBundle:
    return create(tmp_path / "made")


def failure(act: Callable[[], object], kind: type[Exception] = BundleError) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def test_what_is_created_is_loaded(made: ModelBundle) -> None:
    loaded = ModelBundle.load(made.folder)
    assert loaded == made
    assert ModelBundle.load(str(made.folder)) == made
    wanted = parts()
    for name in ("architecture", "labels", "preprocessing", "dimension", "recipe", "split", "figures"):
        assert getattr(loaded, name) == wanted[name]
    assert (loaded.versions, loaded.created_at) == (wanted["versions"], wanted["created_at"])
    assert loaded.input_size == 64
    loaded.verify()


def test_a_bundle_is_three_files_and_the_weights_are_as_given(made: ModelBundle) -> None:
    assert sorted(path.name for path in made.folder.iterdir()) == list(FILES)
    stored = load_file(made.weights_path)
    assert stored.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert stored[name].dtype == tensor.dtype
        assert np.array_equal(stored[name], tensor)
    assert made.graph_path.read_bytes() == parts()["graph"]


def test_the_card_is_json_for_people_with_its_format_first(made: ModelBundle) -> None:
    text = (made.folder / "bundle.json").read_text("utf-8")
    assert next(iter(json.loads(text).items())) == ("format", 1)
    assert '"Zoë"' in text
    assert str(made.folder) not in text
    assert text == made.card()


def test_tensors_that_are_views_are_stored_as_they_look(tmp_path: Path) -> None:
    """Transposed, reversed and strided arrays have the fingerprint and the bytes of their copies."""
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"transposed": grid.T, "reversed": grid[::-1], "strided": grid[:, ::2]}
    bundle = create(tmp_path / "views", tensors=views)
    copies = {name: view.copy() for name, view in views.items()}
    assert bundle.fingerprint == create(tmp_path / "copies", tensors=copies).fingerprint
    stored = load_file(bundle.weights_path)
    assert all(np.array_equal(stored[name], view) for name, view in views.items())


def _with(name: str, change: Callable[[NDArray[Any]], object]) -> dict[str, NDArray[Any]]:
    changed = tensors()
    change(changed[name])
    return changed


def _nudge(tensor: NDArray[Any]) -> None:
    tensor.flat[0] = np.nextafter(tensor.flat[0], np.float32(9))


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": _with("conv1.weight", _nudge)},
        {"tensors": _with("bn1.num_batches_tracked", lambda tensor: tensor.fill(8))},
        {"tensors": {name: tensor for name, tensor in tensors().items() if name != "bn1.bias"}},
        {"tensors": {name.replace("bn1", "bn2"): tensor for name, tensor in tensors().items()}},
        {"tensors": {**tensors(), "bn1.bias": tensors()["bn1.bias"].reshape(2, 2)}},
        {"tensors": {**tensors(), "bn1.bias": tensors()["bn1.bias"].view(np.int32)}},
        {"preprocessing": Preprocessing(size=65, crop=0.75)},
        {"preprocessing": Preprocessing(size=64, crop=0.76)},
        {"architecture": "resnet14-narrow"},
        {"embedding": Embedding(length="unit")},
        {"embedding": Embedding(layers=("layer3", "layer4"))},
        {"embedding": Embedding(pooling="gem")},
        {"embedding": Embedding(dimensions=2048)},
    ],
    ids=[
        *("weight", "counter", "fewer", "name", "shape", "dtype", "size", "crop", "architecture"),
        *("length", "layers", "pooling", "projection"),
    ],
)
def test_what_decides_an_embedding_decides_the_fingerprint(
    made: ModelBundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert create(tmp_path / "other", **change).fingerprint != made.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": dict(reversed(tensors().items()))},
        {"labels": ("Ada", "Bo")},
        {"recipe": {"epochs": 7}},
        {"split": {}},
        {"figures": {}},
        {"versions": {}},
        {"created_at": "2027-01-01T00:00:00+00:00"},
        {"graph": b"written by another exporter"},
    ],
    ids=["order", "labels", "recipe", "split", "figures", "versions", "date", "graph"],
)
def test_what_does_not_decide_an_embedding_leaves_the_fingerprint_alone(
    made: ModelBundle, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert create(tmp_path / "other", **change).fingerprint == made.fingerprint


def test_the_fingerprint_is_a_sha256_that_never_changes_between_versions(made: ModelBundle) -> None:
    """Galleries that exist remember it."""
    plain = {"a": np.arange(3, dtype=np.float32), "b": np.array(1, np.int64)}
    assert (
        fingerprint_of(plain, architecture="resnet50", preprocessing=Preprocessing(size=224, crop=1.0))
        == "f4c6cb654eeaabb22021cdf4d221b8c550a470e6b610a99f6a9913858b62b28c"
    )
    assert (
        fingerprint_of(
            plain,
            architecture="resnet50",
            preprocessing=Preprocessing(size=224, crop=1.0),
            embedding=Embedding("unit", ("layer3", "layer4"), "gem", 256, True),
        )
        == "f1376ef742363352aeb6e100aade48038ac3663be183d2b9a300240592e99a08"
    )
    assert len(made.fingerprint) == 64
    assert made.fingerprint == made.fingerprint.lower()


_FULL = Embedding("unit", ("layer3", "layer4"), "gem", 256, True)


def test_each_two_embeddings_have_their_own_fingerprint() -> None:
    choices = [
        Embedding(length, layers, pooling, dimensions, whiten)
        for length in ("raw", "unit")
        for layers in (("layer4",), ("layer3",), ("layer3", "layer4"))
        for pooling in ("avg", "gem")
        for dimensions, whiten in ((None, False), (64, False), (64, True), (65, False))
    ]
    fixed = {"architecture": "resnet50", "preprocessing": Preprocessing(size=64, crop=1.0)}
    found = {fingerprint_of(tensors(), embedding=embedding, **fixed) for embedding in choices}
    assert len(found) == len(choices) == 48


def test_the_papers_embedding_leaves_the_card_as_it_always_was(made: ModelBundle) -> None:
    """Byte for byte, so that an older faceprint reads it and a gallery knows it by its sum."""
    card = json.loads((made.folder / "bundle.json").read_text("utf-8"))
    assert card["format"] == 1
    assert "embedding" not in card
    assert ModelBundle.load(made.folder).embedding == Embedding()


def test_another_embedding_is_in_the_card_which_an_older_faceprint_refuses(tmp_path: Path) -> None:
    made = create(tmp_path / "made", embedding=_FULL, dimension=256)
    card = json.loads((made.folder / "bundle.json").read_text("utf-8"))
    assert card["format"] == 2
    assert card["embedding"] == {
        "length": "unit",
        "layers": ["layer3", "layer4"],
        "pooling": "gem",
        "dimensions": 256,
        "whiten": True,
    }
    assert ModelBundle.load(made.folder) == made
    made.save(tmp_path / "copy").verify()


def test_an_embedding_that_the_weights_were_not_exported_with_is_found(tmp_path: Path) -> None:
    made = create(tmp_path / "made", embedding=Embedding("unit"))
    _edit(made.folder, embedding={"length": "raw"})
    assert "states another fingerprint" in failure(ModelBundle.load(made.folder).verify)


def test_an_embedding_of_a_later_version_is_refused(made: ModelBundle) -> None:
    _edit(made.folder, embedding={"length": "cubed"})
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"{made.folder / 'bundle.json'} states an embedding that this version of faceprint does not know "
        "(There is no length cubed); upgrade faceprint."
    )


@pytest.mark.parametrize("stated", [[], "unit", {"layers": 4}, {"layers": [4]}, {"dimensions": "many"}])
def test_an_embedding_that_is_none_is_damage(made: ModelBundle, stated: object) -> None:
    _edit(made.folder, embedding=stated)
    assert failure(lambda: ModelBundle.load(made.folder)).startswith(
        f"{made.folder / 'bundle.json'} is damaged (the field embedding"
    )


@pytest.mark.parametrize("field", ["embedding", "preprocessing"])
def test_an_option_of_a_later_version_is_refused(made: ModelBundle, field: str) -> None:
    card = json.loads(made.card())
    _edit(made.folder, **{field: {**card.get(field, {}), "tint": 1}})
    message = failure(lambda: ModelBundle.load(made.folder))
    assert message.startswith(f"{made.folder / 'bundle.json'} states options that this version of faceprint")
    assert "'tint'" in message
    assert message.endswith("upgrade faceprint.")


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"length": "long"}, "There is no length long; choose of raw, unit."),
        ({"pooling": "max"}, "There is no pooling max; choose of avg, gem."),
        ({"layers": ("fc",)}, "There is no layer fc; choose of layer1, layer2, layer3, layer4."),
        ({"layers": ()}, "Name at least one layer, each once, in the order in which a picture passes them."),
        ({"layers": ("layer4", "layer3")}, "Name at least one layer, each once, in the order in which a "),
        ({"layers": ("layer4", "layer4")}, "Name at least one layer, each once, in the order in which a "),
        ({"dimensions": 0}, "A projection keeps at least 1 dimension."),
        ({"whiten": True}, "Only a projection can be whitened; say to how many dimensions."),
    ],
)
def test_choices_that_cannot_be_are_a_sentence(choice: dict[str, Any], sentence: str) -> None:
    assert failure(lambda: Embedding(**choice), InputError).startswith(sentence)


def test_an_embedding_can_be_said_in_words() -> None:
    assert str(Embedding()) == "avg_pool"
    assert str(_FULL) == (
        "generalized mean (p = 3) of layer3 and layer4, projected to 256 whitened principal components, "
        "unit length"
    )


def test_a_copy_has_the_same_bytes_and_is_a_bundle_of_its_own(made: ModelBundle, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folders" / "copy"
    copy = made.save(target)
    assert copy == dataclasses.replace(made, folder=target) == ModelBundle.load(target)
    for name in FILES:
        assert (target / name).read_bytes() == (made.folder / name).read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["copy"]
    copy.verify()


def test_a_copy_leaves_out_what_else_lies_in_the_folder(made: ModelBundle, tmp_path: Path) -> None:
    (made.folder / "report.html").write_text("faces of real people")
    copy = made.save(tmp_path / "copy")
    assert sorted(path.name for path in copy.folder.iterdir()) == list(FILES)


def test_a_copy_is_readable_for_whom_the_folder_of_the_original_is(made: ModelBundle, tmp_path: Path) -> None:
    copy = made.save(tmp_path / "copy")
    assert copy.folder.stat().st_mode == made.folder.stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_copy_never_replaces_anything(made: ModelBundle, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    target.mkdir() if kind == "folder" else target.write_text("mine")
    assert failure(lambda: made.save(target), StorageError) == (
        f"{target} exists already; choose another folder for the copy."
    )
    assert list(target.iterdir()) == [] if kind == "folder" else target.read_text() == "mine"


def test_a_damaged_bundle_is_not_copied(made: ModelBundle, tmp_path: Path) -> None:
    _flip(made.graph_path, 3)
    assert "is not the file that bundle.json names" in failure(lambda: made.save(tmp_path / "copy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def _flip(path: Path, position: int) -> None:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
@pytest.mark.parametrize("position", [0, 20, -1])
def test_a_flipped_bit_is_found(made: ModelBundle, name: str, position: int) -> None:
    made.verify()
    _flip(made.folder / name, position)
    assert failure(ModelBundle.load(made.folder).verify) == (
        f"{made.folder / name} is not the file that bundle.json names; copy the model whole again."
    )


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_a_file_that_vanished_is_found(made: ModelBundle, name: str) -> None:
    (made.folder / name).unlink()
    assert failure(made.verify) == (
        f"{made.folder / name} cannot be read (no such file or directory); copy the model whole again."
    )


def test_another_models_weights_under_this_ones_sums_are_found(made: ModelBundle, tmp_path: Path) -> None:
    """Whoever exchanges the file and its sum has not changed the fingerprint, by which galleries know it."""
    other = create(tmp_path / "other", tensors=_with("conv1.weight", _nudge))
    made.weights_path.write_bytes(other.weights_path.read_bytes())
    _edit(made.folder, files=dict(other.files))
    assert failure(ModelBundle.load(made.folder).verify) == (
        f"{made.folder / 'bundle.json'} states another fingerprint than its weights have."
    )


def _edit(folder: Path, **changes: Any) -> None:
    """Changes entries of a card; None removes one."""
    card = json.loads((folder / "bundle.json").read_text("utf-8")) | changes
    kept = {name: value for name, value in card.items() if value is not None}
    (folder / "bundle.json").write_text(json.dumps(kept), "utf-8")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert failure(lambda: ModelBundle.load(tmp_path / "model")) == (
        f"There is no model folder {tmp_path / 'model'}; make one with `faceprint train`."
    )


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    assert failure(lambda: ModelBundle.load(tmp_path / "model")).startswith("There is no model folder")


def test_a_folder_without_a_card_is_no_model(made: ModelBundle) -> None:
    (made.folder / "bundle.json").unlink()
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"{made.folder} is not a model: it has no bundle.json; make one with `faceprint train`."
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b'{"format": 1, "labels": ["\\ud800"]}', "it is not JSON"),
        (b'{"format": 1, "labels": ' + b"[" * 100_000, "it is not JSON"),
        (b"null", "expected object, got null"),
        (b"[]", "expected object, got array"),
        (b"{}", "object missing required field format"),
        (b'"text"', "expected object, got str"),
        (b'{"format": null}', "the field format: expected int, got null"),
        (b'{"format": "new"}', "the field format: expected int, got str"),
        (b'{"format": []}', "the field format: expected int, got array"),
    ],
)
def test_a_card_that_is_no_card_is_damaged(made: ModelBundle, content: bytes, problem: str) -> None:
    (made.folder / "bundle.json").write_bytes(content)
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"{made.folder / 'bundle.json'} is damaged ({problem}); copy the model whole again."
    )


def test_half_a_card_is_damaged(made: ModelBundle) -> None:
    card = made.folder / "bundle.json"
    card.write_bytes(card.read_bytes()[:200])
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"{card} is damaged (it is not JSON); copy the model whole again."
    )


@pytest.mark.parametrize(
    "name",
    [
        field.name
        for field in dataclasses.fields(ModelBundle)
        if field.name not in ("folder", "embedding", "reference")
    ],
)
def test_a_card_that_lacks_an_entry_is_damaged_and_the_entry_named(made: ModelBundle, name: str) -> None:
    _edit(made.folder, **{name: None})
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"{made.folder / 'bundle.json'} is damaged (object missing required field {name}); "
        "copy the model whole again."
    )


_WRONG = (None, True, -1, 2**70, 1.5, float("nan"), "text", [], [None], {}, {"a": None}, [[[]]], {"": [1]})


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield from _leaves(value, (*path, name))


def test_whatever_stands_in_a_card_it_opens_or_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """Every field, and every field of a field, replaced by values of every type."""
    figures = {"validation_images": 40, "validation_accuracy": 0.5, "left_out": 0, "device": "CPU"}
    recipe = {"seed": 0, "weights": "none", "started_fresh": ["fc"]}
    made = create(tmp_path / "made", embedding=_FULL, dimension=256, figures=figures, recipe=recipe)
    card = json.loads(made.card())
    path = made.folder / "bundle.json"
    sentences: set[str] = set()
    for place in _leaves(card):
        for value in _WRONG:
            changed = json.loads(json.dumps(card))
            inner = changed
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                opened = ModelBundle.load(made.folder)
            except BundleError as error:
                sentences.add(str(error).partition("bundle.json")[0])
            else:
                changes = {number: Relabel(None, keep_photos=False) for number in range(len(opened.labels))}
                opened.relabelled(changes).card().encode()
                # As `faceprint derive` does, under versions of its own.
                describe(dataclasses.replace(opened, versions={"faceprint": "1"}))
    # A newer format names the folder.
    assert sentences == {
        f"{made.folder}/",
        f"The model {made.folder} has format {2**70} and this version of faceprint reads up to {FORMAT}; "
        "upgrade faceprint.",
    }


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("dimension", "2048", "the field dimension: expected int, got str"),
        ("dimension", 0, "the field dimension: 0 is not between 1 and 65,536"),
        ("files", [], "the field files: expected object, got array"),
        ("files", {}, "the field files: object missing required field model.onnx"),
        ("fingerprint", "0" * 63, "the field fingerprint: it is not a SHA-256 in hex"),
        ("split", 1, "the field split: expected object, got int"),
        ("labels", ["Ada", 1], "the field labels[1]: expected str, got int"),
        ("preprocessing", {}, "the field preprocessing: object missing required field size"),
        ("preprocessing", {"size": 64}, "the field preprocessing: object missing required field crop"),
        ("preprocessing", [64, 1.0], "the field preprocessing: expected object, got array"),
        (
            "preprocessing",
            {"size": 10**6, "crop": 1},
            "the field preprocessing.size: 1000000 is not between 1 and 4,096",
        ),
        (
            "preprocessing",
            {"size": 64, "crop": float("nan")},
            "the field preprocessing.crop: nan is not above 0 and at most 1",
        ),
    ],
)
def test_a_wrong_value_is_named(made: ModelBundle, field: str, value: object, problem: str) -> None:
    _edit(made.folder, **{field: value})
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"{made.folder / 'bundle.json'} is damaged ({problem}); copy the model whole again."
    )


def test_a_card_names_its_two_files_and_no_other(made: ModelBundle) -> None:
    _edit(made.folder, files={**made.files, "../elsewhere": "0" * 64})
    assert "does not name model.onnx, model.safetensors and no other file" in failure(
        lambda: ModelBundle.load(made.folder)
    )


def test_numbers_of_a_card_are_written_back_as_they_stand(made: ModelBundle) -> None:
    """Also what `json` knows and JSON does not: a training that diverged has a NaN among its figures."""
    _edit(made.folder, figures={"loss": float("nan"), "steps": 2**70}, preprocessing={"size": 64, "crop": 1})
    card = json.loads(ModelBundle.load(made.folder).card())
    assert str(card["figures"]["loss"]) == "nan"
    assert card["figures"]["steps"] == 2**70
    assert card["preprocessing"] == {"size": 64, "crop": 1}
    assert isinstance(card["preprocessing"]["crop"], int)


def test_a_newer_format_asks_for_a_newer_version(made: ModelBundle) -> None:
    """Even where its other entries have changed beyond recognition."""
    _edit(made.folder, format=FORMAT + 1, labels=None, weights="elsewhere")
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"The model {made.folder} has format {FORMAT + 1} and this version of faceprint reads up to "
        f"{FORMAT}; upgrade faceprint."
    )


def test_entries_of_the_same_format_that_are_not_known_are_passed_over(made: ModelBundle) -> None:
    _edit(made.folder, remark="made on a Sunday")
    assert ModelBundle.load(made.folder) == made


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_a_model_without_one_of_its_files_is_incomplete(made: ModelBundle, name: str) -> None:
    (made.folder / name).unlink()
    assert failure(lambda: ModelBundle.load(made.folder)) == (
        f"The model {made.folder} is incomplete: {name} is missing; copy it whole again."
    )


def test_nothing_in_a_real_bundle_is_a_pickle(bundle: ModelBundle) -> None:
    """Each file is what its name says, by a reader that runs no code, and pickle knows none of them."""
    assert sorted(path.name for path in bundle.folder.iterdir()) == ["MODELCARD.md", *FILES]
    json.loads((bundle.folder / "bundle.json").read_text("utf-8"))
    load_file(bundle.weights_path)
    onnx.checker.check_model(onnx.load(bundle.graph_path))
    for name in FILES:
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)):
            pickle.loads((bundle.folder / name).read_bytes())


@contextmanager
def disk_that_takes(size: int) -> Iterator[None]:
    """A disk on which no file can become larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("large", "kept"),
    [
        ({"tensors": {"conv1.weight": np.zeros(50_000, np.float32)}}, []),
        ({"graph": bytes(200_000)}, ["model.safetensors"]),
        ({"recipe": {"notes": "long " * 40_000}}, ["model.onnx", "model.safetensors"]),
    ],
    ids=["weights", "graph", "card"],
)
def test_a_disk_that_fails_leaves_no_card_and_no_half_file(
    tmp_path: Path, large: dict[str, Any], kept: list[str]
) -> None:
    folder = tmp_path / "model"
    with disk_that_takes(100_000):
        message = failure(lambda: create(folder, **large), StorageError)
    assert message == f"The model cannot be written to {folder}: file too large."
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert "it has no bundle.json" in failure(lambda: ModelBundle.load(folder))


def test_a_disk_that_fails_leaves_no_older_card_beside_newer_weights(made: ModelBundle) -> None:
    with disk_that_takes(100_000):
        failure(lambda: create(made.folder, graph=bytes(200_000)), StorageError)
    assert not (made.folder / "bundle.json").exists()


def test_a_bundle_may_be_made_where_another_was(made: ModelBundle) -> None:
    other = create(made.folder, tensors=_with("conv1.weight", _nudge), labels=("Cy", "Di"))
    assert ModelBundle.load(made.folder) == other
    assert other.fingerprint != made.fingerprint
    other.verify()


def test_a_disk_that_fails_leaves_no_copy(tmp_path: Path) -> None:
    made = create(tmp_path / "made", graph=bytes(200_000))
    with disk_that_takes(100_000):
        message = failure(lambda: made.save(tmp_path / "copy"), StorageError)
    assert message == f"The model cannot be copied to {tmp_path / 'copy'}: file too large."
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("below", ["", "model"])
def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / below
    assert failure(lambda: create(target), StorageError).startswith(
        f"The model cannot be written to {target}: "
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_copy_below_a_file_is_a_storage_error(made: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "copy"
    assert failure(lambda: made.save(target), StorageError) == (
        f"The model cannot be copied to {target}: file exists."
    )
