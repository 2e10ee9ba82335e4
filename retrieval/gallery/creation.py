"""Creates and restores galleries, for `Gallery`: a new folder appears complete, or not at all."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from retrieval.database.records import Receipt
from retrieval.errors import GalleryError, InputError, StorageError
from retrieval.models.bundle import ModelBundle
from retrieval.storage import optimization, ownership
from retrieval.storage.any_vault import AnyVault
from retrieval.storage.backup_integrity import gallery_model
from retrieval.storage.layout import VECTORS
from retrieval.storage.restore import Restored, restore_vault
from retrieval.storage.vault import Vault
from retrieval.system import files, lock
from retrieval.system.files import whole_folder, why
from retrieval.system.places import Place


def is_free(place: Place) -> bool:
    """Returns whether there is nothing at a place where a gallery can be created.

    Raises:
        InputError, MissingDependency, GalleryBusy, StorageError: a database cannot be asked.
    """
    if place.database is not None:
        from retrieval.database.engines.postgresql import Postgresql

        return not Postgresql.has_gallery(place.database)
    return files.is_free(Path(place.text))


def create(place: Place, bundle: ModelBundle, *, vectors: str | None, shared: bool) -> None:
    """Creates an empty gallery with a copy of the bundle; see `Gallery.create`."""
    if place.database is not None:
        from retrieval.storage.server_vault import ServerVault

        if vectors is None:
            raise InputError(
                "A gallery in PostgreSQL has its vectors in Milvus; give their address too, as "
                "`vectors=milvus://HOST:PORT/COLLECTION`."
            )
        if shared:
            raise InputError("`shared` is about a folder; in PostgreSQL, GRANT says who may read.")
        ServerVault.create(place.database, bundle, vectors)
        return
    _check_no_vectors(place, vectors)
    with _new_folder(Path(place.text), shared=shared) as made:
        Vault.create(made, bundle)


def open_vault(place: Place, *, vectors: str | None, read_only: bool, via: str) -> AnyVault:
    """Opens the rows and vectors of a gallery; see `Gallery.open`."""
    if place.database is not None:
        from retrieval.storage.server_vault import ServerVault

        return ServerVault.open(place.database, vectors=vectors, read_only=read_only, via=via)
    _check_no_vectors(place, vectors)
    return Vault.open(Path(place.text), read_only=read_only, via=via)


def _check_no_vectors(place: Place, vectors: str | None) -> None:
    if vectors is not None:
        raise InputError(f"The folder {place} has its vectors itself; leave `vectors` out.")


def restore(source: Path, folder: Path, *, receipts: Sequence[Receipt], via: str) -> Restored:
    """Restores a backup, to a new gallery or to the existing gallery that was backed up; returns the result.

    What was erased after the backup stays erased: the tombstones of the existing gallery ensure this, or
    `receipts` if the gallery is lost.

    Args:
        source: the folder of the backup.
        folder: the gallery's.
        receipts: receipts of erasures that neither the backup nor the gallery has.
        via: the caller's name in the audit log.

    Raises:
        DataError: `source` is no backup, or one of its files is not what was written; nothing was changed.
        InputError: the gallery in `folder` is not the one that was backed up.
        StorageError, GalleryBusy: nothing was changed.
    """
    if not files.is_free(folder):
        return _restore(source, folder, receipts=receipts, via=via, fresh=False)
    bundle = gallery_model(source)
    with _new_folder(folder) as made:
        Vault.create(made, bundle)
        restored = _restore(source, made, receipts=receipts, via=via, fresh=True)
    return dataclasses.replace(restored, folder=os.fspath(folder))


def _restore(source: Path, folder: Path, *, receipts: Sequence[Receipt], via: str, fresh: bool) -> Restored:
    with closing(Vault.open(folder, via=via)) as vault:
        restored = restore_vault(source, vault, receipts=receipts, fresh=fresh)
        optimization.optimize(vault)
    return restored


@contextmanager
def _new_folder(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes the gallery `target` when the block ends without an error.

    Raises:
        GalleryError: `target` exists and is not empty.
        StorageError: a file cannot be written.
    """
    lock.check_lockable(target)
    try:
        with whole_folder(target, shared=shared) as made:
            yield made
            ownership.record_path(made / VECTORS, target)
    except FileExistsError as error:
        raise GalleryError(f"{target} exists already and is not empty; choose another folder.") from error
    except OSError as error:
        raise StorageError(f"The gallery {target} cannot be made: {why(error)}.") from error
