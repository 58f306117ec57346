"""Mixture of depths: in every layout the numbers of one process, in training and in evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.launch.config import RunConfig
from coterie.launch.placement import boxes_of_rank
from coterie.moe.tokens import TokenInfo
from coterie.parallel.evaluate import evaluate
from coterie.parallel.forward import whole_logits
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part
from coterie.parallel.run_state import model_parts, optimizer_parts
from coterie.parallel.step import StepSettings, train_step
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.tiny import held_out_of, model_of, relative_error, sampler_of, tiny_config

ATTENTION = {"heads": 4, "kv_heads": 4, "qk_norm": True, "within_documents": True}
CHOICE = {
    "experts": {"count": 4, "hidden": 8},
    "router": {"kind": "modality", "experts": [2, 2]},
    "shared": {"hidden": 8},
}
MODELS: dict[str, dict[str, Any]] = {
    "dense and experts": {
        "layers": 4,
        "attention": ATTENTION,
        "moe": {"experts": {"count": 8, "hidden": 8}, "router": {"k": 2, "jitter": 0.1}},
        "mixture_of_depths": {"capacity": 0.25, "predictor": True},
        "untie": {"ffn": True, "qkvo": True, "norm": True},
    },
    "limited experts": {"attention": ATTENTION, "mixture_of_depths": {"capacity": 0.25}},
    "MoMa": {
        "attention": ATTENTION,
        "moe": CHOICE,
        "mixture_of_depths": {"capacity": 0.2, "every": 1, "first": 1, "score": "linear"},
    },
}
"""Of 32 tokens 8 and 6 pass; 6 do not divide by what cp asks for."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp": (2, {}),
    "tp": (2, {"tp": 2}),
    "cp": (2, {"cp": 2}),
    "ep": (2, {"ep": 2}),
    "pp": (2, {"pp": 2, "schedule": "zero_bubble"}),
    "shard": (2, {"dp_shard": 2}),
    "tp cp ep": (4, {"tp": 2, "cp": 2, "ep": 2}),
    "pp tp etp": (4, {"pp": 2, "tp": 2, "etp": 2}),
}
RECOMPUTED = ("tp cp ep", "shard")
STEPS, LENGTH = 2, 13


def config_of(data: Path, model: str, layout: str | None = None) -> RunConfig:
    settings = {"eps": 1e-3, "warmup": 0}  # far from zero, where the root turns rounding into steps
    return tiny_config(
        data,
        model=MODELS[model],
        optimizer=settings,
        parallel=LAYOUTS[layout][1] if layout else {},
        train={
            "steps": STEPS,
            "global_batch": 8,
            "accumulation": 2,
            "precision": "fp64",
            "seed": 3,
            "recompute": "full" if layout in RECOMPUTED else "none",
        },
    )


def through(padding_BS: Tensor, capacity: float) -> int:
    """How many tokens of these sequences pass a block."""
    return sum(max(1, int(capacity * n + 1e-9)) for n in (~padding_BS).sum(1).tolist())


Found = tuple[list[Any], dict[str, float], Tensor, dict[str, Part]]


def run(config: RunConfig, world: int) -> Found:
    """The numbers of each step; held-out losses; the logits of a few tokens; this rank's parts of
    weights and moments."""
    ranks = ranks_of(config, world)
    model = model_of(config, ranks)
    with torch.no_grad():
        for name, parameter in model.named():
            if "depths" in name:
                parameter.mul_(20)
    optimizer = Optimizer(model, config.optimizer)
    sampler, micros = sampler_of(config), config.train.accumulation
    settings = StepSettings("fp64", 1.0, config.train.seed)
    depths = config.model.mixture_of_depths
    assert depths is not None
    seen: list[Any] = []
    for step in range(STEPS):
        batches = [
            sampler.batch(step, micro, micros, ranks.place.dp, ranks.layout.dp)
            for micro in range(micros)
        ]
        report = train_step(model, optimizer, batches, step + 1, settings)
        everyone = [sampler.batch(step, micro, micros, 0, 1) for micro in range(micros)]
        passing = sum(through(batch.padding_BS, depths.capacity) for batch in everyone)
        if config.model.moe.router.kind == "top_k":
            for layer, rows in report.load.items():
                tokens = passing if depths.chooses(layer) else report.tokens
                assert sum(rows) + report.dropped[layer] == tokens * 2, layer
        losses = [report.loss, report.grad_norm, *report.router_losses.values()]
        seen.append((losses, report.load, report.dropped))
    held_out = evaluate(model, held_out_of(config), "fp64", 4)
    model.eval()
    tokens_BS = torch.arange(2 * LENGTH).view(2, LENGTH) + 90
    info = TokenInfo(
        modality_T=torch.arange(2 * LENGTH) % 2,
        padding_T=torch.arange(2 * LENGTH) >= 2 * LENGTH - 4,
        sequence_T=torch.arange(2).repeat_interleave(LENGTH),
    )
    with torch.no_grad():
        logits_BSV = whole_logits(model, tokens_BS, info, "fp64")
    state = {**model_parts(model), **optimizer_parts(model, optimizer)}
    planned = boxes_of_rank(config, ranks.layout, ranks.rank)
    assert {name: part.box for name, part in state.items() if part.box.numel} == {
        name: box for name, box in planned.items() if box.numel
    }
    parts = {name: Part(p.tensor.clone(), p.box, p.owner) for name, p in state.items()}
    return seen, held_out, logits_BSV, parts


def on_rank(rank: int, world: int, cases: dict[str, RunConfig]) -> dict[str, Found]:
    return {name: run(config, world) for name, config in cases.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_has_the_numbers_of_one_process(world: int, model: str, data: Path) -> None:
    truth, held_out, logits_BSV, whole = run(config_of(data, model), 1)
    cases = {name: config_of(data, model, name) for name, (n, _) in LAYOUTS.items() if n == world}
    by_rank = run_ranks(world, on_rank, world, cases, timeout=120.0)
    for layout in cases:
        covered: dict[str, Tensor] = {n: torch.zeros(p.box.whole) for n, p in whole.items()}
        for results in by_rank:
            seen, losses, logits, state = results[layout]
            for (numbers, *counts), (right, *right_counts) in zip(seen, truth, strict=True):
                assert numbers == pytest.approx(right, rel=1e-10), layout
                assert counts == right_counts, layout
            assert losses == pytest.approx(held_out, rel=1e-10), layout
            if model != "MoMa":  # its experts choose among the tokens of all ranks' prompts
                assert relative_error(logits, logits_BSV) < 1e-9, layout
            for key, part in state.items():
                expected = whole[key].tensor[part.box.slices]
                if part.box.numel:
                    assert relative_error(part.tensor, expected) < 1e-9, (layout, key)
                if part.owner:
                    covered[key][part.box.slices] += 1
        assert all(bool((times == 1).all()) for times in covered.values()), layout
