"""A gallery of drawn faces, and a server for it that tests share; none of these tests changes the gallery."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval import Gallery, ModelBundle, ingest
from tests.service.server import Server


@pytest.fixture(scope="session")
def enrolled(bundle: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a gallery with all drawn faces; a test that changes it is told so at the end."""
    folder = tmp_path_factory.mktemp("served") / "people.gallery"
    with Gallery.create(folder, bundle) as gallery:
        assert ingest(gallery, [faces]).enrolled == 36
    yield folder
    with Gallery.open(folder, read_only=True) as gallery:
        assert [entry.action for entry in gallery.audit_log()] == ["enroll"]


@pytest.fixture(scope="session")
def served(enrolled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for it; its log has no error at the end."""
    with Server(enrolled, tmp_path_factory.mktemp("log") / "log", "--access-log", cold=True) as server:
        yield server
    log = server.log.read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log


@pytest.fixture
def own_gallery(enrolled: Path, tmp_path: Path) -> Path:
    """A copy of the gallery, to be changed."""
    return Path(shutil.copytree(enrolled, tmp_path / "own.gallery"))
