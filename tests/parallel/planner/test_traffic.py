"""Bytes over links, against counts by hand."""

from dataclasses import replace

import pytest

from coterie.parallel.layout import Layout
from coterie.parallel.planner.traffic import Collective, Links, Sent, collectives, total
from coterie.parallel.planner.workload import Workload
from tests.parallel.planner.saved import model_config

CONFIG = model_config(layers=2)  # one dense layer, one of experts; width 64


def work_of(layout: Layout) -> Workload:
    blocks = (CONFIG.layers,) if layout.pp == 1 else (1, 1)
    return Workload(CONFIG, layout, blocks, 64, 2, 3, "none", "fp32", "cpu")


def found(layout: Layout, what: str) -> list[Collective]:
    return [
        c for pp in range(layout.pp) for c in collectives(work_of(layout), pp) if c.what == what
    ]


def test_rows_travel_there_and_back_twice() -> None:
    layout = Layout(ep=4, dp_replicate=4)
    work = work_of(layout)
    rows = 2 * 64 * 2  # sequences × tokens × k
    for what in ("dispatch", "combine"):
        assert [(c.op, c.volume, c.count) for c in found(layout, what)] == [
            ("all-to-all", rows * 64 * 4, 3)
        ] * 2
    hot = collectives(replace(work, skew=2.0), 0)
    assert [c.volume for c in hot if c.what == "dispatch"] == [2 * rows * 64 * 4] * 2


@pytest.mark.parametrize(
    ("nodes", "expected"), [(1, Sent(75.0, 0.0)), (2, Sent(25.0, 50.0)), (4, Sent(0.0, 75.0))]
)
def test_an_all_to_all_is_split_by_who_shares_a_node(nodes: int, expected: Sent) -> None:
    links = Links(Layout(ep=4, dp_replicate=4), nodes)
    rows = Collective("dispatch", "expert", "all-to-all", 100, "forward", 0, 1)
    assert links.sent(rows) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"), [(1, Sent(150.0, 0.0)), (2, Sent(75.0, 75.0)), (4, Sent(0.0, 150.0))]
)
def test_a_ring_leaves_a_node_once_for_each_node(nodes: int, expected: Sent) -> None:
    links = Links(Layout(dp_replicate=4), nodes)
    gradients = Collective("gradients", "replicate", "all-reduce", 100, "step", None, 1)
    assert links.sent(gradients) == expected


def test_gradients_of_replicas_are_summed_once() -> None:
    layout = Layout(ep=2, dp_replicate=4)
    sums = {c.axis: c.volume for c in found(layout, "gradients")}
    experts = 8 // 2 * 3 * 48 * 64
    dense = 2 * 277 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32) + 3 * 96 * 64 + 8 * 64
    assert sums == {"replicate": 4 * dense, "expert_replicate": 4 * experts}


def test_stages_send_to_their_neighbours_alone() -> None:
    layout = Layout(pp=2)
    work = work_of(layout)
    stream = 2 * 64 * 64 * 4
    sends = [[c for c in collectives(work, pp) if c.op == "send"] for pp in (0, 1)]
    assert [[(c.what, c.volume, c.count) for c in own] for own in sends] == [
        [("activations", stream, 3)],
        [("gradients", stream, 3)],
    ]
    assert total(Links(layout, 2), sends[0]) == Sent(0.0, 3.0 * stream)


def test_one_process_sends_nothing() -> None:
    assert collectives(work_of(Layout()), 0) == []
