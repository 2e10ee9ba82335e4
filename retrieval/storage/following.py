"""Followers: folders that keep a read-only copy of a published gallery; their card, and how old they may be.

`retrieval.replication` writes them. The database of a follower never changes: a new one takes its place,
under the same name, in one rename. So it is read without locks, and a reader that has the old one open keeps
one state.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from retrieval.errors import GalleryError, InputError, OutOfDate, StorageError
from retrieval.storage.layout import FOLLOWER_CARD
from retrieval.system.files import why, write_durably
from retrieval.system.manifests import read_manifest

_FORMAT: Final = 1
_ADVICE: Final = "run `faceprint follow` again, which writes it anew"


@dataclass(frozen=True, slots=True)
class Follower:
    """What a folder follows, and which state of it the folder has.

    Attributes:
        address: where the gallery is published.
        name: of the follower, in the list of followers.
        publisher: who publishes the gallery: a machine and a folder.
        gallery: the UUID of the gallery.
        folder_id: the id of the vectors folder of the gallery that is published.
        number: of the published state that is here; 0 before the first one is complete.
        revision: of the gallery in that state.
        current_at: when the publisher last said that this is the gallery's state; ISO 8601, UTC.
        max_age: searches are refused when `current_at` is longer ago than so many seconds; None for never.
    """

    address: str
    name: str
    publisher: str
    gallery: str
    folder_id: str
    number: int
    revision: int
    current_at: str
    max_age: float | None = None

    def age(self) -> float:
        """Returns the seconds since the publisher last said that this is the gallery's state; at least 0.

        The two machines' clocks are compared.
        """
        return max(0.0, time.time() - datetime.fromisoformat(self.current_at).timestamp())

    def is_too_old(self) -> bool:
        """Returns whether searches are refused."""
        return self.max_age is not None and self.age() > self.max_age

    def facts(self) -> dict[str, Any]:
        """Returns what `info` says of a follower."""
        return {
            "address": self.address,
            "name": self.name,
            "publisher": self.publisher,
            "number": self.number,
            "revision": self.revision,
            "current_at": self.current_at,
            "age_seconds": self.age(),
            "max_age": self.max_age,
        }


@dataclass(frozen=True)
class _Stated(Follower):
    format: int = 0


def read_follower(folder: Path) -> Follower | None:
    """Returns the card of a follower; None for a folder that follows nothing.

    Raises:
        GalleryError: the card is damaged, or a newer version wrote it.
        StorageError: it cannot be read.
    """
    path = folder / FOLLOWER_CARD
    if not path.is_file():
        return None
    said = read_manifest(path, _Stated, error=GalleryError, advice=_ADVICE, max_bytes=2**20)
    if said.format > _FORMAT:
        raise GalleryError(f"The copy {folder} was made by a newer version of faceprint; upgrade faceprint.")
    fields = {name: value for name, value in asdict(said).items() if name != "format"}
    try:
        if datetime.fromisoformat(said.current_at).tzinfo is None:
            raise ValueError("it has no time zone")
    except ValueError as error:
        raise GalleryError(f"{path} is damaged (the field current_at: it is no time); {_ADVICE}.") from error
    return Follower(**fields)


def write_follower(folder: Path, card: Follower) -> None:
    """Writes the card of a follower durably.

    Raises:
        StorageError: the file system refused.
    """
    text = json.dumps({"format": _FORMAT, **asdict(card)}, indent=1) + "\n"
    try:
        write_durably(folder / FOLLOWER_CARD, text.encode(), inherit=True, anything=True)
    except OSError as error:
        raise StorageError(f"{folder / FOLLOWER_CARD} cannot be written: {why(error)}.") from error


class FollowerCard:
    """The card of the follower in a folder, read again whenever it was replaced."""

    def __init__(self, folder: Path, card: Follower) -> None:
        self.folder = folder
        self._card = card
        self._stamp: tuple[int, int] | None = None

    @classmethod
    def of(cls, folder: Path) -> "FollowerCard | None":
        """Returns the card of a folder; None for a folder that follows nothing.

        Raises:
            GalleryError, StorageError: as `read_follower`.
        """
        card = read_follower(folder)
        return None if card is None else cls(folder, card)

    def current(self) -> Follower:
        """Returns what the card says now.

        Raises:
            GalleryError, StorageError: as `read_follower`.
        """
        try:
            status = os.stat(self.folder / FOLLOWER_CARD)
        except OSError as error:
            raise StorageError(f"{self.folder / FOLLOWER_CARD} cannot be read: {why(error)}.") from error
        stamp = status.st_mtime_ns, status.st_ino
        if stamp != self._stamp:
            self._card, self._stamp = read_follower(self.folder) or self._card, stamp
        return self._card

    def check_age(self) -> None:
        """Checks that the copy is not older than it may be.

        Raises:
            OutOfDate: it is.
        """
        card = self.current()
        if card.is_too_old():
            raise OutOfDate(
                f"{self.folder} is {card.age():,.0f} s behind {card.address}, and {card.max_age:,.0f} s are "
                "allowed: see that `faceprint publish --every` runs there and `faceprint follow` here."
            )

    def refuses_writing(self) -> InputError:
        """Returns the error for a change of the copy."""
        card = self.current()
        return InputError(
            f"{self.folder} is a read-only copy of {card.address}; change the gallery itself, "
            f"{card.publisher}, which is published there."
        )
