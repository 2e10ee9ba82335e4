"""The cache folder of this user: what it holds only saves time, and may be deleted at any moment."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """Returns a folder of faceprint's cache, which may not exist; None for a user without a home folder.

    It lies in `$XDG_CACHE_HOME/faceprint`, or in `~/.cache/faceprint`.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores a relative path; a user may have no home folder.
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~")) / ".cache"
    return base / "faceprint" / name if base.is_absolute() else None
