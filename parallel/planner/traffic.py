"""What a rank sends in a step: every collective, its bytes, and over which kind of link.

A node is a block of consecutive ranks. Rings (all-gather, reduce-scatter, all-reduce) pass through
a group in the order of its ranks, so of n ranks on m nodes m of n sends leave a node; an all-to-all
sends to each rank its share.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from coterie.parallel.gradients import BUCKET
from coterie.parallel.layout import Layout
from coterie.parallel.planner.exchange import legs
from coterie.parallel.planner.muon import gatherings, matrices, muon_bytes
from coterie.parallel.planner.parameters import parameters, unit_sizes, units_of, uses
from coterie.parallel.planner.workload import INT, Workload

Op = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
When = Literal["forward", "backward", "fsdp forward", "fsdp backward", "send", "step"]
"""In which piece of work it happens; ``fsdp``: beside it; ``step``: after the last micro-batch."""

_PASSES: tuple[When, When] = ("forward", "backward")
_FACTS = 7
"""Integers that :class:`coterie.moe.tokens.TokenInfo` has of each token in training."""


@dataclass(frozen=True)
class Collective:
    """One collective, or one send, of a rank."""

    what: str
    axis: str
    op: Op
    volume: int
    """Bytes of the whole tensor (a rank's rows for an all-to-all)."""
    when: When
    stage: int | None
    """The pipeline stage; None: once in a step, whatever the stages."""
    count: int
    """Times in a step."""


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in one collective."""

    node: float
    """To ranks of its node."""
    network: float
    """To other nodes."""


class Links:
    """Which share of a collective crosses nodes, by axis."""

    def __init__(self, layout: Layout, nodes: int) -> None:
        self.per_node = -(-layout.world // nodes)
        self.layout = layout
        self._rings: dict[str, tuple[int, float]] = {}
        self._pairs: dict[str, tuple[float, float]] = {}

    def sent(self, collective: Collective) -> Sent:
        """Of the rank that sends the most over the network."""
        if collective.op == "all-to-all":
            node, network = self._shares(collective.axis)
            return Sent(collective.volume * node, collective.volume * network)
        size, crossing = self._ring(collective.axis)
        if collective.op == "send":
            return Sent(collective.volume * (1 - crossing), collective.volume * crossing)
        turns = 2 if collective.op == "all-reduce" else 1
        volume = turns * collective.volume * (size - 1) / size
        return Sent(volume * (1 - crossing), volume * crossing)

    def _nodes(self, axis: str) -> np.ndarray:
        return self.layout.groups(axis) // self.per_node

    def _ring(self, axis: str) -> tuple[int, float]:
        """Ranks of a group, and the share of a ring's sends that leaves a node."""
        if axis not in self._rings:
            nodes_GR = self._nodes(axis)
            size = nodes_GR.shape[1]
            if (
                axis == "pp"
            ):  # to the next rank; the last one's to the first is not of the same kind
                leaves = (nodes_GR[:, 1:] != nodes_GR[:, :-1]).mean(1) if size > 1 else np.zeros(1)
            else:
                leaves = (nodes_GR != np.roll(nodes_GR, 1, 1)).mean(1)
            self._rings[axis] = size, float(leaves.max())
        return self._rings[axis]

    def _shares(self, axis: str) -> tuple[float, float]:
        """The shares of a rank's rows that go to other ranks of its node, and to other nodes."""
        if axis not in self._pairs:
            nodes_GR = self._nodes(axis)
            size = nodes_GR.shape[1]
            same = (nodes_GR[:, :, None] == nodes_GR[:, None, :]).sum(2).min()
            self._pairs[axis] = float(same - 1) / size, float(size - same) / size
        return self._pairs[axis]


def collectives(work: Workload, pp: int) -> list[Collective]:
    """All that a rank of pipeline rank ``pp`` takes part in during a step, but for scalars."""
    found = [c for stage in work.layout.stages_of(pp) for c in _of_stage(work, stage)]
    found += [*summed_gradients(work, pp), *_updates(work, pp)]
    return [c for c in found if c.volume and c.count]


def _updates(work: Workload, pp: int) -> Iterator[Collective]:
    """Muon's: the parts of each matrix that is split, gathered."""
    found = Counter(
        gathering
        for parameter in matrices(work, pp)
        for gathering in gatherings(parameter, work.layout)
    )
    for (axis, elements), count in found.items():
        volume = elements * muon_bytes(work)
        yield Collective("updates of matrices", axis, "all-gather", volume, "step", None, count)


def _runs(work: Workload) -> int:
    """How often a block's forward pass is run."""
    return 2 if work.recompute == "full" else 1


def _both(
    stage: int | None, times: int, what: str, axis: str, op: Op, volume: int, runs: int
) -> Iterator[Collective]:
    """In the forward pass, and what its gradient needs."""
    back: dict[Op, Op] = {"all-gather": "reduce-scatter", "reduce-scatter": "all-gather"}
    yield Collective(what, axis, op, volume, "forward", stage, times)
    gradient = back.get(op, op)
    yield Collective(what, axis, gradient, volume, "backward", stage, times)
    if runs > 1:
        yield Collective(f"{what}, again", axis, op, volume, "backward", stage, times)


def _facts(
    stage: int | None, times: int, what: str, axis: str, op: Op, volume: int, runs: int
) -> Iterator[Collective]:
    """In the forward pass, without a gradient."""
    for when in _PASSES[:runs]:
        name = what if when == "forward" else f"{what}, again"
        yield Collective(name, axis, op, volume, when, stage, times)


def exchanges(work: Workload, layers: list[int], stage: int | None = None) -> Iterator[Collective]:
    """Of the blocks ``layers``, on the work's route: rows or tokens to the experts and back."""
    runs = _runs(work)
    both = partial(_both, stage, work.micro_batches)
    facts = partial(_facts, stage, work.micro_batches)
    for each in zip(*(legs(work, layer) for layer in layers), strict=True):  # a leg of all layers
        axis = each[0].axis
        travelling, told, loads, visits = (
            sum(sizes) for sizes in zip(*(leg[1:] for leg in each), strict=True)
        )
        yield from facts("counts of rows", axis, "all-gather", loads * INT, runs)
        yield from facts("counts of tokens", axis, "all-gather", visits * INT, runs)
        yield from facts("places of rows", axis, "all-to-all", told * INT, runs)
        yield from both("weights of rows", axis, "all-to-all", told * work.whole, runs)
        elements = travelling * work.model.width
        # fused kernels read bfloat16; else activations go as they are
        inside = work.fused and axis == legs(work, layers[0])[-1].axis
        size = work.half if inside else work.whole
        yield from both("dispatch", axis, "all-to-all", elements * size, runs)
        yield from both("combine", axis, "all-to-all", elements * work.half, runs)


def _of_stage(work: Workload, stage: int) -> Iterator[Collective]:
    layout, times = work.layout, work.micro_batches
    again = _runs(work)
    width = work.model.width
    stream = work.gathered * width

    both = partial(_both, stage, times)

    def around(what: str, layers: list[int], last: bool) -> Iterator[Collective]:
        """The sequence gathered before a layer that tp splits, and its result scattered; running
        a block again stops short of a ``last`` result, which nothing needs."""
        if layout.tp == 1:
            return
        for group, runs in ((whole, 1 if last else again), (some, again)):  # g · f(x) needs f(x)
            elements = sum(work.inside(n).gathered for n in layers if n in group) * width
            yield from both(what, "tp", "all-gather", elements * work.whole, again)
            yield from both(what, "tp", "reduce-scatter", elements * work.half, runs)

    def chosen(layer: int) -> Iterator[Collective]:
        """What is known of all tokens of the sequences gathered, and those that pass a block
        brought there and back."""
        tokens = work.rows * work.sequence
        for what, size in (("facts of tokens", _FACTS * INT), ("scores of tokens", work.whole)):
            yield from _facts(stage, times, what, "sequence", "all-gather", tokens * size, again)
        volume = work.rows * work.inside(layer).sequence * width * work.whole
        yield from both("tokens that pass", "sequence", "reduce-scatter", volume, again)
        yield from both("their results", "sequence", "all-gather", volume, again)

    layers = list(work.layers(stage))
    moe = [layer for layer in layers if work.model.is_moe(layer)]
    some = [layer for layer in layers if work.model.depths_of(layer)]
    whole = [layer for layer in layers if layer not in some]
    yield from around("attention", layers, last=False)
    yield from around("feed-forward", [n for n in layers if n not in moe], last=True)
    if work.model.moe and work.model.moe.shared:
        yield from around("shared experts", moe, last=not work.model.moe.shared_gate)
    if layout.cp > 1:
        tokens = work.rows * sum(work.inside(layer).sequence for layer in layers)
        each = tokens * work.head_width * work.half // layout.tp
        yield from both("keys and values", "cp", "all-gather", 2 * work.kv_heads * each, again)
    if layout.cp * layout.tp > 1:
        for layer in some:
            yield from chosen(layer)
    if moe and layout.ep * layout.etp > 1:
        yield from exchanges(work, moe, stage)
    if stage == 0 and layout.tp > 1:
        yield from both("embedding", "tp", "reduce-scatter", stream * work.whole, 1)
    if stage == layout.stages - 1 and layout.tp > 1:
        yield from both("output layer", "tp", "all-gather", stream * work.whole, 1)
    here = layout.rank_of_stage(stage)
    size = work.own * (work.model.width + work.model.carried) * work.whole
    for other, what in ((stage + 1, "activations"), (stage - 1, "gradients")):
        if 0 <= other < layout.stages and layout.rank_of_stage(other) != here:
            yield Collective(what, "pp", "send", size, "send", stage, times)
    if layout.shard > 1:
        yield from _fsdp(work, stage)


def _fsdp(work: Workload, stage: int) -> Iterator[Collective]:
    """Parameters gathered for each pass without a pipeline, once a step with one."""
    layout = work.layout
    piped = layout.pp > 1
    times = 1 if piped else work.micro_batches
    sizes = unit_sizes(work.model, layout)
    for axis, replicas in (("shard", "replicate"), ("expert_shard", "expert_replicate")):
        units = [u for u in units_of(work, stage) if (u[0] == "experts") == ("expert" in axis)]
        if getattr(layout, axis) == 1 or not units:
            continue
        whole = sum(sizes[u].whole * uses(work.model, u) for u in units) * work.whole
        kept = 0 if piped else sum(sizes[u].whole for u in units if u[0] == "head") * work.whole
        own = sum(sizes[u].sharded * uses(work.model, u) for u in units) * work.whole
        name = "expert parameters" if "expert" in axis else "parameters"
        forward: When = "step" if piped else "fsdp forward"
        backward: When = "step" if piped else "fsdp backward"
        yield Collective(name, axis, "all-gather", whole, forward, stage, times)
        if not piped:
            yield Collective(name, axis, "all-gather", whole - kept, backward, stage, times)
        yield Collective(
            f"gradients of {name}", axis, "reduce-scatter", whole, backward, stage, times
        )
        if getattr(layout, replicas) > 1:
            yield Collective(
                f"gradients of {name}", replicas, "all-reduce", own, backward, stage, times
            )


def summed_gradients(work: Workload, pp: int) -> Iterator[Collective]:
    """The gradients that are summed after the last micro-batch."""
    for axis, elements in _summed(work, pp).items():
        volume = sum(elements) * work.whole
        yield Collective("gradients", axis, "all-reduce", volume, "step", None, 1)


def flat_gradients(work: Workload, pp: int) -> int:
    """Bytes of the flat copies of small gradients while those of one axis are summed."""
    small = [
        sum(size for size in elements if size <= BUCKET) for elements in _summed(work, pp).values()
    ]
    return max(small, default=0) * work.whole


def _summed(work: Workload, pp: int) -> dict[str, list[int]]:
    """Elements of each gradient that is to be summed, by axis."""
    layout = work.layout
    sums: dict[str, list[int]] = {}
    mine = {unit for stage in layout.stages_of(pp) for unit in units_of(work, stage)}
    for parameter in parameters(work.model):
        if parameter.unit not in mine or parameter.frozen:
            continue
        axis = _summed_over(parameter.kind == "expert", bool(parameter.cuts), layout)
        if axis is not None:
            sums.setdefault(axis, []).append(parameter.elements(layout))
    return {axis: sizes for axis, sizes in sums.items() if layout.groups(axis).shape[1] > 1}


def _summed_over(expert: bool, split: bool, layout: Layout) -> str | None:
    """As ``coterie.parallel.gradients.summed_over``."""
    if expert:
        return "expert_replicate" if layout.expert_shard == 1 else None
    partial = not split and layout.tp > 1
    if layout.shard > 1:
        return "tp" if partial else None
    return "data" if partial else "replicate"


def total(links: Links, found: list[Collective]) -> Sent:
    """Bytes of a rank in a step."""
    sent = [(c.count, links.sent(c)) for c in found]
    return Sent(sum(n * s.node for n, s in sent), sum(n * s.network for n, s in sent))
