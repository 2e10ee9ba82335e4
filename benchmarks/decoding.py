"""Throughput of reading photos with threads and with processes, and how long a thread holds the GIL.

    python -m benchmarks.decoding --photos FOLDER [--size 128] [--crop 0.6] [--count 512] [--large]

A photo is read, hashed (SHA-256), decoded and resized, as in enrollment before the network. Workers are 1, 2,
4, ... up to the number of cores. `--large` makes photos of 12 megapixels, in a temporary folder, as mosaics
of the given ones. With processes, the same number of threads read and hash files and pass 32 at a time to the
processes; pixels are returned in shared memory, as in enrollment with --decoders. Prints one table and one
JSON line.

The share of a thread's time in which it holds the interpreter's lock (GIL) is 1 minus the relative speed of a
loop of plain Python beside it, on at least two cores: only one thread at a time runs Python.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, features

from retrieval.images import pixels
from retrieval.images.decoders import SLOT, Decoders
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.picture import Pixels
from retrieval.images.preprocessing import Preprocessing
from retrieval.sources import photos
from retrieval.system.cpu import usable_cores

# Number of tiles of a mosaic, across and down; with LFW's 250 pixels, it has 4000 x 3000.
_TILES = (16, 12)
_LARGE = (4000, 3000)


@dataclass(frozen=True)
class Work:
    """The files to read, and the size and crop of the pixels."""

    files: list[Path]
    size: int
    crop: float

    @property
    def reader(self) -> PhotoReader:
        """Reads the photos."""
        return PhotoReader(Preprocessing(self.size, self.crop))


@dataclass(frozen=True)
class Row:
    """A row of the table: photos/s with a number of threads or processes."""

    kind: str
    workers: int
    photos_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--crop", type=float, default=0.6)
    parser.add_argument("--count", type=int, default=512, help="photos, evenly from the folder")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="photos of 12 megapixels")
    options = parser.parse_args()
    found = [Path(photo.path) for photo in photos.scan([options.photos]) if photo.path is not None]
    files = found[:: max(1, len(found) // options.count)][: options.count]
    with tempfile.TemporaryDirectory() as folder:
        if options.large:
            files = list(mosaics(files, Path(folder), count=8))
        work = Work(files, options.size, options.crop)
        rows = paces(work, seconds=options.seconds, rounds=options.rounds)
        held = lock_held(work, seconds=options.seconds)
        stages = stage_shares(work)
    show(rows)
    print(f"\na thread holds the interpreter's lock {held:.0%} of its time; " + _in_words(stages))
    facts = {
        "photos": len(files),
        "large": options.large,
        "size": options.size,
        "crop": options.crop,
        "cores": usable_cores(),
        "pillow_has_libjpeg_turbo": features.check_feature("libjpeg_turbo"),
        "python": platform.python_version(),
    }
    rounded = {name: round(value, 3) for name, value in stages.items()}
    result = {**facts, "lock_held": round(held, 3), "stages": rounded, "rows": [asdict(row) for row in rows]}
    print(json.dumps(result))


def one(path: Path, size: int, crop: float) -> Pixels:
    """Reads a photo as enrollment does."""
    data = pixels.read_bytes(path)
    pixels.content_sha256(data)
    return pixels.read(data, size=size, crop=crop)


def paces(work: Work, *, seconds: float, rounds: int) -> list[Row]:
    """Measures photos/s of threads and of processes: the median of rounds, in which all take turns."""
    counts = [1]
    while counts[-1] < usable_cores():
        counts.append(min(2 * counts[-1], usable_cores()))
    pools = [(kind, workers) for workers in counts for kind in (_Threads, _Processes)]
    running = [kind(work, workers) for kind, workers in pools]
    try:
        found: list[list[float]] = [[] for _ in running]
        for _ in range(rounds):
            for paced, pool in zip(found, running, strict=True):
                paced.append(_pace(pool, seconds))
    finally:
        for pool in running:
            pool.close()
    return [
        Row(kind.name, workers, round(float(np.median(paced)), 1))
        for (kind, workers), paced in zip(pools, found, strict=True)
    ]


class _Threads:
    name = "threads"

    def __init__(self, work: Work, workers: int) -> None:
        self.work = work
        self._pool = ThreadPoolExecutor(workers)
        self._batch = np.empty((len(work.files), work.size, work.size, 3), np.uint8)
        self.run()

    def run(self) -> None:
        """Reads every photo once, into one batch."""
        list(self._pool.map(self._into, range(len(self.work.files))))

    def _into(self, row: int) -> None:
        self._batch[row] = one(self.work.files[row], self.work.size, self.work.crop)

    def close(self) -> None:
        self._pool.shutdown()


class _Processes:
    name = "processes"

    def __init__(self, work: Work, workers: int) -> None:
        self.work = work
        self._threads = ThreadPoolExecutor(workers)
        self._decoders = Decoders(workers, reader=work.reader, ahead=workers)
        self._batch = np.empty((len(work.files), work.size, work.size, 3), np.uint8)
        self.run()

    def run(self) -> None:
        """Reads every photo once, in pieces: threads read and hash them, processes decode them."""
        list(self._threads.map(self._piece_into, range(0, len(self.work.files), SLOT)))

    def _piece_into(self, start: int) -> None:
        contents = [pixels.read_bytes(path) for path in self.work.files[start : start + SLOT]]
        for content in contents:
            pixels.content_sha256(content)
        for row, decoded in enumerate(self._decoders(contents, self.work.reader), start):
            self._batch[row] = decoded[0].pixels

    def close(self) -> None:
        self._threads.shutdown()
        self._decoders.close()


def _pace(pool: _Threads | _Processes, seconds: float) -> float:
    start, runs = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        pool.run()
        runs += 1
    return runs * len(pool.work.files) / (time.perf_counter() - start)


def lock_held(work: Work, *, seconds: float) -> float:
    """Measures the share of its time in which a thread that reads photos holds the interpreter's lock.

    A loop counts alone, then beside the thread, three times in turn. The switch interval is short, so that
    the loop gets the lock whenever the thread does not hold it.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        shares = []
        for _ in range(3):
            alone = _counted(seconds)
            with _Reading(work):
                shares.append(_counted(seconds) / alone)
        return max(0.0, 1 - float(np.median(shares)))
    finally:
        sys.setswitchinterval(before)


