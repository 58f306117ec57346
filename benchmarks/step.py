"""Whole training steps in fp32 on gloo ranks, beside other projects' own runtimes.

    python benchmarks/step.py [--case dp2-ep2] [--rounds 9] [--json benchmarks/results/step.json]
    python benchmarks/step.py --check [--case dp2-ep2]

Every contestant trains the same model (benchmarks/steps/model.py) on the same batches, each with
its own data, expert, tensor and pipeline parallelism, all in the same processes, one thread each.
A round times one step of each in turn, so that the machine's drift meets all alike; a step is from
the global batch in memory to the stepped weights, and takes as long as the slowest rank. Printed:
medians, how many times as long as ours the others take, by round, and the processor time of all
ranks together, which other work on the machine disturbs less. torchtitan needs triton to be
installed too, on a CPU as well.

``--check`` shows instead that all do the same work: parameters, floating-point operations for each
token as torch counts them, and ten losses.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

from benchmarks.steps.count import count_flops
from benchmarks.steps.model import CASES, Contestant, Model, Split, batch
from coterie.comm.gloo import schedule_as_batch

WARM_UP = 3
OURS = "coterie"
TIME_LIMIT = datetime.timedelta(minutes=5)


def makers() -> dict[str, Callable[[Model, Split], Contestant]]:
    """Who takes part, ours first; each is imported only where it is used."""

    def coterie(model: Model, split: Split) -> Contestant:
        from benchmarks.steps.ours import ours

        return ours(model, split)

    def megatron(model: Model, split: Split) -> Contestant:
        from benchmarks.steps.megatron import MegatronStep

        return MegatronStep(model, split)

    def torchtitan(model: Model, split: Split) -> Contestant:
        from benchmarks.steps.torchtitan import TorchtitanStep

        return TorchtitanStep(model, split)

    return {OURS: coterie, "megatron-core": megatron, "torchtitan": torchtitan}


def contestants(model: Model, split: Split, names: list[str]) -> dict[str, Contestant]:
    """Those of ``names`` that can be built here; the others are named on stderr."""
    made = {}
    for name in names:
        try:
            made[name] = makers()[name](model, split)
        except (ImportError, NotImplementedError) as error:
            if dist.get_rank() == 0:
                print(f"left out: {name}: {error}", file=sys.stderr)
    return made


def measure(model: Model, split: Split, names: list[str], rounds: int) -> dict[str, Any]:
    """Of each contestant's steps, in turn: seconds of the slowest rank, and processor seconds of
    all ranks."""
    made = contestants(model, split, names)
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in made}
    for turn in range(WARM_UP + rounds):
        tokens_BC = batch(model, turn)
        for name, contestant in made.items():
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            contestant.step(tokens_BC)
            wall = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            cpu = torch.tensor(time.process_time() - start_cpu, dtype=torch.float64)
            dist.all_reduce(wall, dist.ReduceOp.MAX)
            dist.all_reduce(cpu)
            if turn >= WARM_UP:
                seconds[name]["wall"].append(wall.item())
                seconds[name]["cpu"].append(cpu.item())
    return seconds


def check(model: Model, split: Split, names: list[str], steps: int = 10) -> dict[str, Any]:
    """What shows that all do the same work."""
    found: dict[str, Any] = {}
    for name, contestant in contestants(model, split, names).items():
        losses = [contestant.step(batch(model, step)) for step in range(steps)]
        flops = count_flops(lambda made=contestant: made.step(batch(model, steps)))
        whole = torch.tensor(flops, dtype=torch.float64)
        dist.all_reduce(whole)
        found[name] = {
            "parameters": contestant.parameters,
            "flops_per_token": whole.item() / model.tokens,
            "losses": _known(losses),
        }
    return found


def _known(losses: list[float | None]) -> list[float]:
    """The losses of the last rank that knows them: with pipelines some do not."""
    known = torch.tensor([math.nan if loss is None else loss for loss in losses])
    every = [torch.empty_like(known) for _ in range(dist.get_world_size())]
    dist.all_gather(every, known)
    return next(seen.tolist() for seen in reversed(every) if not seen.isnan().all())


Work = Callable[[Model, Split, list[str], int], dict[str, Any]]


def run_ranks(work: Work, split: Split, names: list[str], rounds: int) -> dict[str, Any]:
    """``work`` on the ranks of ``split``; what its first rank returned."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, work, split, names, rounds)
        multiprocessing.spawn(_rank, arguments, nprocs=split.world)
        return json.loads((Path(folder) / "result").read_text())


