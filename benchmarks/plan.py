"""What the plan of an overlapped exchange costs one rank, before a row travels.

    python benchmarks/plan.py [--rounds N] [--json PATH]

Pools, tiles of 128 rows, and places of the rank's own rows (``comm/exchange/plan.py``), of random
counts. Medians in milliseconds, of each part and of the whole. One thread, and its own time: what
other programs take does not count.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.layer import machine
from coterie.comm.exchange.plan import most_tiles, places, pools, tiles

SHAPES = ((8, 8), (64, 8), (256, 64))
"""Experts E and ranks R."""
ROWS = 300
"""Mean rows from a rank for an expert."""
TILE = 128
PARTS = ("pools", "tiles", "places")


def measure(load_SE: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds; each round is another rank's turn."""
    ranks = len(load_SE)
    local = load_SE.shape[1] // ranks
    sent_S = load_SE.sum(1).tolist()
    received_R = load_SE.unflatten(1, (ranks, local)).sum((0, 2)).tolist()
    times = []
    for number in range(rounds + 2):
        rank = number % ranks
        most = most_tiles(received_R[rank], local, TILE)
        marks = [time.thread_time()]
        pool = pools(load_SE, TILE)
        marks.append(time.thread_time())
        tiles(pool, rank, TILE, most)
        marks.append(time.thread_time())
        places(pool, load_SE[rank], rank, sent_S[rank])
        marks.append(time.thread_time())
        if number >= 2:  # the first two warm up
            times.append([1e3 * (end - start) for start, end in pairwise(marks)])
    medians = dict(zip(PARTS, map(statistics.median, zip(*times, strict=True)), strict=True))
    return {**medians, "whole": statistics.median(map(sum, times))}


def run(rounds: int) -> list[dict[str, Any]]:
    """All shapes."""
    return [
        {"E": experts, "R": ranks, "ms": measure(torch.randint(2 * ROWS, (ranks, experts)), rounds)}
        for experts, ranks in SHAPES
    ]


def show(records: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("E", "R", *(f"{part} ms" for part in (*PARTS, "whole")))
    for record in records:
        medians = (f"{value:.2f}" for value in record["ms"].values())
        table.add_row(str(record["E"]), str(record["R"]), *medians)
    Console().print(table)


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=101, help="plans of each shape")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = run(options.rounds)
    show(records)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "results": records}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
