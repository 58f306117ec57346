"""Options of blocks and of the optimizer: in every layout the numbers of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.launch.config import RunConfig
from coterie.launch.placement import boxes_of_rank
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part
from coterie.parallel.run_state import model_parts, optimizer_parts
from coterie.parallel.step import StepSettings, train_step
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.tiny import model_of, relative_error, sampler_of, tiny_config

ATTENTION = {"heads": 4, "kv_heads": 4, "qk_norm": True}
MUON: dict[str, Any] = {"kind": "muon", "muon_scale": "original"}
SHARED: dict[str, Any] = {
    "layers": 4,
    "shared_depth": 2,
    "dense_layers": [2, 3],
    "attention": ATTENTION,
}
BEFORE: dict[str, Any] = {
    "experts": {"count": 8, "hidden": 8, "activation": "reglu"},
    "router": {"k": 2, "score": "sigmoid", "jitter": 0.1, "capacity_factor": 1.0},
    "route_before_attention": True,
}
PYRAMID: dict[str, Any] = {
    "layers": 4,
    "expert_counts": [4, 4, 8],
    "attention": ATTENTION,
    "moe": {
        "experts": {"count": 4, "hidden": 8},
        "router": {"k": 1, "renormalise": False, "capacity_factor": 1.2},
        "shared": {"hidden": 8},
        "shared_mix": True,
    },
}
UNTIED: dict[str, Any] = {
    "attention": {**ATTENTION, "gate": "head"},
    "untie": {"ffn": True, "qkvo": True, "norm": True},
}
MLP: dict[str, Any] = {
    "experts": {"count": 8, "hidden": 8},
    "router": {"kind": "mlp", "k": 1, "hidden": 8, "renormalise": False, "capacity_factor": 1.2},
}
BIASED: dict[str, Any] = {
    "experts": {"count": 8, "hidden": 8},
    "router": {"k": 2, "score": "sigmoid", "bias_update": 0.1},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gate head": {"model": {"attention": {**ATTENTION, "gate": "head"}}},
    "gate element": {"model": {"attention": {**ATTENTION, "gate": "element"}}},
    "routed before attention": {"model": {"moe": BEFORE, "attention": ATTENTION}},
    "pyramid, residual": {"model": PYRAMID},
    "mlp router": {"model": {"layers": 4, "dense_layers": [2], "moe": MLP, "attention": ATTENTION}},
    "shared depth": {"model": SHARED},
    "shared depth, biased": {"model": {**SHARED, "moe": BIASED}},
    "shared depth, recomputed": {"model": SHARED, "train": {"recompute": "full"}},
    "untied": {"model": UNTIED},
    "untied, shared depth, recomputed": {
        "model": {**SHARED, **UNTIED},
        "train": {"recompute": "full"},
    },
    "untied, muon": {"model": UNTIED, "optimizer": MUON},
    "muon": {"model": {"attention": ATTENTION}, "optimizer": MUON},
    "muon, uneven": {
        "model": {
            "width": 18,
            "attention": {**ATTENTION, "head_width": 4},
            "feed_forward": {"hidden": 10},
        },
        "optimizer": MUON,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp cp ep": {"tp": 2, "cp": 2, "ep": 2},
    "pp shard ep": {"pp": 2, "dp_shard": 2, "ep": 2},
    "tp shard etp": {"tp": 2, "dp_shard": 2, "etp": 2},
    "shard": {"dp_shard": 4},
    "tp etp": {"tp": 4, "etp": 4},
    "zero bubble": {"pp": 2, "schedule": "zero_bubble", "ep": 2},
}
RUN: dict[str, tuple[str, ...]] = {
    "gate head": ("tp cp ep", "pp shard ep"),
    "gate element": ("tp cp ep",),
    "routed before attention": ("tp cp ep", "pp shard ep"),
    "pyramid, residual": ("tp cp ep", "pp shard ep"),
    "mlp router": ("pp shard ep", "zero bubble"),
    "shared depth": ("tp cp ep", "pp shard ep", "shard"),
    "shared depth, biased": ("pp shard ep",),
    "shared depth, recomputed": ("shard",),
    "untied": ("tp cp ep", "pp shard ep", "shard", "zero bubble"),
    "untied, shared depth, recomputed": ("tp cp ep", "pp shard ep"),
    "untied, muon": ("tp shard etp",),
    "muon": ("pp shard ep", "tp shard etp", "shard", "tp etp"),
    "muon, uneven": ("shard",),
}
"""Which option is run in which layouts."""
STEPS = 2


def config_of(data: Path, option: str, layout: dict[str, Any] | None = None) -> RunConfig:
    # far from zero, where the second moment's root would turn rounding into steps
    settings = {"eps": 1e-3, "warmup": 0, **OPTIONS[option].get("optimizer", {})}
    sections = {**OPTIONS[option], "optimizer": settings, "parallel": layout or {}}
    return tiny_config(data, **sections)


def run(config: RunConfig, world: int) -> tuple[list[Any], dict[str, Part]]:
    """The numbers of each step; this rank's parts of weights and moments after the last."""
    ranks = ranks_of(config, world)
    model = model_of(config, ranks)
    optimizer = Optimizer(model, config.optimizer)
    sampler, parts = sampler_of(config), config.train.accumulation
    settings = StepSettings("fp64", 1.0, config.train.seed)
    seen: list[Any] = []
    for step in range(STEPS):
        batches = [
            sampler.batch(step, micro, parts, ranks.place.dp, ranks.layout.dp)
            for micro in range(parts)
        ]
        report = train_step(model, optimizer, batches, step + 1, settings)
        for layer, rows in report.load.items():
            assert len(rows) == config.model.experts_of(layer)
            sent = sum(rows) + report.dropped[layer]
            assert sent == report.tokens * config.model.moe.router.k
        losses = [report.loss, report.grad_norm, *report.router_losses.values()]
        seen.append((losses, report.load, report.dropped))
    state = {**model_parts(model), **optimizer_parts(model, optimizer)}
    planned = boxes_of_rank(config, ranks.layout, ranks.rank)
    assert {name: part.box for name, part in state.items() if part.box.numel} == {
        name: box for name, box in planned.items() if box.numel
    }
    return seen, {name: Part(p.tensor.clone(), p.box, p.owner) for name, p in state.items()}


def on_rank(rank: int, cases: dict[str, RunConfig]) -> dict[str, Any]:
    return {name: run(config, 4) for name, config in cases.items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_layout_has_the_numbers_of_one_process(option: str, data: Path) -> None:
    truth, whole = run(config_of(data, option), 1)
    cases = {layout: config_of(data, option, LAYOUTS[layout]) for layout in RUN[option]}
    by_rank = run_ranks(4, on_rank, cases, timeout=120.0)
    for layout in RUN[option]:
        covered: dict[str, Tensor] = {n: torch.zeros(p.box.whole) for n, p in whole.items()}
        for results in by_rank:
            seen, state = results[layout]
            for (losses, *counts), (right, *right_counts) in zip(seen, truth, strict=True):
                assert losses == pytest.approx(right, rel=1e-10), layout
                assert counts == right_counts, layout
            for key, part in state.items():
                expected = whole[key].tensor[part.box.slices]
                if part.box.numel:
                    assert relative_error(part.tensor, expected) < 1e-9, (layout, key)
                if part.owner:
                    covered[key][part.box.slices] += 1
        assert all(bool((times == 1).all()) for times in covered.values()), layout
