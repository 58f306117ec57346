"""The layouts under test: every one of up to four processes that the rules allow, chosen ones of
eight, and for the long form all of eight or a sample of them."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from coterie.core.errors import UserError
from coterie.launch.check import check_world
from coterie.parallel.layout import Schedule
from tests.conformance.worker import Job

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble", "zbv")
_NAMES = ("tp", "pp", "vpp", "schedule", "stages", "cp", "ep", "etp", "dp_shard")
_EIGHT_STAGES = (0, 1, 1, 1, 1, 1, 1, 0)
_STAGES = {(4, 2): _EIGHT_STAGES, (8, 1): _EIGHT_STAGES}
"""Where six blocks do not fill all stages, by pp and vpp."""
_MICRO_BATCHES = {1: 2, 2: 2, 3: 3, 4: 4, 8: 8}
"""Enough for each schedule, by the length of the pipeline; few, for the sake of time."""
_STEADY = 4
"""Micro-batches of a pipeline of two that is not mixed with other axes."""
_LAYERS = 6
"""Of long pipelines."""
_ROWS = 4
"""Sequences in a micro-batch, unless there are more data-parallel ranks."""


def job_of(world: int, recompute: str = "none", **parallel: Any) -> Job:
    """The job for a layout; what is 1 is left out, the schedule named."""
    pp, stages = parallel.get("pp", 1), parallel.get("stages")
    others = pp * parallel.get("tp", 1) * parallel.get("cp", 1)
    accumulation = _STEADY if pp == world == 2 else _MICRO_BATCHES[pp]
    if pp > 1 and parallel.get("schedule") is None:
        parallel["schedule"] = "1f1b" if parallel.get("vpp", 1) == 1 else "interleaved"
    named = ((name, parallel.get(name, 1)) for name in _NAMES)
    parts = pp * parallel.get("vpp", 1)
    few = 3 if pp == 1 else 4  # the fewer the faster
    return Job(
        world=world,
        parallel=tuple((name, value) for name, value in named if value not in (1, None)),
        recompute=recompute,
        batch=accumulation * max(_ROWS, world // others),
        accumulation=accumulation,
        layers=few if parts in (1, 2, 4) and stages is None else _LAYERS,
    )


def allowed(world: int) -> list[Job]:
    """Every layout of ``world`` processes that the rules allow, with blocks split evenly."""
    return [job for job in _candidates(world) if is_allowed(job)]


def is_allowed(job: Job) -> bool:
    """As the command itself checks before it starts processes."""
    try:
        check_world(job.config(Path("data")), job.world)
    except UserError:
        return False
    return True


def _candidates(world: int) -> Iterator[Job]:
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    for pp, tp, cp, dp_shard, ep, etp in product(sizes, repeat=6):
        if world % (pp * tp * cp * dp_shard):
            continue
        for vpp, schedule in product(range(1, _LAYERS + 1), SCHEDULES) if pp > 1 else ((1, None),):
            yield job_of(
                world,
                tp=tp,
                pp=pp,
                vpp=vpp,
                schedule=schedule,
                cp=cp,
                ep=ep,
                etp=etp,
                dp_shard=dp_shard,
                stages=_STAGES.get((pp, vpp)),
            )


UNEVEN = [
    job_of(2, pp=2, stages=(0, 6)),  # the embedding alone
    job_of(2, pp=2, stages=(6, 0)),  # the loss alone
    job_of(2, pp=2, schedule="zero_bubble", stages=(1, 5)),  # a stage without routers
    job_of(2, pp=2, vpp=2, schedule="zbv", stages=(0, 3, 3, 0)),  # both ends on one rank
    job_of(4, pp=4, stages=(0, 3, 3, 0)),
    job_of(4, pp=4, stages=(1, 2, 1, 2)),  # two stages without routers
    job_of(4, pp=2, dp_shard=2, ep=2, stages=(0, 6)),
    job_of(4, pp=2, tp=2, vpp=2, schedule="interleaved", stages=(0, 4, 2, 0)),
]
"""Stages of many sizes."""

OF_EIGHT = [
    job_of(8, ep=8),
    job_of(8, tp=2, dp_shard=4, ep=4),
    job_of(8, dp_shard=8, ep=2),
    job_of(8, dp_shard=2),  # HSDP, four replicas
    job_of(8, dp_shard=2, tp=2),  # HSDP, two replicas
    job_of(8, dp_shard=4, ep=8),
    job_of(8, dp_shard=4, ep=2, etp=2),  # HSDP, of experts too
    job_of(8, etp=2, ep=4),
    job_of(8, tp=4, ep=2, etp=4),
    job_of(8, tp=4, cp=2, ep=8),
    job_of(8, cp=4, dp_shard=2, ep=4),
    job_of(8, cp=8),
    job_of(8, cp=2, tp=2, pp=2),
    job_of(8, cp=2, pp=2, dp_shard=2, ep=4, schedule="zero_bubble"),
    job_of(8, cp=2, tp=2, dp_shard=2, ep=2, etp=2),
    job_of(8, pp=2, tp=2, dp_shard=2, ep=4),
    job_of(8, pp=2, vpp=2, schedule="zbv", dp_shard=4, ep=4),
    job_of(8, pp=2, vpp=2, schedule="zbv", tp=2, ep=2, etp=2),
    job_of(8, pp=2, vpp=3, schedule="interleaved", dp_shard=2, ep=2),  # HSDP in a pipeline
    job_of(8, pp=4, tp=2, ep=2),
    job_of(8, pp=4, vpp=2, schedule="zbv", dp_shard=2, ep=2, stages=_EIGHT_STAGES),
    job_of(8, pp=4, vpp=2, schedule="interleaved", cp=2, etp=2, stages=_EIGHT_STAGES),
    job_of(8, pp=8, stages=_EIGHT_STAGES),
    job_of(8, pp=8, schedule="zero_bubble", stages=_EIGHT_STAGES),
]
"""Each axis with each other."""

SELECTIVE = [
    job_of(1, "selective"),
    job_of(2, "selective", ep=2),
    job_of(2, "selective", dp_shard=2),
    job_of(2, "selective", tp=2),
    job_of(2, "selective", cp=2),
    job_of(2, "selective", pp=2),
    job_of(2, "selective", pp=2, schedule="zero_bubble"),
    job_of(4, "selective", tp=2, dp_shard=2, ep=4),
    job_of(4, "selective", cp=2, tp=2, etp=2),
    job_of(4, "selective", dp_shard=2, ep=2),
    job_of(4, "selective", pp=2, vpp=2, schedule="zbv", dp_shard=2, ep=2),
    job_of(4, "selective", pp=2, vpp=2, schedule="interleaved", tp=2, ep=2),
    job_of(8, "selective", pp=2, tp=2, dp_shard=2, ep=4),
]
"""Layouts that also recompute selectively."""


def jobs() -> list[Job]:
    """What the tests run, by the number of processes: each layout without and with recompute; of
    eight processes each with one of the two, unless more than the chosen ones are asked for."""
    both = ("none", "full")
    layouts = [*(job for world in (1, 2, 3, 4) for job in allowed(world)), *UNEVEN]
    found = [recomputed(job, recompute) for job in layouts for recompute in both]
    if sampled := of_eight_sampled(os.environ.get("CONFORMANCE", "0")):
        eight = dict.fromkeys([*OF_EIGHT, *sampled])
        found += [recomputed(job, recompute) for job in eight for recompute in both]
    else:
        found += [recomputed(job, both[n % 2]) for n, job in enumerate(OF_EIGHT)]
    return sorted([*found, *SELECTIVE], key=lambda job: job.world)


def recomputed(job: Job, recompute: str) -> Job:
    """The same layout with another recompute. Full recompute, for the sake of time: one micro-batch
    on four processes without a pipeline, and one step where the backward pass is split too, as
    everything is then computed again for each parameter."""
    if recompute != "full":
        return replace(job, recompute=recompute)
    parallel = dict(job.parallel)
    if parallel.get("schedule") in ("zero_bubble", "zbv"):
        return replace(job, recompute=recompute, steps=1)
    if job.world == 4 and "pp" not in parallel:
        rows = job.batch // job.accumulation
        return replace(job, recompute=recompute, batch=rows, accumulation=1)
    return replace(job, recompute=recompute)


def of_eight_sampled(count: str, seed: int = 0) -> list[Job]:
    """``count`` ('all', or a number) of the layouts of eight processes, the same each time."""
    if count == "0":
        return []
    everything = allowed(8)
    if count == "all":
        return everything
    return random.Random(seed).sample(everything, min(int(count), len(everything)))
