"""A run of a mixture of experts, out of the checkpoint of a trained model."""

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from coterie.core.errors import UserError
from coterie.data import open_dataset, prepare
from coterie.launch.assemble import data_cache
from coterie.launch.check import check_data, check_world
from coterie.launch.config import RunConfig
from coterie.launch.placement import boxes_of_rank
from coterie.launch.resharding import check_new, new_run, saved_run
from coterie.launch.run_checkpoints import CHECKPOINTS
from coterie.models.upcycle import How, origins
from coterie.parallel.layout import Layout, LayoutConfig
from coterie.parallel.precision import parameter_dtype
from coterie.parallel.rules import layout_of
from coterie.parallel.upcycle import fresh, upcycle


def make_run(
    source: Path,
    config: RunConfig,
    run_dir: Path,
    world: int,
    how: How,
    advance: Callable[[int], None],
) -> str:
    """Make the folder of a run of ``config`` whose first weights are made of those in the
    checkpoint ``source``; returns in words what was made.

    Its step is 0, so schedules begin anew; it goes on with the data where the trained run stopped.

    Raises:
        UserError: the models, or their data, do not fit; ``run_dir`` exists; the checkpoint is
            damaged or has no config; the disk is full, …
    """
    check_new(run_dir)
    state, trained = saved_run(source, [])
    check_world(config, world)
    check_data(config)
    layout = layout_of(config.parallel, world, config.model)
    made_of = origins(trained.model, config.model, how)
    position = _position(state["sampler"], config)
    now = {
        "config": config.model_dump(mode="json"),
        "layout": {"world": world, **asdict(layout)},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "step": 0,
        "history": [layout.describe()],
        "sampler": position,
    }
    with new_run(run_dir, config) as hidden:
        upcycle(
            source,
            hidden / CHECKPOINTS,
            made_of,
            fresh(config.model, made_of, config.train.seed),
            lambda rank: boxes_of_rank(config, layout, rank),
            world,
            parameter_dtype(config.train.precision),
            now,
            advance,
        )
    before, after = _experts(trained), _experts(config)
    done = position["consumed"] * position["global_batch"]
    return f"{before} became {after}, after {done:,} sequences"


def total_bytes(config: RunConfig) -> int:
    """Of the checkpoint that is to be written."""
    alone = config.model_copy(update={"parallel": LayoutConfig()})
    size = parameter_dtype(config.train.precision).itemsize
    return sum(box.numel for box in boxes_of_rank(alone, Layout(), 0).values()) * size


def _position(sampler: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The place in the data where the trained run stopped, in the new run's batches."""
    train = config.train
    dataset = open_dataset(prepare(config.data, data_cache()), "train")
    if sampler["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"data: the trained run stopped in a dataset with fingerprint "
            f"{sampler['fingerprint'][:16]}, and {dataset.path} has {dataset.fingerprint[:16]}: "
            "give it the dataset that it had"
        )
    if sampler["seed"] != train.seed:
        raise UserError(
            f"train.seed is {train.seed}, but was {sampler['seed']} in the trained run, and orders "
            f"the data that is still to come: set train.seed={sampler['seed']}"
        )
    done = sampler["consumed"] * sampler["global_batch"]
    if done % train.global_batch:
        raise UserError(
            f"train.global_batch is {train.global_batch}, but the trained run stopped after {done} "
            f"sequences, which it does not divide: set train.global_batch={sampler['global_batch']}"
        )
    batches = {"global_batch": train.global_batch, "consumed": done // train.global_batch}
    return {**sampler, **batches}


def _experts(config: RunConfig) -> str:
    """The feed-forwards of a model, in words."""
    model = config.model
    counts = [model.experts_of(layer) for layer in range(model.layers)]
    kinds = {
        f"{count} expert{'s' if count > 1 else ''}" if count else "a dense layer": counts.count(
            count
        )
        for count in dict.fromkeys(counts)
    }
    return " and ".join(f"{times} × {kind}" for kind, times in kinds.items())
