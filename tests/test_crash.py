"""A fault at any call that changes the disk leaves a whole gallery; doing it again ends as if undisturbed.

Killed with SIGKILL before every call of every operation; then errors of the disk and a loss of power at
every few calls. `python -m benchmarks.crashes` does all of it at every call, and prints a table.
"""

from collections.abc import Iterator

import pytest

from tests.faults import Kind, needs_shim
from tests.operations import OPERATIONS
from tests.sweeps import Sweeper

pytestmark = needs_shim

# How far it is from one call to the next at which the disk fails, or the power.
STEP = 7


@pytest.fixture(scope="module")
def sweeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweeper]:
    """The initial states, and the processes that fork a child for each point."""
    with Sweeper(tmp_path_factory.mktemp("sweep")) as ready:
        yield ready


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_before_any_call_it_was_done_or_was_never_begun(name: str, sweeper: Sweeper) -> None:
    swept = sweeper.sweep(name, Kind.KILL)
    assert swept.failures == []
    assert swept.points > 50


@pytest.mark.parametrize("kind", [Kind.ENOSPC, Kind.EIO, Kind.FULL, Kind.DEAD], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_of_the_disk_is_one_sentence_and_a_whole_gallery(
    name: str, kind: Kind, sweeper: Sweeper
) -> None:
    """One call fails, or everything from there on."""
    swept = sweeper.sweep(name, kind, step=STEP)
    assert swept.failures == []
    assert swept.points > 50 // STEP


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_machine_that_lost_its_power_has_a_whole_gallery(name: str, sweeper: Sweeper) -> None:
    """What was not synced is gone; the names of files changed before their contents, or after, or not."""
    swept = sweeper.lose_power(name, step=STEP)
    assert swept.failures == []
    assert swept.points > 50 // STEP
