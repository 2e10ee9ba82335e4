"""Copies between a folder and databases: the same rows and vectors, also after an interruption or a kill."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval.errors import GalleryError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from tests.engines.postgresql_server import PostgresqlServer
from tests.gallery.test_copying import fill, one_more, rows
from tests.operations import contents

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Copies, in parts of four faces, and stops for good after two of them.
COPIER = """
import sys, time
from retrieval.gallery import copying
from retrieval.gallery.gallery import Gallery

copying.rows_at_a_time = lambda dimension: 4
put, parts = copying.ServerTarget.put, []

def put_and_stop(self, ids, vectors):
    put(self, ids, vectors)
    parts.append(len(ids))
    if len(parts) == 2:
        print("copied", flush=True)
        time.sleep(600)

copying.ServerTarget.put = put_and_stop
with Gallery.open(sys.argv[1]) as gallery:
    gallery.copy(sys.argv[2], vectors=sys.argv[3])
"""


def test_a_gallery_is_copied_to_databases_and_back(
    schema_address: str,
    collection: str,
    postgresql_server: PostgresqlServer,
    bundle: ModelBundle,
    cache: Path,
    tmp_path: Path,
) -> None:
    """The copy is killed, the source changes meanwhile, and the same command goes on."""
    source = tmp_path / "source"
    with Gallery.create(source, bundle) as gallery:
        with gallery.vault.store.read() as reader:
            gallery.vault.vectors(gallery.vault.serving(reader)).ceiling = 4  # type: ignore[attr-defined]
        fill(gallery)
    command = [sys.executable, "-W", "ignore", "-c", COPIER, str(source), schema_address, collection]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as copier:
        assert copier.stdout is not None
        assert copier.stdout.readline() == b"copied\n"
        copier.send_signal(signal.SIGKILL)
    with pytest.raises(GalleryError, match="There is no gallery"):
        Gallery.open(schema_address)
    with Gallery.open(source) as gallery:
        gallery.forget(face_id=7)
        gallery.enroll_vectors(*one_more(98))
        done = gallery.copy(schema_address, vectors=collection)
        assert 0 < done.vectors < done.faces == gallery.info().faces
        with Gallery.open(schema_address) as copy:
            assert rows(copy) == rows(gallery)
            assert copy.verify().whole
            assert copy.bundle.labels == gallery.bundle.labels
            # A gallery's collection is no unfinished copy, even for the same gallery in another schema.
            postgresql_server.execute("CREATE SCHEMA other")
            with pytest.raises(GalleryError, match="exists already, and is not an unfinished copy"):
                gallery.copy(postgresql_server.address(schema="other"), vectors=collection)
            with pytest.raises(GalleryError, match="There is a gallery in "):
                gallery.copy(schema_address, vectors=f"{collection}_2")
            [outcome] = copy.enroll_vectors(*one_more(99))
            assert outcome.status == "enrolled"
            copy.copy(tmp_path / "back")
    with Gallery.open(tmp_path / "back") as back, Gallery.open(schema_address) as copy:
        assert rows(back) == rows(copy)
        assert back.verify().whole
        back.backup(tmp_path / "backup")
    expected = contents(source)
    found = contents(tmp_path / "back")
    assert found.items() > expected.items()
    assert len(found) == len(expected) + 1
