"""Which layouts are possible: every rule has its sentence, and what it advises works."""

import re
from itertools import product
from typing import Any

import pytest

from coterie.core.errors import UserError
from coterie.models import DecoderConfig
from coterie.parallel.layout import Layout, LayoutConfig
from coterie.parallel.placement import places
from coterie.parallel.rules import blocks_of_stages, broken_rule, layout_of, smallest_world

WORLD = 12


def model(**settings: Any) -> DecoderConfig:
    return DecoderConfig.model_validate(
        {
            "vocabulary": 64,
            "width": 16,
            "layers": 8,
            "attention": {"heads": 8, "kv_heads": 4},
            "feed_forward": {"hidden": 24},
            "dense_layers": [0],
            "moe": {
                "experts": {"count": 12, "hidden": 18},
                "shared": {"hidden": 20},
                "router": {"k": 2},
            },
        }
        | settings
    )


DENSE: dict[str, Any] = {"moe": None, "dense_layers": []}
MOE: dict[str, Any] = {"experts": {"count": 12, "hidden": 18}, "router": {"k": 2}}
FUSED: dict[str, Any] = {
    "width": 64,
    "moe": {
        "experts": {"count": 12, "hidden": 256},
        "router": {"k": 2},
        "exchange": {"kind": "fused"},
    },
}

