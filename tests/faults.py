"""Fault injection at every call that changes the disk: kill, full disk, I/O error or power loss.

`fault.c` is preloaded into a server process that has imported the slow modules. For every request the server
forks a child, which arms the shim, runs one function and reports. `sweep` (one fault at each point of an
operation) and `power_loss_images` (possible disk contents after every call) are built on the server.
"""

import ctypes
import enum
import gc
import hashlib
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import pytest

_HERE = Path(__file__).parent

needs_shim = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="faults are injected by a library for Linux that cc compiles; one of the two is missing",
)

Function: TypeAlias = Callable[..., Any] | str  # importable by its qualified name, or "module:function"


class Kind(enum.IntEnum):
    """The fault at the n-th call that changes the disk; the numbers are those of fault.c."""

    COUNT = 0  # nothing
    KILL = 1  # SIGKILL, before the call
    ENOSPC = 2  # this call fails, and no other
    EIO = 3
    FULL = 4  # from this call on, every call that needs space fails with ENOSPC
    DEAD = 5  # from this call on, every call fails with EIO
    TRACE = 6  # every call is recorded
    NO_LOCKS = 7  # every lock fails with ENOLCK, as on some network shares; no other call fails


# The kinds of recorded calls; the numbers are those of fault.c.
Call = enum.IntEnum("Call", "FAILED WRITE TRUNCATE CREATE SYNC RENAME LINK SYMLINK UNLINK MKDIR", start=0)


