"""A gallery and its backup."""

import shutil
from pathlib import Path

import pytest

from retrieval.gallery.gallery import Gallery
from tests.operations import add, tiny_model


@pytest.fixture(scope="session")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of two models and three segments, and its backup; no test changes them."""
    root = tmp_path_factory.mktemp("laid")
    model = tiny_model(root / "model")
    (model.folder / "MODELCARD.md").write_text("# A card for people\n")
    with Gallery.create(root / "gallery", model) as gallery:
        add(gallery, range(8))
        add(gallery, range(8, 11))
    # Read only, so that the gallery stays what was backed up: otherwise its log says that there is a backup.
    with Gallery.open(root / "gallery", read_only=True) as gallery:
        gallery.backup(root / "backup")
    return root


@pytest.fixture
def root(laid: Path, tmp_path: Path) -> Path:
    """A copy of these."""
    return Path(shutil.copytree(laid, tmp_path / "root"))
