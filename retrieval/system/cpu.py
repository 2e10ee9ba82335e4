"""The number of CPU cores that this process may use, for the sizes of thread and process pools."""

import os


def usable_cores() -> int:
    """Returns the number of cores that this process may run on (affinity), as set by `taskset` or containers.

    Without affinity (macOS) it is the number of cores of the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # noqa: TID251  macOS has no affinity


def reading_threads() -> int:
    """Returns the number of threads that read and decode files: the usable cores + 4, at most 32.

    The extra threads cover waits for the disk. `ThreadPoolExecutor` has the same default from Python 3.13 on;
    before, it counts all cores of the machine.
    """
    return min(32, usable_cores() + 4)