@dataclass(frozen=True, slots=True)
class Op:
    """A recorded call. Paths are relative to the root ("" is the root), or absolute if outside of it."""

    call: Call
    path: str
    other: str  # target path of a rename or a link
    offset: int
    length: int  # bytes written, or the new size
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run in a child."""

    state: Literal["done", "error", "killed", "hung"]
    count: int  # number of counted calls; for a killed child, the call before which it died; 0 if hung
    result: Any = None
    error: str = ""  # the type of the exception, "Died" for a child that ended without a report
    message: str = ""

    def reached(self, at: int) -> bool:
        """Whether there was a call with this number."""
        return self.state in ("killed", "hung") or self.count >= at


@dataclass(frozen=True, slots=True)
class Swept:
    """The result of a sweep: an operation with a fault at each point, and the points where a check failed."""

    operation: str
    kind: Kind
    points: int
    failures: list[tuple[int, str]]
    calls: int = 0  # that the undisturbed operation makes, if it was run to its end


@dataclass(frozen=True, slots=True)
class _Request:
    function: str
    args: tuple[Any, ...]
    root: Path
    at: int
    kind: Kind
    timeout: float
    log: Path | None
    fork: bool = True


def shim() -> Path:
    """Returns the path of the compiled fault.c; it is compiled once for each content."""
    source = _HERE / "fault.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"fault-{os.getuid()}-{digest}.so"
    # A file of another user under this name must not be loaded.
    if not (path.exists() and path.stat().st_uid == os.getuid()):
        descriptor, temporary = tempfile.mkstemp(suffix=".so")
        os.close(descriptor)
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", temporary, os.fspath(source), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        os.replace(temporary, path)
    return path


def count() -> int:
    """Returns the number of calls counted so far; for functions in a child, to report when they did what."""
    return int(ctypes.CDLL(None).fault_count())


# The server


class FaultServer:
    """A process with the shim and preloaded modules, which forks a child for every run.

    Args:
        preload: modules that are imported before the first fork.
    """

    def __init__(self, preload: Sequence[str] = ("retrieval.gallery.gallery",)) -> None:
        self._preload = list(preload)

    def __enter__(self) -> Self:
        self._connection, there = multiprocessing.Pipe()
        paths = [os.fspath(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        preloads = [os.fspath(shim()), *filter(None, [os.environ.get("LD_PRELOAD")])]
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(preloads),
            "PYTHONPATH": ":".join(paths),
            # A process with threads must not be forked, and numpy and FAISS would start threads.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        number = there.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.faults import serve; serve({number})"],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
        )
        there.close()
        self._connection.send(self._preload)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def run(
        self,
        function: Function,
        args: tuple[Any, ...],
        root: Path,
        *,
        at: int = 0,
        kind: Kind = Kind.COUNT,
        timeout: float = 600,
        log: Path | None = None,
    ) -> Outcome:
        """Runs a function in a child, with a fault at its at-th call that changes what is under `root`.

        Args:
            timeout: seconds after which the child is killed and counts as hung.
            log: path of the trace; outside of `root`.
        """
        return self._asked(_Request(_name(function), args, root, at, kind, timeout, log))

    def call(self, function: Function, args: tuple[Any, ...]) -> Outcome:
        """Runs a function in the server itself, without fork and without a fault; its caches stay warm."""
        return self._asked(_Request(_name(function), args, _HERE, 0, Kind.COUNT, 0, None, fork=False))

    def _asked(self, request: _Request) -> Outcome:
        self._connection.send(request)
        try:
            outcome = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError("The fault server died; what it printed says why.") from error
        assert isinstance(outcome, Outcome)
        return outcome


def _name(function: Function) -> str:
    return function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"


def _found(name: str) -> Callable[..., Any]:
    module, _, names = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in names.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def serve(descriptor: int) -> None:
    """Answers requests until the client closes the connection. Runs in the server."""
    with Connection(descriptor) as connection:
        try:
            for module in connection.recv():
                importlib.import_module(module)
            gc.freeze()
            while True:
                request = connection.recv()
                connection.send(_in_child(request) if request.fork else _in_server(request))
        except (EOFError, BrokenPipeError):
            return


def _in_server(request: _Request) -> Outcome:
    try:
        return Outcome("done", 0, _found(request.function)(*request.args))
    except Exception as error:
        return Outcome("error", 0, None, type(error).__name__, str(error))


def _in_child(request: _Request) -> Outcome:
    function = _found(request.function)  # imported in the server, so that no child repeats the import
    gc.freeze()  # garbage collection in a child would copy every page that it touches
    reader, writer = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            writer.send(_perform(request, function))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    writer.close()
    with reader:
        ready = reader.poll(request.timeout)
        try:
            outcome = reader.recv() if ready else Outcome("hung", 0)
        except EOFError:
            outcome = None
        os.kill(pid, signal.SIGKILL)  # a child that has already ended keeps its exit code
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if isinstance(outcome, Outcome):
        return outcome
    if code == -signal.SIGKILL and request.kind is Kind.KILL:
        return Outcome("killed", request.at)
    return Outcome("error", 0, error="Died", message=f"exit code {code}")


def _perform(request: _Request, function: Callable[..., Any]) -> Outcome:
    shim = ctypes.CDLL(None)
    shim.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a hung child dies with its server
    shim.fault_count.restype = ctypes.c_long
    root = os.fsencode(request.root)
    if request.kind is Kind.TRACE:
        assert request.log is not None, "a trace needs a log"
        failed = shim.fault_trace(root, os.fsencode(request.log))
    else:
        failed = shim.fault_arm(root, ctypes.c_long(request.at), int(request.kind))
    assert not failed, f"{request.root} is not there, or the log cannot be written"
    try:
        result = function(*request.args)
    except BaseException as error:
        shim.fault_disarm()
        return Outcome("error", shim.fault_count(), None, type(error).__name__, str(error))
    shim.fault_disarm()
    return Outcome("done", shim.fault_count(), result)


# The sweep


def sweep(
    operation: Function,
    make: Callable[[Path], None],
    check: Callable[[Path, Outcome], None],
    *,
    kind: Kind,
    servers: Sequence[FaultServer],
    workspace: Path,
    args: tuple[Any, ...] = (),
    step: int = 1,
    timeout: float = 600,
    calls: int | None = None,
) -> Swept:
    """Runs an operation repeatedly, with a fault at its 1st call, its 2nd, and so on to its last.

    The last run, in which the fault is not reached, is checked too, unless `calls` says where the end is. A
    hung child is a failure and ends the sweep.

    Args:
        operation: called in a child with the folder of the point, and with `args`.
        make: makes the initial state in that empty folder. Runs in threads, as `check` does.
        check: raises if an invariant does not hold; the folder is removed afterwards.
        servers: each runs one point at a time.
        workspace: parent of the points' folders.
        step: distance between two points, in calls.
        calls: how many the undisturbed operation makes, from another sweep.
    """
    numbers, over, lock = itertools.count(1, step), threading.Event(), threading.Lock()
    reached: list[int] = []
    undisturbed: list[int] = []
    failures: list[tuple[int, str]] = []

    def point(server: FaultServer, number: int) -> None:
        with tempfile.TemporaryDirectory(dir=workspace, prefix=f"{number}-") as name:
            folder = Path(name)
            make(folder)
            outcome = server.run(operation, (folder, *args), folder, at=number, kind=kind, timeout=timeout)
            if outcome.reached(number):
                reached.append(number)
            elif outcome.state == "done":
                undisturbed.append(outcome.count)
            if outcome.state == "hung" or not outcome.reached(number):
                over.set()
            try:
                assert outcome.state != "hung", f"nothing came back in {timeout} s"
                check(folder, outcome)
            except Exception as error:  # also errors of opening a damaged gallery
                failures.append((number, f"{type(error).__name__}: {error}"))

    def work(server: FaultServer) -> None:
        try:
            while not over.is_set():
                with lock:
                    number = next(numbers)
                if calls is not None and number > calls:
                    return
                point(server, number)
        finally:
            over.set()

    with ThreadPoolExecutor(len(servers)) as pool:
        for finished in [pool.submit(work, server) for server in servers]:
            finished.result()
    return Swept(_name(operation), kind, len(reached), sorted(failures), max(undisturbed, default=0))


# Power loss

_RECORD = struct.Struct("<4I2q")


def trace(server: FaultServer, function: Function, args: tuple[Any, ...], root: Path) -> list[Op]:
    """Runs a function to its end; returns its changes under `root`: op n - 1 is call number n."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        outcome = server.run(function, args, root, kind=Kind.TRACE, log=log)
        assert outcome.state == "done", outcome
        return list(read_ops(log.read_bytes()))


