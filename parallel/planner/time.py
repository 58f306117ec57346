"""How long a step takes: the pipeline's own order of actions, played through with durations.

A pass takes its matrix products at the machine's rate, its other work at the speed of memory, and
what it sends: all of it in the open, but for FSDP's, which runs beside the products.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

from coterie.comm.exchange.config import Route
from coterie.parallel.layout import Layout
from coterie.parallel.planner.exchange import route_of, routes
from coterie.parallel.planner.flops import stage_flops
from coterie.parallel.planner.machine import Machine
from coterie.parallel.planner.muon import matrices, newton_schulz_flops
from coterie.parallel.planner.parameters import unit_sizes, units_of
from coterie.parallel.planner.pieces import Pieces
from coterie.parallel.planner.schedule import Action, Order, order
from coterie.parallel.planner.traffic import Collective, Links, Sent, collectives, exchanges
from coterie.parallel.planner.workload import Workload

_UPDATE = 13
"""How often the update reads or writes each weight's worth: norm, clipping, AdamW (or Muon's
momentum), clearing."""


@dataclass(frozen=True)
class Passes:
    """Seconds of a stage's passes over one micro-batch."""

    forward: float
    backward: float
    sending: float
    """To hand on activations, or gradients."""
    compute: float
    """Of forward and backward together, what is not communication."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. The parts are those of the pipeline rank that computes the most."""

    total: float
    compute: float
    communication: float
    """In the open, inside passes."""
    bubble: float
    """Waiting for other stages."""
    gradients: float
    """Summing gradients after the last micro-batch, and FSDP's gathering once a step."""
    update: float
    bubble_share: float
    """Of the pipeline's time on all its ranks, the part without work."""
    model_flops: float
    """Of the whole model in a step, without what is computed again: 6 for each used weight and
    token, and attention."""
    utilisation: float
    """Those over what the machines could do at their peak (MFU)."""


def step_time(work: Workload, machine: Machine, links: Links, pieces: Pieces) -> StepTime:
    """What a step takes on ``machine``."""
    layout = work.layout
    found = {pp: collectives(work, pp) for pp in range(layout.pp)}
    passes = {
        stage: _passes(work, stage, machine, links, pieces, found[pp])
        for pp in range(layout.pp)
        for stage in layout.stages_of(pp)
    }
    timeline = play(order(layout, work.micro_batches), layout, passes)
    span = max(timeline.ends)
    after = {pp: _seconds(links, machine, found[pp], "step") for pp in found}
    update = max(_update(work, machine, pp) for pp in range(layout.pp))
    busiest = max(range(layout.pp), key=lambda pp: timeline.busy[pp])
    compute = work.micro_batches * sum(passes[s].compute for s in layout.stages_of(busiest))
    total = span + max(after.values()) + update
    flops = _model_flops(work)
    return StepTime(
        total=total,
        compute=compute,
        communication=timeline.busy[busiest] - compute,
        bubble=span - timeline.busy[busiest],
        gradients=max(after.values()),
        update=update,
        bubble_share=1 - sum(timeline.busy) / (layout.pp * span),
        model_flops=flops,
        utilisation=flops / (total * layout.world * machine.peak[work.compute] * 1e12),
    )


def _passes(
    work: Workload,
    stage: int,
    machine: Machine,
    links: Links,
    pieces: Pieces,
    found: list[Collective],
) -> Passes:
    flops = stage_flops(work, stage)
    again = {"none": 0.0, "selective": flops.core, "full": flops.blocks}[work.recompute]
    rate = machine.peak[work.compute] * 1e12 * machine.efficiency
    # everything beside products reads what it keeps and writes as much; twice that to go back
    touched = 2 * pieces.stage(stage).forward / (machine.memory_bandwidth * 1e9)
    forward = flops.forward / rate + touched
    backward = (2 * flops.forward + again) / rate + 2 * touched
    own = [c for c in found if c.stage == stage]
    beside = {
        when: max(0.0, _seconds(links, machine, own, f"fsdp {when}", each=True) - seconds)
        for when, seconds in (("forward", forward), ("backward", backward))
    }
    open_forward = _seconds(links, machine, own, "forward", each=True) + beside["forward"]
    open_backward = _seconds(links, machine, own, "backward", each=True) + beside["backward"]
    return Passes(
        forward + open_forward,
        backward + open_backward,
        max((_one(links, machine, c) for c in own if c.when == "send"), default=0.0),
        forward + backward,
    )


