"""All GPU measurements in one command: forward pass, JPEGs into a gallery, bus transfers, training.

    python -m benchmarks.gpu --photos FOLDER [--model MODEL | --weights FILE] [--device cuda]

`--photos` holds a folder for each person. Without a model, a ResNet50 with the weights of a file, or random
weights, is made for the run: throughput does not depend on weights, drift does. On a machine without a
network that has Python 3.12, torch 2.11 and torchvision 0.26, install the other imports from wheels:

    PACKAGES="faiss-cpu sqlalchemy alembic safetensors"
    pip download --dest wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $PACKAGES
    pip install --no-index --find-links wheels/ $PACKAGES

Photos are copied, each copy with a few different bytes after the image, so that there are enough photos to
keep a GPU busy for some seconds and all of them are enrolled. `--device cpu` only tests the program. Prints
one table and one JSON line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from benchmarks import decoding
from retrieval.bulk.ingest import ingest
from retrieval.bulk.reports import IngestReport
from retrieval.errors import Interrupted
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import PRECISIONS
from retrieval.models.network import Network
from retrieval.models.torch_engine import TorchEngine
from retrieval.sources import photos
from retrieval.system.cpu import usable_cores
from training.data import dataset
from training.fitting.fit import Step, fit
from training.fitting.recipes import FitConfig
from training.networks.initialize import build

BATCHES = (1, 8, 32, 64, 128, 256, 512, 1024)
TRAINING_BATCHES = (10, 64)
# Number of first training steps that are not counted: they select kernels and fill the loaders' queues.
_WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Asked:
    """What is measured: the model, the photos, the device and the settings."""

    bundle: ModelBundle
    photos: Path
    device: str
    seconds: float
    copies: int
    batches: tuple[int, ...] = BATCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--weights", default="none", help="of the ResNet50 that is made without --model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement, about")
    parser.add_argument("--copies", type=int, default=4, help="of each photo, for the run from JPEGs")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    options = parser.parse_args()
    batches = tuple(int(number) for number in options.batches.split(","))
    with tempfile.TemporaryDirectory() as folder:
        bundle = ModelBundle.load(options.model) if options.model else made(Path(folder), options.weights)
        asked = Asked(bundle, options.photos, options.device, options.seconds, options.copies, batches)
        result = measured(asked)
    show(result)
    print(json.dumps(result))


def made(folder: Path, weights: str) -> ModelBundle:
    """Makes a bundle of a ResNet50 for 128 x 128 pixels. It has no graph, so only torch can run it."""
    network, start = build(62, weights=weights)
    return ModelBundle.create(
        folder,
        tensors={name: tensor.contiguous().numpy() for name, tensor in network.state_dict().items()},
        graph=b"",
        architecture=network.architecture,
        labels=tuple(f"person {number}" for number in range(62)),
        preprocessing=Preprocessing(size=128, crop=0.6),
        dimension=network.dimension,
        recipe={"weights": start.source},
        split={},
        figures={},
        versions={},
        created_at="",
    )


def measured(asked: Asked) -> dict[str, Any]:
    """Returns all measurements."""
    found = [Path(photo.path) for photo in photos.scan([asked.photos]) if photo.path is not None]
    sample = _squares(asked.bundle, found[:64])
    return {
        "machine": machine(asked.device),
        "forward": list(_forward(asked, sample)),
        "decoding": _decoding(asked),
        "from_jpegs": [_from_jpegs(asked, found, precision, sample) for precision in PRECISIONS],
        "training": [_training(asked, batch) for batch in TRAINING_BATCHES],
    }


def _decoding(asked: Asked) -> list[dict[str, Any]]:
    """Returns the rows of benchmarks.decoding, run as a program, because its processes need no torch."""
    wanted = {
        "--photos": asked.photos,
        "--size": asked.bundle.input_size,
        "--crop": asked.bundle.preprocessing.crop,
        "--seconds": asked.seconds / 5,
        "--rounds": 1,
    }
    options = [str(part) for pair in wanted.items() for part in pair]
    command = [sys.executable, "-m", "benchmarks.decoding", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1])["rows"])


def machine(device: str) -> dict[str, Any]:
    """Returns the facts about the machine and the versions of packages."""
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "is_a_gpu": on_gpu,
        "cores": usable_cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "pillow", "faiss-cpu")},
    }


def _squares(bundle: ModelBundle, files: list[Path]) -> pixels.Pixels:
    return np.stack([bundle.load_photo_reader().square(path) for path in files])


def _forward(asked: Asked, sample: pixels.Pixels) -> Iterator[dict[str, Any]]:
    """Yields photos/s by precision and batch: resident on the device, and through the engine and the bus."""
    for precision in PRECISIONS:
        engine = TorchEngine.load(asked.bundle, asked.device, precision=precision)
        engine(sample)  # measures the drift
        for batch in asked.batches:
            engine.pass_size = batch
            many = np.resize(sample, (8 * batch, *sample.shape[1:]))
            try:
                alone = _pace(partial(engine.resident(many[:batch]), 8), len(many), asked.seconds)
                through = _pace(partial(engine, many), len(many), asked.seconds)
            except torch.OutOfMemoryError:
                engine.pass_size = 0
            if engine.pass_size < batch:
                yield {"precision": precision, "batch": batch, "problem": "out of memory"}
                break
            drift = engine.drift
            yield {
                "precision": precision,
                "batch": batch,
                "resident_photos_per_second": round(alone, 1),
                "engine_photos_per_second": round(through, 1),
                "bus_mb_per_second": round(through * sample[0].nbytes / 1e6, 1),
                "largest_drift": None if drift is None else float(f"{drift.largest:.2g}"),
                "mean_drift": None if drift is None else float(f"{drift.mean:.2g}"),
            }


def _pace(run: Callable[[], object], count: int, seconds: float) -> float:
    """Returns photos/s: the median of five measurements, after three calls that are not counted."""
    for _ in range(3):
        run()
    paces = []
    for _ in range(5):
        calls, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds / 5 or not calls:
            run()
            calls += 1
        paces.append(calls * count / (time.perf_counter() - start))
    return statistics.median(paces)


def _from_jpegs(asked: Asked, found: list[Path], precision: str, sample: pixels.Pixels) -> dict[str, Any]:
    """Measures ingest from files to durable rows on all cores, and the engine alone in the same process."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "photos"
        copied(found, asked.photos, files, copies=asked.copies)
        options: dict[str, Any] = {"device": asked.device, "engine": "torch", "precision": precision}
        with Gallery.create(Path(folder) / "gallery", asked.bundle, **options) as gallery:
            batch_size = gallery.embedder.tune(sample, limit=max(asked.batches))
            many = np.resize(sample, (4 * batch_size, *sample.shape[1:]))
            pure = _pace(lambda: gallery.embedder.embed(many), len(many), asked.seconds)
            with Busy(asked.device) as busy:
                start = time.perf_counter()
                report = ingest(gallery, [files])
                seconds = time.perf_counter() - start
    pace = report.enrolled / seconds
    return {
        "precision": precision,
        "batch": report.batch_size,
        "photos": report.found,
        "enrolled": report.enrolled,
        "seconds": round(seconds, 2),
        "photos_per_second": round(pace, 1),
        "pure_forward_photos_per_second": round(pure, 1),
        "ratio": round(pace / pure, 3),
        "bytes_over_the_bus_per_photo": sample[0].nbytes + 4 * _answer_width(asked.bundle),
        "gpu_busy": busy.share,
        "stages": _stages(report),
    }


