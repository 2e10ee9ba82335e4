"""Where `copying` copies a gallery to: a folder, or two databases. What an interrupted copy stored stays."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.database.records import GalleryRow, Generation, Segment
from retrieval.database.writer import Writer
from retrieval.errors import GalleryDamaged, GalleryError, StorageError
from retrieval.gallery.integrity import hash_file
from retrieval.index.segments import FlatVectors, Ids, Vectors
from retrieval.models.bundle import ModelBundle
from retrieval.storage import optimization, ownership
from retrieval.storage.layout import VECTORS
from retrieval.storage.vault import Vault
from retrieval.system import files, lock
from retrieval.system.files import make_folder, remove, sync, why, write_durably

# Of an unfinished copy to a folder: what it is a copy of.
_CARD: Final = "copy.json"


class Target(Protocol):
    """A gallery in the making.

    Attributes:
        name: what messages call it.
        advice: what to do if it is not equal to its source, as the end of a sentence.
        generation: the number of its model.
    """

    name: str
    advice: str
    generation: int

    def begin(self, rows: Ids) -> Ids:
        """Returns the ids of vectors that an interrupted copy has stored, ascending; removes those of others.

        Args:
            rows: the ids of all faces, ascending.
        """

    def put(self, ids: Ids, vectors: Vectors) -> None:
        """Stores vectors durably."""

    def stored(self, rows: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """Yields all stored vectors, as they are read back."""

    def finish(self, bundle: ModelBundle, fill: Callable[[Writer], None]) -> None:
        """Makes a gallery of it: `fill` adds the rows in the one transaction, or raises and there is none."""

    def close(self) -> None:
        """Ends what it uses."""


class FolderTarget:
    """A folder, as `Target`. Until it is finished its files lie in a folder beside it, NAME.copying."""

    def __init__(self, folder: Path, source: GalleryRow, generation: Generation) -> None:
        """Checks that there is nothing else.

        Raises:
            GalleryError: the folder is not empty, or what is beside it is a copy of another gallery.
            StorageError: a folder cannot be made.
        """
        self.name, self.generation = str(folder), 1
        self._folder, self._work = folder, folder.with_name(f"{folder.name}.copying")
        self.advice = f"remove {self._work} and copy again"
        if not files.is_free(folder):
            raise GalleryError(f"{folder} exists already and is not empty; choose another folder.")
        stated = {"gallery": source.uuid, "fingerprint": generation.fingerprint}
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_folder(self._work, exist_ok=True)
            lock.check_lockable(self._work)
            if files.is_free(self._work):
                write_durably(self._work / _CARD, json.dumps(stated).encode())
            with suppress(OSError, ValueError):
                if json.loads((self._work / _CARD).read_bytes()) == stated:
                    make_folder(self._work / VECTORS, exist_ok=True)
                    self._flat = FlatVectors(self._work / VECTORS, generation.dimension)
                    self._first = source.next_segment_id
                    return
        except OSError as error:
            raise StorageError(f"The copy {folder} cannot be made: {why(error)}.") from error
        raise GalleryError(
            f"{self._work} is not an unfinished copy of this gallery and its model; remove it, or choose "
            "another folder."
        )

    def begin(self, rows: Ids) -> Ids:
        """See `Target`."""
        # A copy was stopped while it was put together.
        for path in (self._work / "gallery" / VECTORS).glob("*.faiss"):
            os.replace(path, self._flat.folder / path.name)
        remove(self._work / "gallery")
        found = [np.empty(0, np.int64)]
        for path in self._segments():
            try:
                ids, _ = self._flat.rows_of_file(path)
            except GalleryDamaged:
                ids = np.array([0], np.int64)
            # Also a part with faces that were forgotten since, or that another part has.
            if np.isin(ids, rows).all() and not np.isin(ids, np.concatenate(found)).any():
                found.append(np.array(ids))
            else:
                remove(path)
        return np.sort(np.concatenate(found))

    def put(self, ids: Ids, vectors: Vectors) -> None:
        """See `Target`."""
        last = max((int(path.stem) for path in self._segments()), default=self._first - 1)
        self._flat.write(last + 1, [(ids, vectors)])

    def stored(self, rows: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """See `Target`."""
        return (self._flat.rows_of_file(path) for path in self._segments())

    def finish(self, bundle: ModelBundle, fill: Callable[[Writer], None]) -> None:
        """See `Target`."""
        made = self._work / "gallery"
        try:
            make_folder(made, like=self._work)
            Vault.create(made, bundle)
            segments = []
            for path in self._segments():
                ids, _ = self._flat.rows_of_file(path)
                size, digest = hash_file(path)
                segments.append(Segment(int(path.stem), len(ids), size, digest, self.generation))
                os.replace(path, made / VECTORS / path.name)
            sync(made / VECTORS)
            with closing(Vault.open(made, via="faceprint copy")) as vault:
                with vault.noting() as writer:
                    writer.replace_segments([], segments)
                    writer.set_gallery(next_segment_id=1 + max((one.id for one in segments), default=0))
                    fill(writer)
                optimization.optimize(vault)
            ownership.record_path(made / VECTORS, self._folder)
            with suppress(FileNotFoundError):
                self._folder.rmdir()  # an empty one is replaced
            os.rename(made, self._folder)
            sync(self._folder.parent)
            remove(self._work)
        except OSError as error:
            raise StorageError(f"The copy {self._folder} cannot be made: {why(error)}.") from error

    def close(self) -> None:
        """See `Target`."""
        self._flat.forget_all_but(())

    def _segments(self) -> list[Path]:
        return sorted(self._flat.folder.glob("*.faiss"))


class ServerTarget:
    """Two databases, as `Target`. Until it is finished, an alias in Milvus marks the collection."""

    def __init__(self, address: str, vectors: str, source: GalleryRow, generation: Generation) -> None:
        """Checks that there is nothing else, and creates the collection unless an interrupted copy has.

        Raises:
            GalleryError: the schema is not empty, or the collection is not that of an unfinished copy.
            InputError, MissingDependency, GalleryBusy, StorageError: as of `ServerVault.create`.
        """
        from retrieval.index.milvus import MilvusVectors
        from retrieval.storage.server_vault import check_free, owner

        self._address, self._gallery = address, source.uuid
        self._end = source.next_face_id
        self.name, self.generation = check_free(address), 1
        of = owner(source.uuid, generation.fingerprint)
        self._collection = MilvusVectors.create_unfinished(vectors, generation.dimension, owner=of)
        self.advice = f"drop the collection {self._collection.name} and copy again"

    def begin(self, rows: Ids) -> Ids:
        """See `Target`."""
        there = self._collection.ids(self._end)
        self._collection.remove(np.setdiff1d(there, rows))
        return np.intersect1d(there, rows)

    def put(self, ids: Ids, vectors: Vectors) -> None:
        """See `Target`."""
        self._collection.put(ids, vectors)

    def stored(self, rows: Ids) -> Iterator[tuple[Ids, NDArray[np.float32]]]:
        """See `Target`."""
        step = 8192
        parts = (rows[start : start + step] for start in range(0, len(rows), step))
        return ((ids, self._collection.fetch(ids)) for ids in parts)

    def finish(self, bundle: ModelBundle, fill: Callable[[Writer], None]) -> None:
        """See `Target`."""
        from retrieval.storage.server_vault import create_rows

        def fill_last(writer: Writer) -> None:
            fill(writer)
            # Before the commit: a gallery never has a collection that a copy may change.
            self._collection.mark_finished()

        name = self._collection.name
        create_rows(self._address, bundle, name, gallery=self._gallery, fill=fill_last)

    def close(self) -> None:
        """See `Target`."""
        self._collection.close()
