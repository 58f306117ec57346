"""The rate of the fused kernels' products beside cuBLAS's and PyTorch's grouped product.

    python benchmarks/gpu/products.py --json PATH [--device cpu]

All experts on one rank, nothing communicated. SwiGLU and its gradient are part of the fused
kernels' first products and not of the others'; what is said of them holds for the tiles that are
faster for all six. ``one``: cuBLAS with all rows and one expert's
weights, a product of the same size in one piece.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.gpu import cases, program
from benchmarks.gpu.cases import Case
from benchmarks.gpu.experts import PRODUCTS, SHELLS, WAYS, Operands
from benchmarks.gpu.lone_rank import LoneRank
from benchmarks.gpu.timing import medians


def one_product(of: Operands, name: str) -> Callable[[], object]:
    """The product of all rows with the first expert's weights, or over all rows."""
    rows = of.rank.rows
    x, a, h = (t[:rows] for t in (of.rank.x_PD, of.a_PF, of.h_PH))
    w_in, w_out = of.w_in_EHD[0], of.w_out_EFD[0]
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "in": (x, w_in.T),
        "out": (a, w_out),
        "d hidden": (x, w_out.T),
        "d rows": (h, w_in),
        "dw out": (a.T, x),
        "dw in": (h.T, x),
    }
    left, right = pairs[name]
    return lambda: torch.mm(left, right)


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """TFLOP/s of each way, product by product and of all of them together."""
    rank = LoneRank(case, device)
    of = Operands.random(rank)
    ways = {name: way(of) for name, way in WAYS.items()}
    record: dict[str, Any] = {"case": case.name, "rows": rank.rows, "most rows": max(rank.load)}
    record["TFLOP/s"] = {}
    flops, spent = 0, dict.fromkeys([*ways, "one"], 0.0)
    for product in PRODUCTS:
        steps = {name: way.product(product) for name, way in ways.items()}
        steps["one"] = one_product(of, product)
        taken = medians(steps, device, rounds, rank.refresh)
        work = of.flops(product)
        record["TFLOP/s"][product] = {n: work / ms / 1e9 for n, ms in taken.items()}
        flops += work
        spent = {name: spent[name] + ms for name, ms in taken.items()}
    rates = {name: flops / ms / 1e9 for name, ms in spent.items()}
    record["TFLOP/s"]["all six"] = rates
    shell = max(SHELLS, key=rates.__getitem__)
    record["fastest shell"] = shell
    record["of cuBLAS"] = rates[shell] / max(rates["each"], rates["one"])
    record["of grouped"] = rates[shell] / rates["grouped"]
    return record


def main() -> None:
    options = program.options(__doc__)
    device = program.begin(options)
    found = program.Found(options.json)
    for case in cases.small(cases.PRODUCTS, options.device):
        found.add(measure(case, device, options.rounds))


if __name__ == "__main__":
    main()
