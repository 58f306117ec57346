"""From what each rank saw in each round to the figures of a case."""

import statistics
from typing import Any

from benchmarks.overlaps.cases import COMMUNICATION, COMPUTE, CORES, PASSES, PLAIN
from benchmarks.overlaps.usage import Usage

Turn = dict[str, Usage]
"""What a rank did in a forward pass, and in both passes."""


def summarise(every: list[dict[str, list[Turn]]]) -> dict[str, dict[str, Any]]:
    """By contender and pass; ``every``: the turns of each rank."""
    return {name: {which: _figures(every, name, which) for which in PASSES} for name in every[0]}


def _figures(every: list[dict[str, list[Turn]]], name: str, which: str) -> dict[str, Any]:
    """A pass takes as long as its slowest rank; ratios are taken within a round first."""
    wall = _walls(every, name, which)
    compute, communication = (_walls(every, part, which) for part in (COMPUTE, COMMUNICATION))
    found: dict[str, Any] = {
        "ms": statistics.median(wall) * 1e3,
        "all_ms": [round(s * 1e3, 1) for s in wall],
        **_shares(every, name, which, sum(wall)),
    }
    if name not in (COMPUTE, COMMUNICATION):
        plain = _walls(every, PLAIN, which)
        found["speed_up"] = statistics.median(p / w for p, w in zip(plain, wall, strict=True))
        found["hidden"] = statistics.median(
            1 - (w - work) / way for w, work, way in zip(wall, compute, communication, strict=True)
        )
    return found


def _walls(every: list[dict[str, list[Turn]]], name: str, which: str) -> list[float]:
    rounds = zip(*(turns[name] for turns in every), strict=True)
    return [max(turn[which].wall for turn in ranks) for ranks in rounds]


def _shares(
    every: list[dict[str, list[Turn]]], name: str, which: str, wall: float
) -> dict[str, float]:
    """Of the cores' time: ``main`` and ``network`` threads, ``idle``, and ``other``: the kernel's
    own work and other programs; they add up to 1. Of the main threads' time: ``queued`` for the
    processor, and ``waited`` for messages, as the exchange says."""
    spent = [turn[which] for turns in every for turn in turns[name]]
    cores = min(CORES, len(every))

    def share(field: str, of: int) -> float:
        return sum(getattr(u, field) for u in spent) / (of * wall)

    main, network = share("main", cores), share("network", cores)
    idle, queued, waited = (share(f, len(every)) for f in ("idle", "queued", "waited"))
    return {
        "main": main,
        "network": network,
        "idle": idle,
        "other": 1 - main - network - idle,
        "queued": queued,
        "waited": waited,
    }
