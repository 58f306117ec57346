"""Small collectives on gloo, with the system's scheduling and with batch scheduling (comm/gloo.py).

    python benchmarks/collectives.py [--ranks 4] [--rounds 5] [--json FILE]

New processes each time, A B A B; printed: medians of the time of one collective and of one rank's
processor time for it, microseconds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from coterie.comm.gloo import schedule_as_batch

REPEAT = 200
Times = dict[str, tuple[float, float]]


def measure(ranks: int) -> Times:
    """(microseconds, processor microseconds) of one collective, by name."""
    x = torch.randn(64, 16)
    y = torch.empty(64 * ranks, 16)
    collectives: dict[str, Callable[[], object]] = {
        "all_gather": lambda: dist.all_gather_single(y, x),
        "reduce_scatter": lambda: dist.reduce_scatter_single(x, y),
        "all_reduce": lambda: dist.all_reduce(x),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(x), x),
    }
    found = {}
    for name, collective in collectives.items():
        for _ in range(20):
            collective()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(REPEAT):
            collective()
        wall, cpu = time.perf_counter() - start, time.process_time() - used
        found[name] = (wall / REPEAT * 1e6, cpu / REPEAT * 1e6)
    return found


def on_rank(rank: int, ranks: int, folder: str, batch: bool) -> None:
    torch.set_num_threads(1)
    if batch:
        schedule_as_batch()
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    times = measure(ranks)
    if rank == 0:
        Path(folder, "times").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, batch: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(on_rank, (ranks, folder, batch), nprocs=ranks)
        return json.loads(Path(folder, "times").read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    seen: dict[str, list[dict[str, Any]]] = {"default": [], "batch": []}
    for _ in range(chosen.rounds):
        for name, results in seen.items():
            results.append(run(chosen.ranks, name == "batch"))
    medians = {
        name: {
            collective: [statistics.median(r[collective][i] for r in results) for i in range(2)]
            for collective in results[0]
        }
        for name, results in seen.items()
    }
    for collective in medians["default"]:
        before, after = (medians[name][collective] for name in ("default", "batch"))
        print(
            f"{collective:15} default {before[0]:6.0f} ({before[1]:5.0f} busy)   "
            f"batch {after[0]:6.0f} ({after[1]:5.0f} busy)   {before[0] / after[0]:.1f} times"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps({"ranks": chosen.ranks, **medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