# axes, what is not as in `model`, what the sentence says, what it advises
IMPOSSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "world": ({"tp": 8}, {}, "12 processes do not divide by .*tp 8.* = 8", "tp 1 or 2 or 4"),
    "copies": (
        {"dp_replicate": 3, "tp": 2},
        {},
        "tp 2 .*dp_replicate 3 = 6, but the number of processes is 12",
        "tp 4, or pp 2, or cp 2, or dp_shard 2, or dp_replicate 6",
    ),
    "nodes": (
        {"ep": 12, "node": 8},
        {"moe": {**MOE, "exchange": {"route": "nodes"}}},
        "node is 8, which spreads the 12 ranks of ep × etp unevenly over nodes",
        "ep 1 or 2 or 4",
    ),
    "fused across nodes": (
        {"ep": 4, "node": 2},
        FUSED,
        "node is 2, which spreads the 4 ranks of ep × etp over nodes, but "
        "model.moe.exchange.kind is fused",
        "ep 1 or 2",
    ),
    "fused inside nodes of one": (
        {"ep": 2, "node": 1},
        {**FUSED, "moe": {**FUSED["moe"], "exchange": {"kind": "fused", "route": "nodes"}}},
        "each node has one of the 2 ranks of ep × etp",
        "ep 1",
    ),
    "fused and thin": (
        {"etp": 4},
        FUSED,
        "etp is 4, which leaves a rank 64 of the experts' hidden width, .* multiples of 128",
        "etp 1 or 2",
    ),
    "heads": ({"tp": 3}, {}, "tp is 3, but model.attention.heads 8 does", "tp 1 or 2 or 4"),
    "kv_heads": (
        {"tp": 4},
        {"attention": {"heads": 8, "kv_heads": 2}},
        "tp is 4, but model.attention.kv_heads 2 does",
        "tp 1 or 2",
    ),
    "hidden": (
        {"tp": 4},
        {"feed_forward": {"hidden": 6}},
        "tp is 4, but model.feed_forward.hidden 6 does",
        "tp 1 or 2",
    ),
    "shared hidden": (
        {"tp": 4},
        {"moe": {**MOE, "shared": {"hidden": 6}}},
        "tp is 4, but model.moe.shared.hidden 6 does",
        "tp 1 or 2",
    ),
    "shared depth": (
        {"pp": 2, "stages": (3, 5)},
        {"shared_depth": 4, "dense_layers": []},
        "a stage of the pipeline has blocks 0 to 2, but groups of model.shared_depth 4 blocks",
        "stages null",
    ),
    "shared depth, split backward pass": (
        {"pp": 2, "schedule": "zero_bubble"},
        {"shared_depth": 4, "dense_layers": []},
        "schedule is zero_bubble, which computes the gradients of weights by themselves; it cannot "
        "where blocks share their layers, as with model.shared_depth 4",
        "schedule 1f1b",
    ),
    "vocabulary": (
        {"tp": 4},
        {"vocabulary": 5},
        "tp is 4, but model.vocabulary 5 leaves a rank empty",
        "tp 1 or 2",
    ),
    "experts by ep": (
        {"ep": 4},
        {"moe": {**MOE, "experts": {"count": 6, "hidden": 18}}},
        "ep is 4, but model.moe.experts.count 6 does not divide by it",
        "ep 2 or 3 or 6",
    ),
    "a layer's experts by ep": (
        {"ep": 4},
        {"layers": 3, "expert_counts": [4, 6]},
        "ep is 4, but model.expert_counts: 6 does not divide by it",
        "ep 1 or 2",
    ),
    "hidden by etp": (
        {"etp": 4},
        {},
        "etp is 4, but model.moe.experts.hidden 18 does not divide by it",
        "etp 2 or 3 or 6",
    ),
    "ep without experts": ({"ep": 2}, DENSE, "ep is 2, but the model has no experts", "ep 1"),
    "etp without experts": ({"etp": 2}, DENSE, "etp is 2, but the model has no experts", "etp 1"),
    "ranks of a stage": (
        {"ep": 6, "pp": 4},
        {},
        "ep 6 × etp 1 = 6 does not divide the 3 ranks of a pipeline stage",
        "pp 1 or 2, or ep 1 or 3",
    ),
    "slices over the ranks of a stage": (
        {"ep": 4, "etp": 6},
        {},
        "ep 4 × etp 6 = 24 does not divide the 12 ranks",
        "ep 1 or 2, or etp 1 or 3",
    ),
    "experts over shards": (
        {"ep": 3, "dp_shard": 2},
        {},
        "with dp_shard 2, ep 3 × etp 1 = 3 and dp_shard × cp × tp = 2 must be multiples",
        "cp 3 or 6, or ep 1 or 2 or 4, or etp 2, or dp_shard 1 or 3 or 6",
    ),
    "vpp without pipeline": (
        {"vpp": 2},
        {},
        "vpp.* need a pipeline, but pp is 1",
        "pp 2 or 3 or 4",
    ),
    "stages without pipeline": ({"stages": (8,)}, {}, "need a pipeline", "stages null"),
    "schedule without pipeline": ({"schedule": "zbv"}, {}, "need a pipeline", "schedule null"),
    "vpp of 1f1b": (
        {"pp": 2, "vpp": 2, "schedule": "1f1b"},
        {},
        "vpp is 2, but schedule 1f1b needs 1",
        "vpp 1, or schedule interleaved or zero_bubble or zbv, or schedule null",
    ),
    "vpp of interleaved": (
        {"pp": 2, "schedule": "interleaved"},
        {},
        "vpp is 1, but schedule interleaved needs 2 or more",
        "vpp 2 or 3 or 4, or schedule 1f1b or zero_bubble, or schedule null",
    ),
    "vpp of zbv": (
        {"pp": 2, "vpp": 3, "schedule": "zbv"},
        {},
        "vpp is 3, but schedule zbv needs 2",
        "vpp 2, or schedule interleaved or zero_bubble, or schedule null",
    ),
    "too many stages": (
        {"pp": 6, "vpp": 2},
        {},
        r"12 stages \(pp 6 × vpp 2\) need as many blocks, but model.layers is 8",
        "pp 2 or 3 or 4, or vpp 1",
    ),
    "number of stages": (
        {"pp": 2, "stages": (2, 3, 3)},
        {},
        "names 3 stages, but pp 2 × vpp 1 = 2",
        "pp 3, or stages null",
    ),
    "blocks of stages": (
        {"pp": 2, "stages": (4, 5)},
        {},
        r"\[4, 5\] must be counts that sum to model.layers 8",
        "stages null",
    ),
    "less than no block": ({"pp": 2, "stages": (-1, 9)}, {}, "must be counts", "stages null"),
    "an empty stage": (
        {"pp": 4, "stages": (4, 0, 2, 2)},
        {},
        "only the first and the last may be 0",
        "stages null",
    ),
    "tied over a pipeline": (
        {"pp": 2},
        {"tie_embeddings": True},
        "pp is 2, but model.tie_embeddings needs the embedding and the output layer on one stage",
        "pp 1",
    ),
}


