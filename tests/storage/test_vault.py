"""The vault keeps no file mapped that no longer exists, in whatever generation it was."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from retrieval import Gallery, ModelBundle, ingest
from retrieval.gallery import reembed
from retrieval.images.preprocessing import Preprocessing

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="what is mapped shows only on Linux"
)


@pytest.fixture(scope="module")
def other(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Another model: the same weights see another part of a picture."""
    same = ("architecture", "labels", "dimension", "recipe", "split", "figures", "versions", "created_at")
    return ModelBundle.create(
        tmp_path_factory.mktemp("models") / "other",
        tensors=load_file(bundle.weights_path),
        graph=bundle.graph_path.read_bytes(),
        preprocessing=Preprocessing(size=32, crop=0.5),
        **{name: getattr(bundle, name) for name in same},
    )


@pytest.fixture
def filled(gallery: Gallery, faces: Path) -> Gallery:
    """A gallery of several vector files, which were searched."""
    ingest(gallery, [faces], batch_size=8, workers=1)
    search(gallery)
    return gallery


@pytest.fixture
def reader(filled: Gallery) -> Iterator[Gallery]:
    """Another opening of it, as of a process that only searches."""
    with Gallery.open(filled.vault.folder, read_only=True) as opened:
        search(opened)
        yield opened


def search(gallery: Gallery) -> None:
    gallery.search_by_vector(np.zeros(gallery.bundle.dimension, np.float32))


def deleted_files(gallery: Gallery) -> set[str]:
    """The vector files of a gallery that are mapped and exist no more."""
    vectors = os.fsencode(gallery.vault.folder / "vectors") + b"/"
    mapped = [line for line in Path("/proc/self/maps").read_bytes().splitlines() if vectors in line]
    assert mapped
    return {os.fsdecode(line.partition(vectors)[2]) for line in mapped if line.endswith(b" (deleted)")}


def test_forgetting_closes_the_replaced_files_of_the_model_before_too(
    filled: Gallery, other: ModelBundle
) -> None:
    assert filled.reembed(other).switched
    search(filled)
    filled.forget(filled.bundle.labels[0])
    assert deleted_files(filled) == set()
    assert filled.reembed(filled.other_model()).switched  # which has the vectors of all others
    assert deleted_files(filled) == set()


def test_embedding_anew_closes_the_files_that_it_merged(
    filled: Gallery, other: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the gallery switches models, its searches are of the other generation."""
    monkeypatch.setattr(reembed, "_PROGRESS_FACES", 5)
    assert not filled.reembed(other, switch=False).switched
    assert deleted_files(filled) == set()


def test_a_reader_closes_what_a_writer_deleted_with_its_next_search(
    filled: Gallery, reader: Gallery, other: ModelBundle
) -> None:
    assert filled.reembed(other).switched
    search(reader)
    filled.forget(filled.bundle.labels[0])
    assert deleted_files(filled)
    search(reader)
    assert deleted_files(filled) == set()
