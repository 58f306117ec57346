"""metrics.jsonl: one JSON object a line, for programs."""

import json
from typing import IO

from coterie.parallel.monitors.base import Monitor, RunFacts
from coterie.parallel.step import StepReport

FILE = "metrics.jsonl"


class JsonLines(Monitor):
    """Appends; what a resumed run does again is cut off first, so each step stands there once."""

    def __init__(self, every: int, unit: str = "step") -> None:
        self.every = every
        self.unit = unit
        """The key that counts: records of later ones than a run resumes after are cut off."""
        self._file: IO[str] | None = None
        self._steps = 0

    def start(self, facts: RunFacts) -> None:
        path = facts.folder / FILE
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if self._kept(line, facts)]
        replacement = path.with_suffix(".jsonl.new")
        replacement.write_text("".join(line + "\n" for line in kept))
        replacement.replace(path)
        self._file = path.open("a", buffering=1)
        self._steps = facts.steps

    def step(self, report: StepReport) -> None:
        if report.step % self.every and report.step != self._steps:
            return
        self.write(
            {
                "step": report.step,
                "loss": report.loss,
                **{f"router/{name}": value for name, value in report.router_losses.items()},
                "grad_norm": report.grad_norm,
                "lr": report.lr,
                "tokens": report.tokens,
                "tokens_per_second": report.tokens / report.seconds,
                "skew": report.skew,
                "dropped": sum(report.dropped.values()),
                "load": {str(layer): rows for layer, rows in report.load.items()},
            }
        )

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.write({"step": step, **{f"held_out/{name}": v for name, v in metrics.items()}})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, object]) -> None:
        """Append a line."""
        assert self._file is not None, "start() comes first"
        self._file.write(json.dumps(record) + "\n")

    def _kept(self, line: str, facts: RunFacts) -> bool:
        """Whether ``line`` is whole (a kill may cut the last one) and of a step that is kept."""
        try:
            return bool(json.loads(line)[self.unit] <= facts.first_step)
        except (json.JSONDecodeError, KeyError, TypeError):
            return False
