"""Mixture of depths: in every layout the numbers of one process, in training and in evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.launch.config import RunConfig
from coterie.moe.tokens import TokenInfo
from coterie.parallel.evaluate import evaluate
from coterie.parallel.forward import whole_logits
from coterie.parallel.model import ParallelModel
from coterie.parallel.step import StepReport
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.in_layouts import SETTINGS, STEPS, Trained, check_equal, trained
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
LENGTH = 13


def config_of(data: Path, model: str, layout: str | None = None) -> RunConfig:
    return tiny_config(
        data,
        model=MODELS[model],
        optimizer=SETTINGS,
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


def those_that_pass_are_counted(config: RunConfig, step: int, report: StepReport) -> None:
    depths, moe = config.model.mixture_of_depths, config.model.moe
    assert depths is not None and moe is not None
    if moe.router.kind != "top_k":
        return
    sampler, micros = sampler_of(config), config.train.accumulation
    everyone = [sampler.batch(step, micro, micros, 0, 1) for micro in range(micros)]
    passing = sum(through(batch.padding_BS, depths.capacity) for batch in everyone)
    for layer, rows in report.load.items():
        tokens = passing if depths.chooses(layer) else report.tokens
        assert sum(rows) + report.dropped[layer] == tokens * 2, layer


def prompted(model: ParallelModel) -> Tensor:
    """Logits of a few tokens, in evaluation."""
    model.eval()
    tokens_BS = torch.arange(2 * LENGTH).view(2, LENGTH) + 90
    info = TokenInfo(
        modality_T=torch.arange(2 * LENGTH) % 2,
        padding_T=torch.arange(2 * LENGTH) >= 2 * LENGTH - 4,
        sequence_T=torch.arange(2).repeat_interleave(LENGTH),
    )
    with torch.no_grad():
        return whole_logits(model, tokens_BS, info, "fp64")


Found = tuple[Trained, dict[str, float], Tensor]


def run(config: RunConfig, world: int) -> Found:
    """What training gave; held-out losses; the logits of a few tokens."""
    ranks = ranks_of(config, world)
    model = model_of(config, ranks)
    with torch.no_grad():
        for name, parameter in model.named():
            if "depths" in name:
                parameter.mul_(20)
    ours = trained(config, ranks, model, those_that_pass_are_counted)
    return ours, evaluate(model, held_out_of(config), "fp64", 4), prompted(model)


def on_rank(rank: int, world: int, cases: dict[str, RunConfig]) -> dict[str, Found]:
    return {name: run(config, world) for name, config in cases.items()}


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, Found]:
    """Each model in one process."""
    return {model: run(config_of(data, model), 1) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_has_the_numbers_of_one_process(
    world: int, model: str, alone: dict[str, Found], data: Path
) -> None:
    truth, held_out, logits_BSV = alone[model]
    cases = {name: config_of(data, model, name) for name, (n, _) in LAYOUTS.items() if n == world}
    by_rank = run_ranks(world, on_rank, world, cases, timeout=120.0)
    for layout in cases:
        check_equal((found[layout][0] for found in by_rank), truth, layout)
        for _, losses, logits in (found[layout] for found in by_rank):
            assert losses == pytest.approx(held_out, rel=1e-10), layout
            if model != "MoMa":  # its experts choose among the tokens of all ranks' prompts
                assert relative_error(logits, logits_BSV) < 1e-9, layout
