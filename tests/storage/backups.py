"""Ways to damage the files of a backup, and to back up again."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from retrieval.errors import FaceprintError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.storage import backup
from retrieval.storage.backup_integrity import check_backup


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    """The right bytes, which lie elsewhere: another backup may change them."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [
    lambda path: flip(path, 0),
    lambda path: flip(path, len(path.read_bytes()) // 2),
    lambda path: flip(path, -2),
    cut,
    remove,
    empty,
    link,
    folder,
]


def back_up(root: Path, **options: Any) -> Any:
    with Gallery.open(root / "gallery", read_only=True) as gallery:
        return backup.back_up(gallery.vault, root / "backup", **options)


def sealed(path: Path, **changes: Any) -> None:
    """Changes a card, and its own checksum with it, as whoever wants to deceive does."""
    card = json.loads(path.read_text())
    card |= changes
    card.pop("sha256", None)
    card["sha256"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(card))


def refused(root: Path) -> str:
    """The sentence with which each command refuses a backup; nothing is made."""
    said = set()
    for work in (
        lambda: Gallery.restore(root / "backup", root / "new"),
        lambda: Gallery.restore(root / "backup", root / "gallery"),
    ):
        with pytest.raises(FaceprintError) as caught:
            work()
        assert caught.value.exit_status in (1, 2)
        said.add(str(caught.value))
    assert not (root / "new").exists()
    assert verify(root / "gallery").whole
    with suppress(FaceprintError):
        assert check_backup(root / "backup") != []
    (sentence,) = said
    assert sentence.endswith(".")
    return sentence
