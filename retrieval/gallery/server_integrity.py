"""The integrity check of a gallery in PostgreSQL and Milvus: whether rows, model and vectors are whole."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np

from retrieval.database.reader import Reader
from retrieval.errors import GalleryDamaged
from retrieval.gallery.integrity import Notebook, Trouble, Verification
from retrieval.storage import model_cache
from retrieval.storage.server_vault import ServerVault

# Vectors that are fetched at a time.
_ROWS = 8192

_NO_CHECKSUMS = "every vector was fetched, but could be compared with nothing: Milvus tells no checksums"


def verify(address: str, vectors: str | None = None) -> Verification:
    """Reads every row and every vector of a gallery, and returns what is missing or damaged.

    Other writers wait meanwhile; where the gallery cannot be written to, they do not.

    Args:
        address: of the database.
        vectors: as of `Gallery.open`.

    Raises:
        GalleryError: there is no gallery, or one of another version, or it has no collection.
        GalleryBusy: another process wrote for longer than a writer waits.
        StorageError: a server cannot be asked.
    """
    book = Notebook()
    with closing(ServerVault.open(address, vectors=vectors, via="faceprint verify")) as vault:
        for line in vault.store.problems():
            book.add(Trouble.DATABASE_DAMAGED, None, line)
        with _quiet(vault) as reader:
            try:
                for line in [*reader.counter_problems(), *reader.row_problems()]:
                    book.add(Trouble.DATABASE_DAMAGED, None, line)
                reader.read_decisions()
                _check_model(vault, reader, book)
            except GalleryDamaged as error:
                book.add(Trouble.DATABASE_DAMAGED, None, str(error))
            _check_vectors(vault, reader, book)
    return book.verification()


@contextmanager
def _quiet(vault: ServerVault) -> Iterator[Reader]:
    """Yields the rows while no other process writes, so that no vector waits for its row; else a snapshot."""
    if vault.read_only:
        with vault.store.read() as reader:
            yield reader
        return
    with vault.trying() as writer:
        yield writer


def _check_model(vault: ServerVault, reader: Reader, book: Notebook) -> None:
    for generation in reader.generations().values():
        for name, problem in model_cache.problems(reader, generation):
            book.add(Trouble.MODEL_DAMAGED, name, problem)


def _check_vectors(vault: ServerVault, reader: Reader, book: Notebook) -> None:
    """Adds findings about rows without a vector, vectors without a row, and vectors that are no numbers."""
    collection, faces = vault.collection(), np.fromiter(reader.face_ids(), np.int64)
    following = reader.gallery().next_face_id
    stored = np.concatenate([collection.ids(following), collection.ids_from(following)])
    book.faces = len(faces)
    lost, stray = np.setdiff1d(faces, stored), np.setdiff1d(stored, faces)
    if len(lost):
        detail = f"no vector in {collection.name} for {_counted(len(lost), 'face')}"
        book.add(Trouble.FACE_WITHOUT_VECTOR, None, detail, lost.tolist())
    if len(stray) and not vault.read_only:
        detail = (
            f"{_counted(len(stray), 'vector')} in {collection.name} without a face, as of a killed writer; "
            "the next write removes what has none"
        )
        book.add(Trouble.LEFTOVER, None, detail, stray.tolist())
    whole = np.intersect1d(faces, stored)
    for start in range(0, len(whole), _ROWS):
        ids = whole[start : start + _ROWS]
        vectors = collection.fetch(ids)
        book.bytes += vectors.nbytes
        wrong = ids[~np.isfinite(vectors).all(axis=1)]
        if len(wrong):
            detail = f"{_counted(len(wrong), 'vector')} in {collection.name} without finite numbers"
            book.add(Trouble.SEGMENT_DAMAGED, None, detail, wrong.tolist())
    book.notes.append(_NO_CHECKSUMS)


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
