"""Throughput of bulk enrollment, from file to durable row, beside the machine's upper limits.

    python -m benchmarks.ingest --model MODEL --photos FOLDER [--parts speed,memory,broken,again]

Parts:
    speed   tenths of a run, interleaved with (a) the engine's forward pass alone on batches in memory, and
            (b) a plain loop, for a model without a face detector: Pillow opens and resizes, torch embeds
            one photo at a time, a list collects.
    memory  an uninterrupted run over all files, and one over 1,000 files, in separate processes: the first
            and the last tenth, stage times, peak memory.
    broken  good photos only, and with 1% of broken files of 20 kinds, in turn.
    again   the command over a gallery that has all photos, as a whole process; also with --rehash.

Prints one table and one JSON line. Part again uses the gallery of part memory.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.bulk.ingest import ingest_photos
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources import photos
from retrieval.sources.photos import Photo
from retrieval.system.cpu import usable_cores

BATCH = 64
LOOP = 20  # photos of the plain loop after each tenth
FORWARD = 4  # batches of the forward pass after each tenth

RUN = """
import json, sys, time
from itertools import islice
from pathlib import Path
from retrieval import ModelBundle; from retrieval.sources import photos
from retrieval.gallery.gallery import Gallery
from retrieval.system.memory import peak_memory
from retrieval.bulk.ingest import ingest_photos
folder, model, source, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
times = []
with Gallery.create(folder, ModelBundle.load(model)) as gallery:
    gallery.embedder
    started = time.perf_counter()
    report = ingest_photos(
        gallery, islice(photos.scan([source]), count), on_outcome=lambda _: times.append(time.perf_counter())
    )
