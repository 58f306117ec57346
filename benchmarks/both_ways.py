"""All-to-all of rows over slow links: gloo's own, and one in which ranks ask before they send.

    python benchmarks/both_ways.py [--hosts 2 4] [--megabits 500] [--late 0 3] [--json FILE]

``--late``: each rank comes so many milliseconds after the one before it, as ranks do that have
computed something. Hosts are those of benchmarks/overlap.py. Printed: medians, A B A B, of the time
until the last rank has all its rows, and what the link takes for as many bytes one way.
"""

import argparse
import datetime
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

from benchmarks.hosts import hosts, shape
from benchmarks.overlaps.lab import CaseFailed, missing, run
from benchmarks.rows import machine
from coterie.comm.exchange.rows import start_all_to_all
from coterie.comm.gloo import schedule_as_batch

ROWS, WIDTH = (16, 256, 4096, 16384), 256
"""To each rank; of float32."""
ROUNDS = 7
TIME_LIMIT = 120.0  # seconds


def on_rank(folder: Path) -> None:
    """Milliseconds by number of rows and way, written by the first rank."""
    late_ms = json.loads((folder / "late.json").read_text())
    torch.set_num_threads(1)
    schedule_as_batch()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIME_LIMIT))
    group = dist.group.WORLD
    assert group is not None
    found = {str(rows): measure(rows, group, late_ms) for rows in ROWS}
    if group.rank() == 0:
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()


def measure(rows: int, group: dist.ProcessGroup, late_ms: float) -> dict[str, float]:
    """Milliseconds of each way."""
    rows_R = [rows] * group.size()
    sent_AD = torch.randn(sum(rows_R), WIDTH)
    received_AD = torch.empty_like(sent_AD)

    def theirs() -> None:
        dist.all_to_all_single(received_AD, sent_AD, group=group)

    def ours() -> None:
        for work in start_all_to_all(received_AD, sent_AD, rows_R, rows_R, group):
            work.wait()

    ways: dict[str, Callable[[], None]] = {"gloo's": theirs, "asked first": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, ROUNDS):
        for name, way in ways.items():
            dist.barrier()
            began = time.perf_counter()
            time.sleep(1e-3 * late_ms * group.rank())
            way()
            slowest = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn >= 0:
                seconds[name].append(slowest.item())
    return {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--megabits", type=float, default=500)
    parser.add_argument("--late", nargs="+", type=float, default=[0, 3], help="milliseconds")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if lacking := missing():
        print(f"hosts cannot be made here: {lacking}", file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    for count in chosen.hosts:
        for late_ms in chosen.late:
            with hosts(count) as made, tempfile.TemporaryDirectory() as folder:
                shape(made, chosen.megabits)
                (Path(folder) / "late.json").write_text(json.dumps(late_ms))
                try:
                    found = run("benchmarks.both_ways", made, Path(folder), TIME_LIMIT)
                except CaseFailed as failure:
                    print(failure, file=sys.stderr)
                    return 1
            for rows, ms in found.items():
                link_ms = round(int(rows) * (count - 1) * WIDTH * 32 / (1e3 * chosen.megabits), 3)
                what = {"hosts": count, "late_ms": late_ms, "rows": int(rows), "link": link_ms} | ms
                print("  ".join(f"{name} {value:6.5g}" for name, value in what.items()))
                results.append(what)
    if chosen.json:
        found = {"machine": machine(), "megabits": chosen.megabits, "results": results}
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        on_rank(Path(sys.argv[1]))
    else:
        sys.exit(main())
