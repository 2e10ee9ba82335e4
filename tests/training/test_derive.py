"""A trained model with other embeddings: a whole, checked bundle, measured, or none at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval.bulk.ingest import ingest
from retrieval.errors import BundleError, DataError, InputError
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.images.photo_reader import PhotoReader
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.models.network import Network
from tests.cli.test_app import Faceprint, faceprint  # noqa: F401 (a fixture)
from training.data import dataset
from training.derive import derive
from training.fitting.export import export
from training.fitting.validation import evaluate
from training.reports import model_card

FULL = Embedding("unit", ("layer3", "layer4"), "gem", 5, True)


@pytest.fixture(scope="module")
def split(faces: Path) -> dataset.Split:
    return dataset.load(faces, validation_fraction=0.3, min_images=None, seed=0)


@pytest.fixture(scope="module")
def model(
    network: Network, bundle: ModelBundle, split: dataset.Split, faces: Path, tmp_path_factory: Any
) -> ModelBundle:
    """The narrow network with a card as `train` writes it."""
    names = {
        part: [sample.path.relative_to(faces).as_posix() for sample in samples]
        for part, samples in (("train", split.train), ("validation", split.validation))
    }
    found = evaluate(network, split, PhotoReader(bundle.preprocessing), workers=0)
    return export(
        network,
        tmp_path_factory.mktemp("models") / "trained",
        labels=bundle.labels,
        reader=PhotoReader(bundle.preprocessing),
        recipe={"epochs": 6, "seed": 0},
        split={"validation_fraction": 0.3, "min_images": None, **names},
        figures={
            "train_images": 24,
            "validation_images": 12,
            "validation_accuracy": found.validation_accuracy,
            "closest_image_agreement": found.closest_image_agreement,
            "seconds": 60.0,
        },
        sample=np.zeros((2, 32, 32, 3), np.uint8),
        describe=model_card.describe,
    )


@pytest.fixture(scope="module")
def derived(model: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return derive(model, tmp_path_factory.mktemp("derived") / "new.model", FULL, data=faces)


def test_a_derived_bundle_is_whole_and_says_where_it_comes_from(model: ModelBundle, derived: Any) -> None:
    new = ModelBundle.load(derived.bundle.folder)
    assert new == derived.bundle
    new.verify()
    assert (new.embedding, new.dimension) == (FULL, 5)
    assert new.recipe == {**model.recipe, "derived_from": model.fingerprint}
    assert (new.labels, new.split, new.preprocessing) == (model.labels, model.split, model.preprocessing)
    assert new.fingerprint != model.fingerprint
    assert sorted(path.name for path in new.folder.iterdir()) == [
        "MODELCARD.md",
        "bundle.json",
        "model.onnx",
        "model.safetensors",
    ]
    assert [path.name for path in new.folder.parent.iterdir()] == ["new.model"]


def test_the_figures_of_a_derived_bundle_are_those_of_its_own_embeddings(
    model: ModelBundle, derived: Any, split: dataset.Split
) -> None:
    """The held-out photos' nearest training photos, found again here with the new bundle's graph."""
    embedder = Embedder.open(derived.bundle, device="cpu")

    def embedded(samples: tuple[dataset.Sample, ...]) -> np.ndarray:
        return embedder.embed(np.stack([pixels.read(s.path, size=32) for s in samples])).vectors

    train, held_out = embedded(split.train), embedded(split.validation)
    distances = np.linalg.norm(held_out[:, None] - train[None], axis=2)
    labels = np.array([sample.label for sample in split.train])[distances.argmin(1)]
    agreement = float(np.mean(labels == [sample.label for sample in split.validation]))
    figures = derived.bundle.figures
    assert figures["closest_image_agreement"] == derived.after.agreement.value == agreement
    assert figures["closest_image_agreement_before"] == model.figures["closest_image_agreement"]
    assert derived.before.agreement.value == model.figures["closest_image_agreement"]
    assert figures["validation_accuracy"] == model.figures["validation_accuracy"]
    assert derived.after.agreement.n == 12
    assert derived.missing == ()


def test_the_classifier_of_a_derived_bundle_answers_as_before(
    model: ModelBundle, derived: Any, split: dataset.Split
) -> None:
    batch = np.stack([pixels.read(sample.path, size=32) for sample in split.validation])
    answers = [
        Embedder.open(each, device="cpu").embed(batch).probabilities for each in (model, derived.bundle)
    ]
    np.testing.assert_allclose(*answers, atol=1e-6)


def test_a_projection_is_learned_from_the_training_photos_alone(
    model: ModelBundle, derived: Any, faces: Path, tmp_path: Path
) -> None:
    """Held-out photos that look otherwise change no weight."""
    photos = shutil.copytree(faces, tmp_path / "photos")
    for name in model.split["validation"]:
        shutil.copyfile(next(iter(sorted(photos.glob("*/*.jpg")))), photos / name)
    other = derive(model, tmp_path / "other.model", FULL, data=photos)
    assert other.bundle.fingerprint == derived.bundle.fingerprint


def test_without_photos_the_figure_of_the_embeddings_is_left_out(model: ModelBundle, tmp_path: Path) -> None:
    done = derive(model, tmp_path / "new.model", Embedding(length="unit"))
    assert (done.before, done.after, done.missing) == (None, None, ())
    kept = {key: value for key, value in model.figures.items() if key != "closest_image_agreement"}
    assert done.bundle.figures == kept
    done.bundle.verify()


def test_another_length_keeps_the_projection_and_needs_no_photos(derived: Any, tmp_path: Path) -> None:
    """Unit vectors of the first are the raw vectors of the second, divided by their lengths."""
    raw = derive(derived.bundle, tmp_path / "raw.model", replace(FULL, length="raw"))
    assert raw.bundle.recipe["derived_from"] == derived.bundle.fingerprint
    batch = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    before, after = (
        Embedder.open(each, device="cpu").embed(batch).vectors for each in (derived.bundle, raw.bundle)
    )
    np.testing.assert_allclose(after / np.linalg.norm(after, axis=1, keepdims=True), before, atol=1e-5)
    assert np.linalg.norm(after, axis=1).max() > 1.5


def test_without_its_projection_a_model_is_the_one_that_it_was_derived_from(
    model: ModelBundle, derived: Any, tmp_path: Path
) -> None:
    back = derive(derived.bundle, tmp_path / "back.model", Embedding())
    assert back.bundle.fingerprint == model.fingerprint


def test_photos_that_are_gone_or_damaged_are_left_out_and_named(
    model: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(faces, tmp_path / "photos")
    gone, damaged, held_out = *model.split["train"][:2], model.split["validation"][0]
    (photos / gone).unlink()
    (photos / held_out).unlink()
    (photos / damaged).write_bytes(b"no picture")
    done = derive(model, tmp_path / "new.model", Embedding(dimensions=5), data=photos)
    assert done.missing == (gone, damaged, held_out)
    assert (done.bundle.figures["train_images"], done.bundle.figures["validation_images"]) == (22, 11)


@pytest.fixture
def small_gallery(derived: Any, faces: Path, tmp_path: Path) -> Any:
    with Gallery.create(tmp_path / "people.gallery", derived.bundle) as gallery:
        ingest(gallery, [str(faces)])
        yield gallery


def test_a_gallery_of_a_derived_model_finds_what_is_in_it(small_gallery: Gallery, faces: Path) -> None:
    """Five numbers a face go through ingestion, segments and exact search as 2048 do."""
    path = sorted(faces.glob("*/*.jpg"))[7]
    assert small_gallery.info().dimension == 5
    (best, second) = small_gallery.search(path, k=2).matches
    assert (Path(best.face.path), best.distance) == (path, pytest.approx(0, abs=1e-3))
    assert second.distance <= 2


def test_a_gallery_moves_to_a_derived_model_by_being_embedded_again(
    model: ModelBundle, derived: Any, faces: Path, tmp_path: Path
) -> None:
    with Gallery.create(tmp_path / "people.gallery", model) as gallery:
        ingest(gallery, [str(faces)])
        gallery.reembed(derived.bundle)
        assert gallery.info().dimension == 5
        assert gallery.search(sorted(faces.glob("*/*.jpg"))[3], k=1).matches[0].face.id == 4


def _refusal(kind: type[Exception], model: ModelBundle, out: Path, embedding: Embedding, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        derive(model, out, embedding, **more)
    assert not (out.exists() and any(out.iterdir()))
    return str(caught.value)


def test_what_is_there_already_is_not_made_again(model: ModelBundle, tmp_path: Path) -> None:
    assert _refusal(InputError, model, tmp_path / "new", Embedding()) == (
        f"{model.folder} embeds in that way already (avg_pool); choose another one."
    )


def test_a_new_projection_needs_photos(model: ModelBundle, derived: Any, tmp_path: Path) -> None:
    sentence = (
        "A projection is learned from the photos that the model was trained on; "
        "give their folder with `data`."
    )
    assert _refusal(InputError, model, tmp_path / "new", Embedding(dimensions=5)) == sentence
    for change in ({"dimensions": 4}, {"pooling": "avg"}, {"layers": ("layer4",)}, {"whiten": False}):
        assert _refusal(InputError, derived.bundle, tmp_path / "new", replace(FULL, **change)) == sentence


def test_a_folder_that_exists_is_not_written_into(model: ModelBundle, tmp_path: Path) -> None:
    assert _refusal(InputError, model, tmp_path, Embedding("unit")) == (
        f"{tmp_path} exists already; choose another folder with `out`."
    )


def test_a_model_does_not_lie_among_photos(model: ModelBundle, faces: Path) -> None:
    sentence = _refusal(InputError, model, faces / "new", Embedding("unit"), data=faces)
    assert sentence.endswith(f"would lie among the photos of {faces}; choose another `out`.")


def test_more_dimensions_than_training_photos_are_refused_before_anything_is_measured(
    model: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    assert _refusal(
        InputError, model, tmp_path / "new", Embedding(dimensions=24), data=faces, on_stage=stages.append
    ) == (
        "24 training photos with 2,048 numbers each can be projected to at most 23 dimensions, not to 24; "
        "choose fewer."
    )
    assert "measuring the model as it is" not in stages


def test_another_folder_of_photos_is_refused(model: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert _refusal(
        DataError, model, tmp_path / "new", Embedding(dimensions=5), data=tmp_path / "photos"
    ) == (
        f"{tmp_path / 'photos'} does not have the photos that {model.folder} was trained on (36 of 36 are "
        "missing); give the folder that it was trained on."
    )


def test_a_damaged_model_is_not_derived_from(model: ModelBundle, tmp_path: Path) -> None:
    copy = model.save(tmp_path / "copy")
    copy.weights_path.write_bytes(copy.weights_path.read_bytes()[:-1])
    assert "copy the model whole again" in _refusal(BundleError, copy, tmp_path / "new", Embedding("unit"))


def test_a_model_of_another_architecture_is_refused(model: ModelBundle, tmp_path: Path) -> None:
    tensors = {name: tensor.numpy() for name, tensor in torch.nn.Linear(2, 2).state_dict().items()}
    fields = {name: getattr(model, name) for name in ("labels", "preprocessing", "dimension", "created_at")}
    other = ModelBundle.create(
        tmp_path / "other",
        tensors=tensors,
        graph=b"",
        architecture="vit",
        recipe={},
        split={},
        figures={},
        versions={},
        **fields,
    )
    assert "cannot be loaded into a vit" in _refusal(BundleError, other, tmp_path / "new", Embedding("unit"))


def test_the_command_prints_what_an_embedding_costs_and_saves(
    faceprint: Faceprint,  # noqa: F811
    model: ModelBundle,
    faces: Path,
    tmp_path: Path,
) -> None:
    new = tmp_path / "new.model"
    options = ("--length", "unit", "--layers", "layer4, layer3", "--dimensions", 5, "--data", faces)
    status, out, _ = faceprint("derive", model.folder, "--out", new, *options)
    assert status == 0
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "bytes a vector 8,192 20" in rows
    assert any("closest-image agreement, 12 held-out photos" in row for row in rows)
    opened = ModelBundle.load(new)
    assert opened.embedding == Embedding("unit", ("layer3", "layer4"), "avg", 5)
    status, out, _ = faceprint("model", new, "--layer-table")
    assert status == 0
    assert "avg_pool of layer3 and layer4, projected to 5 principal components, unit length, 5 float" in out
    assert "Matrix 5x3072" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--length", "long"), "There is no length long; choose of raw, unit."),
        (("--layers", "layer5"), "There is no layer layer5; choose of layer1, layer2, layer3, layer4."),
        (("--pooling", "max"), "There is no pooling max; choose of avg, gem."),
        (("--whiten",), "Only a projection can be whitened; say to how many dimensions."),
    ],
)
def test_a_choice_that_cannot_be_is_one_sentence_of_either_command(
    faceprint: Faceprint,  # noqa: F811
    model: ModelBundle,
    faces: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    for command in (("derive", model.folder), ("train", faces)):
        status, out, err = faceprint(*command, "--out", tmp_path / "new", *options)
        assert (status, out, err) == (2, "", f"faceprint: {sentence}\n")
    assert not (tmp_path / "new").exists()


def test_training_with_another_embedding_writes_it_and_measures_it(
    faceprint: Faceprint,  # noqa: F811
    faces: Path,
    tmp_path: Path,
) -> None:
    new = tmp_path / "new.model"
    recipe = ("--weights", "none", "--epochs", 1, "--image-size", 32)
    chosen = ("--length", "unit", "--layers", "layer3,layer4", "--pooling", "gem", "--dimensions", 4)
    status, out, _ = faceprint("train", faces, "--out", new, *recipe, *chosen, "--whiten")
    assert status == 0
    assert "closest-image agreement" in out
    opened = ModelBundle.load(new)
    opened.verify()
    assert (opened.embedding, opened.dimension) == (replace(FULL, dimensions=4), 4)
    card = json.loads((new / "bundle.json").read_text("utf-8"))
    assert card["format"] == 3
    batch = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    vectors = Embedder.open(opened, device="cpu").embed(batch).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_training_refuses_too_many_dimensions_before_the_first_step(
    faceprint: Faceprint,  # noqa: F811
    faces: Path,
    tmp_path: Path,
) -> None:
    status, _, err = faceprint(
        "train", faces, "--out", tmp_path / "new", "--weights", "none", "--image-size", 32, "--dimensions", 24
    )
    assert status == 2
    assert err.endswith("can be projected to at most 23 dimensions, not to 24; choose fewer.\n")
    assert not (tmp_path / "new").exists()
