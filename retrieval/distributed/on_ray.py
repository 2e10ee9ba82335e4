"""The run on Ray: workers on the machines of a cluster embed blocks of photos into a folder of parts.

Each machine has workers for its GPUs, or for its cores. A worker has two blocks at a time: one is read while
the other is embedded. A block whose worker died is given to another one; its part has the same name and
rows, so each photo is there once, whatever died. Machines that join the cluster get workers, too.

Only this module imports ray, an optional dependency.
"""

import os
import re
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import retrieval
from retrieval.bulk.embed import EmbedReport
from retrieval.distributed.blocks import Block, in_blocks
from retrieval.distributed.worker import EmbeddedBlock, Settings, Worker, model_files
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.reading import AUTO
from retrieval.embedding.stages import Resources
from retrieval.errors import FaceprintError, InputError, MissingDependency, RunError, StorageError
from retrieval.images.photo_reader import FaceSelection
from retrieval.images.pixels import MAX_SECONDS
from retrieval.models.bundle import ModelBundle
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import STANDARD_INPUT, Photo
from retrieval.system.cpu import usable_cores
from retrieval.system.files import why
from retrieval.system.parquet import pyarrow
from retrieval.system.paths import absolute
from retrieval.system.pipeline import Meter
from retrieval.transfer.embedding_parts import (
    PART,
    PartsFolder,
    RunRecord,
    parts_folder,
    read_record,
    write_record,
)

PHOTOS_PER_PART: Final = 1024

# Blocks that a worker has at a time: it reads the photos of one while the other's last batch is embedded.
_BLOCKS_PER_WORKER: Final = 2
# Workers of a machine that may die as they start before the machine gets no more.
_MAX_STARTS: Final = 3
# Workers that may die with a block before the block is taken for the cause.
_MAX_ATTEMPTS: Final = 5
# Seconds between two looks for machines that joined, and of a wait for results.
_GROW_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.2
# The group of calls that a worker answers while it embeds.
_CONTROL: Final = "control"
_STOP_SECONDS: Final = 5.0
# HOST:PORT, or ray://HOST:PORT; an IPv6 host has brackets.
_PORT: Final = re.compile(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)")
_CONNECT_SECONDS: Final = 10.0
# Of Ray's shared memory for a cluster of this process: the model, and blocks with photos of archives.
_LOCAL_STORE_BYTES: Final = 2**30