def _answer_width(bundle: ModelBundle) -> int:
    return bundle.dimension + len(bundle.labels)


def _stages(report: IngestReport) -> dict[str, float]:
    """Returns the stage times of the report, in seconds."""
    named = {field.name: getattr(report, field.name) for field in fields(report)}
    return {name: round(value, 2) for name, value in named.items() if name.endswith("_seconds")}


def copied(found: list[Path], root: Path, target: Path, *, copies: int) -> None:
    """Copies photos into the same folder structure, each copy with different bytes after the image's end."""
    for path in found:
        content = path.read_bytes()
        place = target / path.relative_to(root.absolute())
        place.parent.mkdir(parents=True, exist_ok=True)
        for number in range(copies):
            name = f"{place.stem}-{number}{place.suffix}"
            (place.parent / name).write_bytes(content + number.to_bytes(4, "big"))


class Busy:
    """Measures GPU utilization with nvidia-smi, five times a second, for the length of a with statement.

    Attributes:
        share: mean utilization from 0 to 1; None without nvidia-smi, or on a CPU.
    """

    def __init__(self, device: str) -> None:
        self.share: float | None = None
        self._index = (torch.device(device).index or 0) if device.startswith("cuda") else None
        self._over = threading.Event()
        self._samples: list[float] = []
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        command = ["nvidia-smi", f"--id={self._index}", "--query-gpu=utilization.gpu"]
        command.append("--format=csv,noheader,nounits")
        while not self._over.wait(0.2):
            try:
                done = subprocess.run(command, capture_output=True, text=True)
                self._samples.append(float(done.stdout.strip()) / 100)
            except (OSError, ValueError):
                return

    def __enter__(self) -> "Busy":
        if self._index is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._index is not None:
            self._thread.join()
        self.share = round(statistics.mean(self._samples), 3) if self._samples else None


