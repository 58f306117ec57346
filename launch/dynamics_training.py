"""``coterie dynamics train`` and ``resume``, on every rank."""

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.comm.objects import from_rank_zero
from coterie.comm.reduce import sum_over
from coterie.core.errors import RunError, UserError
from coterie.data.environments import Environments, generate
from coterie.launch import child
from coterie.launch.dynamics_config import DynamicsRunConfig
from coterie.launch.dynamics_report import DynamicsReport, RoundReport
from coterie.launch.load_config import write_config
from coterie.launch.run_checkpoints import CHECKPOINTS, choose_checkpoint
from coterie.launch.run_folder import DYNAMICS_CONFIG
from coterie.models.dynamics import DynamicsModel
from coterie.moe.routers.kmeans import routing_accuracy
from coterie.parallel.checkpoint import CheckpointConfig, Checkpointer, load_tensors, read_state
from coterie.parallel.distributed import Ranks, agreed, start, stop, world_from_environment
from coterie.parallel.environments import ExpertGrid, expert_grid
from coterie.parallel.layout import Layout
from coterie.parallel.mixer import MixerTrainer
from coterie.parallel.mixer_state import mixer_parts, progress, restore_progress
from coterie.parallel.trainer import Outcome, stop_signals


@dataclass
class DynamicsRun:
    """A trainer and the environments it learns from and is tested on."""

    config: DynamicsRunConfig
    trainer: MixerTrainer
    data: Environments
    test: Environments

    @classmethod
    def build(cls, config: DynamicsRunConfig, grid: ExpertGrid = ExpertGrid()) -> "DynamicsRun":
        """At its beginning; every rank of ``grid`` calls."""
        torch.set_num_threads(1)  # so small are the tensors that threads only wait for each other
        data, test = generate(config.data), generate(config.data, test=True)
        state = data.y_ENTD.shape[-1]
        model = DynamicsModel(state, config.model, grid.ep, config.train.seed).to(config.dtype)
        return cls(config, MixerTrainer(model, data, config.train, grid), data, test)

    def restore(self, checkpoint: Path, ranks: Ranks | None = None) -> None:
        """Go on from ``checkpoint``, of any layout; every rank calls. UserError where it was
        trained on other data."""
        state = read_state(checkpoint)
        self._check_data(state["config"]["data"])
        load_tensors(checkpoint, mixer_parts(self.trainer), ranks.control if ranks else None)
        restore_progress(self.trainer, state)

    def _check_data(self, before: dict[str, Any]) -> None:
        for name, now in self.config.data.model_dump(mode="json").items():
            if name in before and before[name] != now:
                raise UserError(
                    f"data.{name} is {now}, but was {before[name]} in the checkpoint, whose "
                    "contexts are of these environments: set it back, or start a new run"
                )

    def evaluate(self) -> dict[str, float]:
        """Mean relative MSE on held-out trajectories: of all environments, and of each family."""
        return by_family(self.trainer.evaluate(self.test), self.test)

    def accuracy(self) -> float | None:
        """Of the routing; None where there is one family alone."""
        if len(self.data.names) == 1:
            return None
        return routing_accuracy(self.trainer.environments.expert_E, self.data.family_E)


def by_family(loss_E: Tensor, data: Environments) -> dict[str, float]:
    """The mean over all environments, and over those of each family."""
    means = {"mean": float(loss_E.mean())}
    for family, name in enumerate(data.names):
        means[name] = float(loss_E[data.family_E == family].mean())
    return means


def train(config: DynamicsRunConfig, run_dir: Path) -> Outcome:
    """Train ``config`` into ``run_dir``, which must not hold a run yet."""
    return _run(config, run_dir, fresh=True, step=None)


def resume(config: DynamicsRunConfig, run_dir: Path, step: int | None) -> Outcome:
    """Go on with the run in ``run_dir``: from the checkpoint of round ``step``, by default the
    newest; from the beginning if it was ended before the first one."""
    return _run(config, run_dir, fresh=False, step=step)


