"""What finding and aligning faces costs: of small photos, of one of 40 megapixels, and of a crowd.

    python -m benchmarks.faces --detector FILE.onnx --photos FOLDER [--count 500]

Prints one table and one JSON line. Times are of one thread; the large photo is read in a process of its own,
whose peak memory, with that of its decoder, is compared with that of a small photo.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from retrieval.images import pixels
from retrieval.images.photo_reader import DetectionClock, FaceSelection, PhotoReader
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models.detectors import open_detector

_SIZE = 112
_LARGE = (7300, 5500)

_READ_ONE = """
import sys; from benchmarks.faces import read_one; read_one(sys.argv[1], sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detector", required=True, help="yunet, or the file of a detector")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photos of people")
    parser.add_argument("--count", type=int, default=500, help="photos to read")
    asked = parser.parse_args()
    found = sorted(path for path in asked.photos.rglob("*") if path.is_file())
    files = [found[row] for row in np.random.default_rng(0).permutation(len(found))[: asked.count]]
    reader = _reader(asked.detector)
    rows = {**_small(reader, files), **_crowd(reader, files), **_large(asked.detector, files[0])}
    for name, value in rows.items():
        print(f"{name:58}{value:10.2f}")
    print(json.dumps({name: round(value, 3) for name, value in rows.items()}))


def _reader(detector: str) -> PhotoReader:
    opened = open_detector(detector)
    return PhotoReader(Preprocessing(_SIZE, 1.0, "srgb", FaceAlignment(opened.sha256)), opened)


def _small(reader: PhotoReader, files: Sequence[Path]) -> dict[str, float]:
    """Times the photos with and without faces, in turns."""
    contents = [pixels.read_bytes(path) for path in files]
    plain, aligned, clock = 0.0, 0.0, DetectionClock()
    for content in contents:
        plain += _timed(lambda: pixels.read(content, size=_SIZE, colour="srgb"))  # noqa: B023
        aligned += _timed(lambda: reader.read(content, clock=clock))  # noqa: B023
    milliseconds = 1e3 / len(contents)
    return {
        "central square, ms a photo": plain * milliseconds,
        "face found and aligned, ms a photo": aligned * milliseconds,
        "of it in the detector, ms a photo": clock.seconds * milliseconds,
    }


def _crowd(reader: PhotoReader, files: Sequence[Path]) -> dict[str, float]:
    """Times a picture of 100 photos side by side, all of its faces."""
    tiles = [Image.open(path).convert("RGB").resize((128, 128)) for path in files[:100]]
    picture = Image.new("RGB", (1280, 1280))
    for number, tile in enumerate(tiles):
        picture.paste(tile, (128 * (number % 10), 128 * (number // 10)))
    found = 0

    def read() -> None:
        nonlocal found
        found = len(reader.read(picture, FaceSelection("all")))

    seconds = _timed(read)
    return {"faces found in a crowd of 100": float(found), "crowd of 100, seconds": seconds}


def _large(detector: str, photo: Path) -> dict[str, float]:
    """Reads a photo of 40 megapixels in a process of its own."""
    canvas = Image.effect_noise(_LARGE, 30).convert("RGB")
    canvas.paste(Image.open(photo).convert("RGB").resize((1500, 1500)), (4000, 2500))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.jpg"
        canvas.save(path, quality=90)
        small = Path(folder) / "small.jpg"
        canvas.resize((640, 480)).save(small)
        figures = {}
        for name, file in (("small", small), ("large", path)):
            command = [sys.executable, "-c", _READ_ONE, detector, str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[name] = json.loads(done.stdout)
    return {
        "40 megapixels, seconds": figures["large"]["seconds"],
        "40 megapixels, MB of memory above a small photo": figures["large"]["peak"]
        - figures["small"]["peak"],
    }


def read_one(detector: str, path: str) -> None:
    """Reads a photo and prints its time and the peak memory of this process and of those it started."""
    reader = _reader(detector)
    warm = io.BytesIO()
    Image.new("RGB", (64, 64)).save(warm, "BMP")
    reader.find(warm.getvalue())
    seconds = _timed(lambda: reader.read(path))
    # The process that decodes large photos is a child that still runs.
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(json.dumps({"seconds": seconds, "peak": sum(map(_peak_memory, ["self", *children]))}))


def _peak_memory(process: str) -> float:
    """Returns the peak memory of a process so far in MB (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
