"""A whole MoE layer on one rank, forward and backward, beside other ways to make it.

    python benchmarks/gpu/layer.py --json PATH [--device cpu]

Ours (the fused kernels, with tiles of 256 and of 128 columns), torchtitan's way (grouped products),
a loop over experts, and megatron-core's layers where they can be made: in turn, in one process, on
fresh inputs. Planning on the host is in the times.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from benchmarks.gpu import cases, megatron_layers, program
from benchmarks.gpu.cases import Case
from benchmarks.gpu.layers import Fused, Grouped, Layer, Loop, Weights
from benchmarks.gpu.timing import Step, medians
from coterie.csrc.fused_launch import TILE_COLUMNS, Manner

OURS = {f"coterie, fused, {columns} columns": columns for columns in TILE_COLUMNS}
LOOP = "loop over experts"


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of each layer, forward and with its backward pass."""
    weights = Weights(case, device)
    x_TD, dy_TD = torch.randn(2, case.tokens, case.D, device=device).to(torch.bfloat16)
    x_TD.requires_grad_()
    layers: dict[str, Layer | nn.Module] = {
        **{
            name: Fused(weights, case.tokens, Manner(tile_columns=columns))
            for name, columns in OURS.items()
        },
        "grouped product, as torchtitan": Grouped(weights),
        LOOP: Loop(weights),
    }
    left_out: dict[str, str] = {}
    # another project's: whatever stops it is reported, not ours to mend
    try:
        makers = megatron_layers.makers(case, device)
    except Exception as error:
        makers, left_out["megatron-core"] = {}, _told(error)
    for name, make in makers.items():
        try:
            layers[name] = make()
            _both(layers[name], weights, x_TD, dy_TD)()
        except Exception as error:
            layers.pop(name, None)
            left_out[name] = _told(error)
    steps = {name: _both(layer, weights, x_TD, dy_TD) for name, layer in layers.items()}

    def refresh() -> None:
        x_TD.data.normal_()
        dy_TD.normal_()

    both = medians(steps, device, rounds, refresh)
    forward = medians(
        {n: _forward(layer, x_TD) for n, layer in layers.items()}, device, rounds, refresh
    )
    ours = min(OURS, key=both.__getitem__)
    flops = 6 * case.rows * case.D * case.F
    return {
        "case": case.name,
        "ms": both,
        "forward, ms": forward,
        "TFLOP/s": {name: 3 * flops / ms / 1e9 for name, ms in both.items()},
        "ours": ours,
        "others / ours": {name: ms / both[ours] for name, ms in both.items() if name not in OURS},
        "difference from the loop": max(difference(layers, name, x_TD) for name in OURS),
        "left out": left_out,
    }


def difference(layers: dict[str, Any], name: str, x_TD: Tensor) -> float:
    """‖ours − loop‖ / ‖loop‖ of one forward pass: that both compute the same."""
    with torch.no_grad():
        ours, loop = layers[name](x_TD).float(), layers[LOOP](x_TD).float()
    return float((ours - loop).norm() / loop.norm())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _both(layer: Callable[[Tensor], Tensor], weights: Weights, x_TD: Tensor, dy_TD: Tensor) -> Step:
    def step() -> None:
        layer(x_TD).backward(dy_TD)
        x_TD.grad = None
        weights.clear()
        if isinstance(layer, nn.Module):
            layer.zero_grad(set_to_none=True)

    return step


def _forward(layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Step:
    return lambda: layer(x_TD)


def main() -> None:
    options = program.options(__doc__)
    device = program.begin(options)
    found = program.Found(options.json)
    for case in cases.small(cases.LAYERS, options.device):
        found.add(measure(case, device, options.rounds))


if __name__ == "__main__":
    main()
