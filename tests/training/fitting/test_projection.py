"""Principal components: the directions in which embeddings vary most, learned from training photos alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.errors import InputError
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import Embedding
from retrieval.models.network import Network
from training.data import dataset
from training.data.dataset import Photographs
from training.fitting import projection
from training.fitting.fit import outputs


def _cloud(rows: int, columns: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(columns, columns))
    return (random.normal(size=(rows, columns)) @ mixing + 3).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(5, 40),
    columns=st.integers(2, 12),
    dimensions=st.integers(1, 12),
    whiten=st.booleans(),
    seed=st.integers(0, 9),
)
def test_components_are_the_singular_vectors_with_the_largest_values(
    rows: int, columns: int, dimensions: int, whiten: bool, seed: int
) -> None:
    """Against a singular value decomposition of the rows in float64, up to the sign."""
    dimensions = min(dimensions, columns, rows - 1)
    cloud = _cloud(rows, columns, seed)
    found = projection.principal(cloud, dimensions, whiten=whiten)
    wide = cloud.astype(np.float64)
    centred = wide - wide.mean(0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    deviations = values / np.sqrt(rows - 1)
    projected = (wide - found.mean.double().numpy()) @ found.matrix.double().numpy().T
    expected = centred @ vectors[:dimensions].T
    if whiten:
        expected /= deviations[:dimensions]
    signs = np.sign((projected * expected).sum(0))
    scale = np.abs(expected).max() * deviations[0] / deviations[dimensions - 1]
    assert np.abs(projected * signs - expected).max() < 1e-4 * scale


def test_whitened_components_have_variance_one_and_no_correlation() -> None:
    cloud = _cloud(500, 9, 2)
    found = projection.principal(cloud, 6, whiten=True)
    projected = (torch.from_numpy(cloud) - found.mean) @ found.matrix.T
    np.testing.assert_allclose(np.cov(projected.numpy().T), np.eye(6), atol=1e-4)


def test_the_largest_number_of_a_component_is_positive() -> None:
    """A direction and its opposite are one component; the same photos must give the same bundle."""
    matrix = projection.principal(_cloud(50, 8, 1), 8, whiten=False).matrix.numpy()
    assert (matrix[np.arange(8), np.abs(matrix).argmax(1)] > 0).all()


def test_blocks_give_what_all_rows_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = _cloud(50, 8, 1)
    whole = projection.principal(cloud, 8, whiten=True)
    monkeypatch.setattr(projection, "_ROWS_PER_BLOCK", 7)
    parts = projection.principal(cloud, 8, whiten=True)
    torch.testing.assert_close(parts.matrix, whole.matrix)


def test_photos_that_vary_in_fewer_directions_are_refused() -> None:
    flat = np.repeat(_cloud(50, 3, 1), 3, axis=1)
    with pytest.raises(InputError) as caught:
        projection.principal(flat, 4, whiten=True)
    assert str(caught.value) == (
        "The training photos' embeddings vary in 3 dimensions only, not in 4; choose fewer."
    )
    with pytest.raises(InputError, match="vary in 0 dimensions only"):
        projection.principal(np.ones((5, 4), np.float32), 1, whiten=False)


@pytest.mark.parametrize(
    ("embedding", "photos", "most"),
    [
        (Embedding(dimensions=24), 24, 23),
        (Embedding(dimensions=2049), 9000, 2048),
        (Embedding(layers=("layer2", "layer3"), dimensions=1537), 9000, 1536),
    ],
)
def test_too_many_dimensions_are_known_beforehand(embedding: Embedding, photos: int, most: int) -> None:
    network = Network(2, architecture="resnet14-narrow")
    with pytest.raises(InputError) as caught:
        projection.check_projection(embedding, network, photos=photos)
    assert f" can be projected to at most {most:,} dimensions, not to" in str(caught.value)
    projection.check_projection(Embedding(layers=embedding.layers, dimensions=most), network, photos=photos)


def test_a_network_learns_its_projection_from_the_samples_it_is_given(faces: Path) -> None:
    """Their embeddings then have mean 0 and, whitened, variance 1: before the length, which comes last."""
    small = PhotoReader(Preprocessing(size=32, crop=1.0))
    split = dataset.load(faces, validation_fraction=0.3, min_images=None, seed=0)
    torch.manual_seed(1)
    network = Network(6, architecture="resnet14-narrow").eval()
    wanted = Embedding("unit", ("layer3", "layer4"), "gem", 4, True)
    projection.embed_as(network, wanted, split.train, small, workers=0)
    assert (network.embedding, network.dimension) == (wanted, 4)
    network.embedding = Embedding("raw", ("layer3", "layer4"), "gem", 4, True)
    vectors = torch.cat([part for part, *_ in outputs(network, Photographs(split.train, small), workers=0)])
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(vectors.numpy().T), np.eye(4), atol=1e-2)
