"""Deferred work: what can only be done once a transaction stands.

Traces of deleted rows are erased from the database's file and log, and names are taken off a model's card.
The transaction writes down what is to be done, so that the next writer does it where its own could not.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from retrieval.database import page_checksums
from retrieval.database.reader import Reader
from retrieval.database.records import MODEL_FOLDER, check_name
from retrieval.database.store import Store
from retrieval.database.writer import Writer
from retrieval.errors import GalleryDamaged, StorageError
from retrieval.models.bundle import ModelBundle, Relabel
from retrieval.system.files import remove, why

# How long erasing waits for those who still read an older state, in seconds.
ERASE_TIMEOUT: Final = 30.0


@dataclass
class DeferredWork:
    """What is left to do once a transaction stands. The gallery's row holds it, as JSON.

    Attributes:
        erase: "all" for writing the database anew and emptying its log, "log" where only that is left.
        labels: new labels by their number, by the folder of their model.
    """

    erase: str
    labels: dict[str, dict[int, Relabel]]

    def __bool__(self) -> bool:
        return bool(self.erase or self.labels)

    @classmethod
    def read(cls, reader: Reader) -> "DeferredWork":
        """What a snapshot has; nothing where all is done.

        Raises:
            GalleryDamaged: it cannot be read.
        """
        unfinished = reader.gallery().unfinished
        if unfinished is None:
            return cls("", {})
        try:
            stored = json.loads(unfinished)
            for folder in stored["labels"]:
                check_name(MODEL_FOLDER, folder)
            labels = {
                folder: {int(number): Relabel(*change) for number, change in changes.items()}
                for folder, changes in stored["labels"].items()
            }
            return cls(stored["erase"], labels)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GalleryDamaged(
                "What the gallery has to finish after its last write cannot be read; restore it from a "
                "backup."
            ) from error

    def write(self, writer: Writer) -> None:
        """Stores it in place of what was stored, to be committed with the transaction."""
        labels = {
            folder: {number: (change.label, change.keep_photos) for number, change in changes.items()}
            for folder, changes in self.labels.items()
        }
        stored = json.dumps({"erase": self.erase, "labels": labels})
        writer.set_gallery(unfinished=stored if self else None)

    def relabelled(self, bundle: ModelBundle) -> ModelBundle:
        """A model under the labels that it is to have."""
        return bundle.relabelled(self.labels.get(bundle.folder.name, {}))


def defer(folder: Path, writer: Writer, *, erase: bool, labels: Mapping[str, Mapping[int, Relabel]]) -> None:
    """Writes down what has to be done once the transaction stands, beside what is deferred already.

    Args:
        folder: the gallery's.
        writer: of the transaction, which is then not over before this is done.
        erase: leave no trace of deleted rows in the database's file and log.
        labels: new labels by their number, by the folder of their model.
    """
    work = DeferredWork.read(writer)
    for generation in writer.generations().values():
        if generation.folder in labels:
            work.labels.setdefault(generation.folder, {}).update(labels[generation.folder])
            changed = work.relabelled(ModelBundle.load(folder / generation.folder))
            writer.set_card(generation.id, hashlib.sha256(changed.card().encode()).hexdigest())
    work.erase = "all" if erase else work.erase
    work.write(writer)
    writer.defers = bool(work)


def run(store: Store, folder: Path, *, insist: bool, tidy: Callable[[], bool]) -> None:
    """Does what committed transactions have deferred, whoever committed them. Only for the one writer.

    Args:
        store: the gallery's tables.
        folder: the gallery's.
        insist: wait for those who still read an older state, and raise if they do not finish.
        tidy: removes the files that nothing names; says whether all of them went.

    Raises:
        StorageError: `insist`, and it cannot be done now; later writers will try again.
    """
    with store.read() as reader:
        work, deferred = DeferredWork.read(reader), DeferredWork.read(reader)
    if not work:
        return
    try:
        for name in list(work.labels):
            work.relabelled(ModelBundle.load(folder / name)).rewrite_card()
            del work.labels[name]
        _erase_traces(store, folder, work, tidy, timeout=ERASE_TIMEOUT if insist else 0.0)
    except StorageError:
        if insist:
            raise
    if work != deferred:
        with store.write() as writer:
            work.write(writer)


def _erase_traces(
    store: Store, folder: Path, work: DeferredWork, tidy: Callable[[], bool], *, timeout: float
) -> None:
    """Writes the database anew and empties its log, as far as that is deferred.

    Raises:
        StorageError: it cannot be done now; `work` says what is left.
    """
    if not work.erase:
        return
    later = f"run `faceprint compact {folder}`"
    try:
        if not tidy():
            raise StorageError(f"a vector file is missing; see `faceprint repair {folder}`")
        if work.erase == "all":
            for copy in store.upgrade_copies():
                remove(copy)
            page_checksums.discard(store.path)
            store.vacuum()
            work.erase = "log"
        done = store.checkpoint(timeout=timeout)
    except (OSError, StorageError) as error:
        reason = why(error) if isinstance(error, OSError) else str(error).rstrip(".")
        raise StorageError(
            "What was deleted is gone from every answer, but its traces cannot be erased from "
            f"{store.path} ({reason}); {later} when that is mended."
        ) from error
    if not done:
        raise StorageError(
            "What was deleted is gone from every answer, but another process still reads an older state "
            f"of {folder}; {later} when it has finished."
        )
    work.erase = ""
