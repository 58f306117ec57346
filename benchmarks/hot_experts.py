"""Memory and time where one rank's experts are hot: 8 gloo processes, fp32, rows by a given skew.

    python benchmarks/hot_experts.py [--rounds 3] [--json benchmarks/results/hot_experts.json]

Skew is the busiest rank's rows over the mean. A stack of expert layers (residual, no attention)
goes forward and backward, each skew without a bound on rows and with several, in turn. Printed for
the busiest rank, rank 0: its rows in a layer; peak bytes of tensors, weights not counted and their
gradients counted; CPU seconds of its own thread, medians (the processes share few cores, so that
time on the clock would show the sum of all ranks); and the work by arithmetic. Ratios are to skew 1
without a bound.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.layer import machine
from benchmarks.memory import peak_bytes
from coterie.comm.axis import Axis
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.moe.assignment import Assignment, from_choices
from coterie.moe.experts import Experts, ExpertsConfig
from tests.distributed import run_ranks

R = 8
SKEWS = (1.0, 1.25, 2.0, 4.0, 8.0)
FACTORS = (None, 1.0, 1.25, 2.0)


@dataclass(frozen=True)
class Stack:
    """Layers of experts, and the tokens of each rank."""

    layers: int = 4
    D: int = 128
    F: int = 256
    E: int = 16
    K: int = 2
    T: int = 512

    def flops(self, skew: float, factor: float | None) -> float:
        """Of the busiest rank in one step; a recomputed row passes forward twice."""
        mean = self.T * self.K
        rows = skew * mean
        again = 0.0 if factor is None or skew <= factor else rows - mean
        return self.layers * 6 * self.D * self.F * (3 * rows + again)


class Layers(nn.Module):
    """x + experts(x), ``layers`` times, with a given assignment."""

    def __init__(self, stack: Stack, rank: int) -> None:
        super().__init__()
        config = ExpertsConfig(count=stack.E, hidden=stack.F)
        self.experts = nn.ModuleList(
            Experts(stack.D, config, Axis("ep", rank, R)) for _ in range(stack.layers)
        )
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x_TD: Tensor, assignment: Assignment, exchange: AllToAllExchange) -> Tensor:
        for experts in self.experts:
            x_TD = x_TD + exchange(x_TD, assignment, experts)
        return x_TD


def skewed(stack: Stack, skew: float) -> Assignment:
    """``skew`` / R of the rows go to rank 0, the others evenly to the other ranks."""
    rows, local = stack.T * stack.K, stack.E // R
    hot = round(rows * skew / R)
    rank_A = torch.cat(
        [torch.zeros(hot, dtype=torch.int64), torch.arange(rows - hot) % (R - 1) + 1]
    )
    expert_A = (rank_A * local + torch.arange(rows) % local)[torch.randperm(rows)]
    weight_TK = torch.rand(stack.T, stack.K, requires_grad=True)
    return from_choices(expert_A.view(stack.T, stack.K), weight_TK, stack.E)


def on_rank(rank: int, stack: Stack, rounds: int) -> dict[tuple[float, float | None], Any]:
    """For each skew and factor this rank's rows, peak bytes and CPU seconds."""
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(rank)
    layers = Layers(stack, rank)
    results: dict[tuple[float, float | None], Any] = {}
    for number in range(rounds + 1):  # the first is to warm up and to count bytes
        for skew in SKEWS:
            for factor in FACTORS:
                exchange = AllToAllExchange(group, factor)
                assignment = skewed(stack, skew)
                x_TD = torch.randn(stack.T, stack.D, requires_grad=True)
                dy_TD = torch.randn(stack.T, stack.D)
                layers.zero_grad(set_to_none=True)
                dist.barrier(group)

                step = partial(run, layers, x_TD, assignment, exchange, dy_TD)
                seen = results.setdefault((skew, factor), {"seconds": []})
                if number == 0:
                    seen["peak"] = peak_bytes(step)
                    seen["rows"] = received(assignment, rank, stack)
                else:
                    start = time.thread_time()
                    step()
                    seen["seconds"].append(time.thread_time() - start)
    return results


def run(
    layers: Layers, x_TD: Tensor, assignment: Assignment, exchange: AllToAllExchange, dy_TD: Tensor
) -> None:
    """Forward and backward."""
    layers(x_TD, assignment, exchange).backward(dy_TD)


def received(assignment: Assignment, rank: int, stack: Stack) -> int:
    """Rows that this rank takes in a layer."""
    load_E = assignment.load_E.clone()
    dist.all_reduce(load_E)
    return int(load_E.view(R, -1)[rank].sum())


def summarise(
    stack: Stack, ranks: list[dict[tuple[float, float | None], Any]]
) -> list[dict[str, Any]]:
    """One line for each skew and factor."""
    one = (1.0, None)
    peak = max(rank[one]["peak"] for rank in ranks)
    seconds = statistics.median(ranks[0][one]["seconds"])
    lines = []
    for skew in SKEWS:
        for factor in FACTORS:
            hot = ranks[0][skew, factor]
            lines.append(
                {
                    "skew": skew,
                    "max_rows_factor": factor,
                    "rows": hot["rows"],
                    "rows_ratio": hot["rows"] / ranks[0][one]["rows"],
                    "peak_mb": hot["peak"] / 1e6,
                    "peak_ratio": hot["peak"] / peak,
                    "highest_peak_ratio": max(r[skew, factor]["peak"] for r in ranks) / peak,
                    "cpu_s": statistics.median(hot["seconds"]),
                    "cpu_ratio": statistics.median(hot["seconds"]) / seconds,
                    "work_ratio": stack.flops(skew, factor) / stack.flops(1.0, None),
                }
            )
    return lines


def show(stack: Stack, lines: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"busiest of {R} ranks; {stack.layers} layers, D {stack.D}, F {stack.F}, "
        f"E {stack.E}, T·k {stack.T * stack.K} a rank"
    )
    for heading in ("skew", "bound", "rows", "peak MB", "peak ×", "CPU s", "CPU ×", "work ×"):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            f"{line['skew']:g}",
            f"{line['max_rows_factor'] or '-'}",
            f"{line['rows']}",
            f"{line['peak_mb']:.1f}",
            f"{line['peak_ratio']:.2f}",
            f"{line['cpu_s']:.2f}",
            f"{line['cpu_ratio']:.2f}",
            f"{line['work_ratio']:.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for layers in (1, 4):
        stack = Stack(layers=layers)
        lines = summarise(stack, run_ranks(R, on_rank, stack, options.rounds, timeout=900))
        show(stack, lines)
        results[f"{layers} layers" if layers > 1 else "1 layer"] = lines
    if options.json:
        report = {"machine": {**machine(), "threads": 1}, "results": results}
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
