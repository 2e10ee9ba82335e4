"""Work that is left after a commit: it is done once its own commit is, and not sooner."""

from pathlib import Path

import pytest

from retrieval.database.writer import Writer
from retrieval.errors import StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.storage.deferred import DeferredWork
from tests.operations import add, tiny_model


def left(gallery: Gallery) -> str:
    with gallery.vault.store.read() as reader:
        return DeferredWork.read(reader).erase


def test_an_erasure_whose_commit_fails_is_left_for_the_next_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until that commit connections may have old pages in memory, and write back what was zeroed."""
    write, fails = DeferredWork.write, True

    def fails_at_first(work: DeferredWork, writer: Writer) -> None:
        write(work, writer)
        if not work and fails:
            raise StorageError("The disk is full.")

    with Gallery.create(tmp_path / "g", tiny_model(tmp_path / "model")) as gallery:
        add(gallery, range(8))
        monkeypatch.setattr(DeferredWork, "write", fails_at_first)
        with pytest.raises(StorageError, match="its traces cannot be erased"):
            gallery.forget(face_id=1)
        add(gallery, range(20, 22))
        assert left(gallery) == "pages"
        fails = False
        add(gallery, range(30, 32))
        assert left(gallery) == ""
