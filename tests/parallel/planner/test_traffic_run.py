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
"""Bytes: counts, norms and sums over a vocabulary are not planned."""
WHOLE: dict[tuple[Any, str], tuple[str, int]] = {
    (sequence, "all_gather"): ("all-gather", 0),
    (parts, "all_gather"): ("all-gather", 0),
    (sequence, "_reduce_scatter"): ("reduce-scatter", 1),
    (dist, "all_reduce"): ("all-reduce", 0),
    (dist, "all_to_all_single"): ("all-to-all", 0),
}
"""The function, by module and name; which of its arguments is the whole tensor."""


def sent_in_a_step(rank: int, world: int, config: RunConfig) -> dict[str, int]:
    """Bytes of the whole tensors of all collectives, by kind."""
    layout = layout_of(config.parallel, world, config.model)
    ranks = make_groups(layout, torch.device("cpu"), timedelta(seconds=60))
    model = build_model(config, ranks)
    optimizer = Optimizer(model, config.optimizer)
    rows = config.train.global_batch // config.train.accumulation // layout.dp
    batches = [batch_of(config, rows, n) for n in range(config.train.accumulation)]
    bytes_of: Counter[str] = Counter()

    def counted(module: Any, name: str) -> Any:
        op, argument = WHOLE[module, name]
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            size = args[argument].numel() * args[argument].element_size()
            bytes_of[op] += size if size > SMALL else 0
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
    work = workload_of(
        config.model,
        config.parallel,
        config.train,
        config.data.sequence,
        2,
        optimizer=config.optimizer.kind,
    )
    planned: Counter[str] = Counter()
    for collective in collectives(work, 0):
        size = collective.volume * collective.count
        planned[collective.op] += size if collective.volume > SMALL else 0
    ranks = run_ranks(2, sent_in_a_step, 2, config)
    seen = {op: sum(rank.get(op, 0) for rank in ranks) / 2 for op in {*planned, *ranks[0]}}
    # rows that arrive vary from rank to rank, but not in their sum
    assert seen == {op: pytest.approx(planned[op], rel=1e-6) for op in seen}
