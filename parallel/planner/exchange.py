"""What travels to the experts of one layer on each route, where choices fall evenly on experts.

A token's K choices are K different experts, each as likely as any other. So of E experts a holder
(a rank, or a node) of L misses a token with probability Π (1 - L / (E - i)) over i < K; where a
token chooses inside some groups of experts, E and L count those. The busiest holder counts as one
of ``skew`` · L experts. Every choice goes to all slices (etp) of its expert.
"""

from math import ceil, comb, floor, prod
from typing import Literal, NamedTuple

from coterie.comm.exchange.config import Route
from coterie.parallel.layout import Layout
from coterie.parallel.planner.workload import Workload


class Leg(NamedTuple):
    """An exchange between the ranks of one axis, as the rank sees it that receives the most."""

    axis: Literal["expert", "expert_across", "expert_node"]
    travelling: int
    """Rows or tokens that it receives."""
    told: int
    """Rows whose places and weights it is told, where tokens travel."""
    loads: int
    """Counts of rows for each expert that it gathers."""
    visits: int
    """Counts of tokens for each rank that it gathers, where tokens travel."""


def hit(experts: int, held: float, choices: float, groups: int = 1, top: int = 1) -> float:
    """The probability that one of a token's ``choices`` is among the ``held`` of all ``experts``;
    of an average that is no whole number, between those of its neighbours. Experts come in equal
    ``groups``, and a token chooses inside ``top`` of them; held ones are in as few as they can."""
    size = experts // groups
    spans = max(1, ceil(held / size))
    ways = comb(groups, top)
    return sum(
        comb(spans, n)
        * comb(groups - spans, top - n)
        / ways
        * (1 - _missed(top * size, held * n / spans, choices))
        for n in range(1, min(spans, top) + 1)
    )


def _missed(experts: int, held: float, choices: float) -> float:
    def by(count: int) -> float:
        return prod(max(0.0, 1 - held / (experts - i)) for i in range(min(count, experts)))

    whole = floor(choices)
    part = choices - whole
    return (1 - part) * by(whole) + part * by(whole + 1)


def routes(layout: Layout) -> tuple[Route, ...]:
    """Those that differ: without several nodes of several ranks each, `nodes` is `tokens`; without
    other ranks, there are none."""
    ranks = layout.ep * layout.etp
    if ranks == 1:
        return ()
    return ("rows", "tokens", "nodes") if 1 < layout.expert_node < ranks else ("rows", "tokens")


def arriving(work: Workload, experts: int, holders: int, shares: int) -> int:
    """Tokens that arrive at one of ``holders`` of a layer of ``experts``, which has those of
    ``shares`` ranks of ep."""
    held = min(experts, work.skew * shares * experts / work.layout.ep)
    return round(work.own * holders * hit(experts, held, work.choices, *work.groups))


def route_of(work: Workload) -> Route:
    """The one that is taken where ``work`` names one that others stand for."""
    return work.route if work.route in routes(work.layout) or work.route == "rows" else "tokens"


def legs(work: Workload, layer: int) -> list[Leg]:
    """Of the exchange of block ``layer``, in the order of the way there."""
    layout, inside = work.layout, work.inside(layer)
    experts, ranks = work.model.experts_of(layer), layout.ep * layout.etp
    rows, loads = inside.received, experts * layout.etp

    def tokens(holders: int, shares: int) -> int:
        return arriving(inside, experts, holders, shares)

    route = route_of(work)
    if route == "rows":
        return [Leg("expert", rows, 0, loads * ranks, 0)]
    if route == "tokens":
        return [Leg("expert", tokens(ranks, 1), rows, loads * ranks, ranks**2)]
    each = layout.expert_node
    nodes = ranks // each
    firsts = range(0, ranks, each)
    shares = max((n + each - 1) // layout.etp - n // layout.etp + 1 for n in firsts)
    return [
        Leg("expert_across", tokens(nodes, shares), rows, loads * nodes, nodes**2),
        Leg("expert_node", tokens(ranks, 1), rows, loads // nodes * each, each**2),
    ]
