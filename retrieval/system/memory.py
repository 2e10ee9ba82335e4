"""The memory that this process took, for the reports of runs and for benchmarks."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory() -> int:
    """Returns the peak memory (resident set) of this process so far, in bytes."""
    # On Linux, getrusage may return the peak of the process that started this one.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # ru_maxrss is in KiB, except on macOS, where it is in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
