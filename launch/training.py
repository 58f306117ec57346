"""`coterie train` and `coterie resume`, on every rank."""

import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coterie.comm.objects import from_rank_zero
from coterie.data import Sampler, TokenDataset
from coterie.launch import child
from coterie.launch.assemble import build_model, join, open_data
from coterie.launch.causality import can_foresee, who_looks_ahead
from coterie.launch.config import RunConfig
from coterie.launch.images import image_drawer
from coterie.launch.load_config import write_config
from coterie.launch.run_checkpoints import CHECKPOINTS, choose_checkpoint, stage_checkpoint
from coterie.launch.run_folder import CONFIG
from coterie.launch.tuning import tuned
from coterie.models.placement import parameter_counts
from coterie.parallel.checkpoint import Checkpointer, load_tensors, read_manifest
from coterie.parallel.config import StageConfig
from coterie.parallel.distributed import Ranks, agreed, stop, world_from_environment
from coterie.parallel.model import ParallelModel
from coterie.parallel.monitors import (
    Certificates,
    JsonLines,
    LoadLines,
    Monitor,
    RunFacts,
    TensorBoard,
    Terminal,
)
from coterie.parallel.precision import bf16_slowdown, resolve
from coterie.parallel.run_state import model_parts
from coterie.parallel.trainer import DrawImages, Outcome, Trainer

_SLOW = 4.0  # times slower than fp32: worth a warning


def train(config: RunConfig, run_dir: Path) -> Outcome:
    """Train ``config`` into ``run_dir``, which must not hold a run yet."""
    return _run(config, run_dir, fresh=True, step=None)


def resume(config: RunConfig, run_dir: Path, step: int | None) -> Outcome:
    """Go on with the run in ``run_dir``: from the checkpoint of ``step``, by default the newest;
    from the beginning if it was ended before the first one."""
    return _run(config, run_dir, fresh=False, step=step)


def _run(config: RunConfig, run_dir: Path, fresh: bool, step: int | None) -> Outcome:
    _, world = world_from_environment()
    ranks = join(config, world)
    monitors = _monitors(config) if ranks.rank == 0 else []
    try:
        train_set, held_out = open_data(config.data, ranks)
        config = tuned(config, ranks, partial(_say, monitors))
        model = build_model(config, ranks)
        with Checkpointer(run_dir / CHECKPOINTS, config.checkpoint, ranks.saving) as checkpointer:
            trainer = Trainer(
                model,
                Sampler(train_set, config.train.global_batch, config.train.seed),
                held_out,
                config.train,
                config.optimizer,
                config.evaluation,
                checkpointer,
                _state(config, ranks),
                [_Attached(), *monitors],
                _drawer(config, ranks, train_set),
                config.monitor.exchange_every,
            )
            checkpoint = None
            if not fresh:  # one choice for all: file systems may show a checkpoint late
                checkpoint = from_rank_zero(lambda: choose_checkpoint(run_dir, step), ranks.control)
            if checkpoint is not None:
                trainer.restore(checkpoint)
            elif config.stage is not None:
                _start_from(config.stage, model)
            # only now: what cannot go on must not replace the config of what could
            agreed(
                ranks, lambda: write_config(config, run_dir / CONFIG) if ranks.rank == 0 else None
            )
            _say(monitors, _facts(config, ranks, train_set))
            if ranks.ctas is not None:
                _say(monitors, _room(ranks))
            _say(monitors, _start(run_dir, fresh, checkpoint, trainer))
            if trainer.step >= config.train.steps:
                return Outcome(trainer.step, True, {})
            _warn_of_slow_bf16(config, ranks, monitors)
            _warn_of_losses(config, monitors)
            outcome = trainer.run(run_dir)
            if outcome.finished:
                _say(monitors, f"{run_dir}: done; {_what_next(config, run_dir)}")
            return outcome
    finally:
        stop()


class _Attached(Monitor):
    """On every rank: the trainer starts its monitors once it handles SIGINT and SIGTERM."""

    def start(self, facts: RunFacts) -> None:
        child.report_training()


