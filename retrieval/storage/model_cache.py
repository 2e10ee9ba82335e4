"""Copies of models that a database holds, in this user's cache folder, from which they are run.

A copy lies in `models/GALLERY-FINGERPRINT` of the cache folder: the files are those that the card states by
their SHA-256, and the card is replaced whenever the database has another one. So a name that was forgotten by
another machine leaves this one when the gallery is opened next.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from retrieval.database.reader import Reader
from retrieval.database.records import Generation
from retrieval.database.server_tables import PART_BYTES
from retrieval.database.writer import Writer
from retrieval.errors import BundleError, GalleryDamaged, StorageError
from retrieval.models.bundle import CARD, FILE_NAMES, MAX_FILE_BYTES, ModelBundle
from retrieval.system import proof_cache
from retrieval.system.cache import cache_folder
from retrieval.system.files import create, remove, whole_folder, why, write_durably


def store(writer: Writer, generation: int, bundle: ModelBundle) -> None:
    """Stores the files of a model in the database.

    Raises:
        BundleError: a file is not what the card states.
        StorageError: one cannot be read.
    """
    bundle.verify()
    for name in bundle.file_names():
        try:
            data = (bundle.folder / name).read_bytes()
        except OSError as error:
            raise StorageError(f"{bundle.folder / name} cannot be read: {why(error)}.") from error
        store_file(writer, generation, name, data)


def store_file(writer: Writer, generation: int, name: str, data: bytes) -> None:
    """Stores one file of a model in the database, in place of that of the same name."""
    starts = range(0, max(1, len(data)), PART_BYTES)
    writer.set_model_file(generation, name, (data[start : start + PART_BYTES] for start in starts))


def load(reader: Reader, generation: Generation) -> ModelBundle:
    """Returns the model of a generation from this machine's copy, which is made or renewed if need be.

    Raises:
        GalleryDamaged: the database has not the files that the gallery states.
        StorageError: the copy cannot be written.
    """
    models = cache_folder("models")
    if models is None:
        raise StorageError("There is no folder for a copy of the gallery's model; set XDG_CACHE_HOME to one.")
    folder = models / f"{reader.gallery().uuid}-{generation.fingerprint[:16]}"
    try:
        with suppress(BundleError):
            return _renewed(reader, generation, folder)
        remove(folder)
        models.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError), whole_folder(folder) as made:  # another process was faster
            for name in FILE_NAMES.intersection(reader.model_files(generation.id)) - {CARD}:
                with create(made / name) as file:
                    file.writelines(reader.model_file(generation.id, name))
            _write_card(reader, generation, made)
            ModelBundle.load(made).verify()
        return _renewed(reader, generation, folder)
    except BundleError as error:
        raise GalleryDamaged(
            f"The model in the gallery's database is not whole ({str(error).rstrip('.')}); restore the "
            "database from a backup."
        ) from error
    except OSError as error:
        raise StorageError(f"The gallery's model cannot be copied to {folder}: {why(error)}.") from error


def _renewed(reader: Reader, generation: Generation, folder: Path) -> ModelBundle:
    """Returns a copy, after its card was replaced if the database has another one.

    Raises:
        BundleError: there is no copy, or it is not whole.
    """
    bundle = ModelBundle.load(folder)
    if bundle.card_sha256() != generation.card_sha256:
        _write_card(reader, generation, folder)
        bundle = ModelBundle.load(folder)
    for name, sha256 in bundle.files.items():
        # Read once: `proof_cache` knows an unchanged file again.
        try:
            proof_cache.load(
                folder / name, sha256, check=_ignore, checked=("copy",), use=_ignore, most=MAX_FILE_BYTES
            )
        except proof_cache.NotTheFile as error:
            raise BundleError(f"{folder / name} is damaged.") from error
    return bundle


def _ignore(found: object) -> None:
    pass


def _write_card(reader: Reader, generation: Generation, folder: Path) -> None:
    card = b"".join(reader.model_file(generation.id, CARD))
    if hashlib.sha256(card).hexdigest() != generation.card_sha256:
        raise GalleryDamaged(
            "The card of the model in the gallery's database is not what was written; restore the database "
            "from a backup."
        )
    write_durably(folder / CARD, card)


def problems(reader: Reader, generation: Generation) -> Iterator[tuple[str, str]]:
    """Yields name and problem of each file in the database that is not what the model's card states."""
    card = b"".join(reader.model_file(generation.id, CARD))
    if hashlib.sha256(card).hexdigest() != generation.card_sha256:
        yield CARD, "it is not what was written"
        return
    for name, expected in json.loads(card)["files"].items():
        digest = hashlib.sha256()
        for part in reader.model_file(generation.id, name):
            digest.update(part)
        if digest.hexdigest() != expected:
            yield name, "it is missing, or not what the model's card states"
