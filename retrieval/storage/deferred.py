"""Deferred work of the vault: work that can only be done after a transaction has committed.

It erases traces of deleted rows from the database file and its log, and removes names from a model's card.
The transaction records the work, so that the next writer does it if its own writer could not.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

from retrieval.database.reader import Reader
from retrieval.database.records import MODEL_FOLDER, check_name
from retrieval.database.store import Store
from retrieval.database.writer import Writer
from retrieval.errors import GalleryDamaged, StorageError
from retrieval.models.bundle import ModelBundle, Relabel
from retrieval.system.files import remove, why

# The longest wait of an erasure for readers of an older snapshot, in seconds.
ERASE_TIMEOUT: Final = 30.0

# A compaction writes the database anew if that saves at least this much of it: others wait meanwhile, seconds
# with a million faces, and a minute with ten million.
_WORTH_REWRITING: Final = 0.1


@dataclass
class DeferredWork:
    """The work left after a commit. The gallery's row holds it as JSON.

    Attributes:
        erase: "pages" to empty the log of the database and zero the bytes of its pages that no row uses,
            "all" to write it anew instead where that is worth it, "log" to empty the log only, "" for none.
        labels: changes of labels by index, by the folder of their model.
    """

    erase: str
    labels: dict[str, dict[int, Relabel]]

    def __bool__(self) -> bool:
        return bool(self.erase or self.labels)

    @classmethod
    def read(cls, reader: Reader) -> "DeferredWork":
        """Returns the deferred work of a snapshot; empty where all is done.

        Raises:
            GalleryDamaged: the stored work cannot be read.
        """
        unfinished = reader.gallery().unfinished
        if unfinished is None:
            return cls("", {})
        try:
            stored = json.loads(unfinished)
            for folder in stored["labels"]:
                check_name(MODEL_FOLDER, folder)
            labels = {
                folder: {int(number): _relabel(*change) for number, change in changes.items()}
                for folder, changes in stored["labels"].items()
            }
            return cls(stored["erase"], labels)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GalleryDamaged(
                "What the gallery has to finish after its last write cannot be read; restore it from a "
                "backup."
            ) from error

    def write(self, writer: Writer) -> None:
        """Replaces the stored work, as a part of the transaction."""
        labels = {
            folder: {number: astuple(change) for number, change in changes.items()}
            for folder, changes in self.labels.items()
        }
        stored = json.dumps({"erase": self.erase, "labels": labels})
        writer.set_gallery(unfinished=stored if self else None)

    def relabelled(self, bundle: ModelBundle) -> ModelBundle:
        """Returns a model with its deferred label changes applied."""
        return bundle.relabelled(self.labels.get(bundle.folder.name, {}))


def _relabel(label: str | None, keep_photos: bool, photos: Sequence[Sequence[str]] | None = None) -> Relabel:
    """Returns the change of a label that is stored as JSON; older versions stored no photos."""
    moved = None if photos is None else tuple((part, name) for part, name in photos)
    return Relabel(label, keep_photos, moved)


def defer(
    folder: Path,
    writer: Writer,
    *,
    erase: bool,
    labels: Mapping[str, Mapping[int, Relabel]],
    rewrite: bool = False,
) -> None:
    """Records work to do after the commit, in addition to the work that is already deferred.

    Args:
        folder: the folder of the gallery.
        writer: the transaction; it then insists on this work after its commit.
        erase: leave no trace of deleted rows in the database file and its log.
        labels: changes of labels by index, by the folder of their model.
        rewrite: erase by writing the whole database anew, without free pages, where that is worth it.
    """
    work = DeferredWork.read(writer)
    for generation in writer.generations().values():
        if generation.folder in labels:
            work.labels.setdefault(generation.folder, {}).update(labels[generation.folder])
            changed = work.relabelled(ModelBundle.load(folder / generation.folder))
            writer.set_card(generation.id, hashlib.sha256(changed.card().encode()).hexdigest())
    if erase and work.erase != "all":
        work.erase = "all" if rewrite else "pages"
    work.write(writer)
    writer.defers = bool(work)


def run(store: Store, folder: Path, *, insist: bool, tidy: Callable[[], bool]) -> None:
    """Runs the work that committed transactions have deferred. Only for the holder of the writer lock.

    Args:
        store: the tables of the gallery.
        folder: the folder of the gallery.
        insist: wait for readers of an older snapshot, and raise if they do not finish.
        tidy: removes unreferenced files; returns whether none had to stay.

    Raises:
        StorageError: `insist` is True and the work cannot be done now; later writers try again.
    """
    with store.read() as reader:
        work = DeferredWork.read(reader)
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
    with store.read() as reader:
        written = DeferredWork.read(reader)
    if work != written:
        with store.write() as writer:
            work.write(writer)


def _erase_traces(
    store: Store, folder: Path, work: DeferredWork, tidy: Callable[[], bool], *, timeout: float
) -> None:
    """Erases deleted rows from the database and its log, as far as that is deferred.

    Raises:
        StorageError: it cannot be done now; `work` holds the rest.
    """
    if not work.erase:
        return
    later = f"run `faceprint compact {folder}`"
    try:
        if not tidy():
            raise StorageError(f"a vector file is missing; see `faceprint repair {folder}`")
        if work.erase in ("pages", "all"):
            for copy in store.file.upgrade_copies():
                remove(copy)
        done = store.file.checkpoint(timeout=timeout)
        if done and work.erase != "log" and not _zero_unused(store, work):
            store.file.vacuum()
            work.erase = "log"
            done = store.file.checkpoint(timeout=timeout)
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


def _zero_unused(store: Store, work: DeferredWork) -> bool:
    """Zeroes the bytes of the database that no row uses; returns False where it is to be written anew.

    The same transaction records that it is done: pages that connections have in memory are invalid from then
    on (see `unused_bytes`).
    """
    if work.erase == "all" and store.file.unused() >= _WORTH_REWRITING:
        return False
    with store.write() as writer:
        if not store.zero_unused(writer):
            return False
        DeferredWork("", work.labels).write(writer)
    # Not sooner: after a failed commit connections may have pages from before, and write them back.
    work.erase = ""
    return True
