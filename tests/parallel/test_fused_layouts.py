"""Training with the fused exchange gives the gradients of the plain one, up to bfloat16, in layouts
that use it in their own ways. Its kernels run on the host, and windows are files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.comm.exchange.fused import windows
from coterie.comm.exchange.fused.exchange import FusedExchange
from coterie.csrc import fused_ops
from coterie.launch.config import RunConfig
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.run_state import optimizer_parts
from coterie.parallel.step import StepSettings, train_step
from tests.comm.files import files, kernels
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.in_layouts import SETTINGS
from tests.parallel.tiny import model_of, sampler_of, tiny_config

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "shard ep": ({"dp_shard": 2, "ep": 4}, "none"),
    "zero bubble": ({"pp": 2, "schedule": "zero_bubble", "ep": 2}, "selective"),
    "tp etp, recomputed": ({"tp": 2, "etp": 2}, "full"),
    "nodes": ({"ep": 4, "node": 2}, "none"),
}
ATTENTION = {"heads": 2, "kv_heads": 2, "qk_norm": True}
NEAR = 0.03


def config_of(data: Path, layout: str, kind: str) -> RunConfig:
    parallel, recompute = LAYOUTS[layout]
    route = "nodes" if "node" in parallel else "tokens"
    exchange: dict[str, Any] = {"kind": kind, "route": route}
    if kind == "fused":
        exchange |= {"communication": 1, "slabs": 1, "tile_columns": 128}
    moe = {
        "experts": {"count": 4, "hidden": 256},
        # all experts of every token: no rounding changes who is chosen
        "router": {"k": 4},
        "exchange": exchange,
    }
    return tiny_config(
        data,
        model={"width": 64, "layers": 2, "dense_layers": [], "attention": ATTENTION, "moe": moe},
        train={"precision": "bf16", "recompute": recompute, "global_batch": 8},
        optimizer=SETTINGS,
        parallel=parallel,
    )


def _gradients(rank: int, cases: dict[str, RunConfig]) -> dict[str, dict[str, Tensor]]:
    """After a step with each config: the moments of this rank's parameters, and the loss."""
    fused_ops.library = kernels()
    windows.symmetric_memory = files
    found = {}
    for name, config in cases.items():
        ranks = ranks_of(config, 4)
        model = model_of(config, ranks)
        optimizer = Optimizer(model, config.optimizer)
        assert config.model.moe is not None
        is_fused = config.model.moe.exchange.kind == "fused"
        used = [e for e in _exchanges(model) if isinstance(e, FusedExchange)]
        assert bool(used) == is_fused
        for exchange in used:
            exchange.manner = exchange.manner._replace(blocks=2, patience=600.0)
        micros = config.train.accumulation
        place, layout = ranks.place, ranks.layout
        batches = [
            sampler_of(config).batch(0, micro, micros, place.dp, layout.dp)
            for micro in range(micros)
        ]
        report = train_step(model, optimizer, batches, 1, StepSettings("bf16", None, 3))
        parts = optimizer_parts(model, optimizer)
        found[name] = {n: part.tensor.clone() for n, part in parts.items() if part.box.numel}
        found[name]["loss"] = torch.tensor(report.loss)
    return found


def _exchanges(model: Any) -> list[Any]:
    layers = [m.exchange for d in model.decoders for m in d.modules() if hasattr(m, "exchange")]
    return [getattr(one, "onward", None) or one for one in layers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plain_exchanges_gradients(layout: str, data: Path) -> None:
    kernels()
    cases = {kind: config_of(data, layout, kind) for kind in ("all_to_all", "fused")}
    for found in run_ranks(4, _gradients, cases, timeout=240.0):
        ours, right = found["fused"], found["all_to_all"]
        assert ours.keys() == right.keys()
        for name, true in right.items():
            if true.norm() > 0:
                assert (ours[name] - true).norm() <= NEAR * true.norm(), name
