"""The crash sweep: every operation with every fault, at every call that changes the disk.

    python -m benchmarks.crashes [--operations forget,compact] [--faults KILL,EIO]

Prints a row for each operation with the number of points and of failures, and one JSON line. Takes about half
an hour on two cores. Needs cc, as the tests do (`tests/fault.c`).
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

from retrieval.system.cpu import usable_cores
from tests.faults import Kind, Swept
from tests.operations import OPERATIONS
from tests.sweeps import Sweeper

FAULTS = ("KILL", "ENOSPC", "EIO", "FULL", "DEAD", "POWER")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="which, separated by commas")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, separated by commas")
    options = parser.parse_args()
    names, faults = options.operations.split(","), options.faults.split(",")
    # In memory: durability does not matter here, because the faults are injected above the disk.
    memory = Path("/dev/shm")
    started, points, failures = time.monotonic(), 0, 0
    print(f"{'operation':22}" + "".join(f"{fault:>10}" for fault in faults))
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        Sweeper(Path(folder)) as sweeper,
    ):
        for name in names:
            row = [_swept(sweeper, name, fault) for fault in faults]
            points += sum(swept.points for swept in row)
            failures += sum(len(swept.failures) for swept in row)
            cells = (
                f"{swept.points}" + (f" ({len(swept.failures)}!)" if swept.failures else "") for swept in row
            )
            print(f"{name.replace('_', ' '):22}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
            for swept in row:
                for number, message in swept.failures[:3]:
                    print(f"    {swept.kind.name} at {number}: {message}")
    result = {
        "operations": len(names),
        "faults": faults,
        "points": points,
        "failures": failures,
        "seconds": round(time.monotonic() - started),
        "cores": usable_cores(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))
    raise SystemExit(1 if failures else 0)


def _swept(sweeper: Sweeper, name: str, fault: str) -> Swept:
    return sweeper.lose_power(name) if fault == "POWER" else sweeper.sweep(name, Kind[fault])


if __name__ == "__main__":
    main()