def _counted(seconds: float) -> int:
    count, ends = 0, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        count += 1
    return count


class _Reading:
    def __init__(self, work: Work) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(work,))

    def _read(self, work: Work) -> None:
        for path in cycle(work.files):
            if self._over.is_set():
                return
            one(path, work.size, work.crop)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()


def stage_shares(work: Work) -> dict[str, float]:
    """Measures the ms per photo for reading, hashing, and decoding with resizing, in one thread."""
    contents = [path.read_bytes() for path in work.files]
    return {
        "read_ms": _milliseconds(work, lambda row: pixels.read_bytes(work.files[row])),
        "hash_ms": _milliseconds(work, lambda row: hashlib.sha256(contents[row]).hexdigest()),
        "decode_ms": _milliseconds(
            work, lambda row: pixels.read(contents[row], size=work.size, crop=work.crop)
        ),
    }


def _milliseconds(work: Work, step: Callable[[int], object]) -> float:
    start = time.perf_counter()
    for row in range(len(work.files)):
        step(row)
    return (time.perf_counter() - start) / len(work.files) * 1000


def mosaics(files: list[Path], folder: Path, *, count: int) -> Iterator[Path]:
    """Writes JPEGs of 12 megapixels, made of small photos."""
    tiles = cycle(files)
    across, down = _TILES
    width, height = _LARGE[0] // across, _LARGE[1] // down
    for number in range(count):
        mosaic = Image.new("RGB", _LARGE)
        for place in range(across * down):
            with Image.open(next(tiles)) as tile:
                left, top = place % across * width, place // across * height
                mosaic.paste(tile.convert("RGB").resize((width, height)), (left, top))
        path = folder / f"{number}.jpg"
        mosaic.save(path, quality=90)
        yield path


def _in_words(stages: dict[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_ms')} {value:.2f} ms" for name, value in stages.items())


def show(rows: list[Row]) -> None:
    """Prints the table."""
    first = rows[0].photos_per_second
    print(f"{'':10} {'workers':>7} {'photos/s':>9} {'of one thread':>14}")
    for row in rows:
        pace = row.photos_per_second
        print(f"{row.kind:10} {row.workers:7} {pace:9,.1f} {pace / first:14.2f}")


if __name__ == "__main__":
    main()
