"""How well the demo recognizes its drawn people, over several sets of people.

    python -m benchmarks.demo [--seeds 0 1 2 3 4]

Runs `faceprint demo` once per seed: other drawn people, another split and other random weights. Prints a
line after each run with its figures and its time, then one JSON line. Docs: docs/training.md.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from retrieval.cli import walkthrough
from retrieval.cli.walkthrough import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args().seeds
    print("seed  accuracy  closest  named  wrong  UNKNOWN  strangers UNKNOWN  CPU s    s", flush=True)
    runs = [measured(replace(Plan(), seed=seed)) for seed in seeds]
    print(json.dumps({"runs": runs}))


def measured(plan: Plan) -> dict[str, Any]:
    """Runs a demo in a temporary folder, prints its line, and returns its figures."""
    started, cpu_started = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        figures = walkthrough.run(None, Path(folder) / "demo", plan)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    strangers = figures.strangers_unknown + figures.strangers_named
    print(
        f"{plan.seed:4}  {figures.validation_accuracy:8.3f}  {figures.closest_image_agreement:7.3f}  "
        f"{figures.named:5}  {figures.misnamed:5}  {figures.unknown:7}  "
        f"{f'{figures.strangers_unknown} of {strangers}':>17}  {cpu_seconds:5.0f}  {seconds:3.0f}",
        flush=True,
    )
    return {
        "seed": plan.seed,
        **asdict(figures),
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
