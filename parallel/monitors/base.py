"""A monitor hears of a run's events: on rank 0, unless it says otherwise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.parallel.certificate import Certificate
from coterie.parallel.step import StepReport


def due(report: StepReport, every: int, steps: int) -> bool:
    """Whether a step is reported: every so many, the last of ``steps``, and those whose exchanges
    were measured in full."""
    in_full = report.exchange is not None and report.exchange.communication is not None
    return report.step % every == 0 or report.step == steps or in_full


def exchange_figures(report: StepReport) -> dict[str, float]:
    """What the exchanges between ranks took, and which rank came late, by name; nothing where there
    are none."""
    figures = report.exchange.figures if report.exchange else {}
    late = report.late.figures if report.late else {}
    return {f"exchange/{name}": value for name, value in (figures | late).items()}


@dataclass(frozen=True)
class RunFacts:
    """What does not change during a run."""

    folder: Path
    steps: int
    """Steps in all."""
    first_step: int
    """Steps done before this start: 0, or what a resumed checkpoint holds."""
    image_levels: int
    """Grey levels of generated images."""
    layout: str = "one process"
    """Short, as in ``tp 2 · ep 4``."""
    ranks: int = 1
    """Processes."""


class Monitor:
    """Base class: every event may be ignored."""

    def start(self, facts: RunFacts) -> None:
        """The run starts or goes on."""

    def step(self, report: StepReport) -> None:
        """A step was taken."""

    def certificate(self, certificate: Certificate) -> None:
        """The hashes of the step just taken."""

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out losses after ``step``."""

    def images(self, step: int, images: dict[str, npt.NDArray[np.int64]]) -> None:
        """Images that the prompts gave after ``step``: levels, (side, side), by prompt."""

    def message(self, text: str) -> None:
        """One line for the person at the terminal."""

    def failure(self, step: int, reason: str) -> None:
        """``step`` could not be taken, which ends the run."""

    def close(self) -> None:
        """The run ends; also called when it fails."""