def read_ops(log: bytes) -> Iterator[Op]:
    """Yields the calls in a log that fault.c wrote."""
    position = 0
    while position < len(log):
        call, *sizes, offset, length = _RECORD.unpack_from(log, position)
        ends = list(itertools.accumulate(sizes, initial=position + _RECORD.size))
        path, other, data = (log[start:end] for start, end in itertools.pairwise(ends))
        yield Op(Call(call), os.fsdecode(path), os.fsdecode(other), offset, length, data)
        position = ends[-1]


Variant: TypeAlias = Literal["lost", "reordered", "all"]
VARIANTS: tuple[Variant, ...] = ("lost", "reordered", "all")


@dataclass(eq=False, slots=True)
class _File:
    data: bytearray
    synced: bytes = b""
    least: int = 0  # the smallest size since the last sync, at most that of `synced`


@dataclass(eq=False, slots=True)
class _Folder:
    entries: dict[str, "_Node"] = field(default_factory=dict)
    synced: dict[str, "_Node"] = field(default_factory=dict)


_Node: TypeAlias = _File | _Folder | bytes  # bytes: the text of a symbolic link
_Image: TypeAlias = dict[str, bytes | tuple[bytes] | None]  # content, (text of a link,), None for a folder


def power_loss_images(
    initial: Path, ops: Sequence[Op], target: Path, *, distinct: bool = False, step: int = 1
) -> Iterator[tuple[int, Variant, Path]]:
    """Yields possible disk contents after a power loss that follows n calls, for every n from 0 on.

    - "all": all changes, as after a SIGKILL.
    - "lost": only synced changes: a file has the bytes of its last fsync, a folder the entries of its last
      fsync. One exception: an fsync of a file named *-wal or *-journal also keeps its entry, because SQLite
      relies on that if it does not sync the folder.
    - "reordered": metadata was written first. Entries and truncations are as in "all", bytes as in "lost".

    No image has SQLite's *-shm files, which SQLite recreates. Modes and times are not restored.

    Args:
        initial: a copy of the root before the first call; its contents count as durable.
        target: an existing folder; each image is removed when the next one is requested.
        distinct: leave out images that equal an earlier one, except those after the last call.
        step: distance between two values of n, in calls.
    """
    disk, before = _load(initial), set[bytes]()
    for number in range(len(ops) + 1):
        if number:
            _replay(disk, ops[number - 1])
        for variant in VARIANTS if number % step == 0 else ():
            image = dict(_image(disk, variant))
            digest = _digest(image)
            if distinct and number < len(ops) and digest in before:
                continue
            before.add(digest)
            folder = target / f"{number}-{variant}"
            folder.mkdir()
            try:
                _lay(image, folder)
                yield number, variant, folder
            finally:
                shutil.rmtree(folder)


