"""What a run of ``coterie dynamics`` tells: the terminal and metrics.jsonl, after each round."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.core.errors import UserError
from coterie.moe.routers.kmeans import GateUpdate
from coterie.parallel.monitors import JsonLines, RunFacts, Terminal

if TYPE_CHECKING:
    from coterie.launch.dynamics_training import DynamicsRun

_EVERY = 10  # rounds between lines, where there is no terminal to draw a bar on


@dataclass(frozen=True)
class RoundReport:
    """One round."""

    round: int
    loss: float
    """Mean of its steps' batches (relative squared error)."""
    seconds: float
    updates: list[GateUpdate]
    """Of a K-means gate."""
    experts: int
    """That environments are with."""
    accuracy: float | None
    """Fraction of environments that are with their family's expert; None: there is one family."""

    def record(self) -> dict[str, object]:
        """For metrics.jsonl."""
        fitted = [update.accuracy for update in self.updates if not update.reason]
        found: dict[str, object] = {
            "round": self.round,
            "loss": self.loss,
            "seconds": self.seconds,
            "experts_in_use": self.experts,
            "gate_updates": len(fitted),
            "gate_failures": dict(Counter(u.reason for u in self.updates if u.reason)),
        }
        if fitted:
            found["gate_accuracy"] = fitted[-1]
        if self.accuracy is not None:
            found["routing_accuracy"] = self.accuracy
        return found

    def __str__(self) -> str:
        told = f"loss {self.loss:.4f}  experts in use {self.experts}"
        if self.accuracy is not None:
            told += f"  routing {self.accuracy:.0%}"
        if self.updates and self.updates[-1].reason:
            told += f"  gate not refitted: {self.updates[-1].reason}"
        return told


class DynamicsReport:
    """Of rank 0. Raises UserError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._terminal = Terminal(every=_EVERY, unit="round")
        self._lines = JsonLines(every=1, unit="round")
        self._warned: set[str] = set()

    def start(self, run: "DynamicsRun", world: int) -> None:
        """The run starts or goes on."""
        trainer, data, config = run.trainer, run.data, run.config
        weights = sum(p[0].numel() for p in trainer.model.experts.parameters())
        split = f", experts over {config.parallel.ep}" if world > 1 else ""
        self._terminal.message(
            f"{len(data.names)} families, {len(data.family_E)} environments of "
            f"{data.y_ENTD.shape[1]} trajectories; {config.model.experts} experts of {weights:,} "
            f"weights, contexts of width {config.model.context}; {world} "
            f"process{'es' if world > 1 else ''}{split} in {config.precision}"
        )
        done, rounds = trainer.round, config.train.rounds
        if done >= rounds:
            self._terminal.message(
                f"{self._folder}: all {done} rounds are done; for more: train.rounds=N"
            )
        elif done:
            self._terminal.message(f"{self._folder}: going on after round {done} of {rounds}")
        layout = f"ep {config.parallel.ep}" if world > 1 else "one process"
        facts = RunFacts(self._folder, rounds, done, image_levels=0, layout=layout, ranks=world)
        self._write(lambda: self._lines.start(facts))
        self._terminal.start(facts)

    def round(self, report: RoundReport) -> None:
        """A round was done."""
        self._terminal.progress(report.round, str(report))
        self._write(lambda: self._lines.write(report.record()))

    def evaluation(self, done: int, means: dict[str, float]) -> None:
        """Mean relative errors on held-out trajectories."""
        self._terminal.message(f"round {done}: held-out relative MSE {means['mean']:.3e}")
        record: dict[str, object] = {"round": done}
        record |= {f"held_out/{name}": value for name, value in means.items()}
        self._write(lambda: self._lines.write(record))

    def warn(self, text: str) -> None:
        """Once."""
        if text not in self._warned:
            self._warned.add(text)
            self._terminal.message(f"warning: {text}")

    def close(self) -> None:
        """The run ends; also called when it fails."""
        self._terminal.close()
        self._lines.close()

    def _write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise UserError(
                f"{self._folder}: could not be reported to: {error.strerror or error}"
            ) from error