# Photos become durable some hundreds at a time: a tenth begins and ends with one of these.
step = len(times) / 10
marks = [started, *(times[min(round((n + 1) * step), len(times)) - 1] for n in range(10))]
done = [0, *(sum(t <= mark for t in times) for mark in marks[1:])]
tenths = [(done[n + 1] - done[n]) / (marks[n + 1] - marks[n]) for n in range(10)]
after = peak_memory()
print(json.dumps({**report.summary(), "tenths": tenths, "peak_after_optimizing": after}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--photos", type=Path, default=Path("demo/photos"))
    parser.add_argument("--parts", default="speed,memory,broken,again")
    parser.add_argument("--photos-each", type=int, default=400, help="photos of a tenth in part speed")
    parser.add_argument("--folder", type=Path, help="where galleries go; a temporary folder unless named")
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": usable_cores(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in options.parts.split(","):
            result |= PARTS[part](options, Path(folder))
    for name, value in result.items():
        shown = f"{value:,}" if isinstance(value, int | float) else str(value)
        print(f"{name.replace('_', ' '):44} {shown:>20}")
    print(json.dumps(result))


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures tenths of a run, each followed by the forward pass alone and by the plain loop."""
    found = list(islice(photos.scan([options.photos]), 10 * options.photos_each))
    each = max(1, len(found) // 10)
    bundle = ModelBundle.load(options.model)
    # A loop that finds no faces, or has no network of ours, is no comparison.
    plain = None if bundle.imported or bundle.preprocessing.faces else _plain_loop(bundle)
    rates: dict[str, list[float]] = {"ingest": [], "forward": [], **({"plain loop": []} if plain else {})}
    with Gallery.create(folder / "speed", bundle) as gallery:
        forward = _forward(gallery.embedder, [photo.path for photo in found[: 2 * BATCH]])
        forward()  # what is done once only
        if plain is not None:
            plain([found[0].path])
        for start in range(0, each * 10, each):
            report = ingest_photos(gallery, found[start : start + each])
            rates["ingest"].append(report.photos_per_second)
            rates["forward"].append(forward())
            if plain is not None:
                rates["plain loop"].append(plain([photo.path for photo in found[start : start + LOOP]]))
    named = {name.replace(" ", "_"): rate for name, rate in rates.items()}
    ingest = named["ingest"]
    return {
        **{f"{name}_per_second": round(statistics.median(rate), 1) for name, rate in named.items()},
        **{
            f"ingest_to_{name}": round(statistics.median(a / b for a, b in zip(ingest, rate, strict=True)), 3)
            for name, rate in named.items()
            if rate is not ingest
        },
    }


def _forward(embedder: Embedder, paths: Sequence[Any]) -> Callable[[], float]:
    """Returns a function that measures photos/s of the engine alone, on pixels in memory."""
    squares = np.stack([embedder.photo_reader.square(path) for path in paths])

    def run() -> float:
        started = time.perf_counter()
        for number in range(FORWARD):
            first = number * BATCH % len(squares)
            embedder.embed(squares[first : first + BATCH])
        return FORWARD * BATCH / (time.perf_counter() - started)

    return run


def _plain_loop(bundle: ModelBundle) -> Callable[[Sequence[Any]], float]:
    """Returns a function that measures photos/s of a program that calls the libraries for each photo."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from retrieval.models.network import Network

    network = Network(len(bundle.labels), architecture=bundle.architecture, embedding=bundle.embedding)
    network.load_state_dict(load_file(bundle.weights_path))
    network.eval()
    size, crop = bundle.preprocessing.size, bundle.preprocessing.crop

    def run(paths: Sequence[Any]) -> float:
        embeddings = []
        started = time.perf_counter()
        for path in paths:
            with Image.open(path) as image:
                side = crop * min(image.size)
                left, top = (image.width - side) / 2, (image.height - side) / 2
                square = image.convert("RGB").resize((size, size), box=(left, top, left + side, top + side))
            with torch.inference_mode():
                embeddings.append(network(torch.from_numpy(np.array(square)[None]))[0].numpy()[0])
        return len(paths) / (time.perf_counter() - started)

    return run


def memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures runs in separate processes, over 1,000 files and over all."""
    every = _child(folder / "all", options, sys.maxsize)
    few = _child(folder / "few", options, 1000)
    busy = {one["name"]: round(one["busy_seconds"] / one["workers"], 1) for one in every["stages"]}
    return {
        "photos": every["found"],
        "all_per_second": every["photos_per_second"],
        "all_seconds": every["seconds"],
        "of_them_making_searches_quick": every["optimizing_seconds"],
        "tenths_per_second": [round(rate, 1) for rate in every["tenths"]],
        "first_tenth_to_last": round(every["tenths"][0] / every["tenths"][-1], 3),
        "peak_memory_mb_at_1,000": round(few["peak_memory_bytes"] / 2**20),
        f"peak_memory_mb_at_{every['found']:,}": round(every["peak_memory_bytes"] / 2**20),
        "peak_memory_mb_making_searches_quick": round(every["peak_after_optimizing"] / 2**20),
        "bottleneck": every["bottleneck"],
        **{f"busy_seconds_{name.replace(' ', '_')}": seconds for name, seconds in busy.items()},
    }


def _child(gallery: Path, options: argparse.Namespace, count: int) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, gallery, options.model, options.photos, count]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def broken(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures 2,000 good files with 20 broken ones, and the good ones alone, in turn."""
    from tests.broken import make_broken

    expected = make_broken(folder / "broken files")
    bad = list(photos.scan([folder / "broken files"]))
    good = list(islice(photos.scan([options.photos]), 100 * len(bad)))
    step = len(good) // len(bad)
    mixed: list[Photo] = []
    for number, one in enumerate(bad):
        mixed += [*good[number * step : (number + 1) * step], one]
    rates: dict[str, list[float]] = {"good": [], "mixed": []}
    rejected = []
    for turn, (name, found) in enumerate((("good", good), ("mixed", mixed)) * 2):
        with Gallery.create(folder / f"turn {turn}", ModelBundle.load(options.model)) as gallery:
            _ = gallery.embedder
            report = ingest_photos(gallery, found)
        seconds = report.seconds - report.optimizing_seconds
        rates[name].append((report.found - report.rejected) / seconds)
        rejected.append(report.rejected)
    return {
        "good_alone_per_second": round(statistics.mean(rates["good"]), 1),
        "good_among_broken_per_second": round(statistics.mean(rates["mixed"]), 1),
        "among_broken_to_alone": round(sum(rates["mixed"]) / sum(rates["good"]), 3),
        "broken_files": len(expected),
        "broken_files_reported": rejected[1],
    }


def again(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures the command over enrolled photos, as a whole process."""
    gallery = folder / "all"
    if not gallery.exists():
        _seconds("ingest", gallery, options.photos, "--model", options.model)
    unchanged = [_seconds("ingest", gallery, options.photos) for _ in range(5)]
    rehashed = [_seconds("ingest", gallery, options.photos, "--rehash") for _ in range(3)]
    return {
        "again_seconds_median": round(statistics.median(unchanged), 2),
        "again_rehash_seconds_median": round(statistics.median(rehashed), 2),
    }


def _seconds(*arguments: object) -> float:
    """Wall-clock time of one faceprint command, which must succeed."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "retrieval.cli.app", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - started


PARTS = {"speed": speed, "memory": memory, "broken": broken, "again": again}


if __name__ == "__main__":
    main()
