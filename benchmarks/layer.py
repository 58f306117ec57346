"""The MoE layer, forward and backward in fp32 on one process, beside other projects' layers.

    python benchmarks/layer.py [--rounds 11] [--threads N] [--json benchmarks/results/layer.json]

Each round times one matrix product of 2048³ and each layer once, in turn, so that the machine's
drift meets all alike; inputs are drawn anew each time, so experts get other numbers of rows.
Printed: medians, the share of the rate of ``torch.mm`` (a layer is mostly such products), and how
many times longer than ours the others take. The limit is the machine's best product, which on AMD
processors is oneDNN's and not torch.mm's: both rates stand in the title.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.peers import Shape, hugging_face_layer, megatron_layer
from coterie.csrc import matmul
from coterie.models import initialise
from coterie.moe import MoEConfig, MoELayer

SHAPES = (
    Shape("few large experts", D=512, F=1024, E=8, K=2, T=2048),
    Shape("many small experts", D=512, F=128, E=64, K=6, T=2048),
)
PRODUCTS = ("torch.mm", "oneDNN")
Run = Callable[[], float]


def our_layer(shape: Shape) -> nn.Module:
    """coterie's layer with the router losses off, as the others have them."""
    config = MoEConfig.model_validate(
        {
            "experts": {"count": shape.E, "hidden": shape.F},
            "router": {"k": shape.K, "balance_loss": 0.0, "z_loss": 0.0},
        }
    )
    layer = MoELayer(shape.D, config)
    initialise(layer, seed=0)
    return _FirstOutput(layer)


class _FirstOutput(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def layers(shape: Shape) -> dict[str, nn.Module]:
    """Every layer that can be built here, ours first."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "coterie": lambda: our_layer(shape),
        "Hugging Face Mixtral (eager)": lambda: hugging_face_layer(shape, "eager"),
        "Hugging Face Mixtral (grouped_mm)": lambda: hugging_face_layer(shape, "grouped_mm"),
        "megatron-core SequentialMLP": lambda: megatron_layer(shape),
    }
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ImportError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    return made


def forward_backward(layer: nn.Module, shape: Shape) -> Run:
    """One training pass on fresh inputs: gradients of the input and of every parameter."""

    def run() -> float:
        x_1TD = torch.randn(1, shape.T, shape.D, requires_grad=True)
        dy_1TD = torch.randn(1, shape.T, shape.D)
        layer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        layer(x_1TD).backward(dy_1TD)
        return time.perf_counter() - start

    return run


def product(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Run:
    """One matrix product of 2048³."""
    a, b = torch.randn(2, 2048, 2048)

    def run() -> float:
        start = time.perf_counter()
        multiply(a, b)
        return time.perf_counter() - start

    return run


def measure(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turn."""
    runs = {"torch.mm": product(torch.mm), "oneDNN": product(matmul.mm)}
    runs |= {name: forward_backward(layer, shape) for name, layer in layers(shape).items()}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def summarise(shape: Shape, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians over rounds; ratios are taken within a round first."""
    product = [2 * 2048**3 / s for s in seconds["torch.mm"]]
    ours = seconds["coterie"]
    summary = {}
    for name, times in seconds.items():
        if name in PRODUCTS:
            summary[name] = {"gflops": 2 * 2048**3 / statistics.median(times) / 1e9}
            continue
        rates = [shape.flops / s for s in times]
        pairs = list(zip(times, ours, strict=True))
        summary[name] = {
            "ms": statistics.median(times) * 1e3,
            "gflops": statistics.median(rates) / 1e9,
            "of_torch_mm": statistics.median(
                rate / peak for rate, peak in zip(rates, product, strict=True)
            ),
            "times_ours": statistics.median(theirs / own for theirs, own in pairs),
        }
    return summary


def show(shape: Shape, summary: dict[str, dict[str, float]]) -> None:
    peaks = ", ".join(f"{name} {summary[name]['gflops']:.0f} GFLOP/s" for name in PRODUCTS)
    table = Table(
        title=f"{shape.name}: D {shape.D}, F {shape.F}, E {shape.E}, k {shape.K}, T {shape.T}; "
        f"2048³ by {peaks}"
    )
    table.add_column("layer, forward + backward")
    for heading in ("ms", "GFLOP/s", "of torch.mm's rate", "time / ours"):
        table.add_column(heading, justify="right")
    for name, row in summary.items():
        if name not in PRODUCTS:
            table.add_row(
                name,
                f"{row['ms']:.1f}",
                f"{row['gflops']:.0f}",
                f"{row['of_torch_mm']:.0%}",
                f"{row['times_ours']:.2f}",
            )
    Console(width=110).print(table)


def machine() -> dict[str, object]:
    """What the figures were measured on, and from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    results = {}
    for shape in SHAPES:
        summary = summarise(shape, measure(shape, options.rounds))
        show(shape, summary)
        results[shape.name] = summary
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
