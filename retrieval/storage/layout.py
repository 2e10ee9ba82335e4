"""Names of what is in the folder of a gallery or a backup; `retrieval.storage.vault` says what each is."""

from pathlib import Path
from typing import Final

DATABASE: Final = "gallery.db"
VECTORS: Final = "vectors"
ID_NAME: Final = "gallery.id"  # in the folder of vectors
MODEL: Final = "model"
BACKUP_CARD: Final = "backup.json"


def segment_path(folder: Path, segment: int) -> Path:
    """Where the vector file of a segment is."""
    return folder / VECTORS / f"{segment:08d}.faiss"
