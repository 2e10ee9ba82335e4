"""Restoring a backup."""

from pathlib import Path

from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
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