def _monitors(config: RunConfig) -> list[Monitor]:
    every = config.monitor.every
    return [
        Terminal(),
        JsonLines(every),
        LoadLines(config.monitor.heat_map_every),
        TensorBoard(every, config.monitor.heat_map_every),
        Certificates(),
    ]


def _say(monitors: list[Monitor], text: str) -> None:
    for monitor in monitors:
        monitor.message(text)


def _state(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """What each checkpoint says of the run besides its numbers. Random numbers need no state: they
    are keyed by (seed, step, sample)."""
    return {
        "config": config.model_dump(mode="json"),
        "layout": {"world": ranks.world, **asdict(ranks.layout)},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _drawer(config: RunConfig, ranks: Ranks, dataset: TokenDataset) -> DrawImages | None:
    evaluation = config.evaluation
    if not evaluation.prompts or not config.model.causal:
        return None
    return image_drawer(
        evaluation.prompts,
        dataset.vocabulary,
        resolve(config.train.precision, ranks.device),
        evaluation.temperature,
        config.train.seed,
    )


def _start_from(stage: StageConfig, model: ParallelModel) -> None:
    """Load all weights that there are; others are of what ``stage`` adds. All ranks call."""
    checkpoint = from_rank_zero(lambda: stage_checkpoint(stage), model.ranks.control)
    there = read_manifest(checkpoint).tensors
    into = {
        name: part
        for name, part in model_parts(model).items()
        if name in there or model.places[name.removeprefix("model.")].frozen
    }
    load_tensors(checkpoint, into, model.ranks.control, strict=False)


def _facts(config: RunConfig, ranks: Ranks, dataset: TokenDataset) -> str:
    """One line on what is about to run."""
    total, active = parameter_counts(config.model)
    precision = resolve(config.train.precision, ranks.device)
    processes = f"{ranks.world} process{'es' if ranks.world > 1 else ''}"
    split = f" ({ranks.layout.describe()})" if ranks.world > 1 else ""
    return (
        f"{total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active for a token; "
        f"{len(dataset):,} sequences of {dataset.sequence} tokens; {processes}{split} on "
        f"{ranks.device.type} in {precision}"
    )


def _room(ranks: Ranks) -> str:
    """One line on what NCCL is limited to."""
    axes = ", ".join(ranks.layout.beside)
    return f"NCCL takes up to {ranks.ctas} CTAs beside the fused exchange (groups: {axes})"


def _start(run_dir: Path, fresh: bool, checkpoint: Path | None, trainer: Trainer) -> str:
    if trainer.step >= trainer.train.steps:
        return f"{run_dir}: all {trainer.step} steps are done; for more: train.steps=N"
    if checkpoint is not None:
        return f"{run_dir}: going on after step {trainer.step} of {trainer.train.steps}"
    if not fresh:
        return f"{run_dir}: no checkpoint was saved yet, starting from the beginning"
    return f"{run_dir}: training {trainer.train.steps} steps (interrupt with Ctrl-C, then resume)"


def _what_next(config: RunConfig, run_dir: Path) -> str:
    if config.model.causal or not can_foresee(config.model):
        return f"measure it: coterie evaluate {run_dir}"
    return f"make it causal: coterie train {run_dir} --stage aux"


def _warn_of_losses(config: RunConfig, monitors: list[Monitor]) -> None:
    if config.model.causal:
        return
    drawn = "; evaluation.prompts are not continued" if config.evaluation.prompts else ""
    _say(
        monitors,
        f"note: {who_looks_ahead(config.model)}, so losses are not those of a causal model{drawn}",
    )


def _warn_of_slow_bf16(config: RunConfig, ranks: Ranks, monitors: list[Monitor]) -> None:
    if not monitors or config.train.precision != "bf16" or ranks.device.type != "cpu":
        return
    if (slowdown := bf16_slowdown()) > _SLOW:
        _say(
            monitors,
            f"warning: train.precision is bf16, whose matrix products are {slowdown:.0f} times "
            "slower than fp32 on this CPU; `train.precision=auto` runs in fp32 here",
        )
