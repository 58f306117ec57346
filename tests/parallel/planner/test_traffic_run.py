"""The collectives of a real step are those of the plan, with as many bytes."""

from collections import Counter
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from coterie.comm import parts, sequence
from coterie.comm.exchange import rows
from coterie.launch.assemble import build_model
from coterie.launch.config import RunConfig
from coterie.parallel.distributed import make_groups
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.planner.traffic import collectives
from coterie.parallel.planner.workload import workload_of
from coterie.parallel.rules import layout_of
from coterie.parallel.step import StepSettings, train_step
from tests.distributed import run_ranks
from tests.parallel.planner.measure import TREE, batch_of, config_of

SMALL = 20_000
"""Bytes: norms and sums over a vocabulary are not planned; but all of an exchange is."""
WHOLE: dict[tuple[Any, str], tuple[str, int]] = {
    (sequence, "all_gather"): ("all-gather", 0),
    (parts, "all_gather"): ("all-gather", 0),
    (sequence, "_reduce_scatter"): ("reduce-scatter", 1),
    (dist, "all_reduce"): ("all-reduce", 0),
    (rows, "start_all_to_all"): ("all-to-all", 0),
}
"""The function, by module and name; which of its arguments is the whole tensor."""


def sent_in_a_step(rank: int, world: int, config: RunConfig) -> dict[str, int]:
    """Bytes of the whole tensors of all collectives, by kind."""
    layout = layout_of(config.parallel, world, config.model)
    ranks = make_groups(layout, torch.device("cpu"), timedelta(seconds=60))
    model = build_model(config, ranks)
    optimizer = Optimizer(model, config.optimizer)
    sequences = config.train.global_batch // config.train.accumulation // layout.dp
    batches = [batch_of(config, sequences, n) for n in range(config.train.accumulation)]
    bytes_of: Counter[str] = Counter()

    def counted(module: Any, name: str) -> Any:
        op, argument = WHOLE[module, name]
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            size = args[argument].numel() * args[argument].element_size()
            bytes_of[op] += size if op == "all-to-all" or size > SMALL else 0
            return plain(*args, **kwargs)

        return patch.object(module, name, call)

    with ExitStack() as watched:
        for module, name in WHOLE:
            watched.enter_context(counted(module, name))
        settings = StepSettings("fp32", config.optimizer.clip, config.train.seed)
        train_step(model, optimizer, batches, 1, settings)
    return dict(bytes_of)


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        ({"tp": 2}, "none"),
        ({"cp": 2}, "none"),
        ({"ep": 2}, "none"),
        ({"etp": 2}, "none"),
        ({"tp": 2, "ep": 2}, "full"),
        ({}, "none"),
        ({"tp": 2, "ep": 2}, "none, muon"),
        ({"etp": 2}, "none, muon"),
    ],
    ids=str,
)
def test_bytes_of_a_real_step(parallel: dict[str, int], recompute: str) -> None:
    recompute, *optimizer = recompute.split(", ")
    config = config_of(
        parallel=parallel,
        train={**TREE["train"], "recompute": recompute},
        optimizer={"kind": "muon"} if optimizer else {},
    )
    check_bytes(config, run_ranks(2, sent_in_a_step, 2, config))


def test_bytes_of_routes() -> None:
    """Of 8 experts on 4 ranks on 2 nodes, a token's 7 are on all ranks, whichever they are."""
    moe = {**TREE["model"]["moe"], "router": {"k": 7}}
    configs = [
        config_of(
            model={**TREE["model"], "layers": 2, "moe": {**moe, "exchange": {"route": route}}},
            parallel={"ep": 4, "node": 2},
            train={**TREE["train"], "recompute": recompute},
        )
        for route, recompute in (("tokens", "none"), ("nodes", "none"), ("nodes", "full"))
    ]
    seen = run_ranks(4, sent_in_steps, 4, configs)
    for config, *ranks in zip(configs, *seen, strict=True):
        check_bytes(config, ranks)


def sent_in_steps(rank: int, world: int, configs: list[RunConfig]) -> list[dict[str, int]]:
    """Of a step of each config."""
    return [sent_in_a_step(rank, world, config) for config in configs]


def check_bytes(config: RunConfig, ranks: list[dict[str, int]]) -> None:
    """What ``ranks`` sent is what is planned."""
    work = workload_of(
        config.model,
        config.parallel,
        config.train,
        config.data.sequence,
        len(ranks),
        optimizer=config.optimizer.kind,
    )
    planned: Counter[str] = Counter()
    for collective in collectives(work, 0):
        counted = collective.op == "all-to-all" or collective.volume > SMALL
        planned[collective.op] += collective.volume * collective.count if counted else 0
    ops = {*planned, *ranks[0]}
    seen = {op: sum(rank.get(op, 0) for rank in ranks) / len(ranks) for op in ops}
    # rows that arrive vary from rank to rank, but not in their sum
    assert seen == {op: pytest.approx(planned[op], rel=1e-6) for op in seen}
