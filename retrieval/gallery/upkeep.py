"""The upkeep of a gallery: another model, integrity, speed, backups and exports."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from retrieval.database.records import Receipt
from retrieval.embedding.outcome import Outcome
from retrieval.gallery import creation, integrity, reembed, repair
from retrieval.gallery.active_model import ActiveModel
from retrieval.gallery.enrollment import Enrollment
from retrieval.gallery.integrity import Verification
from retrieval.gallery.reembed import Reembedded
from retrieval.gallery.repair import Repaired
from retrieval.models.bundle import ModelBundle
from retrieval.storage import backup, compaction, optimization
from retrieval.storage.any_vault import AnyVault
from retrieval.storage.backup import BackedUp
from retrieval.storage.compaction import Compacted
from retrieval.storage.optimization import Optimized
from retrieval.storage.restore import Restored
from retrieval.storage.vault import Vault, in_folder
from retrieval.system.places import Place
from retrieval.transfer import export, import_
from retrieval.transfer.import_ import Imported
from retrieval.transfer.manifest import Export

# What to do with a gallery in databases instead.
_COPY_TO_REEMBED: Final = "copy it to one with `faceprint copy`, embed that anew, and copy it back"
_RESTORE: Final = "restore the databases from backups of their own, or copy a folder to new ones"
_BACK_UP: Final = "back up both servers by their own means, or copy it to a folder and back up that"
_NO_CODES: Final = "Milvus compares whole vectors, without codes"
_COMPACT: Final = "VACUUM the tables in PostgreSQL, and compact the collection in Milvus"


def verify_at(place: Place, vectors: str | None = None) -> Verification:
    """Checks the gallery at a place; see `GalleryUpkeep.verify`, which needs an undamaged one."""
    if place.database is None:
        return integrity.verify(Path(place.text))
    from retrieval.gallery import server_integrity

    return server_integrity.verify(place.database, vectors)


class GalleryUpkeep:
    """The upkeep of `Gallery`, which inherits it.

    Attributes:
        vault: the gallery's rows and vectors.
        enrollment: its stages of enrollment.
    """

    vault: AnyVault
    enrollment: Enrollment
    _model: ActiveModel

    def _in_folder(self, instead: str) -> Vault:
        return in_folder(self.vault, instead)

    # Switching models

    def reembed(
        self,
        bundle: ModelBundle,
        *,
        switch: bool = True,
        give_up: bool = False,
        fetch: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Reembedded:
        """Embeds all faces with another model and switches to it; see `gallery.reembed.reembed`."""
        vault = self._in_folder(_COPY_TO_REEMBED)
        done = reembed.reembed(
            vault,
            bundle,
            self._model.open_other,
            switch=switch,
            give_up=give_up,
            fetch=fetch,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        self._model.current()
        if done.switched:
            optimization.optimize(vault)
        return done

    def other_model(self) -> ModelBundle:
        """Returns the model that is not active: the former one, or one that is not complete yet.

        Raises:
            InputError: the gallery has one model only.
        """
        return reembed.other_model(self._in_folder(_COPY_TO_REEMBED))

    def drop_other_model(self) -> int:
        """Deletes the model that is not active, with its vectors; returns the number of vectors.

        Raises:
            InputError: the gallery has one model only.
        """
        return reembed.drop_other(self._in_folder(_COPY_TO_REEMBED))

    # Integrity and speed

    def verify(self) -> Verification:
        """Reads every byte and compares it with what was written; see `integrity.verify`.

        In databases it reads every row and every vector; see `server_integrity.verify`.
        """
        self.vault.store.check_open()
        return verify_at(Place.of(self.vault.place), self.vault.vectors_address)

    def repair(
        self,
        *,
        backup: str | os.PathLike[str] | None = None,
        model: ModelBundle | None = None,
        give_up: bool = False,
        fetch: bool = False,
    ) -> Repaired:
        """Repairs damage without guessing; see `retrieval.repair`, which needs no open gallery."""
        self.vault.store.check_open()
        return repair.repair(
            self._in_folder(_RESTORE).folder,
            backup=backup,
            model=model,
            give_up=give_up,
            fetch=fetch,
            device=self._model.device,
            engine=self._model.engine,
        )

    def optimize(self, *, anew: bool = False) -> Optimized:
        """Makes searches faster, if that is due; answers do not change. See `optimization.optimize`."""
        return optimization.optimize(self._in_folder(_NO_CODES), anew=anew)

    def compact(self) -> Compacted:
        """Merges segments into as few as possible, and erases what no row of the database uses.

        The database is written anew, without free pages, where that saves at least a tenth of it; others
        cannot write meanwhile.

        Raises:
            StorageError, GalleryBusy: segments that were merged before the error stay merged.
        """
        return compaction.compact(self._in_folder(_COMPACT))

    # Copies

    def backup(self, target: str | os.PathLike[str], *, verify: bool = True) -> BackedUp:
        """Copies one snapshot to a backup, or what is new since the last backup; see `backup.back_up`.

        Other threads and processes may write meanwhile.
        """
        return backup.back_up(self._in_folder(_BACK_UP), Path(target), verify=verify)

    @classmethod
    def restore(
        cls,
        backup: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        receipts: Sequence[Receipt] = (),
        via: str = "library",
    ) -> Restored:
        """Restores a backup, to a new gallery or to the one that was backed up; see `creation.restore`."""
        return creation.restore(Path(backup), Path(folder), receipts=receipts, via=via)

    def export(self, target: str | os.PathLike[str]) -> Export:
        """Writes one snapshot as Parquet, with the model's contract, and checksums; see `transfer.export`.

        Raises:
            InputError: `target` exists and is not empty.
            MissingDependency: pyarrow is not installed.
        """
        return export.export(self.vault, Path(target))

    def import_export(
        self,
        exported: Export,
        *,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Imported:
        """Enrolls the export of another gallery, as read by `export_reader.read_export`; see there."""
        enroll = partial(self.enrollment.enroll_vectors, fingerprint=exported.fingerprint)
        return import_.import_export(
            self.vault, exported, enroll, on_outcome=on_outcome, should_stop=should_stop
        )
