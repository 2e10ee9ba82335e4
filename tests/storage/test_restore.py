"""Restoring backups: the content comes back as it was, and what was erased since stays erased."""

from pathlib import Path

import pytest

from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.models.bundle import ModelBundle
from tests.operations import add, contents, face, tiny_model
from tests.storage.backups import flip


def test_restoring_in_place_does_not_go_on_with_a_damaged_model(root: Path) -> None:
    """Its fingerprint and its card are those of the backup; its weights are not."""
    for name in ("model.onnx", "model.safetensors"):
        (model,) = (path for path in (root / "gallery").iterdir() if path.name.startswith("model"))
        flip(model / name, 100)
        Gallery.restore(root / "backup", root / "gallery")
        assert verify(root / "gallery").whole
    before = sorted(path.name for path in (root / "gallery").iterdir())
    Gallery.restore(root / "backup", root / "gallery")
    assert sorted(path.name for path in (root / "gallery").iterdir()) == before


def test_ids_on_a_receipt_are_not_given_to_others_after_a_restore(tmp_path: Path) -> None:
    """A gallery is lost, and with it the ids that it had given; those on a receipt are nobody else's."""
    with Gallery.create(tmp_path / "lost", tiny_model(tmp_path / "model")) as lost:
        add(lost, range(2))
        lost.backup(tmp_path / "backup")
        add(lost, range(2, 4))
        receipts = [lost.forget(face_id=4), lost.forget(face(2).identity)]
    Gallery.restore(tmp_path / "backup", tmp_path / "people.gallery", receipts=receipts)
    with Gallery.open(tmp_path / "people.gallery") as gallery:
        add(gallery, range(10, 16))
        gallery.backup(tmp_path / "newer")
    before = contents(tmp_path / "people.gallery")
    assert len(before) == 8
    assert Gallery.restore(tmp_path / "newer", tmp_path / "people.gallery").forgotten_again == 0
    assert contents(tmp_path / "people.gallery") == before


def test_a_restore_in_place_brings_everything_back_except_what_was_erased_since(root: Path) -> None:
    before = contents(root / "gallery")
    with Gallery.open(root / "gallery") as gallery:
        erased = gallery.forget(face_id=4)
        add(gallery, range(20, 24))
    restored = Gallery.restore(root / "backup", root / "gallery")
    assert (restored.faces, restored.forgotten_again, erased.face_ids) == (10, 1, (4,))
    assert contents(root / "gallery") == {
        key: vector for key, vector in before.items() if key[0] != face(3).sha256
    }
    assert verify(root / "gallery").whole


def test_a_backup_of_another_gallery_is_not_restored_over_a_gallery(root: Path) -> None:
    Gallery.create(root / "another", ModelBundle.load(root / "model")).close()
    before = contents(root / "another")
    with pytest.raises(InputError, match="is a backup of another gallery than"):
        Gallery.restore(root / "backup", root / "another")
    assert contents(root / "another") == before