def _load(path: Path) -> _Folder:
    folder = _Folder()
    for entry in os.scandir(path):
        node: _Node
        if entry.is_symlink():
            node = os.fsencode(os.readlink(entry.path))
        elif entry.is_dir():
            node = _load(Path(entry.path))
        else:
            data = Path(entry.path).read_bytes()
            node = _File(bytearray(data), data, len(data))
        folder.entries[entry.name] = folder.synced[entry.name] = node
    return folder


def _replay(disk: _Folder, op: Op) -> None:
    """Applies a recorded call to a disk. A call on a file that no longer has a name changes nothing."""
    folder, name = _parent(disk, op.path)
    node = disk if not op.path else folder.entries.get(name)
    match op.call, node:
        case Call.CREATE, _:
            folder.entries[name] = _File(bytearray())
        case Call.MKDIR, _:
            folder.entries[name] = _Folder()
        case Call.SYMLINK, _:
            folder.entries[name] = op.data
        case Call.UNLINK, _:
            folder.entries.pop(name, None)
        case Call.RENAME | Call.LINK, _:
            other, new = _parent(disk, op.other)
            if node is None:
                raise ValueError(f"{op.path} came from outside of the root, with unknown contents")
            if op.call is Call.RENAME:
                del folder.entries[name]
            other.entries[new] = node
        case Call.WRITE, _File():
            node.data.extend(bytes(max(0, op.offset - len(node.data))))
            node.data[op.offset : op.offset + op.length] = op.data
        case Call.TRUNCATE, _File():
            del node.data[op.length :]
            node.data.extend(bytes(op.length - len(node.data)))
            node.least = min(node.least, op.length)
        case Call.SYNC, _File():
            node.synced, node.least = bytes(node.data), len(node.data)
            if name.endswith(("-wal", "-journal")):
                folder.synced[name] = node
        case Call.SYNC, _Folder():
            node.synced = dict(node.entries)


def _parent(disk: _Folder, path: str) -> tuple[_Folder, str]:
    """Returns the parent folder and the name of a path; outside of the root, a discarded folder."""
    *parents, name = path.split("/")
    if path.startswith("/"):
        return _Folder(), name
    for part in parents:
        found = disk.entries.get(part)
        disk = found if isinstance(found, _Folder) else _Folder()
    return disk, name


def _image(folder: _Folder, variant: Variant, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the paths of an image with their contents, folders before their entries."""
    for name, node in (folder.synced if variant == "lost" else folder.entries).items():
        if isinstance(node, _Folder):
            yield prefix + name, None
            yield from _image(node, variant, f"{prefix}{name}/")
        elif isinstance(node, bytes):
            yield prefix + name, (node,)
        elif not name.endswith("-shm"):
            contents = {"lost": node.synced, "reordered": node.synced[: node.least], "all": node.data}
            yield prefix + name, bytes(contents[variant])


def _digest(image: _Image) -> bytes:
    return hashlib.sha256(repr(sorted(image.items())).encode()).digest()


def _lay(image: _Image, target: Path) -> None:
    for path, content in image.items():
        if content is None:
            (target / path).mkdir()
        elif isinstance(content, tuple):
            (target / path).symlink_to(os.fsdecode(content[0]))
        else:
            (target / path).write_bytes(content)
