"""Derives a bundle with other embeddings from a trained bundle, without training again."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from retrieval.errors import BundleError, DataError, InputError, StorageError, UnreadableImage
from retrieval.images.photo_reader import PhotoReader
from retrieval.index import brute_force
from retrieval.models.bundle import Embedding, ModelBundle
from retrieval.models.network import Network, Projection
from retrieval.rates import Rate, wilson
from retrieval.system.cpu import reading_threads
from retrieval.system.files import path_in_utf8, temporary_folder, why
from training.data.dataset import (
    TRIAL_PICTURES,
    Photographs,
    Sample,
    Split,
    check_outside,
    check_readable,
    trial_pictures,
)
from training.fitting import projection
from training.fitting.export import export
from training.fitting.fit import outputs
from training.reports import model_card


@dataclass(frozen=True)
class Measured:
    """The results of a model on its held-out photos.

    Attributes:
        accuracy: share of photos that the classifier labels correctly; it does not depend on the embedding.
        agreement: closest-image agreement: share of photos with a nearest training photo of the same person.
    """

    accuracy: Rate
    agreement: Rate


@dataclass(frozen=True)
class Derivation:
    """A derived bundle.

    Attributes:
        bundle: the new bundle.
        before, after: results of both models on the same photos; None without photos.
        missing: photos of the model's split that do not exist or cannot be read, named as in the card.
    """

    bundle: ModelBundle
    before: Measured | None
    after: Measured | None
    missing: tuple[str, ...]


def derive(
    model: ModelBundle,
    out: Path,
    embedding: Embedding,
    *,
    data: Path | None = None,
    device: torch.device = torch.device("cpu"),
    workers: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Derivation:
    """Writes a bundle with a model's network and other embeddings, completely or not at all.

    Args:
        model: the trained model; it is not changed.
        out: a folder that does not exist yet.
        embedding: the embedding of the new bundle.
        data: the folder of photos that the model was trained on. Figures are measured on these photos, and a
            new projection is learned from those of the training split only.
        device: the device that computes.
        workers: number of processes that read photos.
        on_stage: called with a description when a stage begins.

    Raises:
        InputError: the model was imported, nothing would change, `embedding` needs photos that are not given,
            or `out` exists.
        DataError: `data` does not have the model's photos.
        BundleError: the model's files do not match its card.
        StorageError: `out` cannot be written.
    """
    _check(model, out, embedding, data)
    on_stage("reading the model")
    network, reader = _network(model), model.load_photo_reader()
    on_stage("looking for the photos")
    split, missing = (None, ()) if data is None else _split(model, data, reader)
    before = after = None
    if split is None:
        network.embed_as(embedding, _projection(network))
    else:
        before, after = _measured(network.to(device), embedding, split, reader, workers, on_stage)
    on_stage("exporting the model")
    return Derivation(_written(network, model, out, reader, split, before, after), before, after, missing)


def _check(model: ModelBundle, out: Path, embedding: Embedding, data: Path | None) -> None:
    model.require_trained("derived from")
    if embedding == model.embedding:
        raise InputError(f"{model.folder} embeds in that way already ({embedding}); choose another one.")
    if data is None and _learns(model.embedding, embedding):
        raise InputError(
            "A projection is learned from the photos that the model was trained on; give their folder with "
            "`data`."
        )
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder with `out`.")
    if data is not None:
        check_outside(out, data)


def _learns(before: Embedding, after: Embedding) -> bool:
    """Whether the new embedding needs a projection that the model does not have."""
    before, after = (replace(each, length="raw") for each in (before, after))
    return after.dimensions is not None and after != before


def _network(model: ModelBundle) -> Network:
    model.verify()
    try:
        network = Network(len(model.labels), architecture=model.architecture, embedding=model.embedding)
        with path_in_utf8(model.weights_path) as name:
            network.load_state_dict(load_file(name))
    except (KeyError, RuntimeError) as error:
        raise BundleError(
            f"{model.weights_path} cannot be loaded into a {model.architecture}; upgrade faceprint."
        ) from error
    network.eval()
    return network


def _projection(network: Network) -> Projection | None:
    if network.projection_mean is None or network.projection_matrix is None:
        return None
    return Projection(network.projection_mean, network.projection_matrix)


def _split(model: ModelBundle, data: Path, reader: PhotoReader) -> tuple[Split, tuple[str, ...]]:
    """Returns the readable photos of the card's split, and the names of the others."""
    numbers = {label: number for number, label in enumerate(model.labels)}
    parts = [_samples(model.split.get(part, []), data, numbers, reader) for part in ("train", "validation")]
    (train, missing_train), (validation, missing_validation) = parts
    missing = (*missing_train, *missing_validation)
    if not train or not validation:
        raise DataError(
            f"{data} does not have the photos that {model.folder} was trained on "
            f"({len(missing):,} of {len(train) + len(validation) + len(missing):,} "
            "are missing); give the folder that it was trained on."
        )
    return Split(model.labels, train, validation, ()), missing


