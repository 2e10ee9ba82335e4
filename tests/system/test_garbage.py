"""The pause of the garbage collector: it ends, whatever happens inside, and only where it began."""

import gc

import pytest

from retrieval.system.garbage import collection_paused


def test_the_collector_is_off_inside_and_on_again_afterwards() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_inside_turns_it_on_again() -> None:
    with pytest.raises(ValueError, match="inside"), collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_caller_without_a_collector_stays_without_it() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