def _run(config: DynamicsRunConfig, run_dir: Path, fresh: bool, step: int | None) -> Outcome:
    _, world = world_from_environment()
    ranks = start(Layout(dp_replicate=world), config.parallel.timeout, gpus=False)
    saving = CheckpointConfig(every=config.every.save, keep=config.every.keep)
    try:
        grid = expert_grid(config.parallel.ep) if world > 1 else ExpertGrid()
        run = DynamicsRun.build(config, grid)
        with Checkpointer(run_dir / CHECKPOINTS, saving, ranks.saving) as checkpointer:
            checkpoint = None
            if not fresh:  # one choice for all: file systems may show a checkpoint late
                checkpoint = from_rank_zero(lambda: choose_checkpoint(run_dir, step), ranks.control)
            if checkpoint is not None:
                run.restore(checkpoint, ranks)
            # only now: what cannot go on must not replace the config of what could
            agreed(
                ranks,
                lambda: (
                    write_config(config, run_dir / DYNAMICS_CONFIG) if ranks.rank == 0 else None
                ),
            )
            report = DynamicsReport(run_dir) if ranks.rank == 0 else None
            return _Loop(run, ranks, checkpointer, report).run()
    finally:
        stop()


class _Loop:
    """Rounds, and what is due after them, until all are done or a signal came."""

    def __init__(
        self,
        run: DynamicsRun,
        ranks: Ranks,
        checkpointer: Checkpointer,
        report: DynamicsReport | None,
    ) -> None:
        self.built, self.trainer, self.every = run, run.trainer, run.config.every
        self.ranks, self.checkpointer, self.report = ranks, checkpointer, report
        self.rounds = run.config.train.rounds
        self._saved = run.trainer.round
        self._metrics: dict[str, float] = {}

    def run(self) -> Outcome:
        """Every rank calls. A SIGINT or SIGTERM on any rank ends it after the round under way, with
        a checkpoint."""
        stopped = False
        with stop_signals() as asked:
            if self.report is not None:
                self.report.start(self.built, self.ranks.world)
            child.report_training()
            try:
                while self.trainer.round < self.rounds and not stopped:
                    self._round()
                    stopped = self._any(bool(asked))
                if self.trainer.round > self._saved:
                    self._save()
                self.checkpointer.wait()
            finally:
                if self.report is not None:
                    self.report.close()
        return Outcome(self.trainer.round, self.trainer.round >= self.rounds, self._metrics)

    def _round(self) -> None:
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = self.trainer.train_round()
        trainer, done = self.trainer, self.trainer.round
        if not math.isfinite(loss):
            good = f"round {self._saved}" if self._saved else "none was saved yet"
            raise RunError(
                f"round {done}: the loss is {loss}: a trajectory diverged; try a lower train.lr; "
                f"the last good checkpoint: {good}"
            )
        if self.report is not None:
            for warning in caught:
                self.report.warn(str(warning.message))
            experts = trainer.environments.expert_E.unique().numel()
            seconds = time.perf_counter() - began
            updates, accuracy = trainer.round_updates, self.built.accuracy()
            self.report.round(RoundReport(done, loss, seconds, updates, experts, accuracy))
        last = done == self.rounds
        if last or (self.every.evaluate and done % self.every.evaluate == 0):
            self._metrics = self.built.evaluate()
            if self.report is not None:
                self.report.evaluation(done, self._metrics)
        if self.checkpointer.due(done):
            self._save()

    def _save(self) -> None:
        state = {**progress(self.trainer), **_facts(self.built.config, self.ranks)}
        self.checkpointer.save(self.trainer.round, mixer_parts(self.trainer), state)
        self._saved = self.trainer.round

    def _any(self, mine: bool) -> bool:
        return bool(sum_over(torch.tensor(int(mine)), self.trainer.grid.world.group))


def _facts(config: DynamicsRunConfig, ranks: Ranks) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json"), "world": ranks.world}
