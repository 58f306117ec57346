"""metrics.jsonl and load.jsonl: one JSON object a line, for programs."""

import json
from pathlib import Path
from typing import IO

from coterie.parallel.load import LayerLoad, LoadWindow
from coterie.parallel.monitors.base import Monitor, RunFacts, due, exchange_figures
from coterie.parallel.step import StepReport

FILE = "metrics.jsonl"
LOAD_FILE = "load.jsonl"


class JsonLines(Monitor):
    """Appends; what a resumed run does again is cut off first, so each step stands there once."""

    def __init__(self, every: int, unit: str = "step") -> None:
        self.every = every
        self.unit = unit
        """The key that counts: records of later ones than a run resumes after are cut off."""
        self._file: IO[str] | None = None
        self._steps = 0
        self._window = LoadWindow()

    def start(self, facts: RunFacts) -> None:
        self._file = _appended(facts.folder / FILE, self.unit, facts.first_step)
        self._steps = facts.steps
        self.write({self.unit: facts.first_step, "layout": facts.layout, "ranks": facts.ranks})

    def step(self, report: StepReport) -> None:
        self._window.add(report.layers)
        if not due(report, self.every, self._steps):
            return
        window = self._window.take()
        self.write(
            {
                "step": report.step,
                "loss": report.loss,
                **{f"router/{name}": value for name, value in report.router_losses.items()},
                "grad_norm": report.grad_norm,
                "lr": report.lr,
                "tokens": report.tokens,
                "tokens_per_second": report.tokens / report.seconds,
                **exchange_figures(report),
                **_waited_for(report),
                "skew": report.skew,
                "rank_skew": report.rank_skew,
                "dropped": sum(report.dropped.values()),
                "unrouted": sum(load.unrouted for load in report.layers.values()),
                "dead": sum(load.dead for load in window.values()),
                "load": {str(layer): rows for layer, rows in report.load.items()},
            }
        )

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.write({"step": step, **{f"held_out/{name}": v for name, v in metrics.items()}})

    def failure(self, step: int, reason: str) -> None:
        self.write({"step": step, "failure": reason})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, object]) -> None:
        """Append a line."""
        assert self._file is not None, "start() comes first"
        self._file.write(json.dumps(record) + "\n")


def _waited_for(report: StepReport) -> dict[str, object]:
    """How long the fused exchange waited for each rank."""
    if report.late is None:
        return {}
    return {"waited_for_ms": [round(1e3 * seconds, 3) for seconds in report.late.each_W]}


class LoadLines(Monitor):
    """What the experts of each layer had to do, summed over all steps since the line before.

    A step that a resumed run takes again is counted once: lines beyond its checkpoint are cut off.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._file: IO[str] | None = None
        self._facts: RunFacts | None = None
        self._window = LoadWindow()
        self._last = 0

    def start(self, facts: RunFacts) -> None:
        self._facts = facts

    def step(self, report: StepReport) -> None:
        if not report.layers:
            return
        self._window.add(report.layers)
        self._last = report.step
        if report.step % self.every == 0:
            self._write()

    def close(self) -> None:
        if self._window.steps:  # the last step, or where the run was stopped
            self._write()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        assert self._facts is not None, "start() comes first"
        if self._file is None:
            self._file = _appended(self._facts.folder / LOAD_FILE, "step", self._facts.first_step)
        record = {"step": self._last, "steps": self._window.steps}
        layers = {str(layer): _numbers(load) for layer, load in self._window.take().items()}
        text = json.dumps({**record, "layers": layers}, separators=(",", ":"))
        self._file.write(text + "\n")


def _numbers(load: LayerLoad) -> dict[str, object]:
    """``load`` as it stands in load.jsonl."""
    return {
        "rows": load.rows_ME.tolist(),
        "dropped": load.dropped_E.tolist(),
        "tokens": load.tokens_M.tolist(),
        "unrouted": load.unrouted_M.tolist(),
        "ranks": load.rows_R.tolist(),
        "entropy": load.entropy,
    }


def _appended(path: Path, unit: str, done: int) -> IO[str]:
    """The file of a run that goes on after ``done`` units: its lines up to there kept."""
    kept = []
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _at_most(line, unit, done)]
    replacement = path.with_suffix(".jsonl.new")
    replacement.write_text("".join(line + "\n" for line in kept))
    replacement.replace(path)
    return path.open("a", buffering=1)


def _at_most(line: str, unit: str, done: int) -> bool:
    """Whether ``line`` is whole (a kill may cut the last one) and of a unit that is kept."""
    try:
        return bool(json.loads(line)[unit] <= done)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
