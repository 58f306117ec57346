"""Options of blocks and of the optimizer: in every layout the numbers of one process."""

from pathlib import Path
from typing import Any

import pytest

from coterie.launch.config import RunConfig
from coterie.parallel.step import StepReport
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.in_layouts import SETTINGS, Trained, check_equal, trained
from tests.parallel.tiny import model_of, tiny_config

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
OVERLAPPED: dict[str, Any] = {
    "experts": {"count": 8, "hidden": 8},
    "router": {"k": 2, "capacity_factor": 1.5},
    "exchange": {"kind": "overlapped", "pieces": 3, "slabs": 2},
}
TOKENS: dict[str, Any] = {**OVERLAPPED, "exchange": {"kind": "overlapped", "route": "tokens"}}
NODES: dict[str, Any] = {**OVERLAPPED, "exchange": {"kind": "overlapped", "route": "nodes"}}
OPTIONS: dict[str, dict[str, Any]] = {
    "overlapped": {"model": {"moe": OVERLAPPED, "attention": ATTENTION}},
    "overlapped, recomputed": {
        "model": {"moe": {**OVERLAPPED, "max_rows_factor": 1.0}, "attention": ATTENTION},
        "train": {"recompute": "full"},
    },
    "overlapped, by tokens, recomputed": {
        "model": {"moe": {**TOKENS, "max_rows_factor": 1.0}, "attention": ATTENTION},
        "train": {"recompute": "full"},
    },
    "overlapped, by nodes": {"model": {"moe": NODES, "attention": ATTENTION}},
    "overlapped, by nodes, recomputed": {
        "model": {"moe": {**NODES, "max_rows_factor": 1.0}, "attention": ATTENTION},
        "train": {"recompute": "full"},
    },
    "by nodes": {
        "model": {"moe": {**NODES, "exchange": {"route": "nodes"}}, "attention": ATTENTION},
    },
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
    "nodes": {"ep": 4, "node": 2},
    "nodes, etp": {"ep": 2, "etp": 2, "node": 2, "dp_shard": 2},
    "nodes, zero bubble": {"pp": 2, "schedule": "zero_bubble", "ep": 2, "node": 1},
}
RUN: dict[str, tuple[str, ...]] = {
    "overlapped": ("tp cp ep", "pp shard ep", "tp shard etp", "zero bubble"),
    "overlapped, recomputed": ("tp cp ep", "pp shard ep"),
    "overlapped, by tokens, recomputed": ("tp cp ep", "pp shard ep"),
    "overlapped, by nodes": ("nodes", "nodes, etp", "nodes, zero bubble"),
    "overlapped, by nodes, recomputed": ("nodes", "nodes, etp"),
    "by nodes": ("nodes",),
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


def config_of(data: Path, option: str, layout: dict[str, Any] | None = None) -> RunConfig:
    settings = {**SETTINGS, **OPTIONS[option].get("optimizer", {})}
    sections = {**OPTIONS[option], "optimizer": settings, "parallel": layout or {}}
    return tiny_config(data, **sections)


def every_choice_is_counted(config: RunConfig, step: int, report: StepReport) -> None:
    for layer, rows in report.load.items():
        assert len(rows) == config.model.experts_of(layer)
        sent = sum(rows) + report.dropped[layer]
        assert sent == report.tokens * config.model.moe.router.k


def run(config: RunConfig, world: int) -> Trained:
    ranks = ranks_of(config, world)
    return trained(config, ranks, model_of(config, ranks), every_choice_is_counted)


def on_rank(rank: int, cases: dict[str, RunConfig]) -> dict[str, Trained]:
    return {name: run(config, 4) for name, config in cases.items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_layout_has_the_numbers_of_one_process(option: str, data: Path) -> None:
    alone = run(config_of(data, option), 1)
    cases = {layout: config_of(data, option, LAYOUTS[layout]) for layout in RUN[option]}
    by_rank = run_ranks(4, on_rank, cases, timeout=120.0)
    for layout in cases:
        check_equal((found[layout] for found in by_rank), alone, layout)