def _samples(
    names: Iterable[str], data: Path, numbers: Mapping[str, int], reader: PhotoReader
) -> tuple[tuple[Sample, ...], list[str]]:
    names = list(names)
    with ThreadPoolExecutor(reading_threads()) as threads:
        readable = list(threads.map(partial(_readable, reader=reader), (data / name for name in names)))
    samples, missing = [], []
    for name, found in zip(names, readable, strict=True):
        label = numbers.get(unicodedata.normalize("NFC", name).partition("/")[0])
        if found and label is not None:
            samples.append(Sample(data / name, label))
        else:
            missing.append(name)
    return tuple(samples), missing


def _readable(path: Path, reader: PhotoReader) -> bool:
    try:
        check_readable(path, reader)
    except UnreadableImage:
        return False
    return True


@dataclass(frozen=True)
class _Activations:
    """The features of the photos of a split, before projection and normalisation of length.

    Attributes:
        train, validation: (n, f) float32, pooled.
        predicted: (n,) predicted label of each held-out photo.
    """

    train: Tensor
    validation: Tensor
    predicted: NDArray[np.int64]


def _measured(
    network: Network,
    embedding: Embedding,
    split: Split,
    reader: PhotoReader,
    workers: int,
    on_stage: Callable[[str], None],
) -> tuple[Measured, Measured]:
    """Changes how a network embeds; returns its results before and after."""
    present, kept = network.embedding, _projection(network)
    learns = _learns(present, embedding)
    if learns:
        projection.check_projection(embedding, network, photos=len(split.train))
    on_stage("measuring the model as it is")
    found = _activations(network, present, split, reader, workers)
    network.embed_as(present, kept)
    before = _evaluated(network, found, split)
    on_stage("measuring the new embeddings")
    if (present.layers, present.pooling) != (embedding.layers, embedding.pooling):
        found = _activations(network, embedding, split, reader, workers)
    if learns and embedding.dimensions is not None:
        train = found.train.cpu().numpy()
        kept = projection.principal(train, embedding.dimensions, whiten=embedding.whiten)
    network.embed_as(embedding, kept)
    return before, _evaluated(network, found, split)


def _activations(
    network: Network, embedding: Embedding, split: Split, reader: PhotoReader, workers: int
) -> _Activations:
    network.embed_as(Embedding(layers=embedding.layers, pooling=embedding.pooling))
    parts: list[tuple[Tensor, Tensor]] = []
    for samples in (split.train, split.validation):
        batches = list(outputs(network, Photographs(samples, reader), workers=workers))
        features, logits, _ = (torch.cat(each) for each in zip(*batches, strict=True))
        parts.append((features, logits))
    (train, _), (validation, logits) = parts
    return _Activations(train, validation, logits.argmax(1).cpu().numpy())


def _evaluated(network: Network, found: _Activations, split: Split) -> Measured:
    with torch.inference_mode():
        train, held_out = (network.finish(each).cpu().numpy() for each in (found.train, found.validation))
    _, closest = brute_force.nearest(held_out, train, 1)
    labels, actual = (np.array([s.label for s in part]) for part in (split.train, split.validation))
    hits = found.predicted == actual, labels[closest[:, 0]] == actual
    return Measured(*(wilson(int(each.sum()), len(actual)) for each in hits))


def _written(
    network: Network,
    model: ModelBundle,
    out: Path,
    reader: PhotoReader,
    split: Split | None,
    before: Measured | None,
    after: Measured | None,
) -> ModelBundle:
    """Writes the new bundle to a temporary folder beside `out`, checks it, and moves it to `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out.parent, f".{out.name}-") as temporary:
            made = export(
                network,
                temporary / "bundle",
                labels=model.labels,
                reader=reader,
                recipe={**model.recipe, "derived_from": model.fingerprint},
                split=model.split,
                figures=_figures(model, split, before, after),
                sample=_sample(model, split, reader),
                describe=model_card.describe,
            )
            return made.save(out)
    except OSError as error:
        raise StorageError(f"The model cannot be written to {out}: {why(error)}.") from error


def _figures(
    model: ModelBundle, split: Split | None, before: Measured | None, after: Measured | None
) -> dict[str, Any]:
    """Returns the model's figures, with new closest-image agreement if it was measured, else without it."""
    figures = {name: value for name, value in model.figures.items() if name != "closest_image_agreement"}
    if split is None or before is None or after is None:
        return figures
    return {
        **figures,
        "train_images": len(split.train),
        "validation_images": len(split.validation),
        "validation_accuracy": after.accuracy.value,
        "closest_image_agreement": after.agreement.value,
        "closest_image_agreement_before": before.agreement.value,
    }


def _sample(model: ModelBundle, split: Split | None, reader: PhotoReader) -> NDArray[np.uint8]:
    """Returns photos on which the graph is checked; random noise without photos."""
    if split is None:
        shape = (TRIAL_PICTURES, model.input_size, model.input_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return trial_pictures(split.validation, reader)
