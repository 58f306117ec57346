"""Time the row ops: native against their twins and against index_select and index_add.

    python benchmarks/rows.py [--threads N] [--rounds N] [--json PATH]

The contenders take turns (A B C A B C …) in one process; the table shows the median of each in
microseconds, and how many times as long as the native op the others took. "torch" is what one
would write with autograd's own ops: index_select, multiply, index_add.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from coterie.csrc import Inverse, invert, loader, permute, unpermute

# (tokens T, width D, choices per token k): few large experts, many small ones, and a decode step
SHAPES = ((2048, 512, 2), (2048, 512, 6), (16, 512, 2))
DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("native", "twin", "torch")
Step = Callable[[], object]


class Case:
    """Random rows of one shape and dtype, sorted by expert as an assignment sorts them."""

    def __init__(self, tokens: int, width: int, k: int, dtype: torch.dtype) -> None:
        rows = tokens * k
        self.tokens = tokens
        self.token_A = torch.arange(tokens).repeat_interleave(k)[torch.randperm(rows)]
        self.inverse: Inverse = invert(self.token_A, tokens)
        self.x_TD = torch.randn(tokens, width).to(dtype).requires_grad_()
        self.x_AD = torch.randn(rows, width).to(dtype).requires_grad_()
        self.weight_A = torch.rand(rows).requires_grad_()
        self.dy_TD, self.dy_AD = torch.randn_like(self.x_TD), torch.randn_like(self.x_AD)

    def steps(self) -> dict[str, dict[str, Step]]:
        """For each measured operation, the contenders."""
        return {
            "invert": self._ours(lambda: invert(self.token_A, self.tokens)),
            "permute": {**self._ours(self._permute), "torch": self._torch_permute},
            "permute + backward": {
                **self._ours(lambda: self._permute().backward(self.dy_AD)),
                "torch": lambda: self._torch_permute().backward(self.dy_AD),
            },
            "unpermute": {**self._ours(self._unpermute), "torch": self._torch_unpermute},
            "unpermute + backward": {
                **self._ours(lambda: self._unpermute().backward(self.dy_TD)),
                "torch": lambda: self._torch_unpermute().backward(self.dy_TD),
            },
        }

    @staticmethod
    def _ours(step: Step) -> dict[str, Step]:
        def twin() -> None:
            with loader.twins_only():
                step()

        return {"native": step, "twin": twin}

    def _permute(self) -> Tensor:
        return permute(self.x_TD, self.token_A, self.inverse)

    def _torch_permute(self) -> Tensor:
        return self.x_TD.index_select(0, self.token_A)

    def _unpermute(self) -> Tensor:
        return unpermute(self.x_AD, self.weight_A, self.token_A, self.inverse)

    def _torch_unpermute(self) -> Tensor:
        weighted_AD = self.x_AD * self.weight_A.to(self.x_AD.dtype).unsqueeze(1)
        return torch.zeros_like(self.x_TD).index_add(0, self.token_A, weighted_AD)

    def clear(self) -> None:
        """Drop the gradients, so that no contender pays for adding to another's."""
        self.x_TD.grad = self.x_AD.grad = self.weight_A.grad = None


def measure(case: Case, contenders: dict[str, Step], rounds: int) -> dict[str, float]:
    """The median time of each contender in microseconds; they take turns."""
    times: dict[str, list[float]] = {way: [] for way in contenders}
    for index in range(rounds + 2):
        for way, step in contenders.items():
            case.clear()
            start = time.perf_counter()
            result = step()
            elapsed = time.perf_counter() - start
            del result
            if index >= 2:  # the first two warm up
                times[way].append(elapsed * 1e6)
    return {way: statistics.median(values) for way, values in times.items()}


def run(rounds: int) -> list[dict[str, Any]]:
    """Every operation, shape and dtype."""
    records = []
    for dtype in DTYPES:
        for tokens, width, k in SHAPES:
            case = Case(tokens, width, k, dtype)
            for name, contenders in case.steps().items():
                record = {"op": name, "dtype": str(dtype).removeprefix("torch."), "T": tokens}
                medians = measure(case, contenders, rounds)
                records.append({**record, "D": width, "k": k, "microseconds": medians})
    return records


def show(records: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("operation", "dtype", "T", "D", "k", "native µs", "twin", "torch")
    for record in records:
        medians = record["microseconds"]
        ratios = [
            f"{medians[way] / medians['native']:.2f}×" if way in medians else "" for way in WAYS[1:]
        ]
        shape = (str(record[letter]) for letter in "TDk")
        table.add_row(record["op"], record["dtype"], *shape, f"{medians['native']:.0f}", *ratios)
    Console().print(table)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def main() -> int:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument("--rounds", type=int, default=21, help="timed turns of each contender")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if missing := [r for r in loader.status() if r.device == "cpu" and not r.native]:
        print(f"nothing to compare: {missing[0].reason}; {missing[0].fix}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    records = run(arguments.rounds)
    show(records)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "results": records}, indent=2)
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
