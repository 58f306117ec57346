"""Gloo on Linux: how its processes are scheduled."""

import os
import sys


def schedule_as_batch() -> None:
    """Give this process, and the threads it starts from now on, the scheduling class SCHED_BATCH.

    To be called before a gloo group is made. Gloo's network thread polls for as long as another
    thread of its process holds the connection's lock; if being woken lets it preempt the holder, it
    burns its whole time slice. A batch thread that wakes up waits until the running one sleeps:
    collectives of 4 ranks on 2 cores take a third of the time (``benchmarks/collectives.py``).
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