def _rank(rank: int, folder: str, work: Work, split: Split, names: list[str], rounds: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    schedule_as_batch()  # all contestants gain by it
    store = dist.FileStore(f"{folder}/store", split.world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=split.world, timeout=TIME_LIMIT
    )
    result = work(Model(), split, names, rounds)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def summarise(seconds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Medians over rounds; ratios are taken within a round first."""
    summary: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        summary[name] = {
            "ms": statistics.median(times["wall"]) * 1e3,
            "fastest_ms": min(times["wall"]) * 1e3,
            "cpu_ms": statistics.median(times["cpu"]) * 1e3,
            "all_ms": [round(s * 1e3, 1) for s in times["wall"]],
            "all_cpu_ms": [round(s * 1e3, 1) for s in times["cpu"]],
        }
        if OURS in seconds:
            for kind, key in (("wall", "times_ours"), ("cpu", "cpu_times_ours")):
                pairs = zip(times[kind], seconds[OURS][kind], strict=True)
                ratios = [theirs / own for theirs, own in pairs]
                summary[name][key] = statistics.median(ratios)
                summary[name][f"{key}_range"] = [min(ratios), max(ratios)]
    return summary


def show(case: str, summary: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{case}: one training step, {len(summary)} contestants in turn")
    table.add_column("runtime")
    for heading in ("median ms", "fastest ms", "time / ours", "cpu ms", "cpu / ours"):
        table.add_column(heading, justify="right")
    for name, row in summary.items():
        ratios = ["", ""]
        for place, key in enumerate(("times_ours", "cpu_times_ours")):
            if key in row:
                low, high = row[f"{key}_range"]
                ratios[place] = f"{row[key]:.2f} ({low:.2f}–{high:.2f})"
        ms, fastest, cpu = (f"{row[key]:.0f}" for key in ("ms", "fastest_ms", "cpu_ms"))
        table.add_row(name, ms, fastest, ratios[0], cpu, ratios[1])
    Console(width=100).print(table)


def show_check(case: str, found: dict[str, Any]) -> None:
    model = Model()
    table = Table(
        title=f"{case}: {model.parameters:,} parameters, {model.product_flops_per_token / 1e6:.2f} "
        "MFLOP a token in products with weights"
    )
    for heading in ("runtime", "parameters", "MFLOP / token", "loss of step 1", "of step 10"):
        table.add_column(heading, justify="left" if heading == "runtime" else "right")
    for name, row in found.items():
        first, last = row["losses"][0], row["losses"][-1]
        flops = f"{row['flops_per_token'] / 1e6:.2f}"
        table.add_row(name, f"{row['parameters']:,}", flops, f"{first:.4f}", f"{last:.4f}")
    Console(width=100).print(table)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and from."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("torch", "megatron-core", "torchtitan"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "threads of a rank": 1,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> int:
    """Measure or check, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contestant")
    parser.add_argument("--only", nargs="+", choices=list(makers()), default=list(makers()))
    parser.add_argument("--check", action="store_true", help="show that all do the same work")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    results = {}
    for case in CASES if options.case == "all" else [options.case]:
        if options.check:
            results[case] = run_ranks(check, CASES[case], options.only, 10)
            show_check(case, results[case])
        else:
            seconds = run_ranks(measure, CASES[case], options.only, options.rounds)
            results[case] = summarise(seconds)
            show(case, results[case])
        if options.json:  # after each case: later ones may fail
            text = json.dumps({"machine": machine(), "results": results}, indent=1)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
