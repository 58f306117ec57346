"""Multiplications and additions of a stage's matrix products, for one micro-batch on one rank."""

from collections import Counter
from dataclasses import dataclass

from coterie.models.depths import MixtureOfDepthsConfig
from coterie.moe.activations import ACTIVATIONS
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.routers.mlp import MLPConfig
from coterie.parallel.planner.workload import Workload


@dataclass(frozen=True)
class Flops:
    """Of one forward pass; a backward pass has twice as many."""

    forward: float
    core: float = 0.0
    """Of these, what selective recompute runs again: attention's core and hidden layers."""
    blocks: float = 0.0
    """Of these, what full recompute runs again: all but the output layer."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward, self.core + other.core, self.blocks + other.blocks
        )


def stage_flops(work: Workload, stage: int) -> Flops:
    """The stage's products; experts work on the busiest rank's rows."""
    total = Flops(0.0)
    layers = work.layers(stage)
    kinds = Counter((work.inside(n), work.model.experts_of(n)) for n in layers)
    parts = [(count, _block(inside, experts)) for (inside, experts), count in kinds.items()]
    parts += [
        (1, _choosing(work, depths)) for depths in map(work.model.depths_of, layers) if depths
    ]
    for count, flops in parts:
        total += Flops(count * flops.forward, count * flops.core, count * flops.forward)
    if stage == work.layout.stages - 1:
        total += Flops(2.0 * work.gathered * work.model.width * work.vocabulary)
    return total


def _block(work: Workload, experts: int) -> Flops:
    return _attention(work) + (_moe(work, experts) if experts else _dense(work))


def _choosing(work: Workload, depths: MixtureOfDepthsConfig) -> Flops:
    """The scores of all tokens, and the predictor's answers."""
    width, hidden = work.model.width, -(-work.model.width // 2)
    weights = width + (hidden * (width + 1) if depths.foresees else 0)
    return Flops(2.0 * work.own * weights)


def _attention(work: Workload) -> Flops:
    attention, layout = work.model.attention, work.layout
    outputs = (2 * attention.heads + 2 * work.kv_heads) * work.head_width + work.gates
    projections = 2.0 * work.gathered * work.model.width * outputs / layout.tp
    # causal: half of all pairs, in two products
    pairs = work.gathered * work.sequence / 2
    core = 4.0 * pairs * attention.heads // layout.tp * work.head_width
    return Flops(projections + core, core)


def _feed_forward(work: Workload, config: FeedForwardConfig) -> Flops:
    parts = ACTIVATIONS[config.activation].parts
    each = 2.0 * work.gathered * work.model.width * config.hidden / work.layout.tp
    return Flops((parts + 1) * each, parts * each)


def _dense(work: Workload) -> Flops:
    assert work.model.feed_forward is not None
    return _feed_forward(work, work.model.feed_forward)


def _moe(work: Workload, count: int) -> Flops:
    config = work.model.moe
    assert config is not None
    width, experts = work.model.width, config.experts
    parts = ACTIVATIONS[experts.activation].parts
    each = 2.0 * work.received * width * experts.hidden / work.layout.etp
    router = width * count
    if isinstance(config.router, MLPConfig):
        hidden = config.router.hidden
        router = hidden * (width + 2 * hidden + count + config.router.skip)
    routed = Flops((parts + 1) * each + 2.0 * work.own * router, parts * each)
    return routed + (_feed_forward(work, config.shared) if config.shared else Flops(0.0))
