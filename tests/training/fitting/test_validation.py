"""Measuring a network on its split, against one photo at a time in float64."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.network import Network
from training.data import dataset
from training.data.dataset import Sample, Split
from training.fitting.fit import fit
from training.fitting.recipes import FitConfig
from training.fitting.validation import NEIGHBOURS, Evaluation, evaluate
from training.networks.initialize import build

SMALL = PhotoReader(Preprocessing(size=32, crop=1.0))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """A network after a short training, and what was measured."""

    network: Network
    split: Split
    last_accuracy: float
    evaluation: Evaluation


@pytest.fixture(scope="module")
def measured(faces: Path) -> Measured:
    split = dataset.load(faces, validation_fraction=0.3, min_images=None, seed=0)
    torch.manual_seed(0)
    network, _ = build(6, weights="none", architecture="resnet14-narrow")
    config = FitConfig(epochs=2, batch_size=8, warmup_epochs=1.0)
    history = fit(network, split, SMALL, config, device=CPU)
    evaluation = evaluate(network, split, SMALL, workers=0)
    return Measured(network, split, history.epochs[-1].validation_accuracy, evaluation)


def one_by_one(
    network: Network, samples: tuple[Sample, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Embeddings and logits of samples, each alone in its batch."""
    photographs = dataset.Photographs(samples, SMALL)
    network.eval()
    with torch.inference_mode():
        answers = [network(photographs[index][0][None]) for index in range(len(samples))]
    embeddings, logits = zip(*answers, strict=True)
    return torch.cat(embeddings).double().numpy(), torch.cat(logits).double().numpy()


def test_validation_accuracy_is_the_last_epochs(measured: Measured) -> None:
    assert measured.evaluation.validation_accuracy == measured.last_accuracy


def test_predictions_are_the_likeliest_labels_with_their_softmax(measured: Measured) -> None:
    _, logits = one_by_one(measured.network, measured.split.validation)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = measured.evaluation
    assert np.array_equal(found.predicted, logits.argmax(1))
    np.testing.assert_allclose(found.probability, probabilities.max(1), rtol=1e-4)
    assert found.actual.tolist() == [sample.label for sample in measured.split.validation]
    assert found.validation_accuracy == (found.predicted == found.actual).mean()


def test_the_closest_photos_are_those_of_a_search_by_hand(measured: Measured) -> None:
    held_out, _ = one_by_one(measured.network, measured.split.validation)
    train, _ = one_by_one(measured.network, measured.split.train)
    every = np.array([[np.linalg.norm(one - other) for other in train] for one in held_out])
    found = measured.evaluation
    assert found.closest.shape == found.distances.shape == (len(held_out), NEIGHBOURS)
    np.testing.assert_allclose(found.distances, np.sort(every, axis=1)[:, :NEIGHBOURS], rtol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(every, found.closest, axis=1), found.distances, rtol=1e-3)
    assert all(len(set(rows)) == NEIGHBOURS for rows in found.closest.tolist())


def test_closest_image_agreement_is_the_share_whose_nearest_photo_shows_the_same_person(
    measured: Measured,
) -> None:
    train, held_out = measured.split.train, measured.split.validation
    agreeing = [
        train[row].label == sample.label
        for sample, row in zip(held_out, measured.evaluation.closest[:, 0], strict=True)
    ]
    assert measured.evaluation.closest_image_agreement == np.mean(agreeing)


def test_confusions_are_the_wrong_predictions(measured: Measured) -> None:
    found = measured.evaluation
    confusions = found.confusions()
    wrong = sum(number for _, _, number in confusions)
    assert wrong == round((1 - found.validation_accuracy) * len(found.actual))
    assert wrong > 0
    for actual, predicted, number in confusions:
        assert number == ((found.actual == actual) & (found.predicted == predicted)).sum()
        assert actual != predicted


def test_with_fewer_training_photos_than_neighbours_all_of_them_are_given(measured: Measured) -> None:
    few = Split(measured.split.labels, measured.split.train[:3], measured.split.validation, ())
    found = evaluate(measured.network, few, SMALL, workers=0)
    assert found.closest.shape == (len(few.validation), 3)
    assert {tuple(sorted(rows)) for rows in found.closest.tolist()} == {(0, 1, 2)}


def test_measuring_changes_no_parameter_and_no_statistic(measured: Measured) -> None:
    network = measured.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    again = evaluate(network.train(), measured.split, SMALL, workers=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert np.array_equal(again.predicted, measured.evaluation.predicted)
    assert np.array_equal(again.distances, measured.evaluation.distances)