def _training(asked: Asked, batch: int) -> dict[str, Any]:
    """Measures photos/s of a training epoch, without its first steps; stops after `asked.seconds`."""
    split = dataset.load(asked.photos, validation_fraction=0.3, min_images=2, seed=0)
    network = Network(len(split.labels), architecture=asked.bundle.architecture)
    on_gpu = asked.device.startswith("cuda")
    times: list[float] = []

    def note(_step: Step) -> None:
        times.append(time.perf_counter())

    def enough() -> bool:
        return len(times) > _WARM_UP_STEPS + 1 and times[-1] - times[_WARM_UP_STEPS] > asked.seconds

    try:
        fit(
            network,
            split,
            asked.bundle.load_photo_reader(),
            FitConfig(epochs=1, batch_size=batch, learning_rate=1e-4),
            device=torch.device(asked.device),
            workers=min(8, usable_cores()) if on_gpu else 0,
            on_step=note,
            should_stop=enough,
        )
        whole = True
    except Interrupted:
        whole = False
    warm = min(_WARM_UP_STEPS, max(0, len(times) - 2))
    steps = len(times) - 1 - warm
    took = times[-1] - times[warm]
    return {
        "batch": batch,
        "steps": len(times),
        "whole_epoch": whole,
        "photos_per_second": round(steps * batch / took, 1) if steps > 0 else None,
    }


def limit_of(result: dict[str, Any], run: dict[str, Any]) -> str:
    """Returns the bottleneck of a run from JPEGs, as text."""
    if run["ratio"] >= 0.8:
        return "the network"
    threads = max(row["photos_per_second"] for row in result["decoding"] if row["kind"] == "threads")
    if threads < run["pure_forward_photos_per_second"]:
        return f"decoding: threads alone read {threads:,.0f} photos/s"
    slowest = max(run["stages"], key=run["stages"].__getitem__, default=None)
    return "none of decoding and network alone" + (f"; see {slowest}" if slowest else "")


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    facts = result["machine"]
    if not facts["is_a_gpu"]:
        print("A toy run on a CPU: these figures say nothing of a GPU.")
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "is_a_gpu"))
    heads = f"{'forward':9} {'batch':>6} {'resident/s':>11} {'engine/s':>9} {'bus MB/s':>9}"
    print(f"\n{heads} {'drift of distances':>19}")
    for row in result["forward"]:
        if "problem" in row:
            print(f"{row['precision']:9} {row['batch']:6} {row['problem']}")
            continue
        drift = (
            "-" if row["largest_drift"] is None else f"{row['mean_drift']:.1e}, {row['largest_drift']:.1e}"
        )
        print(
            f"{row['precision']:9} {row['batch']:6} {row['resident_photos_per_second']:11,.1f} "
            f"{row['engine_photos_per_second']:9,.1f} {row['bus_mb_per_second']:9,.1f} {drift:>19}"
        )
    print()
    decoding.show([decoding.Row(**row) for row in result["decoding"]])
    heads = f"{'from JPEGs':10} {'batch':>6} {'photos':>8} {'photos/s':>9} {'forward':>9} {'ratio':>6}"
    print(f"\n{heads} {'GPU busy':>8}  limit")
    for run in result["from_jpegs"]:
        busy = "-" if run["gpu_busy"] is None else f"{run['gpu_busy']:.0%}"
        print(
            f"{run['precision']:10} {run['batch']:6} {run['enrolled']:8,} {run['photos_per_second']:9,.1f} "
            f"{run['pure_forward_photos_per_second']:9,.1f} {run['ratio']:6.2f} {busy:>8}  "
            f"{limit_of(result, run)}"
        )
    print(f"\nbytes over the bus: {result['from_jpegs'][0]['bytes_over_the_bus_per_photo']:,} a photo")
    for row in result["training"]:
        pace = (
            "too few steps" if row["photos_per_second"] is None else f"{row['photos_per_second']:,} photos/s"
        )
        print(f"training, batches of {row['batch']}: {pace}, {row['steps']} steps")


if __name__ == "__main__":
    main()
