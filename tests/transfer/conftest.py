"""Galleries to export from and to import into."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from retrieval.database.records import NewFace
from retrieval.gallery.gallery import Gallery
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from tests.transfer.numbered_faces import D, add, digest_of, face, vector_of


@pytest.fixture
def people(gallery: Gallery) -> Gallery:
    """A gallery of 13 faces in several segments; some have several paths, one has none."""
    for first, count in ((0, 6), (6, 5), (11, 1)):
        add(gallery, first, count)
    paths = {"/a.jpg": face(2), "/b.jpg": face(7), "/c.jpg": face(2)}
    copies = [dataclasses.replace(original, path=path) for path, original in paths.items()]
    gallery.enroll_vectors(copies, np.zeros((3, D)))
    gallery.enroll_vectors([NewFace(None, None, digest_of(99))], vector_of(99)[None])
    return gallery


@pytest.fixture
def other(bundle: ModelBundle, tmp_path: Path) -> Iterator[Gallery]:
    """Another empty gallery of the same model."""
    with Gallery.create(tmp_path / "other.gallery", bundle) as opened:
        yield opened


@pytest.fixture(scope="session")
def strangers(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Another model: the same weights with another crop."""
    return ModelBundle.create(
        tmp_path_factory.mktemp("models") / "other",
        tensors=load_file(bundle.weights_path),
        graph=bundle.graph_path.read_bytes(),
        preprocessing=Preprocessing(size=32, crop=0.5),
        **{
            name: getattr(bundle, name)
            for name in (
                "architecture",
                "labels",
                "dimension",
                "recipe",
                "split",
                "figures",
                "versions",
                "created_at",
            )
        },
    )
