"""The most bytes that live tensors take on each rank of a real run, beside what the plan says.

    python -m tests.parallel.planner.measure

A profiler sees every allocation and release of torch's CPU allocator, those inside kernels
included; summed up, they are the bytes of live tensors at each moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from coterie.data import Batch
from coterie.launch.assemble import build_model
from coterie.launch.check import check_world
from coterie.launch.config import RunConfig
from coterie.parallel.distributed import Ranks, make_groups
from coterie.parallel.layout import Layout
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.planner.memory import memory
from coterie.parallel.rules import layout_of
from coterie.parallel.step import StepSettings, train_step
from tests.distributed import run_ranks

TREE: dict[str, Any] = {
    "model": {
        "vocabulary": 277,
        "width": 64,
        "layers": 4,
        "attention": {"heads": 4, "kv_heads": 2},
        "feed_forward": {"hidden": 192},
        "dense_layers": [0],
        "moe": {"experts": {"count": 8, "hidden": 96}, "router": {"k": 2}, "max_rows_factor": None},
    },
    "data": {"sequence": 128},
    "train": {"steps": 2, "global_batch": 8, "accumulation": 2},
    "optimizer": {"warmup": 1},
    "evaluation": {"batch": 8},
}


def config_of(**sections: Any) -> RunConfig:
    """``TREE`` with ``sections`` merged in."""
    tree = {**TREE}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    if tree["model"]["moe"]["router"].get("auxiliary"):
        tree["stage"] = {"weights": "of another run"}
    return RunConfig.model_validate(tree)


class Peak:
    """Bytes of live tensors since the block was entered: the most, and at the end."""

    most = 0
    end = 0


@contextmanager
def live_bytes() -> Iterator[Peak]:
    """Count the bytes that torch's CPU allocator hands out inside the block."""
    peak = Peak()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        yield peak
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda at: at[0]):
        peak.end += change
        peak.most = max(peak.most, peak.end)


def batch_of(config: RunConfig, rows: int, number: int) -> Batch:
    """Random tokens without padding."""
    draw = torch.Generator().manual_seed(number)
    shape = (rows, config.data.sequence)
    tokens_BS = torch.randint(0, config.model.vocabulary, shape, generator=draw)
    zeros_BS = torch.zeros_like(tokens_BS)
    return Batch(
        tokens_BS=tokens_BS,
        targets_BS=tokens_BS.roll(-1, 1),
        modality_BS=zeros_BS,
        segment_BS=zeros_BS.clone(),
        padding_BS=torch.zeros(shape, dtype=torch.bool),
        sample_B=torch.arange(rows),
        index_B=torch.arange(rows),
    )


def measured(rank: int, world: int, config: RunConfig) -> tuple[int, float]:
    """(peak bytes of live tensors, expert skew) of this rank over two steps."""
    check_world(config, world)
    layout = layout_of(config.parallel, world, config.model)
    device = torch.device("cpu")
    ranks = (
        make_groups(layout, device, timedelta(seconds=60))
        if world > 1
        else Ranks(0, device, layout)
    )
    train = config.train
    rows = train.global_batch // train.accumulation // layout.dp
    with live_bytes() as peak:
        model = build_model(config, ranks)
        optimizer = Optimizer(model, config.optimizer)
        skew = 0.0
        for step in (1, 2):
            batches = [batch_of(config, rows, n) for n in range(train.accumulation)]
            settings = StepSettings("fp32", config.optimizer.clip, train.seed)
            report = train_step(model, optimizer, batches, step, settings)
            skew = max(skew, skew_of(rank, layout, report.load))
    return peak.most, skew


def skew_of(rank: int, layout: Layout, load: dict[int, list[int]]) -> float:
    """The rows that this rank's experts had in a step over the even share, in the worst layer."""
    at, size = layout.coordinates(rank).ep, layout.ep
    ratios = []
    for rows in load.values():
        each = len(rows) // size
        ratios.append(sum(rows[at * each : (at + 1) * each]) * size / sum(rows))
    return max(ratios, default=1.0)


def moe(router: dict[str, Any]) -> dict[str, Any]:
    """``TREE``'s experts with another router."""
    return {**TREE["model"]["moe"], "router": router}


FORESEEING = {
    **TREE["model"],
    "moe": moe({"kind": "modality", "experts": [4, 4], "auxiliary": True}),
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ep 2": (2, {"parallel": {"ep": 2}}),
    "dp 2": (2, {}),
    "tp 2": (2, {"parallel": {"tp": 2}}),
    "cp 2": (2, {"parallel": {"cp": 2}}),
    "etp 2": (2, {"parallel": {"etp": 2}}),
    "pp 2": (2, {"parallel": {"pp": 2}}),
    "dp_shard 2": (2, {"parallel": {"dp_shard": 2}}),
    "pp 2, zbv": (2, {"parallel": {"pp": 2, "vpp": 2, "schedule": "zbv"}}),
    "recompute full": (1, {"train": {**TREE["train"], "recompute": "full"}}),
    "ep 2, recompute full": (
        2,
        {"parallel": {"ep": 2}, "train": {**TREE["train"], "recompute": "full"}},
    ),
    "shared depth": (1, {"model": {**TREE["model"], "dense_layers": [], "shared_depth": 2}}),
    "pyramid": (1, {"model": {**TREE["model"], "expert_counts": [4, 8, 16]}}),
    "muon": (1, {"optimizer": {"kind": "muon", "warmup": 1}}),
    "auxiliary routers": (1, {"model": FORESEEING}),
    "tp 2, muon": (2, {"parallel": {"tp": 2}, "optimizer": {"kind": "muon", "warmup": 1}}),
    "vocabulary 8192": (1, {"model": {**TREE["model"], "vocabulary": 8192}}),
}


def compared(name: str) -> list[tuple[int, int]]:
    """(predicted, measured) peak bytes of each rank of a case, at the skew that it had."""
    from coterie.parallel.planner.workload import workload_of

    world, sections = CASES[name]
    config = config_of(**sections)
    work = workload_of(
        config.model,
        config.parallel,
        config.train,
        config.data.sequence,
        world,
        optimizer=config.optimizer.kind,
    )
    seen = run_ranks(world, measured, world, config)
    layout = work.layout
    return [
        (memory(replace(work, skew=skew), layout.coordinates(rank).pp).peak, peak)
        for rank, (peak, skew) in enumerate(seen)
    ]


def main() -> None:
    print(f"{'layout':24} {'rank':>4} {'predicted':>10} {'measured':>10}  ratio")
    for name in CASES:
        for rank, (predicted, seen) in enumerate(compared(name)):
            print(
                f"{name:24} {rank:>4} {predicted / 1e6:8.2f}MB {seen / 1e6:8.2f}MB  "
                f"{predicted / seen:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
