"""Waiting times of a new user: help, an ingest, the same ingest again, a search from a cold start.

    python -m benchmarks.first_steps [--model MODEL] [--photos FOLDER] [--runs 5]

By default it uses the model and the photos of `make demo`. Every command is timed as a whole process, from
its start to its end. Prints one table and one JSON line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from retrieval.sources import photos
from retrieval.system.cpu import usable_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--photos", type=Path, default=Path("demo/photos"))
    parser.add_argument("--runs", type=int, default=5, help="how often the short commands are timed")
    options = parser.parse_args()
    found = [photo.path for photo in photos.scan([options.photos])]
    with tempfile.TemporaryDirectory() as folder:
        gallery = Path(folder) / "gallery"
        first = _seconds("ingest", gallery, options.photos, "--model", options.model)
        again = _seconds("ingest", gallery, options.photos)
        search = [_seconds("search", gallery, found[0]) for _ in range(options.runs)]
        info = [_seconds("info", gallery) for _ in range(options.runs)]
        size = sum(path.stat().st_size for path in (gallery / "vectors").iterdir())
    helped = [_seconds("--help") for _ in range(options.runs)]
    result = {
        "photos": len(found),
        "ingest_seconds": round(first, 2),
        "ingest_photos_per_second": round(len(found) / first, 1),
        "ingest_again_seconds": round(again, 2),
        "cold_search_seconds_median": round(statistics.median(search), 3),
        "info_seconds_median": round(statistics.median(info), 3),
        "help_seconds_median": round(statistics.median(helped), 3),
        "vector_bytes": size,
        "cores": usable_cores(),
        "python": platform.python_version(),
    }
    for name, value in result.items():
        shown = f"{value:,}" if isinstance(value, int | float) else str(value)
        print(f"{name.replace('_', ' '):32} {shown:>16}")
    print(json.dumps(result))


def _seconds(*arguments: object) -> float:
    """Returns the wall-clock time in seconds of one faceprint command, which must succeed."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "retrieval.cli.app", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - started


if __name__ == "__main__":
    main()
