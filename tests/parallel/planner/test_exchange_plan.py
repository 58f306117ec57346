"""What travels on each route, against choices drawn at random; and which route is the fastest."""

from dataclasses import replace
from math import comb

import pytest
import torch

from coterie.launch.plan_command import read_machine
from coterie.parallel.layout import Layout
from coterie.parallel.planner.exchange import Leg, hit, legs, route_of, routes
from coterie.parallel.planner.machine import Link
from coterie.parallel.planner.plan import Plan
from coterie.parallel.planner.time import route_seconds
from coterie.parallel.planner.traffic import Links
from coterie.parallel.planner.workload import Workload
from tests.parallel.planner.saved import model_config

EXPERTS, TOKENS = 16, 400  # of a rank


def work_of(
    layout: Layout, route: str = "rows", k: int = 3, top: int = 4, **settings: object
) -> Workload:
    router = {"k": k, "groups": 4, "top_groups": top}
    moe = {"experts": {"count": EXPERTS, "hidden": 48}, "router": router}
    model = model_config(layers=2, moe=moe)
    work = Workload(model, layout, (2,), TOKENS, layout.tp, 1, "none", "fp32", "cpu")
    return replace(work, route=route, **settings)


def drawn(layout: Layout, k: int, top: int) -> dict[str, float]:
    """Means over ranks of what is sent when all draw ``k`` of the experts of ``top`` groups of 4,
    counted one by one."""
    draw = torch.Generator().manual_seed(0)
    ranks, each = layout.ep * layout.etp, layout.expert_node
    tokens = TOKENS * ranks
    groups_TG = torch.rand(tokens, 4, generator=draw).argsort(1) < top
    score_TE = torch.rand(tokens, EXPERTS, generator=draw)
    score_TE += groups_TG.repeat_interleave(EXPERTS // 4, 1)
    chosen_TK = score_TE.argsort(1, descending=True)[:, :k]
    ep_TK = chosen_TK // (EXPERTS // layout.ep)
    slices = torch.arange(layout.etp)
    rank_TKE = ep_TK[..., None] * layout.etp + slices
    counts = dict.fromkeys(("rows", "ranks", "nodes"), 0)
    for ranks_KE in rank_TKE.flatten(1).tolist():
        counts["rows"] += len(ranks_KE)
        counts["ranks"] += len(set(ranks_KE))
        counts["nodes"] += len({rank // each for rank in ranks_KE})
    return {what: count / ranks for what, count in counts.items()}


@pytest.mark.parametrize(("k", "top"), [(1, 4), (2, 4), (5, 4), (2, 1), (2, 3), (5, 2), (6, 3)])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(ep=8, dp_replicate=8, node=4),
        Layout(ep=4, etp=2, dp_replicate=8, node=4),
        Layout(ep=2, etp=4, dp_replicate=8, node=2),
    ],
    ids=lambda layout: f"{layout.describe()} on nodes of {layout.node}",
)
def test_what_travels_is_what_was_drawn(layout: Layout, k: int, top: int) -> None:
    seen = {what: pytest.approx(count, rel=0.02) for what, count in drawn(layout, k, top).items()}
    (rows,) = legs(work_of(layout, "rows", k, top), 1)
    (tokens,) = legs(work_of(layout, "tokens", k, top), 1)
    across, inside = legs(work_of(layout, "nodes", k, top), 1)
    assert (rows.axis, rows.travelling, rows.told) == ("expert", seen["rows"], 0)
    assert (tokens.axis, tokens.travelling, tokens.told) == ("expert", seen["ranks"], seen["rows"])
    assert across[:3] == ("expert_across", seen["nodes"], seen["rows"])
    assert inside[:3] == ("expert_node", seen["ranks"], seen["rows"])


def test_counts_are_those_of_each_leg() -> None:
    layout = Layout(ep=4, etp=2, dp_replicate=8, node=4)
    counts = {
        route: [leg[3:] for leg in legs(work_of(layout, route), 1)]
        for route in ("rows", "tokens", "nodes")
    }
    # 16 experts of 2 slices; 8 ranks on 2 nodes
    assert counts == {"rows": [(256, 0)], "tokens": [(256, 64)], "nodes": [(64, 4), (64, 16)]}


@pytest.mark.parametrize(("held", "choices"), [(1, 1), (3, 2), (5, 4), (12, 6), (16, 3)])
def test_a_holder_is_hit_as_often_as_by_draws_without_repetition(held: int, choices: int) -> None:
    missed = comb(EXPERTS - held, choices) / comb(EXPERTS, choices)
    assert hit(EXPERTS, held, choices) == pytest.approx(1 - missed)


def test_an_average_number_of_choices_lies_between_its_neighbours() -> None:
    some, more = hit(EXPERTS, 4, 1), hit(EXPERTS, 4, 2)
    assert hit(EXPERTS, 4, 1.25) == pytest.approx(0.75 * some + 0.25 * more)
    assert hit(EXPERTS, 4, EXPERTS) == 1


def test_a_hot_rank_gets_at_most_every_token() -> None:
    layout = Layout(ep=4, dp_replicate=4)
    even, hot, hottest = (
        legs(work_of(layout, "tokens", skew=skew), 1)[0] for skew in (1.0, 2.0, 9.0)
    )
    assert even.travelling < hot.travelling < hottest.travelling == 4 * TOKENS
    assert hot.told == 2 * even.told == 2 * 3 * TOKENS
    # the hot rank's 4 experts are chosen as 8 would be
    assert hot.travelling == round(4 * TOKENS * hit(EXPERTS, 8, 3))


def test_nodes_are_a_route_only_where_there_are_two_levels() -> None:
    assert routes(Layout()) == ()
    assert routes(Layout(ep=4, dp_replicate=4)) == ("rows", "tokens")
    assert routes(Layout(ep=4, dp_replicate=4, node=1)) == ("rows", "tokens")
    assert routes(Layout(ep=4, dp_replicate=4, node=2)) == ("rows", "tokens", "nodes")
    assert routes(Layout(ep=4, dp_replicate=4, node=3)) == ("rows", "tokens")  # 3 and 1
    on_one = work_of(Layout(ep=4, dp_replicate=4), "nodes")
    assert route_of(on_one) == "tokens"
    assert legs(on_one, 1) == legs(replace(on_one, route="tokens"), 1)


def test_seconds_of_a_route() -> None:
    """Rows and places and their weights to 2 nodes of 2 ranks, added up by hand."""
    layout = Layout(ep=4, dp_replicate=4, node=2)
    cpu = read_machine("cpu")
    link = {"efficiency": 1.0}
    machine = cpu.model_copy(
        update={
            "node": Link(bandwidth=2e-3, latency=1000.0, **link),  # 2 MB/s
            "network": Link(bandwidth=1e-3, latency=5000.0, **link),
        }
    )
    seconds = route_seconds(work_of(layout), machine, Links(layout, 2))

    def of(leg: Leg) -> float:
        # its share of an all-to-all that takes the longest; and a ring's
        size = {"expert": 4, "expert_across": 2, "expert_node": 2}[leg.axis]
        far = leg.axis != "expert_node"
        latency, speed = (5e-3, 1e6) if far else (1e-3, 2e6)
        share = {"expert": 2 / 4, "expert_across": 1 / 2, "expert_node": 1 / 2}[leg.axis]
        turns = (size - 1) / size / (2 if leg.axis == "expert" else 1)  # 2 of 4 leave the node
        gathered = [8 * n * turns for n in (leg.loads, leg.visits) if n]
        sent = [4 * 64 * leg.travelling * share] * 4
        told = [8 * leg.told * share, *[4 * leg.told * share] * 2] if leg.told else []
        return sum(latency + volume / speed for volume in (*gathered, *sent, *told))

    for route in ("rows", "tokens", "nodes"):
        expected = sum(map(of, legs(work_of(layout, route), 1)))
        assert seconds[route] == pytest.approx(expected), route


@pytest.mark.parametrize(
    ("k", "layout", "network", "best"),
    [
        (1, Layout(ep=8, dp_replicate=8), 1.0, "rows"),  # tokens cross once anyway
        (6, Layout(ep=2, dp_replicate=2), 1.0, "tokens"),
        (6, Layout(ep=8, dp_replicate=8), 0.05, "nodes"),
        (6, Layout(ep=8, dp_replicate=8), 1.0, "tokens"),  # no slower than inside a node
        (6, Layout(dp_replicate=8), 1.0, None),
    ],
)
def test_the_best_route(k: int, layout: Layout, network: float, best: str | None) -> None:
    machine = read_machine("cpu").model_copy(
        update={
            "ranks_per_node": 4,
            "node": Link(bandwidth=1.0, latency=0),
            "network": Link(bandwidth=network, latency=0),
        }
    )
    plan = Plan(work_of(layout, k=k), machine)
    assert plan.best_route == best
    there = plan.on_best_route()
    assert there.route == (best or "rows")
    assert there.time.total <= plan.time.total
    assert (there.time.total < plan.time.total) == (best not in (None, "rows"))
