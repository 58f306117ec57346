"""The layout as a pure function: groups, coordinates and stages of any number of ranks."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.parallel.layout import AXES, Layout, stage_blocks

SIZES = st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that fits its world, with up to some hundred ranks."""
    tp, cp, dp_shard = draw(SIZES), draw(SIZES), draw(SIZES)
    dp_replicate, pp = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    inside, ranks = dp_shard * cp * tp, dp_replicate * dp_shard * cp * tp
    folded = [
        (ep, etp)
        for ep in range(1, ranks + 1)
        for etp in range(1, ranks + 1)
        if ranks % (ep * etp) == 0
        and (dp_shard == 1 or inside % (ep * etp) == 0 or (ep * etp) % inside == 0)
    ]
    ep, etp = draw(st.sampled_from(folded))
    schedule, vpp = draw(
        st.sampled_from([("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)])
    )
    return Layout(
        tp=tp,
        pp=pp,
        vpp=vpp if pp > 1 else 1,
        schedule=schedule if pp > 1 else "1f1b",
        cp=cp,
        ep=ep,
        etp=etp,
        dp_shard=dp_shard,
        dp_replicate=dp_replicate,
        node=draw(st.sampled_from([None, 2, 3, 4, 8])),
    )


EVERY = settings(max_examples=60, deadline=None)


@EVERY
@given(layouts())
def test_the_groups_of_every_axis_partition_the_ranks(layout: Layout) -> None:
    sizes = {
        "pp": layout.pp,
        "tp": layout.tp,
        "cp": layout.cp,
        "sequence": layout.cp * layout.tp,
        "data": layout.stage_ranks,
        "replicate": layout.replicate,
        "shard": layout.shard,
        "expert": layout.ep * layout.etp,
        "expert_node": layout.expert_node,
        "expert_across": layout.ep * layout.etp // layout.expert_node,
        "etp": layout.etp,
        "expert_replicate": layout.expert_replicate,
        "expert_shard": layout.expert_shard,
    }
    assert sizes.keys() == set(AXES)
    for axis, size in sizes.items():
        groups = layout.groups(axis)
        assert groups.shape == (layout.world // size, size), axis
        assert sorted(groups.flatten().tolist()) == list(range(layout.world)), axis
        assert (np.diff(groups, axis=1) > 0).all(), axis
    assert layout.replicate * layout.shard * layout.tp == layout.stage_ranks
    folded = layout.expert_replicate * layout.expert_shard * layout.ep * layout.etp
    assert folded == layout.stage_ranks


@EVERY
@given(layouts())
def test_coordinates_say_which_rank_it_is(layout: Layout) -> None:
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        stage = at.pp * layout.stage_ranks
        by_data = ((at.dp * layout.cp + at.cp) * layout.tp) + at.tp
        by_parameters = (at.replicate * layout.shard + at.shard) * layout.tp + at.tp
        by_experts = at.expert_replicate * layout.expert_shard + at.expert_shard
        by_experts = (by_experts * layout.ep + at.ep) * layout.etp + at.etp
        assert stage + by_data == stage + by_parameters == stage + by_experts == rank


@EVERY
@given(layouts())
def test_a_rank_has_its_place_in_every_group(layout: Layout) -> None:
    """What the layers are told agrees with the position in the process group."""
    position = {
        axis: {
            rank: place
            for group in layout.groups(axis).tolist()
            for place, rank in enumerate(group)
        }
        for axis in AXES
    }
    for rank in range(layout.world):
        axes, at = layout.axes(rank), layout.coordinates(rank)
        for axis in (
            "tp",
            "cp",
            "expert",
            "expert_node",
            "expert_across",
            "etp",
            "sequence",
            "data",
        ):
            own = getattr(axes, axis)
            assert own.name == axis
            assert own.rank == position[axis][rank], axis
            assert own.size == layout.groups(axis).shape[1], axis
        for axis in ("pp", "replicate", "shard", "expert_replicate", "expert_shard"):
            assert getattr(at, axis) == position[axis][rank], axis
        assert (axes.ep.rank, axes.ep.size) == (at.ep, layout.ep)
        assert (axes.etp.rank, axes.etp.size) == (at.etp, layout.etp)
        assert axes.expert.rank == at.ep * layout.etp + at.etp


@EVERY
@given(layouts())
def test_ranks_of_an_exchange_that_share_a_node(layout: Layout) -> None:
    node = layout.node or layout.world
    alike = {
        tuple(np.unique(np.asarray(group) // node, return_counts=True)[1].tolist())
        for group in layout.groups("expert").tolist()
    }
    (counts, *others) = alike
    evenly = not others and len(set(counts)) == 1
    assert layout.expert_node == (counts[0] if evenly else 1)
    for group in layout.groups("expert_node").tolist():
        assert len({rank // node for rank in group}) == 1
    if evenly:
        for group in layout.groups("expert_across").tolist():
            assert len({rank // node for rank in group}) == len(group)


@EVERY
@given(layouts())
def test_sharding_grids_hold_the_same_parameters(layout: Layout) -> None:
    """The ranks of a grid differ in nothing that splits a parameter; its rows are the groups."""
    for rank in range(0, layout.world, 5):
        at = layout.coordinates(rank)
        for prefix, split in (("", ("pp", "tp")), ("expert_", ("pp", "ep", "etp"))):
            grid = layout.sharding_grid("expert" if prefix else "dense", rank)
            assert rank in grid
            for axis, rows in ((f"{prefix}shard", grid), (f"{prefix}replicate", grid.T)):
                groups = layout.groups(axis).tolist()
                assert all(row in groups for row in rows.tolist())
            for other in map(layout.coordinates, grid.flatten().tolist()):
                assert all(getattr(other, name) == getattr(at, name) for name in split)


@EVERY
@given(layouts())
def test_what_ranks_of_a_group_share(layout: Layout) -> None:
    """cp and tp hold parts of the same sequences, dp other ones; stages never share a group."""
    for group in layout.groups("sequence").tolist():
        assert len({layout.coordinates(rank).dp for rank in group}) == 1
    for axis in set(AXES) - {"pp"}:
        for group in layout.groups(axis).tolist():
            assert len({layout.coordinates(rank).pp for rank in group}) == 1, axis
    for group in layout.groups("pp").tolist():
        assert len({rank % layout.stage_ranks for rank in group}) == 1


@EVERY
@given(layouts())
def test_every_stage_is_on_one_pipeline_rank(layout: Layout) -> None:
    held = [layout.stages_of(pp) for pp in range(layout.pp)]
    assert sorted(stage for own in held for stage in own) == list(range(layout.stages))
    for pp, own in enumerate(held):
        assert list(own) == sorted(own) and len(own) == layout.vpp
        assert all(layout.rank_of_stage(stage) == pp for stage in own)


def test_stages_go_round_or_turn_back() -> None:
    round_robin = Layout(pp=3, vpp=2, schedule="interleaved")
    assert [round_robin.stages_of(pp) for pp in range(3)] == [(0, 3), (1, 4), (2, 5)]
    turning = Layout(pp=3, vpp=2, schedule="zbv")
    assert [turning.stages_of(pp) for pp in range(3)] == [(0, 5), (1, 4), (2, 3)]


@EVERY
@given(st.integers(1, 100), st.integers(1, 20))
def test_blocks_are_split_evenly_the_rest_in_the_middle(layers: int, stages: int) -> None:
    blocks = stage_blocks(layers, stages)
    assert len(blocks) == stages and sum(blocks) == layers
    assert max(blocks) - min(blocks) <= 1
    longer = [stage for stage, size in enumerate(blocks) if size > min(blocks)]
    if longer:
        assert longer == list(range(longer[0], longer[-1] + 1))
        before, after = longer[0], stages - 1 - longer[-1]
        assert 0 <= after - before <= 1  # the last stage has the larger output layer


def test_ten_thousand_ranks_take_seconds() -> None:
    layout = Layout(tp=8, pp=10, vpp=2, schedule="zbv", ep=20, dp_shard=5, dp_replicate=25)
    assert layout.world == 10_000
    start = time.process_time()
    groups = {axis: layout.groups(axis) for axis in AXES}
    for rank in range(layout.world):
        assert layout.axes(rank).tp.rank == rank % 8
    assert time.process_time() - start < 5
    assert {axis: group.size for axis, group in groups.items()} == dict.fromkeys(AXES, 10_000)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(), "one process"),
        (Layout(tp=2, ep=4, dp_replicate=4), "tp 2 · ep 4 · dp_replicate 4"),
        (Layout(pp=2, vpp=2, schedule="zbv"), "pp 2 · vpp 2 · zbv"),
    ],
)
def test_describe(layout: Layout, said: str) -> None:
    assert layout.describe() == said
