"""What routers cost: from activations to an assignment, each beside the plain top-k router.

    python benchmarks/routers.py [--rounds 15] [--json benchmarks/results/routers.json]

16,384 tokens of width 1024, 64 experts, 6 for each token, fp32, in training. Top-k and each
other router take turns (A B A B …) on the same fresh inputs; printed are medians and, within
each pair, how many times as long the other one took. The product with the router's weight is
part of it; what the experts then do is not. One thread, and seconds of its own: those that other
programs take do not count.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from benchmarks.layer import machine
from coterie.comm.axis import Axes
from coterie.core.random import fold_in, key
from coterie.models import initialise
from coterie.moe.routers.base import Router
from coterie.moe.routers.config import RouterConfig
from coterie.moe.tokens import TokenInfo

T, D, E, K = 16384, 1024, 64, 6
SEQUENCES = 8
PLAIN = "top_k"
ROUTERS: dict[str, dict[str, Any]] = {
    PLAIN: {"kind": "top_k", "k": K},
    "top_k, capacity 1.25": {"kind": "top_k", "k": K, "capacity_factor": 1.25},
    "top_k, DeepSeek-V3": {
        "kind": "top_k",
        "k": K,
        "score": "sigmoid",
        "groups": 8,
        "top_groups": 4,
        "bias_update": 0.001,
        "sequence_loss": 1e-4,
        "balance_loss": 0.0,
        "z_loss": 0.0,
    },
    "top_k, biased": {"kind": "top_k", "k": K, "score": "sigmoid", "bias_update": 0.001},
    "mlp": {"kind": "mlp", "k": K, "bias_update": 0.001},
    "random_fixed": {"kind": "random_fixed", "first_k": K, "k": K},
    "hash": {"kind": "hash", "k": K},
    "sinkhorn": {"kind": "sinkhorn", "k": K},
    "expert_choice": {"kind": "expert_choice", "capacity_factor": K},
    "modality": {"kind": "modality", "experts": [32, 32], "capacity_factor": K},
}


def build(settings: dict[str, Any]) -> Router:
    """A router with the weights that training starts with."""
    config = TypeAdapter(RouterConfig).validate_python(settings)
    router: Router = config.build(D, E, Axes())
    initialise(router, seed=0)
    return router.train()


def facts(seed: int) -> TokenInfo:
    """Tokens of two modalities in sequences of 2048."""
    gen = torch.Generator().manual_seed(seed)
    place_T = torch.arange(T)
    return TokenInfo(
        token_T=torch.randint(0, 65536, (T,), generator=gen),
        modality_T=torch.randint(0, 2, (T,), generator=gen),
        sequence_T=place_T // (T // SEQUENCES),
        position_T=place_T % (T // SEQUENCES),
        key_T=fold_in(torch.full((T,), key("noise", seed)), place_T),
    )


def seconds(router: Router, x_TD: torch.Tensor, info: TokenInfo) -> tuple[float, float]:
    """Of the forward pass, and of both passes: gradients of input and weights."""
    x_TD = x_TD.detach().requires_grad_()
    router.zero_grad(set_to_none=True)
    start = time.process_time()
    state_TR = router.state(x_TD, info)  # of an MLP router, as a layer asks it
    routing = router(x_TD, replace(info, router_state_TR=state_TR))
    forward = time.process_time() - start
    outputs = [routing.assignment.weight_A, *routing.losses.values()]
    outputs = [output for output in outputs if output.requires_grad]
    gradients = [torch.ones_like(output) for output in outputs]
    start = time.process_time()
    if outputs:  # a hash has no gradient
        torch.autograd.backward(outputs, gradients)
    return forward, forward + time.process_time() - start


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds; ratios are taken within a pair first."""
    routers = {name: build(settings) for name, settings in ROUTERS.items()}
    results = {}
    for name, router in routers.items():
        pairs = []
        for number in range(-1, rounds):  # the first is to warm up
            x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(number + 1))
            info = facts(number + 1)
            pair = seconds(routers[PLAIN], x_TD, info), seconds(router, x_TD, info)
            pairs.append(pair)
        plain, other = zip(*pairs[1:], strict=True)
        results[name] = {}
        for place, what in enumerate(("forward", "both")):
            ratios = [b[place] / a[place] for a, b in zip(plain, other, strict=True)]
            results[name][f"{what}_ms"] = statistics.median(b[place] for b in other) * 1e3
            results[name][f"{what}_times_top_k"] = statistics.median(ratios)
    return results


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"T {T}, D {D}, E {E}, k {K}")
    table.add_column("router")
    for heading in ("forward, ms", "× top_k", "and backward, ms", "× top_k"):
        table.add_column(heading, justify="right")
    for name, row in results.items():
        cells = (f"{value:.2f}" if "times" in key else f"{value:.1f}" for key, value in row.items())
        table.add_row(name, *cells)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(options.rounds)
    show(results)
    if options.json:
        shape = {"T": T, "D": D, "E": E, "K": K}
        text = {"machine": machine(), "shape": shape, "results": results}
        options.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