@dataclass(frozen=True, slots=True)
class _WorkerSize:
    """The GPUs and cores of a worker, as of `embed_on_ray`."""

    gpus: float | None
    cores: int | None

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 0:
            raise InputError("The number of GPUs per worker must be at least 0.")
        if self.cores is not None and self.cores < 1:
            raise InputError("The number of cores per worker must be at least 1.")

    def shares(self, cores: int, gpus: float, *, use_gpus: float) -> tuple[int, int]:
        """Returns how many workers a machine has, and the cores of each."""
        if use_gpus:
            workers = int(gpus / use_gpus + 1e-9)
            return workers, max(1, cores // max(1, workers))
        each = min(cores, self.cores or cores)
        return (cores // each, each) if each else (0, 0)


def embed_on_ray(
    bundle: ModelBundle,
    found: Iterable[Photo],
    out: str | os.PathLike[str],
    *,
    sources: Sequence[str] = (),
    address: str | None = None,
    gpus_per_worker: float | None = None,
    cores_per_worker: int | None = None,
    photos_per_part: int = PHOTOS_PER_PART,
    device: str = "auto",
    precision: str = "float32",
    passed_over: PassedOver | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    photo_seconds: float = MAX_SECONDS,
    selection: FaceSelection = AUTO,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EmbedReport:
    """Embeds photos with the machines of a Ray cluster into a folder of parts; returns a report.

    The parts have the rows that `embed` writes into a Parquet file, and `ingest --embeddings` takes the
    folder. The machines read the photos by the paths and addresses that this one finds, and write the parts.

    Args:
        bundle: the model; the machines get a copy.
        found: the photos, as `photos.scan` gives them.
        out: a folder that all machines share under one path, or an address that fsspec knows; empty, or with
            a run of the same model over the same sources, which this one replaces.
        sources: what the photos come from, for `run.json`.
        address: of a Ray cluster, as of `ray.init`; None is that of the environment variable RAY_ADDRESS, and
            else a cluster of this machine alone, which ends with the run.
        gpus_per_worker: GPUs of a worker, of which a machine has as many as fit; 0.5 lets two share one, 0
            embeds on cores; None is 1 where a machine of the cluster has a GPU, and else 0.
        cores_per_worker: cores of a worker without a GPU; None is all of a machine.
        photos_per_part: the photos of a block, at least 1.
        device: "auto", "cpu" or "cuda".
        precision: as of `Embedder.open`.
        passed_over: what the scan counts in.
        batch_size, workers, decoders, photo_seconds, selection: as of `embed`, of each worker.
        on_outcome: called once for every photo; for rejected ones in the order of the photos.
        should_stop: called several times a second; True stops the run, and finished parts stay.

    Raises:
        InputError: an argument, or `out` holds something else; there is no cluster at `address`, or it has no
            machine for a worker; a machine does not see `out`.
        RunError: a machine has another version of faceprint, workers cannot be started, or they died with
            each of five attempts to embed the same photos.
        StorageError: `out` cannot be written.
        MissingDependency: ray or pyarrow is not installed, or what fsspec needs for an address.
    """
    started = time.monotonic()
    size = _WorkerSize(gpus_per_worker, cores_per_worker)
    if photos_per_part < 1:
        raise InputError("A part must have at least 1 photo.")
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"Ray gives each worker its GPUs, so `device` is auto, cpu or cuda, not {device}.")
    pyarrow()  # its absence is told before anything is made
    folder = parts_folder(out)
    report = EmbedReport(passed_over=PassedOver() if passed_over is None else passed_over)
    gathered = _Gathered(report, on_outcome)
    with _cluster(address) as ray:
        record = _claim(folder, bundle, sources)
        settings = Settings(
            out=folder.location,
            run=record.id,
            device=device,
            precision=precision,
            resources=Resources(batch_size, workers, decoders, photo_seconds),
            selection=selection,
        )
        with _Pool(ray, size, settings, bundle) as pool:
            blocks = in_blocks(found, photos_per_part)
            report.interrupted = not _run(pool, blocks, gathered, should_stop)
    gathered.finish(pool.most_workers)
    if not report.interrupted:
        _finish(folder, record, report, gathered.parts)
    report.seconds = time.monotonic() - started
    return report


def _claim(folder: PartsFolder, bundle: ModelBundle, sources: Sequence[str]) -> RunRecord:
    """Checks that a folder is free for a run, and writes its `run.json`.

    Raises:
        InputError: it holds parts of another run.
        StorageError: it cannot be written.
    """
    folder.make()
    before = read_record(folder)
    named = [one if one == STANDARD_INPUT else absolute(one) for one in sources]
    if before is not None and (before.model, before.sources) != (bundle.fingerprint, named):
        raise InputError(
            f"{folder.location} holds a run with another model or other sources; name another folder with "
            "`out`, or remove that run."
        )
    if before is None and any(name.endswith(".parquet") for name in folder.names()):
        raise InputError(f"{folder.location} holds other Parquet files; name another folder with `out`.")
    record = RunRecord(secrets.token_hex(16), bundle.fingerprint, named)
    write_record(folder, record)
    return record


def _finish(folder: PartsFolder, record: RunRecord, report: EmbedReport, parts: dict[str, int]) -> None:
    """Removes parts of an earlier run, and names those of this one in `run.json`."""
    for name in folder.names():
        if PART.fullmatch(name) and name not in parts:
            folder.remove(name)
    folder.remove_unfinished()
    complete = RunRecord(
        id=record.id,
        model=record.model,
        sources=record.sources,
        complete=True,
        found=report.found,
        embedded=report.embedded,
        rejected=report.rejected,
        faces=report.faces,
        parts=dict(sorted(parts.items())),
    )
    write_record(folder, complete)


class _Gathered:
    """The results of blocks, which finish in any order: counts, the report of rejected photos, and parts."""

    def __init__(self, report: EmbedReport, on_outcome: Callable[[Outcome], None]) -> None:
        self.parts: dict[str, int] = {}
        self._report = report
        self._on_outcome = on_outcome
        self._rejected: dict[int, tuple[Outcome, ...]] = {}
        self._next = 0
        self._meters: dict[str, Meter] = {}

    def add(self, block: Block, done: EmbeddedBlock) -> None:
        """Counts a block, once."""
        rejected = dict(done.rejected)
        for place, photo in enumerate(block.photos):
            if place not in rejected:
                self._note(Outcome(photo.path, photo.identity, Status.EMBEDDED))
        self._rejected[block.number] = tuple(rejected.values())
        while self._next in self._rejected:
            for outcome in self._rejected.pop(self._next):
                self._note(outcome)
            self._next += 1
        if done.part is not None:
            self.parts[done.part] = done.rows
        report = self._report
        report.faces += done.rows
        report.bytes_read += done.bytes_read
        report.batch_size = max(done.batch_size or 0, report.batch_size or 0) or None
        report.peak_memory = max(report.peak_memory, done.peak_memory)
        for stage in done.stages:
            meter = self._meters.setdefault(stage.name, Meter(stage.name, stage.workers))
            meter.add(
                items=stage.items,
                busy=stage.busy_seconds,
                starved=stage.starved_seconds,
                blocked=stage.blocked_seconds,
            )

    def _note(self, outcome: Outcome) -> None:
        self._report.count(outcome)
        self._on_outcome(outcome)

    def finish(self, workers: int) -> None:
        """Counts rejected photos that wait for earlier blocks, after a stop, and sets the stages."""
        for number in sorted(self._rejected):
            for outcome in self._rejected[number]:
                self._note(outcome)
        self._rejected.clear()
        for meter in self._meters.values():
            meter.workers *= max(1, workers)
        self._report.stages = tuple(self._meters.values())


def _run(
    pool: "_Pool", blocks: Iterator[Block], gathered: _Gathered, should_stop: Callable[[], bool]
) -> bool:
    """Embeds all blocks; returns False where the run was stopped before the last one.

    Raises:
        FaceprintError: of a worker; or there is no machine for one, or a block ends its workers.
    """
    again: deque[_Task] = deque()
    ended = False
    while not should_stop():
        pool.grow()
        while not (ended and not again) and (worker := pool.idle()) is not None:
            task = again.popleft() if again else _next_task(blocks)
            if task is None:
                ended = True
            else:
                pool.submit(worker, task)
        if ended and not again and not pool.busy:
            return True
        for task, done in pool.finished():
            if done is not None:
                gathered.add(task.block, done)
            else:
                again.append(task.failed())
    return False


def _next_task(blocks: Iterator[Block]) -> "_Task | None":
    block = next(blocks, None)
    return None if block is None else _Task(block)


@dataclass(frozen=True, slots=True)
class _Task:
    """A block to be embedded, and how many workers died with it."""

    block: Block
    attempts: int = 0

    def failed(self) -> "_Task":
        """Returns the next attempt.

        Raises:
            RunError: there were five.
        """
        if self.attempts + 1 >= _MAX_ATTEMPTS:
            photos = self.block.photos
            raise RunError(
                f"{_MAX_ATTEMPTS} workers died one after the other with the {len(photos):,} photos from "
                f"{photos[0].path} to {photos[-1].path}; look for what ends them (memory, the system's log), "
                "or leave these photos out."
            )
        return _Task(self.block, self.attempts + 1)


@dataclass(eq=False)
class _Actor:
    """A worker on a machine of the cluster.

    Attributes:
        handle: of Ray.
        node: the id of its machine.
        starting: the reference of its start; None once the model is loaded.
        tasks: by the references of their results.
    """

    handle: Any
    node: str
    starting: Any
    tasks: dict[Any, _Task] = field(default_factory=dict)


class _Pool:
    """The workers of a run: a context manager, which ends them."""

    def __init__(self, ray: Any, size: _WorkerSize, settings: Settings, bundle: ModelBundle) -> None:
        self.most_workers = 0
        self._ray = ray
        self._size = size
        self._settings = settings
        try:
            self._files = ray.put(model_files(bundle))
        except OSError as error:
            raise StorageError(f"The model {bundle.folder} cannot be read: {why(error)}.") from error
        self._actors: list[_Actor] = []
        self._grown = 0.0
        self._failures: dict[str, list[str]] = {}
        self._use_gpus: float | None = size.gpus
        if settings.device != "auto" and size.gpus is None:
            self._use_gpus = 1.0 if settings.device == "cuda" else 0.0

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_error: object) -> None:
        stop = [actor.handle.stop.options(concurrency_group=_CONTROL).remote() for actor in self._actors]
        if stop:
            self._ray.wait(stop, num_returns=len(stop), timeout=_STOP_SECONDS)
        for actor in self._actors:
            self._end(actor)

    @property
    def busy(self) -> bool:
        """Whether a worker has a block."""
        return any(actor.tasks for actor in self._actors)

    def grow(self) -> None:
        """Starts the workers that machines lack, at most every 2 s.

        Raises:
            InputError: no machine has room for one.
            RunError: workers could be started on none.
        """
        if self._actors and time.monotonic() - self._grown < _GROW_SECONDS:
            return
        self._grown = time.monotonic()
        machines = [node for node in self._ray.nodes() if node["Alive"]]
        if self._use_gpus is None:
            self._use_gpus = 1.0 if any(node["Resources"].get("GPU", 0) >= 1 for node in machines) else 0.0
        for node in machines:
            resources = node["Resources"]
            wanted, cores = self._size.shares(
                int(resources.get("CPU", 0)), resources.get("GPU", 0.0), use_gpus=self._use_gpus
            )
            if len(self._failures.get(node["NodeID"], ())) >= _MAX_STARTS:
                continue
            there = sum(actor.node == node["NodeID"] for actor in self._actors)
            for _ in range(wanted - there):
                self._start(node["NodeID"], cores)
        self.most_workers = max(self.most_workers, len(self._actors))
        if not self._actors and self._failures:
            words = next(reversed(self._failures.values()))[-1]
            raise RunError(f"Not one worker of the Ray cluster could be started ({words}).")
        if not self._actors:
            what = f"{self._use_gpus:g} GPUs" if self._use_gpus else "a core"
            raise InputError(
                f"No machine of the Ray cluster has {what} for a worker; add machines, or state the number "
                "with `gpus_per_worker`."
            )

    def _start(self, node: str, cores: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        made = self._ray.remote(
            num_cpus=cores,
            num_gpus=self._use_gpus,
            max_concurrency=_BLOCKS_PER_WORKER,
            concurrency_groups={_CONTROL: 1},
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        handle = made(Worker).remote()
        # Ray may show a worker GPUs that are not its own.
        settings = self._settings if self._use_gpus else replace(self._settings, device="cpu")
        ready = handle.start.remote(settings, self._files, retrieval.__version__, cores)
        self._actors.append(_Actor(handle, node, ready))

    def idle(self) -> _Actor | None:
        """Returns the worker with the fewest blocks, below two; None where all have two or are starting."""
        free = [one for one in self._actors if one.starting is None and len(one.tasks) < _BLOCKS_PER_WORKER]
        return min(free, key=lambda one: len(one.tasks), default=None)

    def submit(self, actor: _Actor, task: _Task) -> None:
        """Gives a block to a worker."""
        actor.tasks[actor.handle.embed.remote(task.block)] = task

    def finished(self) -> list[tuple[_Task, EmbeddedBlock | None]]:
        """Waits up to 0.2 s for results; returns finished tasks, with None for those of a worker that died.

        Raises:
            FaceprintError: that of a worker.
        """
        waiting = {ref: actor for actor in self._actors for ref in (actor.starting, *actor.tasks) if ref}
        if not waiting:
            time.sleep(_POLL_SECONDS)
            return []
        refs, _ = self._ray.wait([*waiting], timeout=_POLL_SECONDS)
        return [one for ref in refs for one in self._taken(waiting[ref], ref)]

    def _taken(self, actor: _Actor, ref: Any) -> list[tuple[_Task, EmbeddedBlock | None]]:
        exceptions = self._ray.exceptions
        try:
            result = self._ray.get(ref)
        except exceptions.RayTaskError as error:
            raise _translated(error) from error
        except exceptions.RayError as error:
            if actor.starting is not None:
                words = " ".join(str(error).split())[:300]
                self._failures.setdefault(actor.node, []).append(words)
            # The worker or its machine died, or cannot be reached: another one takes its blocks.
            self._actors.remove(actor)
            self._end(actor)
            return [(task, None) for task in actor.tasks.values()]
        if ref is actor.starting:
            actor.starting = None
            return []
        return [(actor.tasks.pop(ref), result)]

    def _end(self, actor: _Actor) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor.handle)


def _translated(error: Any) -> FaceprintError:
    """Returns the error of a worker as one of this project."""
    cause = error.cause
    if isinstance(cause, FaceprintError):
        return cause
    words = " ".join(str(cause).split())[:300]
    return RunError(f"A worker failed ({type(cause).__name__}: {words}).")


def _check_port(address: str) -> None:
    """Checks that something listens at an address with a port; Ray would try for minutes.

    Raises:
        OSError: nothing does.
    """
    found = _PORT.fullmatch(address)
    if found is not None:
        socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Yields ray, connected to a cluster, from which it disconnects in the end.

    Raises:
        MissingDependency: ray is not installed.
        InputError: there is no such cluster.
        RunError: a cluster of this machine alone cannot be started.
    """
    # Without it, Ray hides the GPUs of a worker without one, and warns that it will not any more.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependency(
            "Embedding with many machines needs ray; install it with pip install 'faceprint[ray]'."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                "local",
                num_cpus=usable_cores(),
                object_store_memory=_LOCAL_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        else:
            _check_port(address)
            ray.init(address, **quiet)
    except Exception as error:  # of many types, among them RuntimeError and ConnectionError
        words = " ".join(str(error).split())[:300]
        if address is None:
            raise RunError(f"Ray cannot be started on this machine ({words}).") from error
        raise InputError(
            f"There is no Ray cluster at {address} that lets this machine in ({words}); start one with "
            "`ray start --head`, or leave `address` out."
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray ends the program at SIGTERM; the caller may want to end the run.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()
