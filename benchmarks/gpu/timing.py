"""Times of contenders that take turns: A B C, B C A, C A B …, after each has been warmed up.

On a GPU the time between two events of the stream. The device first waits for a moment, so that the
host has the whole step in the queue before it begins; only where a step waits for the device itself
does the host's time count. Every round has fresh inputs.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
_HEAD_START = 4_000_000
"""Cycles: about two milliseconds."""


def once(step: Step, device: torch.device) -> float:
    """Milliseconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def medians(
    steps: Mapping[Name, Step],
    device: torch.device,
    rounds: int,
    refresh: Step = lambda: None,
    warm_up: int = 2,
) -> dict[Name, float]:
    """Median milliseconds of each; ``refresh`` draws inputs anew before each round."""
    names = list(steps)
    if device.type != "cuda":
        warm_up = 0  # times on the host say nothing
    for name in names:
        for _ in range(warm_up):
            steps[name]()
    times: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        refresh()
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(once(steps[name], device))
    return {name: statistics.median(taken) for name, taken in times.items()}
