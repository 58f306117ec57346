"""What a process did with its time, by the kernel's own account of each thread.

``/proc/self/task/*/schedstat`` holds, for each thread, nanoseconds on a processor and nanoseconds
in which it could have run but something else had the processor; ``/proc/stat`` how long a
processor had nothing to do at all.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """Seconds."""

    wall: float
    main: float
    """Of processor by the main thread: the layer's work, and copies into and out of messages."""
    queued: float
    """In which the main thread could have run, but something else had its processor."""
    network: float
    """Of processor by all other threads: gloo's, and the one that receives."""
    idle: float
    """In which this process's processor had nothing to do."""
    waited: float
    """That the layer says it waited for messages."""

    def since(self, before: "Usage") -> "Usage":
        """What happened between the two."""
        return Usage(*(now - then for now, then in zip(self, before, strict=True)))

    def plus(self, other: "Usage") -> "Usage":
        """Of two spans of time."""
        return Usage(*(one + another for one, another in zip(self, other, strict=True)))


def usage(waited: float) -> Usage:
    """Up to now, since some time in the past; this process may use one processor only."""
    main = queued = network = 0
    for task in Path("/proc/self/task").iterdir():
        ran, ready, _ = map(int, (task / "schedstat").read_text().split())
        if int(task.name) == os.getpid():
            main, queued = ran, ready
        else:
            network += ran
    times = (main / 1e9, queued / 1e9, network / 1e9)
    return Usage(time.perf_counter(), *times, _idle(), waited)


def _idle() -> float:
    (core,) = os.sched_getaffinity(0)
    lines = Path("/proc/stat").read_text().splitlines()
    ticks = next(line.split() for line in lines if line.startswith(f"cpu{core} "))
    return int(ticks[4]) / os.sysconf("SC_CLK_TCK")
