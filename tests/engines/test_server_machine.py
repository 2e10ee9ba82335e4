"""A gallery in PostgreSQL and Milvus against a plain dictionary, in the steps that a folder is tested by."""

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from retrieval.gallery.gallery import Gallery
from retrieval.index.milvus import MilvusVectors
from retrieval.models.bundle import ModelBundle
from tests.durability.test_machine import CEILING, GalleryMachine, State
from tests.engines.postgresql_server import PostgresqlServer
from tests.operations import DIMENSION

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Each step flushes Milvus, which takes seconds.
EXAMPLES = int(os.environ.get("FACEPRINT_MACHINE_EXAMPLES", "3"))
STEPS = 12


class ServerMachine(GalleryMachine):
    """The same steps, except those that need files."""

    places: Iterator[tuple[str, str]]
    bundle: ModelBundle

    compact = back_up = restore_in_place = restore_after_a_loss = None  # type: ignore[assignment]

    @initialize()
    def open(self) -> None:
        self.address, self.collection = next(self.places)
        self.gallery = Gallery.create(self.address, self.bundle, vectors=self.collection)
        self.watcher = Gallery.open(self.address, read_only=True)
        self.state = State()
        self.newest_id = self.newest_person = self.steps = 0
        self.erased_ids, self.erased_people, self.contested = set(), set(), set()
        self.receipts, self.backups, self.dropped = [], {}, {}

    def teardown(self) -> None:
        if hasattr(self, "watcher"):
            self.watcher.close()
            assert self.gallery.verify().whole
            self.gallery.close()
            with closing(MilvusVectors.open(self.collection, DIMENSION)) as opened:
                assert opened.ids(10_000).tolist() == sorted(self.state.ids.values())
                opened.drop()

    @rule()
    def reopen(self) -> None:
        self.gallery.close()
        self.gallery = Gallery.open(self.address)

    def lower_the_ceiling(self) -> None:
        self.gallery.vault.rows_at_a_time = lambda generation: CEILING  # type: ignore[method-assign]

    @invariant()
    def everybody_sees_the_same(self) -> None:
        if not hasattr(self, "watcher"):
            return
        self.steps += 1
        for gallery in (self.gallery, self.watcher):
            self.check_faces(gallery)
            self.check_counts(gallery)
            assert list(gallery.bundle.labels) == self.state.labels
        self.check_searches(self.watcher)


def test_a_gallery_in_databases_holds_and_finds_what_a_dictionary_does_after_each_step(
    milvus: str, postgresql_server: PostgresqlServer, bundle: ModelBundle, cache: object
) -> None:
    def new_places() -> Iterator[tuple[str, str]]:
        while True:
            name = f"machine_{os.urandom(4).hex()}"
            postgresql_server.execute(f"CREATE SCHEMA {name}")
            yield postgresql_server.address(schema=name), f"{milvus}/{name}"

    class Machine(ServerMachine):
        places = new_places()

    Machine.bundle = bundle
    run_state_machine_as_test(
        Machine,
        settings=settings(
            deadline=None,
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            phases=[Phase.explicit, Phase.generate],
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
