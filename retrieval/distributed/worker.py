"""The worker: embeds blocks on one machine by `bulk.embed.embed_photos`, and puts the parts into a folder."""

import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import retrieval
from retrieval.bulk.embed import embed_photos
from retrieval.distributed.blocks import Block
from retrieval.embedding.outcome import Outcome, Status
from retrieval.embedding.stages import Resources
from retrieval.errors import FaceprintError, InputError, RunError
from retrieval.images.photo_reader import FaceSelection
from retrieval.models.bundle import FILE_NAMES, ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.system.pipeline import Meter
from retrieval.transfer.embedding_parts import parts_folder, read_record

# With fewer cores, threads decode as fast as processes.
_MIN_CORES_TO_DECODE_BESIDE_GPU: Final = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker needs to know beside the model and the photos.

    Attributes:
        out: the folder of the parts.
        run: the id in its `run.json`.
        device: "auto", "cpu" or "cuda", of what the worker sees.
        precision: as of `Embedder.open`.
        resources: as of `embed`; None for `workers` and `decoders` is the worker's share of its machine.
        selection: which faces of a photo.
    """

    out: str
    run: str
    device: str
    precision: str
    resources: Resources
    selection: FaceSelection


@dataclass(frozen=True, slots=True)
class Stage:
    """The figures of a `Meter`, which itself cannot be sent to another process."""

    name: str
    workers: int
    items: int
    busy_seconds: float
    starved_seconds: float
    blocked_seconds: float

    @classmethod
    def of(cls, meter: Meter) -> "Stage":
        """Returns the figures of a meter."""
        return cls(
            meter.name,
            meter.workers,
            meter.items,
            meter.busy_seconds,
            meter.starved_seconds,
            meter.blocked_seconds,
        )


@dataclass(frozen=True, slots=True)
class EmbeddedBlock:
    """What became of a block.

    Attributes:
        part: the name of its part; None where no photo could be embedded, so that there is none.
        rows: of the part.
        rejected: the place in the block and the outcome of each photo that could not be embedded.
        bytes_read, batch_size, peak_memory, stages: as of a `Run`.
    """

    part: str | None
    rows: int
    rejected: tuple[tuple[int, Outcome], ...]
    bytes_read: int
    batch_size: int | None
    peak_memory: int
    stages: tuple[Stage, ...]


def model_files(bundle: ModelBundle) -> dict[str, bytes]:
    """Returns the files of a bundle by their names, to be sent to workers.

    Raises:
        OSError: a file cannot be read.
    """
    paths = [bundle.folder / name for name in sorted(FILE_NAMES)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


class Worker:
    """Embeds blocks with one model, in a process of its own; `embed` may be called by two threads at once."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="faceprint-worker-"))

    def start(self, settings: Settings, files: Mapping[str, bytes], version: str, cores: int) -> str:
        """Loads the model; returns the name of this machine.

        Args:
            settings: of the run.
            files: of the bundle, by name.
            version: of faceprint where the run was started.
            cores: how many of this machine's the worker may use.

        Raises:
            FaceprintError: this machine has another version of faceprint, cannot run the model, or sees
                another folder than the machine where the run was started.
        """
        host = socket.gethostname()
        if version != retrieval.__version__:
            raise RunError(
                f"The machine {host} has faceprint {retrieval.__version__}, and this one {version}; install "
                "the same version on all machines."
            )
        self._out, self._settings = parts_folder(settings.out), settings
        try:
            record = read_record(self._out)
        except FaceprintError as error:
            raise RunError(f"The machine {host} cannot use the folder of the run: {error.words}.") from error
        if record is None or record.id != settings.run:
            raise InputError(
                f"The machine {host} does not see the files that this one writes to {settings.out}; name a "
                "folder that all machines share under one path, or an address such as s3://bucket/run."
            )
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
        self._cores = cores
        self._embedder = Embedder.open(
            ModelBundle.load(self._folder),
            device=settings.device,
            precision=settings.precision,
            threads=cores,
        )
        return host

    def embed(self, block: Block) -> EmbeddedBlock:
        """Embeds a block and writes its part, which is whole when this returns; an older one is replaced.

        Raises:
            FaceprintError: as `embed`, or the part cannot be written.
        """
        rejected: list[tuple[int, Outcome]] = []
        count = 0

        def note(outcome: Outcome) -> None:
            nonlocal count
            if outcome.status is not Status.EMBEDDED:
                rejected.append((count, outcome))
            count += 1

        name = block.part
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            made = Path(folder) / name
            report = embed_photos(
                self._embedder,
                block.photos,
                made,
                batch_size=self._settings.resources.batch_size,
                workers=self._settings.resources.workers or self._threads(),
                decoders=self._decoders(),
                photo_seconds=self._settings.resources.photo_seconds,
                selection=self._settings.selection,
                on_outcome=note,
            )
            if report.embedded:
                self._out.put(made, name)
        return EmbeddedBlock(
            part=name if report.embedded else None,
            rows=report.faces,
            rejected=tuple(rejected),
            bytes_read=report.bytes_read,
            batch_size=report.batch_size,
            peak_memory=report.peak_memory,
            stages=tuple(map(Stage.of, report.stages)),
        )

    def stop(self) -> None:
        """Removes the worker's files; it cannot embed afterwards."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _threads(self) -> int:
        return max(self._cores, self._decoders())

    def _decoders(self) -> int:
        """Returns the number of decoding processes: as asked, else the cores of a worker with a GPU."""
        asked = self._settings.resources.decoders
        if asked is not None:
            return asked
        few = self._cores < _MIN_CORES_TO_DECODE_BESIDE_GPU
        return 0 if few or not self._embedder.on_gpu else self._cores
