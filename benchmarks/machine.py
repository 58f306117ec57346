"""What this machine's CPU ranks can do: configs/machines/cpu.yaml, for ``coterie plan``.

    python benchmarks/machine.py --ranks 2 --write

Matrix products by precision, copying, and an all-reduce between gloo processes. Medians;
meaningless while other programs load the machine.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from coterie.comm.gloo import schedule_as_batch

OUT = Path(__file__).resolve().parent.parent / "configs" / "machines" / "cpu.yaml"
SIZES = (1 << 10, 1 << 24)  # bytes of a small and a large all-reduce


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median over ``rounds``, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rate(dtype: torch.dtype, size: int, rounds: int) -> float:
    """TFLOP/s of a product of ``size``³."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ b, rounds) / 1e12


def copying(rounds: int) -> float:
    """GB/s, reading and writing counted."""
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), rounds) / 1e9


def _rank(rank: int, ranks: int, port: int, threads: int, rounds: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    schedule_as_batch()
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    measured = [rate(torch.float32, 1024, rounds), copying(rounds)]
    for size in SIZES:
        x = torch.zeros(size // 4)
        measured.append(seconds(lambda x=x: dist.all_reduce(x), rounds))  # type: ignore[misc]
    # bf16 is emulated where the processor lacks it: a small product is slow enough
    measured += [rate(torch.float64, 1024, rounds), rate(torch.bfloat16, 256, 3)]
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def measure(ranks: int, rounds: int) -> dict[str, Any]:
    """All ranks work at once, as they do in training."""
    context = mp.get_context("spawn")
    results = context.Queue()
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    port = 29000 + os.getpid() % 10000
    processes = [
        context.Process(target=_rank, args=(n, ranks, port, threads, rounds, results))
        for n in range(ranks)
    ]
    for process in processes:
        process.start()
    fp32, copied, small, large, fp64, bf16 = results.get(timeout=300)
    for process in processes:
        process.join()
    moved = 2 * SIZES[1] * (ranks - 1) / ranks
    link = {
        "bandwidth": _round(moved / max(large - small, 1e-9) / 1e9),
        "latency": _round(small * 1e6),
        "efficiency": 1.0,
    }
    return {
        "name": f"one of {ranks} CPU processes, {threads} threads",
        "device": "cpu",
        "ranks_per_node": ranks,
        "memory": _round(psutil.virtual_memory().total / ranks / 1e9),
        "usable": 0.9,
        "peak": {"fp32": _round(fp32), "fp64": _round(fp64), "bf16": _round(bf16)},
        "efficiency": 0.5,
        "memory_bandwidth": _round(copied),
        "node": link,
        "network": dict(link),
    }


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help=f"into {OUT.name}")
    options = parser.parse_args()
    text = (
        "# CPU processes of one machine over gloo. Measured, but for usable and efficiency, by:\n"
        f"# python benchmarks/machine.py --ranks {options.ranks} --write\n"
        + yaml.safe_dump(measure(options.ranks, options.rounds), sort_keys=False)
    )
    print(text, end="")
    if options.write:
        OUT.write_text(text)


if __name__ == "__main__":
    main()
