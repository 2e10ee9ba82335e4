"""A gallery in PostgreSQL and Milvus after its writer, or one of the servers, was killed; and two writers."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from retrieval.errors import GalleryBusy, StorageError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble
from retrieval.index.milvus import MilvusVectors
from tests.engines.conftest import MilvusProcess
from tests.engines.postgresql_server import PostgresqlServer
from tests.operations import DIMENSION, add, face, vector_of

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Enrolls five faces, and stops for good once Milvus has their vectors, before their rows are committed.
WRITER = """
import sys, time
from retrieval.database.writer import Writer
from retrieval.gallery.gallery import Gallery
from tests.operations import add

def stop(writer):
    print("stored", flush=True)
    time.sleep(600)

with Gallery.open(sys.argv[1]) as gallery:
    Writer.finish = stop
    add(gallery, range(10, 15))
"""


@contextmanager
def stopped_writer(address: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process whose vectors are stored and whose rows are not committed."""
    command = [sys.executable, "-W", "ignore", "-c", WRITER, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"stored\n"
        try:
            yield writer
        finally:
            writer.kill()


def stored(vectors: str) -> list[int]:
    with closing(MilvusVectors.open(vectors, DIMENSION)) as collection:
        return collection.ids(1000).tolist()


def found(gallery: Gallery) -> list[int]:
    return sorted(match.face.id for match in gallery.search_by_vector(vector_of(face(0).sha256), 50))


def test_a_writer_that_is_killed_between_vector_and_row_leaves_nothing_that_is_found(
    databases: tuple[str, str],
) -> None:
    """Its vectors are swept by the next writer, and their ids are never used again."""
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(3))
    with stopped_writer(address) as writer:
        writer.send_signal(signal.SIGKILL)
    with Gallery.open(address) as gallery:
        assert found(gallery) == [1, 2, 3]
        assert stored(vectors) == [1, 2, 3, 4, 5, 6, 7, 8]
        [finding] = gallery.verify().findings
        assert (finding.trouble, finding.face_ids) == (Trouble.LEFTOVER, (4, 5, 6, 7, 8))
        [outcome] = gallery.enroll_vectors([face(20)], vector_of(face(20).sha256)[None])
        assert outcome.face_id == 9
        assert stored(vectors) == [1, 2, 3, 9]
        assert found(gallery) == [1, 2, 3, 9]
        assert gallery.verify().whole


def test_vectors_of_a_later_state_than_the_rows_are_removed_before_their_ids_are_given_again(
    databases: tuple[str, str],
) -> None:
    """As of a database that was restored from a backup, and Milvus was not."""
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(2))
    with closing(MilvusVectors.open(vectors, DIMENSION)) as collection:
        collection.put(np.array([3, 77]), np.zeros((2, DIMENSION), np.float32))
    with Gallery.open(address) as gallery:
        assert gallery.search_by_vector(np.zeros(DIMENSION), 9)[0].distance > 0
        gallery.rename_identity("Adi", "Adi Berg")
        assert stored(vectors) == [1, 2]
        add(gallery, range(2, 3))
        assert found(gallery) == stored(vectors) == [1, 2, 3]


def test_a_second_writer_waits_and_one_without_its_lock_cannot_take_the_ids_of_another(
    databases: tuple[str, str], postgresql_server: PostgresqlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one loses its connection, and with it the lock, while Milvus stores its vectors."""
    address, vectors = databases
    with stopped_writer(address):
        monkeypatch.setattr("retrieval.storage.server_vault.LOCK_TIMEOUT", 0.5)
        with Gallery.open(address) as gallery:
            with pytest.raises(GalleryBusy, match="Another process is writing"):
                add(gallery, range(1))
            # The connection of the writer, which waits for its next statement.
            postgresql_server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            )
            add(gallery, range(1))
            assert found(gallery) == [6]
            assert stored(vectors) == [6]


def test_writers_at_once_lose_nothing_of_each_other(databases: tuple[str, str]) -> None:
    address, vectors = databases
    failed: list[BaseException] = []

    def work(first: int) -> None:
        try:
            with Gallery.open(address) as gallery:
                for start in range(first, first + 6, 3):
                    add(gallery, range(start, start + 3))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with Gallery.open(address) as gallery:
        assert found(gallery) == stored(vectors) == list(range(1, 13))
        for number in [*range(6), *range(100, 106)]:
            [match] = gallery.search_by_vector(vector_of(face(number).sha256), 1)
            assert (match.distance, match.face.sha256) == (0.0, face(number).sha256)
        assert gallery.verify().whole


def test_postgresql_is_killed_between_vector_and_row(
    databases: tuple[str, str], postgresql_server: PostgresqlServer
) -> None:
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(3))
        with stopped_writer(address):
            postgresql_server.kill()
        with pytest.raises(StorageError, match="cannot be used"):
            found(gallery)
        postgresql_server.start()
        assert found(gallery) == [1, 2, 3]
        add(gallery, range(3, 5))
        assert found(gallery) == stored(vectors)
        assert gallery.verify().whole


def test_what_was_enrolled_is_found_after_milvus_was_killed(
    databases: tuple[str, str], milvus_process: MilvusProcess
) -> None:
    """An open gallery goes on, and so does a new one; the loss of the log would lose nothing."""
    address, vectors = databases
    with Gallery.open(address) as gallery:
        add(gallery, range(4))
        gallery.forget(face_id=2)
        before = gallery.search_by_vector(np.zeros(DIMENSION), 9)
        milvus_process.kill_and_restart()
        assert gallery.search_by_vector(np.zeros(DIMENSION), 9) == before
        assert found(gallery) == stored(vectors) == [1, 3, 4]
        add(gallery, range(4, 6))
        assert found(gallery) == [1, 3, 4, 5, 6]
        assert gallery.verify().whole