def said(axes: dict[str, Any], settings: dict[str, Any], world: int = WORLD) -> str:
    with pytest.raises(UserError) as raised:
        layout_of(LayoutConfig(**axes), world, model(**settings))
    return str(raised.value)


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_layout(case: str) -> None:
    axes, settings, rule, advice = IMPOSSIBLE[case]
    text = said(axes, settings)
    assert re.match(rf"parallel.*{rule}", text), text
    assert f"; what fits instead: {advice}" in text


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_is_advised_fits(case: str) -> None:
    axes, settings, *_ = IMPOSSIBLE[case]
    config = LayoutConfig(**axes)
    choices = re.split(r",? or |, ", said(axes, settings).split("; what fits instead: ")[1])
    name, tried = "", 0
    for choice in choices:
        *named, value = choice.split(" ")
        name = named[0] if named else name
        fixed: Any = int(value) if value.isdigit() else None if value == "null" else value
        layout_of(config.model_copy(update={name: fixed}), WORLD, model(**settings))
        tried += 1
    assert tried == len(choices) > 0


def test_a_domain_has_up_to_64_ranks() -> None:
    moe = {**FUSED["moe"], "experts": {"count": 128, "hidden": 256}}
    text = said({"ep": 128}, {**FUSED, "moe": moe}, world=128)
    assert "128 ranks of ep × etp" in text and "up to 64" in text
    layout_of(LayoutConfig(ep=64), 128, model(**{**FUSED, "moe": moe}))
    inside = {**moe, "exchange": {"kind": "fused", "route": "nodes"}}
    layout_of(LayoutConfig(ep=128, node=8), 128, model(**{**FUSED, "moe": inside}))


def test_where_no_one_key_helps_the_number_of_processes_does() -> None:
    text = said({"tp": 4, "pp": 4}, {}, world=6)
    assert text.endswith("; what fits instead: 16 processes")
    text = said({"tp": 3, "ep": 5}, {})
    assert text.endswith("; no change of one key makes it fit")
    assert said({"tp": 2}, {}, world=1).startswith("parallel: 1 process does not divide by")


AXES = {
    "tp": (1, 2, 4),
    "pp": (1, 2),
    "cp": (1, 2),
    "ep": (1, 2, 3, 4),
    "etp": (1, 2),
    "dp_shard": (1, 2, 3),
}


def test_what_fits_fits_everywhere() -> None:
    """A layout that breaks no rule gives every rank its part of the model; parts add up."""
    fitting = 0
    whole = sum(box.box.numel for box in places(model(), (range(8),), Layout(), 0).values())
    for sizes in product(*AXES.values()):
        config = LayoutConfig(**dict(zip(AXES, sizes, strict=True)))
        if broken_rule(config, 24, model()) is not None:
            continue
        fitting += 1
        layout = layout_of(config, 24, model())
        assert layout.world == 24
        if fitting % 40 == 0:
            blocks = blocks_of_stages(config, 8)
            ranks = [places(model(), blocks, layout, rank).values() for rank in range(24)]
            owned = sum(own.box.numel for rank in ranks for own in rank if own.owner)
            assert owned == whole, config
    assert fitting > 100


@pytest.mark.parametrize(
    ("axes", "least"),
    [
        ({}, 1),
        ({"ep": 4}, 4),
        ({"tp": 2, "ep": 4, "pp": 2}, 8),
        ({"tp": 4, "ep": 6, "etp": 3}, 36),
        ({"cp": 2, "dp_shard": 3, "dp_replicate": 2}, 12),
    ],
)
def test_the_least_number_of_processes(axes: dict[str, Any], least: int) -> None:
    config = LayoutConfig(**axes)
    assert smallest_world(config) == least
    assert layout_of(config, least, model()).world == least
    assert all(broken_rule(config, world, model()) for world in range(1, least))


def test_blocks_of_named_stages_and_of_even_ones() -> None:
    config = LayoutConfig(pp=2, vpp=2, stages=(0, 3, 5, 0))
    assert blocks_of_stages(config, 8) == (range(0), range(3), range(3, 8), range(8, 8))
    assert broken_rule(config, 2, model()) is None
    assert blocks_of_stages(LayoutConfig(pp=4), 10) == (
        *(range(2), range(2, 5), range(5, 8), range(8, 10)),
    )
    layout = layout_of(config, 2, model())
    assert (layout.schedule, layout.stages) == ("interleaved", 4)
