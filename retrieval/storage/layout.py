"""File names in the folder of a gallery or a backup; `retrieval.storage.vault` describes each."""

from pathlib import Path
from typing import Final

DATABASE: Final = "gallery.db"
VECTORS: Final = "vectors"
ID_NAME: Final = "gallery.id"  # in the vectors folder
MODEL: Final = "model"
BACKUP_CARD: Final = "backup.json"
FOLLOWER_CARD: Final = "follower.json"
FOLLOWER_LOCK: Final = "follower.lock"
TOKENS: Final = "tokens.json"
TOKENS_USED: Final = "tokens.used.json"


def segment_path(folder: Path, segment: int) -> Path:
    """Returns the path of a segment's vector file."""
    return folder / VECTORS / f"{segment:08d}.faiss"