def _seconds(
    links: Links, machine: Machine, found: list[Collective], when: str, each: bool = False
) -> float:
    """Of all collectives of one kind in a step; ``each``: for one micro-batch."""
    return sum(_one(links, machine, c) * (1 if each else c.count) for c in found if c.when == when)


def _one(links: Links, machine: Machine, collective: Collective) -> float:
    sent: Sent = links.sent(collective)
    # both kinds of link work at once
    return max(
        machine.node.seconds(sent.node) if sent.node else 0.0,
        machine.network.seconds(sent.network) if sent.network else 0.0,
    )


def route_seconds(work: Workload, machine: Machine, links: Links) -> dict[Route, float]:
    """The exchange of one layer of experts in both passes over a micro-batch (the mean of layers),
    for each route that the layout has; with the fused exchange for its own, which rules name."""
    model = work.model
    layers = [layer for layer in range(model.layers) if model.is_moe(layer)]
    kinds = {(model.experts_of(n), model.depths_of(n)): n for n in layers}

    def seconds(route: Route) -> float:
        on_route = replace(work, route=route)
        of_kind = {
            kind: sum(_one(links, machine, c) for c in exchanges(on_route, [layer]))
            for kind, layer in kinds.items()
        }
        of_layers = [of_kind[model.experts_of(n), model.depths_of(n)] for n in layers]
        return sum(of_layers) / len(layers)

    possible = (route_of(work),) if work.fused else routes(work.layout)
    return {route: seconds(route) for route in possible}


def _update(work: Workload, machine: Machine, pp: int) -> float:
    sizes = unit_sizes(work.model, work.layout)
    units = [u for stage in work.layout.stages_of(pp) for u in units_of(work, stage)]
    elements = sum(sizes[unit].trained for unit in units)
    products = sum(newton_schulz_flops(p, work) for p in matrices(work, pp))
    rate = machine.peak[work.compute] * 1e12 * machine.efficiency
    return _UPDATE * elements * work.whole / (machine.memory_bandwidth * 1e9) + products / rate


def _model_flops(work: Workload) -> float:
    """Of all ranks at even load: three passes' worth of each product."""
    even = replace(work, skew=1.0)
    stages = sum(stage_flops(even, stage).forward for stage in range(work.layout.stages))
    return 3.0 * stages * work.micro_batches * work.layout.stage_ranks


@dataclass(frozen=True)
class Timeline:
    """By pipeline rank."""

    ends: list[float]
    busy: list[float]


def play(actions: Order, layout: Layout, passes: dict[int, Passes]) -> Timeline:
    """Run the actions of all pipeline ranks in their order, each as soon as what it needs is there.

    Raises RuntimeError when the order is a deadlock.
    """
    done: dict[tuple[str, int, int], float] = {}
    clock, busy = [0.0] * len(actions), [0.0] * len(actions)
    place = [0] * len(actions)
    waiting: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    ready = list(range(len(actions)))
    while ready:
        rank = ready.pop()
        while place[rank] < len(actions[rank]):
            action = actions[rank][place[rank]]
            need = _needs(action, layout.stages)
            if need is not None and need not in done:
                waiting[need].append(rank)
                break
            start = clock[rank]
            if need is not None:
                away = layout.rank_of_stage(need[1]) != rank
                start = max(start, done[need] + (passes[need[1]].sending if away else 0.0))
            length = _length(action, passes[action.stage])
            clock[rank] = start + length
            busy[rank] += length
            place[rank] += 1
            if action.kind != "W":
                made = ("F" if action.kind == "F" else "B", action.stage, action.micro_batch)
                done[made] = clock[rank]
                ready += waiting.pop(made, [])
    if any(place[rank] < len(actions[rank]) for rank in range(len(actions))):
        raise RuntimeError("the pipeline's schedule waits for itself")
    return Timeline(clock, busy)


def _needs(action: Action, stages: int) -> tuple[str, int, int] | None:
    """What must be done first: (pass, stage, micro-batch)."""
    stage, micro = action.stage, action.micro_batch
    if action.kind == "F":
        return ("F", stage - 1, micro) if stage > 0 else None
    if action.kind == "W":
        return "B", stage, micro
    return ("B", stage + 1, micro) if stage < stages - 1 else ("F", stage, micro)


def _length(action: Action, passes: Passes) -> float:
    if action.kind == "F":
        return passes.forward
    return passes.backward / (1 if action.kind == "B" else 2)
