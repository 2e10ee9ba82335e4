"""Publishers and followers that are killed at any call, or whose disk fails, leave one state or the other."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import FaultServer, Kind, Outcome, needs_shim, power_loss_images, sweep, trace
from tests.operations import Contents
from tests.replication import publications

pytestmark = needs_shim

_PRELOAD = (
    *("tests.replication.publications", "onnxruntime", "retrieval.models.onnx_engine"),
    *("retrieval.models.self_test", "alembic.command", "msgspec.json", "numpy.ma"),
)

# How far it is from one call to the next that fails; each kind meets others. FACEPRINT_FULL_SWEEP=1
# fails at all.
FULL = "FACEPRINT_FULL_SWEEP" in os.environ
KILL_STEP, ERROR_STEP, POWER_STEP, STORE_STEP = (1, 1, 1, 1) if FULL else (31, 61, 61, 11)


@dataclass
class Laid:
    """Folders that are copied for each point, the contents of both states, and what runs the points."""

    workspace: Path
    to_publish: Path
    to_follow: Path
    before: Contents
    after: Contents
    faulty: FaultServer
    sound: FaultServer

    def sweep(self, work: str, check: str, *, kind: Kind, step: int) -> int:
        """Runs a function with a fault at every step-th call that changes a disk; returns the points."""
        laid = self.to_publish if work == "publish_again" else self.to_follow

        def checked(root: Path, outcome: Outcome) -> None:
            if outcome.state == "error":
                assert outcome.error in ("StorageError", "GalleryBusy"), outcome
            self.checked(check, root, outcome.state)

        found = sweep(
            getattr(publications, work),
            lambda root: shutil.copytree(laid, root, dirs_exist_ok=True, symlinks=True) and None,
            checked,
            kind=kind,
            servers=[self.faulty],
            workspace=self.workspace,
            step=step,
        )
        assert found.failures == []
        return found.points

    def checked(self, check: str, root: Path, state: str) -> None:
        states = (self.after,) if check == "check_new_follower" else (self.before, self.after)
        outcome = self.sound.call(getattr(publications, check), (root, state, *states))
        assert outcome.state == "done", f"{outcome.error}: {outcome.message}"


@pytest.fixture(scope="module")
def laid() -> Iterator[Laid]:
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(dir=place) as folder,
        FaultServer(_PRELOAD) as faulty,
        FaultServer(_PRELOAD) as sound,
    ):
        root = Path(folder)
        for name, work in (("to-publish", publications.lay), ("to-follow", publications.lay_published)):
            (root / name).mkdir()
            outcome = sound.call(work, (root / name,))
            assert outcome.state == "done", outcome
            # The address of a follower is absolute, and each point has a folder of its own.
        before, after = publications.states(root / "to-publish")
        yield Laid(root, root / "to-publish", root / "to-follow", before, after, faulty, sound)


WORKS = (
    ("publish_again", "check_publisher"),
    ("follow_again", "check_follower"),
    ("follow_anew", "check_new_follower"),
)


@pytest.mark.parametrize(("work", "check"), WORKS)
def test_killed_before_any_call_that_changes_a_disk_there_is_one_state_or_the_other(
    work: str, check: str, laid: Laid
) -> None:
    assert laid.sweep(work, check, kind=Kind.KILL, step=KILL_STEP) > 30 // KILL_STEP


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.DEAD], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("work", "check"), WORKS)
def test_an_error_of_a_disk_is_one_sentence_and_one_state_or_the_other(
    work: str, check: str, kind: Kind, laid: Laid
) -> None:
    assert laid.sweep(work, check, kind=kind, step=ERROR_STEP) > 30 // ERROR_STEP


@pytest.mark.parametrize(("work", "check"), WORKS)
def test_a_machine_that_lost_its_power_has_one_state_or_the_other(work: str, check: str, laid: Laid) -> None:
    """What was not synced is gone; the names of files changed before their contents, or after, or not."""
    source = laid.to_publish if work == "publish_again" else laid.to_follow
    points = 0
    with tempfile.TemporaryDirectory(dir=laid.workspace) as folder:
        run, image = Path(folder) / "run", Path(folder) / "image"
        shutil.copytree(source, run)
        image.mkdir()
        ops = trace(laid.faulty, getattr(publications, work), (run,), run)
        for _, _, root in power_loss_images(source, ops, image, distinct=True, step=POWER_STEP):
            points += 1
            laid.checked(check, root, "lost")
    assert points > 60 // POWER_STEP


@pytest.mark.parametrize(("work", "check"), WORKS)
def test_killed_before_any_call_of_the_store_there_is_one_state_or_the_other(
    work: str, check: str, laid: Laid
) -> None:
    """The store is one that fsspec reaches."""
    source = laid.to_publish if work == "publish_again" else laid.to_follow
    for at in range(1, 200, STORE_STEP):
        with tempfile.TemporaryDirectory(dir=laid.workspace) as folder:
            root = Path(folder) / "root"
            shutil.copytree(source, root)
            (root / "shimmed").touch()
            outcome = laid.faulty.run(publications.killed_at, (root, work, at), root)
            died = (outcome.state, outcome.error) == ("error", "Died")
            assert died or outcome.state == "done", outcome
            laid.checked(check, root, "killed" if died else "done")
            if not died:
                assert at - STORE_STEP <= outcome.result < at
                assert outcome.result > 8
                return
    raise AssertionError("it was killed at each of 199 calls")
