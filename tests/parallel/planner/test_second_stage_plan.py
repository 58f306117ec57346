"""The plan of the second stage, which trains auxiliary routers alone, and of frozen parameters.

Peaks of real steps are in test_peak.
"""

from typing import Any

import pytest
import torch

from coterie.launch.assemble import build_model
from coterie.launch.config import RunConfig
from coterie.launch.plan_command import read_machine
from coterie.models import DecoderConfig
from coterie.parallel.distributed import Ranks
from coterie.parallel.layout import Layout
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.planner.parameters import unit_sizes, units_of
from coterie.parallel.planner.pieces import Pieces
from coterie.parallel.planner.plan import Plan
from coterie.parallel.planner.workload import workload_of
from coterie.parallel.run_state import optimizer_parts
from tests.parallel.planner.measure import FORESEEING, TREE, config_of, moe
from tests.parallel.planner.saved import model_config
from tests.parallel.planner.test_depths_plan import saved_by_blocks, work_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROUTERS: dict[str, dict[str, Any]] = {
    "trained": TREE["model"],
    "random": {**TREE["model"], "moe": moe({"kind": "random_fixed"})},
    "bias": {**TREE["model"], "moe": moe({"k": 2, "bias_update": 0.1})},
    "auxiliary": FORESEEING,
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ROUTERS)
def test_moments_are_the_optimizers(name: str, optimizer: str) -> None:
    config: RunConfig = config_of(model=ROUTERS[name], optimizer={"kind": optimizer, "warmup": 1})
    model = build_model(config, Ranks(0, torch.device("cpu"), Layout()))
    parts = optimizer_parts(model, Optimizer(model, config.optimizer))
    kept = sum(part.tensor.numel() for name, part in parts.items() if not name.endswith(".step"))
    work = workload_of(
        config.model, config.parallel, config.train, 128, 1, optimizer=config.optimizer.kind
    )
    sizes = unit_sizes(config.model, work.layout)
    assert sum(sizes[unit].moments(work) for unit in units_of(work, 0)) == kept
    (kind,) = Plan(work, read_machine("h100"), None).kinds
    assert kind.memory.optimizer == kept * work.whole


def moe_of(kind: str, **settings: Any) -> dict[str, Any]:
    router = {"kind": kind, "auxiliary": True, **settings}
    return {"moe": {"experts": {"count": 8, "hidden": 48}, "router": router}}


AUXILIARY: dict[str, DecoderConfig] = {
    name: model_config(layers=3, **settings)
    for name, settings in {
        "modality": moe_of("modality", experts=[6, 2]),
        "expert choice": moe_of("expert_choice"),
        "tokens of blocks": {"mixture_of_depths": {"every": 2, "auxiliary": True}},
    }.items()
}


@pytest.mark.parametrize("compute", ["fp64", "bf16"])
@pytest.mark.parametrize("name", AUXILIARY)
def test_only_auxiliary_routers_keep_something(name: str, compute: str) -> None:
    work = work_of(AUXILIARY[name], compute)
    seen = saved_by_blocks(AUXILIARY[name], compute)
    assert 0 in seen  # a block without one
    assert Pieces(work).stage(0).kept == sum(seen)
