"""A PostgreSQL standby for reads: with remote_apply it has what a command committed once that returns."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from tests.engines.postgresql_server import PostgresqlServer, programs
from tests.operations import add, face, vector_of

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def pair(postgresql_server: PostgresqlServer) -> Iterator[tuple[PostgresqlServer, PostgresqlServer]]:
    """A primary server, and a standby that every commit waits for."""
    found = programs()
    assert found is not None
    if not (found / "pg_basebackup").exists():
        pytest.skip("pg_basebackup is not installed")
    with closing(PostgresqlServer(found)) as primary:
        primary.start()
        with closing(PostgresqlServer(found, primary=primary)) as standby:
            standby.start()
            primary.execute(
                "ALTER SYSTEM SET synchronous_standby_names = '*'",
                "ALTER SYSTEM SET synchronous_commit = 'remote_apply'",
                "SELECT pg_reload_conf()",
            )
            yield primary, standby
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = ''", "SELECT pg_reload_conf()")


def test_a_standby_answers_with_what_was_committed_before_and_refuses_changes(
    pair: tuple[PostgresqlServer, PostgresqlServer], collection: str, bundle: ModelBundle, cache: Path
) -> None:
    primary, standby = pair
    with (
        Gallery.create(primary.address(), bundle, vectors=collection) as written,
        Gallery.open(standby.address()) as read,
    ):
        for number in range(3):
            add(written, range(number, number + 1))
            asked = vector_of(face(number).sha256)
            [match] = read.search_by_vector(asked, 1)
            assert (match.face.sha256, match.distance) == (face(number).sha256, 0.0)
        written.rename_identity("Kim", "Kim Rosenthal")
        read.require_identities(["Kim Rosenthal"])
        written.forget("Adi")
        assert len(read.search_by_vector(asked, 9)) == 2
        read.info()  # follows the model's card too
        assert read.bundle.labels == ("(forgotten)", "Kim Rosenthal", "Zephyr Kant")
        with pytest.raises(InputError, match="its server is a standby"):
            add(read, range(9, 10))
        assert read.verify().whole
