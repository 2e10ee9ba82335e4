"""Repair of a gallery's folder, which works also where the gallery can no longer be opened."""

import os
from pathlib import Path

from retrieval.gallery import integrity
from retrieval.gallery.integrity import Repaired
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.storage.backup import files_by_sha256


def repair(
    folder: str | os.PathLike[str],
    *,
    backup: str | os.PathLike[str] | None = None,
    model: ModelBundle | None = None,
    give_up: bool = False,
    fetch: bool = False,
    device: str = "auto",
    engine: str = "auto",
) -> Repaired:
    """Mends what can be mended of a gallery, also one that can no longer be opened.

    Args:
        folder: the gallery's.
        backup: a backup of it, for files that have the SHA-256 which was written down.
        model: another copy of its model.
        give_up: remove faces whose vectors nothing can bring back.
        fetch: read photos at addresses, from hosts that photos were enrolled from; see `remote.Fetching`.
        device, engine: see `Embedder.open`.

    Raises:
        GalleryError: there is no gallery.
        StorageError, GalleryBusy: what was mended until then stays mended.
    """
    files = files_by_sha256(Path(backup)) if backup is not None else {}
    return integrity.repair(
        Path(folder),
        lambda loaded: Embedder.open(loaded, device=device, engine=engine),
        backup=files.get,
        model=model,
        give_up=give_up,
        fetch=fetch,
    )
