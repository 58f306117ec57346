"""The plan's table of parameters is the model's, on every rank of every layout."""

import itertools
from typing import Any

import pytest
import torch

from coterie.models import Decoder, DecoderConfig
from coterie.models.depths import MixtureOfDepthsConfig
from coterie.models.untied import UntieConfig
from coterie.parallel.layout import Layout
from coterie.parallel.placement import places
from coterie.parallel.planner.parameters import owned, parameters, unit_sizes, units_of
from coterie.parallel.planner.workload import Workload
from tests.parallel.planner.saved import model_config

CONFIG = model_config(
    vocabulary=277,
    layers=4,
    attention={"heads": 4, "kv_heads": 2, "qk_norm": True, "gate": "head"},
    moe={
        "experts": {"count": 8, "hidden": 48},
        "router": {"k": 2},
        "shared": {"hidden": 40},
        "shared_gate": True,
    },
)
SHARED = CONFIG.model_copy(update={"shared_depth": 2, "dense_layers": (2, 3), "layers": 8})
PYRAMID = model_config(
    layers=4,
    expert_counts=[4, 8, 16],
    moe={
        "experts": {"count": 8, "hidden": 48},
        "router": {"k": 1},
        "shared": {"hidden": 40},
        "shared_mix": True,
    },
)
UNTIED = SHARED.model_copy(
    update={"untie": UntieConfig(modalities=3, ffn=True, qkvo=True, norm=True)}
)
DEPTHS = SHARED.model_copy(
    update={"mixture_of_depths": MixtureOfDepthsConfig(every=3, first=1, predictor=True)}
)
MLP = model_config(
    layers=4,
    moe={"experts": {"count": 8, "hidden": 48}, "router": {"kind": "mlp", "k": 1, "hidden": 24}},
)
CONFIGS = {
    "mlp router": MLP,
    "plain": CONFIG,
    "pyramid": PYRAMID,
    "shared depth": SHARED,
    "untied": UNTIED,
    "some tokens": DEPTHS,
}
LAYOUTS = [
    Layout(),
    Layout(tp=2, ep=2, etp=2, dp_replicate=4),
    Layout(pp=2, ep=4, dp_shard=4),
    Layout(pp=2, vpp=2, schedule="zbv", tp=2, cp=2, ep=2, dp_shard=2, dp_replicate=2),
    Layout(tp=2, dp_shard=3, dp_replicate=2),
]


ROUTERS = [
    {"k": 2},
    {"k": 2, "bias_update": 0.1},
    {"kind": "random_fixed"},
    {"kind": "hash"},
    {"kind": "modality", "experts": [6, 2], "auxiliary": True},
]


def routed(router: dict[str, Any]) -> DecoderConfig:
    moe = {"experts": {"count": 8, "hidden": 48}, "router": router, "shared": {"hidden": 40}}
    return model_config(layers=4, moe=moe)


def work_of(layout: Layout, config: DecoderConfig = CONFIG) -> Workload:
    blocks = tuple(config.layers // layout.stages for _ in range(layout.stages))
    return Workload(config, layout, blocks, 64, 2, 4, "none", "fp32", "cpu")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_every_rank_owns_what_its_model_would(layout: Layout, name: str) -> None:
    config = CONFIGS[name]
    work = work_of(layout, config)
    blocks = tuple(work.layers(stage) for stage in range(layout.stages))
    expected = []
    for rank in range(layout.world):
        held = places(config, blocks, layout, rank).values()
        expected.append(
            [sum(p.box.numel for p in held if p.expert == expert) for expert in (False, True)]
        )
    assert owned(work).tolist() == expected


def test_names_and_shapes_are_the_models() -> None:
    tied = CONFIG.model_copy(update={"tie_embeddings": True})
    for config in (*CONFIGS.values(), tied, *map(routed, ROUTERS)):
        with torch.device("meta"):
            model = Decoder(config)
        ours = {p.name: (p.shape, p.frozen) for p in parameters(config)}
        assert ours == {
            name: (tuple(p.shape), not p.requires_grad) for name, p in model.named_parameters()
        }


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_units_hold_the_largest_parts(layout: Layout) -> None:
    work = work_of(layout)
    sizes = unit_sizes(CONFIG, layout)
    most = owned(work).sum(1).reshape(layout.pp, -1).max(1)
    for pp in range(layout.pp):
        units = itertools.chain.from_iterable(units_of(work, s) for s in layout.stages_of(pp))
        planned = sum(sizes[unit].sharded for unit in units)
        # the largest part of each parameter: no rank has more, and one may have less of some
        assert most[pp] <= planned <= most[pp] * 1.1
