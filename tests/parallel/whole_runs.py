"""Whole runs of several routers: in one process, on four ranks, and on these from the middle of the
run in one process."""

from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.launch.config import RunConfig
from coterie.parallel.distributed import Ranks, make_groups
from coterie.parallel.rules import layout_of
from coterie.parallel.trainer import Trainer
from tests.parallel.tiny import Recorder, checkpointer_of, tiny_config, trainer_of

Reports = list[dict[str, Any]]
Found = tuple[Reports, Any]
"""The report of each step, and what was observed."""
Observe = Callable[[RunConfig, Trainer, Path], Any]
"""Runs a trainer to its end, in a folder; what there is to compare."""


def router_config(
    data: Path,
    router: dict[str, Any],
    steps: int,
    half: int,
    parallel: dict[str, Any] | None = None,
    **sections: Any,
) -> RunConfig:
    """With a checkpoint every ``half`` steps; over ranks recomputed."""
    config = tiny_config(
        data,
        train={"steps": steps, "recompute": "full" if parallel else "none"},
        checkpoint={"every": half},
        parallel=parallel or {},
    )
    tree = config.model_dump(mode="json")
    tree["model"]["attention"]["kv_heads"] = 2
    tree["model"]["moe"]["router"] = router
    for name, section in sections.items():
        tree[name] = {**(tree[name] or {}), **section}
    return RunConfig.model_validate(tree)


def run(
    config: RunConfig,
    ranks: Ranks,
    folder: Path,
    observe: Observe,
    checkpoint: Path | None = None,
) -> Found:
    """From ``checkpoint``, or from the beginning."""
    recorder = Recorder()
    with checkpointer_of(config, folder, ranks) as checkpointer:
        trainer = trainer_of(config, ranks, checkpointer, [recorder])
        if checkpoint is not None:
            trainer.restore(checkpoint)
        return recorder.reports, observe(config, trainer, folder)


def on_ranks(
    rank: int,
    configs: dict[str, RunConfig],
    observe: Observe,
    folder: Path,
    alone: Path,
    resumed: Collection[str],
) -> dict[str, list[Found]]:
    """By router: a whole run, and of those ``resumed`` one from the first checkpoint of the run in
    one process, which is in ``alone``."""
    some = next(iter(configs.values()))
    layout = layout_of(some.parallel, 4, some.model)
    ranks = make_groups(layout, torch.device("cpu"), timedelta(seconds=60))
    found = {}
    for router, config in configs.items():
        found[router] = [run(config, ranks, folder / router / "whole", observe)]
        if router in resumed:
            middle = alone / router / "checkpoints" / f"step_{config.checkpoint.every:08d}"
            again = folder / router / "resumed"
            found[router].append(run(config, ranks, again, observe, middle))
    return found


def check_close(ours: Reports, truth: Reports) -> None:
    """The reports of the same steps say the same."""
    assert [mine["step"] for mine in ours] == [right["step"] for right in truth]
    for mine, right in zip(ours, truth, strict=True):
        assert mine["load"] == right["load"]
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(right[name], rel=1e-9), (name, mine["step"])
        assert mine["router_losses"] == pytest.approx(right["router_losses"], rel=1e-9)
