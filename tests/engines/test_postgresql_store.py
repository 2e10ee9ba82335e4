"""A store in PostgreSQL: what holds of one in SQLite holds of it, and its rows are the same."""

from collections.abc import Callable, Iterator

import pytest

from retrieval.database.store import Store
from tests.database.test_filter_sql import (  # noqa: F401
    test_everything_that_is_said_holds_of_the_faces_that_are_found,
    test_lists_of_any_length_are_taken,
    test_numbers_compare_exactly_whatever_their_kind,
    test_the_database_finds_the_faces_of_which_the_conditions_hold,
)
from tests.database.test_store import (  # noqa: F401
    test_a_new_database_holds_the_gallerys_own_row_and_nothing_else,
    test_a_reader_sees_one_snapshot_whatever_others_commit,
    test_a_second_writer_waits_for_the_first,
    test_a_write_that_raises_never_was,
    test_an_identity_is_one_row_however_often_it_is_enrolled,
    test_an_identity_leaves_with_its_last_face,
    test_face_ids_are_never_used_again,
    test_faces_come_back_as_they_were_given,
    test_identities_are_counted_the_most_photographed_first_then_by_name,
    test_more_values_than_one_statement_takes_are_found_and_removed,
    test_names_and_paths_of_any_letters_come_back_as_they_were_given,
    test_nothing_asked_for_is_nothing_found,
    test_readers_do_not_wait_for_a_writer_and_do_not_see_what_it_has_not_committed,
    test_segment_ids_are_never_used_again,
    test_two_faces_with_the_same_bytes_are_damage_and_neither_is_stored,
)


@pytest.fixture
def store(schema_address: str) -> Iterator[Store]:
    """The tables of an empty gallery."""
    opened = Store.create_at(schema_address, fingerprint="f" * 64, dimension=2048)
    yield opened
    assert opened.closed or opened.problems() == []
    opened.close()


@pytest.fixture
def reopen(schema_address: str) -> Callable[[], Store]:
    """Opens the tables of `store` once more."""
    return lambda: Store.open_at(schema_address)
