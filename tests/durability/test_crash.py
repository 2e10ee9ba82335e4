"""A fault at any call that changes the disk leaves a whole gallery; doing it again ends as if undisturbed.

Here at every few calls of every operation, to be quick; `python -m benchmarks.crashes` does it at every call,
and prints a table.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import Kind, needs_shim
from tests.operations import OPERATIONS
from tests.sweeps import Sweeper

pytestmark = needs_shim

# How far it is from one call to the next at which the process is killed, or the disk fails, or the power.
# Without a common factor, so that each kind meets other calls.
KILL_STEP = 31
ERROR_STEP = 149
POWER_STEP = 101


@pytest.fixture(scope="module")
def sweeper() -> Iterator[Sweeper]:
    """The initial states, and the processes that fork a child for each point.

    In memory where there is some: the faults are injected above the disk, and syncing one takes its time.
    """
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder, Sweeper(Path(folder), processes=1) as ready:
        yield ready


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_before_any_call_it_was_done_or_was_never_begun(name: str, sweeper: Sweeper) -> None:
    swept = sweeper.sweep(name, Kind.KILL, step=KILL_STEP)
    assert swept.failures == []
    assert swept.points > 40 // KILL_STEP


@pytest.mark.parametrize("kind", [Kind.ENOSPC, Kind.EIO, Kind.FULL, Kind.DEAD], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_of_the_disk_is_one_sentence_and_a_whole_gallery(
    name: str, kind: Kind, sweeper: Sweeper
) -> None:
    """One call fails, or everything from there on."""
    swept = sweeper.sweep(name, kind, step=ERROR_STEP)
    assert swept.failures == []
    assert swept.points > 50 // ERROR_STEP


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_machine_that_lost_its_power_has_a_whole_gallery(name: str, sweeper: Sweeper) -> None:
    """What was not synced is gone; the names of files changed before their contents, or after, or not."""
    swept = sweeper.lose_power(name, step=POWER_STEP)
    assert swept.failures == []
    assert swept.points > 50 // POWER_STEP
