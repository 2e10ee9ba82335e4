"""`DatabaseEngine`: what a store needs of the database that holds its tables."""

from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection


class DatabaseEngine(Protocol):
    """An opened database with the tables of one gallery. Safe to share between threads."""

    @property
    def gallery(self) -> str:
        """Returns what messages call the gallery: its folder, or its address without a password."""

    def creating(self) -> AbstractContextManager[Connection]:
        """Returns a context with the transaction that has made the tables, for the first rows of a gallery.

        Raises:
            StorageError: the machine, or the server, refused.
        """

    def reading(self) -> AbstractContextManager[Connection]:
        """Returns a context with a connection that sees one snapshot until it ends, and cannot write.

        Raises:
            StorageError: the machine, or the server, refused.
            GalleryDamaged: the tables are not what was written.
        """

    def writing(self) -> AbstractContextManager[Connection]:
        """Returns a context with the only transaction that writes: later ones wait for it.

        It is committed durably at the end, unless the with statement raises.

        Raises:
            GalleryBusy: another transaction did not end in time.
            StorageError: the machine, or the server, refused; nothing was changed.
            GalleryDamaged: the tables are not what was written.
        """

    def problems(self) -> list[str]:
        """Returns what the database's own checks find wrong, a clause each; empty without any."""

    def size(self) -> int:
        """Returns the bytes on disk of tables and indexes."""

    def close(self) -> None:
        """Closes all connections."""
