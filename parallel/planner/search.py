"""All layouts of a world, the ones that fit its memory, and of these the fastest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from coterie.models import DecoderConfig
from coterie.models.decoder import Recompute
from coterie.parallel.config import OptimizerKind, TrainConfig
from coterie.parallel.layout import LayoutConfig, Schedule
from coterie.parallel.planner.machine import Machine
from coterie.parallel.planner.parameters import unit_sizes, units_of
from coterie.parallel.planner.plan import Plan
from coterie.parallel.planner.workload import Workload, workload_of
from coterie.parallel.rules import broken_rule

_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout and its plan."""

    parallel: LayoutConfig
    plan: Plan


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    best: list[Candidate]
    possible: int
    """Layouts that the rules allow, each with every way to recompute."""
    fitting: int
    """Of these, the ones that fit the machine's memory."""


def search(
    model: DecoderConfig,
    train: TrainConfig,
    sequence: int,
    world: int,
    machine: Machine,
    nodes: int | None,
    skew: float,
    allowed: Callable[[LayoutConfig], bool],
    best: int = 5,
    optimizer: OptimizerKind = "adamw",
) -> Found:
    """Try every layout of ``world`` ranks. ``allowed``: says whether the rest of
    the run's config allows a layout that the model does.

    The global batch and its micro-batches stay as they are: they are part of the run's numbers.
    The exchange takes the best route of each layout.
    """
    possible = fitting = 0
    found: list[Candidate] = []
    for parallel in layouts(model, world, machine.ranks_per_node):
        if broken_rule(parallel, world, model) is not None or not allowed(parallel):
            continue
        work = workload_of(model, parallel, train, sequence, world, machine.device, skew, optimizer)
        possible += len(_RECOMPUTE)
        if _states(work) > machine.bytes:
            continue
        for recompute in _RECOMPUTE:
            plan = Plan(replace(work, recompute=recompute), machine, nodes)
            if plan.fits:
                fitting += 1
                found.append(Candidate(parallel, plan.on_best_route()))
    found.sort(key=lambda candidate: candidate.plan.time.total)
    return Found(found[:best], possible, fitting)


def _states(work: Workload) -> int:
    """Weights, gradients and moments of the pipeline rank with the most, without all else."""
    sizes = unit_sizes(work.model, work.layout)
    return work.whole * max(
        sum(
            sizes[unit].sharded + sizes[unit].trained + sizes[unit].moments(work)
            for stage in work.layout.stages_of(pp)
            for unit in units_of(work, stage)
        )
        for pp in range(work.layout.pp)
    )


def layouts(model: DecoderConfig, world: int, node: int) -> Iterator[LayoutConfig]:
    """Layouts worth a look: tp and etp inside a node, all other axes any divisor of the world."""
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    inside = [size for size in sizes if size <= node]
    counts = (1,) if model.moe is None else model.expert_counts or (model.moe.experts.count,)
    eps = [size for size in sizes if gcd(*counts) % size == 0]
    etps = inside if model.moe else [1]
    for tp, pp in product(inside, [s for s in sizes if s <= model.layers]):
        rest = world // (tp * pp) if world % (tp * pp) == 0 else 0
        ways = [size for size in sizes if rest and rest % size == 0]
        for cp in [size for size in ways if size <= node]:
            shards = [size for size in ways if rest // cp % size == 0]
            for shard, ep, etp in product(shards, eps, etps):
                for vpp, schedule in _schedules(model, pp):
                    yield LayoutConfig(
                        tp=tp,
                        pp=pp,
                        vpp=vpp,
                        schedule=schedule,
                        cp=cp,
                        ep=ep,
                        etp=etp,
                        dp_shard=shard,
                    )


def _schedules(model: DecoderConfig, pp: int) -> Iterator[tuple[int, Schedule | None]]:
    if pp == 1:
        yield 1, None
        return
    yield 1, "1f1b"
    yield 1, "zero_bubble"
    if 2 * pp <= model.layers:
        yield 2, "interleaved"
        yield 2, "zbv"
