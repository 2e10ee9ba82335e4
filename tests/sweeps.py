"""The crash sweep: every operation of `operations` with every fault of `faults`, at every call."""

import queue
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests import operations
from tests.faults import FaultServer, Kind, Outcome, Swept, power_loss_images, sweep, trace
from tests.operations import Contents

# All modules that an operation or a check imports, so that no child repeats an import.
_PRELOAD = (
    *("tests.operations", "onnxruntime", "retrieval.models.onnx_engine", "retrieval.models.self_test"),
    *("alembic.command", "msgspec.json", "numpy.ma"),
)

# Operations that make most of the statements of all of them.
_WARM = ("forget", "restore", "merge_people", "undo_merge", "annotate", "calibrate", "relocate", "export")


class Sweeper:
    """The initial states, made once, and the server processes that fork a child for each point."""

    def __init__(self, workspace: Path, *, processes: int = 2) -> None:
        self._workspace = workspace
        self._laid = workspace / "laid"
        self._stack = ExitStack()
        self._faulty = [FaultServer(_PRELOAD) for _ in range(processes)]
        self._sound = [FaultServer(_PRELOAD) for _ in range(processes)]
        self._idle: queue.SimpleQueue[FaultServer] = queue.SimpleQueue()
        self._calls: dict[str, int] = {}
        self._states: dict[str, list[Contents | None]] = {}

    def __enter__(self) -> Self:
        for server in (*self._faulty, *self._sound):
            self._stack.enter_context(server)
        for server in self._sound:
            self._idle.put(server)
        self._laid.mkdir()
        self._ask(operations.lay, self._laid)
        self._warm()
        return self

    def _warm(self) -> None:
        """Does some operations in the processes that fork, so that no child compiles their SQL again."""
        for server in self._faulty:
            for name in _WARM:
                with tempfile.TemporaryDirectory(dir=self._workspace) as folder:
                    operations.copy_initial(self._laid, name, Path(folder))
                    outcome = server.call(operations.OPERATIONS[name].work, (Path(folder),))
                    assert outcome.state == "done", outcome

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def sweep(self, name: str, kind: Kind, *, step: int = 1) -> Swept:
        """Sweeps one operation with one kind of fault, at every step-th call.

        Only the first sweep of an operation also runs it undisturbed, and checks that.
        """
        states = self.states(name)

        def check(root: Path, outcome: Outcome) -> None:
            self._ask(operations.check, root, name, outcome.state, outcome.error, states)

        swept = sweep(
            operations.OPERATIONS[name].work,
            lambda root: operations.copy_initial(self._laid, name, root),
            check,
            kind=kind,
            servers=self._faulty,
            workspace=self._workspace,
            step=step,
            calls=self._calls.get(name),
        )
        if swept.calls:
            self._calls[name] = swept.calls
        return swept

    def lose_power(self, name: str, *, step: int = 1) -> Swept:
        """Checks one operation on each possible disk after a power loss at every step-th of its calls."""
        states, points, failures = self.states(name), 0, []
        with tempfile.TemporaryDirectory(dir=self._workspace) as folder:
            initial, run, image = (Path(folder) / part for part in ("initial", "run", "image"))
            image.mkdir()
            for copy in (initial, run):
                copy.mkdir()
                operations.copy_initial(self._laid, name, copy)
            ops = trace(self._faulty[0], operations.OPERATIONS[name].work, (run,), run)
            shutil.rmtree(run)
            for number, variant, root in power_loss_images(initial, ops, image, distinct=True, step=step):
                points += 1
                try:
                    self._ask(operations.check, root, name, "lost", "", states)
                except AssertionError as error:
                    failures.append((number, f"{variant}: {error}"))
        return Swept(name, Kind.TRACE, points, failures)

    def states(self, name: str) -> list[Contents | None]:
        """Returns the galleries that an operation may leave."""
        if name not in self._states:
            with tempfile.TemporaryDirectory(dir=self._workspace) as folder:
                root = Path(folder)
                operations.copy_initial(self._laid, name, root)
                self._states[name] = self._ask(operations.all_states, root, name)
        return self._states[name]

    def _ask(self, function: object, root: Path, *arguments: object) -> object:
        """Calls a function in a server process, without a fault, and returns its result.

        Raises:
            AssertionError: the function raised an error.
        """
        server = self._idle.get()
        try:
            outcome = server.call(function, (root, *arguments))
        finally:
            self._idle.put(server)
        assert outcome.state == "done", f"{outcome.state} {outcome.error}: {outcome.message}"
        return outcome.result
