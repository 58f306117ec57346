"""The training loop: step, report, evaluate, save, until done or told to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from coterie.core.errors import UserError
from coterie.data import Batch, Sampler, TokenDataset
from coterie.parallel.certificate import certificate
from coterie.parallel.checkpoint import Checkpointer, load_tensors, read_state
from coterie.parallel.config import EvaluationConfig, OptimizerConfig, TrainConfig
from coterie.parallel.evaluate import evaluate
from coterie.parallel.finite import NonFiniteError
from coterie.parallel.model import ParallelModel
from coterie.parallel.monitors import Monitor, RunFacts
from coterie.parallel.optimizer import Optimizer, learning_rate
from coterie.parallel.part import Part
from coterie.parallel.precision import resolve
from coterie.parallel.run_state import model_parts, optimizer_parts
from coterie.parallel.step import StepReport, StepSettings, train_step

DrawImages = Callable[[ParallelModel], dict[str, npt.NDArray[np.int64]]]
"""Images for the prompts of an evaluation, by prompt, on rank 0. All ranks call."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    finished: bool
    """False: it was told to stop, and saved a checkpoint first."""
    metrics: dict[str, float]
    """Of the last evaluation; empty when there was none."""


class Trainer:
    """Trains ``model`` on ``sampler``'s batches; one on every rank, in step with each other."""

    def __init__(
        self,
        model: ParallelModel,
        sampler: Sampler,
        held_out: TokenDataset,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        evaluation: EvaluationConfig,
        checkpointer: Checkpointer,
        state: dict[str, Any],
        monitors: list[Monitor],
        draw_images: DrawImages | None = None,
        exchange_every: int = 0,
    ) -> None:
        """``state``: what to store in each checkpoint beside the trainer's own (config, versions).

        ``monitors``: of this rank; all but the first have little to say. ``exchange_every``: steps
        between those, besides the last, whose exchanges are measured in full; 0: none.
        """
        self.model = model
        self.sampler = sampler
        self.held_out = held_out
        self.ranks = model.ranks
        self.train = train
        self.optimizer_config = optimizer
        self.evaluation = evaluation
        self.optimizer = Optimizer(model, optimizer)
        self.checkpointer = checkpointer
        self.state = state
        self.monitors = monitors
        self.draw_images = draw_images
        self.exchange_every = exchange_every
        self.precision = resolve(train.precision, self.ranks.device)
        self.step = 0
        self._before = 0
        """Global batches that were consumed before step 0, by the run that this was made of."""
        self.metrics: dict[str, float] = {}
        self.history = [self.ranks.layout.describe()]
        """The layouts so far, each but the first with the step after which it took over."""
        self._saved = 0
        self._folder = checkpointer.folder

    def restore(self, checkpoint: Path) -> None:
        """Go on from ``checkpoint``; all ranks call. Raises UserError as ``load_tensors`` does."""
        state = read_state(checkpoint)
        load_tensors(checkpoint, self._parts(), self.ranks.control)
        self.sampler.load_state_dict(state["sampler"])
        self.step = self._saved = state["step"]
        self._before = self.sampler.consumed - self.step
        self.history = list(state["history"])
        now = self.ranks.layout.describe()
        if self.history[-1].split(" after step ")[0] != now:
            self.history.append(f"{now} after step {self.step}")

    def run(self, folder: Path) -> Outcome:
        """Train to the last step, reporting into ``folder``.

        SIGINT or SIGTERM on any rank ends it after the step under way, with a checkpoint.

        Raises:
            NonFiniteError: with the last good checkpoint named.
            UserError: a checkpoint or a report could not be written.
        """
        self._folder = folder
        levels = self.sampler.dataset.vocabulary.levels
        facts = RunFacts(
            folder,
            self.train.steps,
            self.step,
            levels,
            self.ranks.layout.describe(),
            self.ranks.world,
        )
        stopped = False
        with stop_signals() as asked:
            self._tell(lambda monitor: monitor.start(facts))
            try:
                while self.step < self.train.steps and not stopped:
                    stopped = self._advance(stop=bool(asked)).stop
                if stopped and self.step > self._saved:
                    self._save()
                self.checkpointer.wait()
            except NonFiniteError as error:
                self._tell_failure(str(error))
                raise
            finally:
                self._tell(lambda monitor: monitor.close())
        return Outcome(self.step, self.step >= self.train.steps, self.metrics)

    def _advance(self, stop: bool) -> StepReport:
        """One step, and what is due after it."""
        self.optimizer.lr = learning_rate(self.step, self.train.steps, self.optimizer_config)
        batches = self._batches()
        report = self._train_step(batches, stop)
        self.step += 1
        self.sampler.consumed = self._before + self.step
        last = self.step == self.train.steps
        self._tell(lambda monitor: monitor.step(report))
        saves = last or self.checkpointer.due(self.step)
        if saves or (self.train.certify_every and self.step % self.train.certify_every == 0):
            self._certify(batches)
        if last or (self.evaluation.every and self.step % self.evaluation.every == 0):
            self._evaluate()
        if saves:
            self._save()
        return report

    def _batches(self) -> list[Batch]:
        """The micro-batches of this rank's part of the next global batch."""
        parts, dp = self.train.accumulation, self.ranks.layout.dp
        batches = (
            self.sampler.batch(self.sampler.consumed, micro, parts, self.ranks.place.dp, dp)
            for micro in range(parts)
        )
        return [batch.to(self.ranks.device) for batch in batches]

    def _train_step(self, batches: list[Batch], stop: bool) -> StepReport:
        moe, k = self.model.config.moe, None
        if moe is not None and not self.model.config.auxiliary:  # what is trained then knows no k
            k = moe.router.k_at(self.step, self.train.steps)
        step = self.step + 1
        resend = bool(self.exchange_every) and (
            step % self.exchange_every == 0 or step == self.train.steps
        )
        settings = StepSettings(
            self.precision, self.optimizer_config.clip, self.train.seed, k, resend
        )
        try:
            return train_step(self.model, self.optimizer, batches, step, settings, stop)
        except NonFiniteError as error:
            self.checkpointer.wait()
            good = f"step {self._saved}" if self._saved else "none was saved yet"
            raise NonFiniteError(
                f"{error}; the last good checkpoint in {self.checkpointer.folder}: {good}"
            ) from None

    def _certify(self, batches: list[Batch]) -> None:
        found = certificate(
            self.step,
            self.model,
            self.optimizer,
            batches,
            self.train.seed,
            "; ".join(self.history),
        )
        self._tell(lambda monitor: monitor.certificate(found))

    def _evaluate(self) -> None:
        self.metrics = evaluate(
            self.model,
            self.held_out,
            self.precision,
            self.evaluation.batch,
            self.evaluation.sequences,
        )
        self._tell(lambda monitor: monitor.evaluation(self.step, self.metrics))
        if self.draw_images is not None:
            images = self.draw_images(self.model)
            self._tell(lambda monitor: monitor.images(self.step, images))

    def _save(self) -> None:
        state = {
            **self.state,
            "step": self.step,
            "history": self.history,
            "sampler": self.sampler.state_dict(),
        }
        self.checkpointer.save(self.step, self._parts(), state)
        self._saved = self.step

    def _parts(self) -> dict[str, Part]:
        return {**model_parts(self.model), **optimizer_parts(self.model, self.optimizer)}

    def _tell_failure(self, reason: str) -> None:
        """Where even that cannot be reported, the failure itself still is."""
        with suppress(UserError):
            self._tell(lambda monitor: monitor.failure(self.step + 1, reason))

    def _tell(self, event: Callable[[Monitor], None]) -> None:
        for monitor in self.monitors:
            try:
                event(monitor)
            except OSError as error:
                raise UserError(
                    f"what step {self.step} did could not be reported in {self._folder}: "
                    f"{error.strerror or error}"
                ) from error


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that arrive; a second one acts as it did before."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
