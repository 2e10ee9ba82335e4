"""Leftovers: files and folders with names that only faceprint creates, and that no row references.

An interrupted write left them, or the last write replaced them; the next writer removes them.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from retrieval.database.reader import Reader
from retrieval.errors import StorageError
from retrieval.index.segments import basis_name, codes_name
from retrieval.storage.layout import BACKUP_CARD, DATABASE, ID_NAME, VECTORS, segment_path
from retrieval.system.files import abandoned, why

# A segment, codes or a basis, complete or temporary; other files in the folder are never touched.
_SEGMENT_NAME: Final = re.compile(
    r"\d{8,}\.(faiss|part)$|\.\d{8,}\.faiss\.part$"
    r"|\d{8,}-\d+\.codes$|\.\d{8,}-\d+\.codes\.part$|\d{8,}\.basis$|\.\d{8,}\.basis\.part$"
    r"|\.gallery\.id\.part$"
)
_VECTORS_NAME: Final = re.compile(r"\d{8,}\.faiss$")
# A temporary file, and SQLite's files beside it.
_PART: Final = re.compile(r"\.part(-wal|-shm|-journal)?$")
# A model folder, complete or temporary.
_MODEL_NAME: Final = re.compile(r"model(-\d+)?$|\.model(-\d+)?-")
# Files that a first backup writes before its card, beside its folders, and that no gallery has.
_BACKUP_NAME: Final = re.compile(r"gallery-[0-9a-f]{16}\.db|\.gallery\.part")


def removable(folder: Path, reader: Reader, *, replaced: Collection[str]) -> tuple[list[Path], list[Path]]:
    """Returns the unreferenced files: those that the next writer removes, and those that must stay.

    If a referenced vector file is missing, or faces have no vectors, the row itself may be damaged, and an
    unreferenced file may hold the vectors. Then vector files stay, except those that the current transaction
    has replaced.
    """
    found = list(unnamed(folder, reader))
    strange = {path for path in found if _is_vectors(path) and path.name not in replaced}
    if not strange or not _lacks_vectors(folder, reader):
        return found, []
    return [path for path in found if path not in strange], sorted(strange)


def _is_vectors(path: Path) -> bool:
    return path.parent.name == VECTORS and _VECTORS_NAME.match(path.name) is not None


def _lacks_vectors(folder: Path, reader: Reader) -> bool:
    segments, serving = reader.segments(), reader.serving_generation().id
    rows = sum(segment.rows for segment in segments if segment.generation_id == serving)
    return rows < reader.count() or not all(segment_path(folder, segment.id).exists() for segment in segments)


def named_files(reader: Reader) -> set[str]:
    """Returns the names of the files in the vectors folder that rows reference, and of the id file."""
    bases = {number for number, basis in reader.bases().items() if basis.coordinates}
    return {
        ID_NAME,
        *(f"{segment.id:08d}.faiss" for segment in reader.segments()),
        *(codes_name(one.segment_id, one.basis_id) for one in reader.codes().values()),
        *map(basis_name, bases),
    }


def unnamed(folder: Path, reader: Reader) -> Iterator[Path]:
    """Yields files and folders with names that only faceprint creates, and that no row references."""
    folders = {generation.folder for generation in reader.generations().values()}
    named = named_files(reader)
    try:
        vectors = folder / VECTORS
        for name in sorted(os.listdir(vectors)) if vectors.is_dir() else ():
            if name not in named and _SEGMENT_NAME.match(name):
                yield vectors / name
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            ours = _MODEL_NAME.match(entry.name) is not None and entry.is_dir()
            if (ours and entry.name not in folders) or _PART.search(entry.name):
                yield Path(entry.path)
        for model in sorted(folder / name for name in folders):
            # The target of a link does not belong to this gallery.
            yield from sorted(model.glob(".*.part")) if not model.is_symlink() else ()
    except OSError as error:
        raise StorageError(f"{folder} cannot be listed: {why(error)}.") from error


def is_unfinished_backup(folder: Path) -> bool:
    """Returns whether a folder is an unfinished first backup: it lacks the card, which is written last."""
    if any(os.path.lexists(folder / name) for name in (BACKUP_CARD, DATABASE)):
        return False
    with suppress(OSError):
        names = os.listdir(folder)
        # A folder with `models` alone may be another program's.
        return {"models", VECTORS} <= set(names) or any(map(_BACKUP_NAME.fullmatch, names))
    return False


def unfinished_backup(folder: Path) -> str:
    """Returns the advice for an unfinished backup."""
    return (
        f"{folder} is an unfinished backup: the run that made it was stopped; run `faceprint backup GALLERY "
        f"{folder}` again, which goes on from here."
    )


def beside(folder: Path) -> list[Path]:
    """Returns temporary folders beside a gallery that its killed creations and restores left."""
    with suppress(OSError):  # the parent folder may not be listable
        return abandoned(*in_the_making(folder))
    return []


def in_the_making(folder: Path) -> tuple[Path, str]:
    """Returns the parent and the name prefix of a gallery's temporary folder; see `files.whole_folder`."""
    folder = Path(os.path.abspath(folder))
    return folder.parent, f".{folder.name}-"
