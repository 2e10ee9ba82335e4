"""The number of CPU cores that this process may use."""

import os


def usable_cores() -> int:
    """How many cores this process may run on: its affinity, which `taskset` and containers narrow."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # noqa: TID251  macOS has no affinity


def reading_threads() -> int:
    """How many threads read files that are decoded: a few more than cores, because disks make them wait.

    `ThreadPoolExecutor` chooses so itself from Python 3.13 on; before, it counts every core of the machine.
    """
    return min(32, usable_cores() + 4)
