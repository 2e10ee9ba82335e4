"""Integrity of a backup: each file has its SHA-256, and the files agree with each other."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from retrieval.database.migrations import SCHEMA_VERSION
from retrieval.database.reader import Reader
from retrieval.database.records import Generation, Segment
from retrieval.database.store import Store
from retrieval.errors import BundleError, DataError, GalleryDamaged
from retrieval.index.segments import FlatVectors
from retrieval.models.bundle import ModelBundle
from retrieval.storage.backup_contents import (
    MODEL_CARD,
    MODEL_DESCRIPTION,
    MODELS,
    Backup,
    read_backup,
    sha256_in,
    vectors_name,
)
from retrieval.storage.layout import VECTORS
from retrieval.system.files import copy_durably, temporary_folder


def check_backup(folder: Path) -> list[str]:
    """Returns the names of the files of a backup that are missing or damaged.

    Raises:
        DataError: there is no backup, its card is damaged, or its files contradict each other.
        StorageError: a file cannot be read.
    """
    backup = read_backup(folder)
    wrong = sorted(name for name, digest in backup.files.items() if sha256_in(folder, name) != digest)
    if not wrong:
        with readable(backup) as store:
            if problems := store.problems():
                raise _contradiction(backup, f"hold a database that is damaged ({problems[0]})")
            with store.read() as reader:
                if problems := [*reader.counter_problems(), *reader.row_problems()]:
                    raise _contradiction(backup, f"hold a database that is damaged ({problems[0]})")
                _check_against(backup, reader)
    return wrong


def verified(folder: Path) -> Backup:
    """Returns a backup after checking all of its files.

    Raises:
        DataError: there is no backup, or a file is missing or damaged.
    """
    if damaged := check_backup(folder):
        raise DataError(f"{folder / damaged[0]} is not what was backed up; restore another backup.")
    return read_backup(folder)


def gallery_model(folder: Path) -> ModelBundle:
    """Returns the model that served searches when a backup was taken.

    Raises:
        DataError: there is no backup, or it is damaged.
    """
    backup = verified(folder)
    with readable(backup) as store, store.read() as reader:
        return ModelBundle.load(backup.model(reader.serving_generation()))


@contextmanager
def readable(backup: Backup) -> Iterator[Store]:
    """Yields the database of a backup; one of an older schema is migrated in a temporary copy."""
    path = backup.folder / backup.database
    if backup.schema == SCHEMA_VERSION:
        with closing(Store.open(path, read_only=True)) as store:
            yield store
        return
    with temporary_folder(Path(tempfile.gettempdir()), "faceprint-restore-") as temporary:
        copy_durably(path, temporary / "gallery.db")
        with closing(Store.open(temporary / "gallery.db")) as store:
            yield store


def _check_against(backup: Backup, reader: Reader) -> None:
    """Checks that the card, database, models and segments of a backup agree; their hashes were compared.

    Raises:
        DataError: they contradict each other.
    """
    row, generations, segments = reader.gallery(), reader.generations(), reader.segments()
    if row.unfinished is not None:
        raise _contradiction(backup, "hold a database with an erasure half done")
    if row.uuid != backup.gallery:
        raise _contradiction(backup, "name different galleries")
    if (row.revision, reader.count()) != (backup.revision, backup.faces):
        raise _contradiction(backup, "state different numbers of faces or revisions")
    if row.generation_id not in generations:
        raise _contradiction(backup, "name different models")
    expected = {backup.database: backup.files[backup.database]}
    for generation in generations.values():
        try:
            bundle = ModelBundle.load(backup.model(generation))
        except BundleError as error:
            raise DataError(f"{error} So the backup {backup.folder} is not whole; back up again.") from error
        if (bundle.fingerprint, bundle.dimension) != (generation.fingerprint, generation.dimension):
            raise _contradiction(backup, "state different models")
        below = f"{MODELS}/{generation.card_sha256}"
        expected |= {f"{below}/{MODEL_CARD}": generation.card_sha256}
        expected |= {f"{below}/{name}": digest for name, digest in bundle.files.items()}
        described = f"{below}/{MODEL_DESCRIPTION}"
        expected |= {described: backup.files[described]} if described in backup.files else {}
    for segment in segments:
        expected[vectors_name(segment)] = segment.sha256
        _check_segment(backup, segment, generations)
    if differing := sorted(expected.items() ^ backup.files.items()):
        raise _contradiction(backup, f"do not name the same files ({differing[0][0]} is one)")


def _check_segment(backup: Backup, segment: Segment, generations: Mapping[int, Generation]) -> None:
    path = backup.vectors(segment)
    if segment.generation_id not in generations:
        raise _contradiction(backup, "name vectors of no model")
    flat = FlatVectors(backup.folder / VECTORS, generations[segment.generation_id].dimension)
    try:
        ids, _ = flat.rows_of_file(path)
    except GalleryDamaged as error:
        raise DataError(f"{path} is not a vector file of this backup; back up again.") from error
    if (len(ids), path.stat().st_size) != (segment.rows, segment.bytes):
        raise _contradiction(backup, f"state different sizes of {path.name}")


def _contradiction(backup: Backup, what: str) -> DataError:
    return DataError(
        f"The backup {backup.folder} contradicts itself: its files {what}; back up again, or use another "
        "backup."
    )
