"""The person at the terminal: a progress bar, or plain lines where the output is a file."""

from collections.abc import Collection

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from coterie.parallel.evaluate import AUXILIARY
from coterie.parallel.load import LayerLoad, LoadWindow
from coterie.parallel.monitors.base import Monitor, RunFacts
from coterie.parallel.step import StepReport

_SMOOTHING = 0.9


class Terminal(Monitor):
    """Step, loss, tokens/s, expert skew and time left; where there are any, also rows dropped,
    tokens unrouted, and experts without a row in ``every`` steps."""

    def __init__(self, console: Console | None = None, every: int = 50, unit: str = "step") -> None:
        self.console = console or Console(stderr=True)
        self.unit = unit
        self.every = every
        """Steps between lines, where there is no terminal to draw a bar on."""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._rate = 0.0
        self._steps = 0
        self._window = LoadWindow()
        self._dead = 0

    def start(self, facts: RunFacts) -> None:
        self._steps = facts.steps
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn(f"{self.unit} {{task.completed}}/{{task.total}}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=facts.steps, completed=facts.first_step)

    def step(self, report: StepReport) -> None:
        rate = report.tokens / report.seconds
        self._rate = rate if not self._rate else _SMOOTHING * self._rate + (1 - _SMOOTHING) * rate
        self._window.add(report.layers)
        if self._window.steps == self.every:
            self._dead = sum(load.dead for load in self._window.take().values())
        loss = f"loss {report.loss:.3f}"
        if "auxiliary" in report.router_losses:  # what is trained then
            loss = f"auxiliary {report.router_losses['auxiliary']:.4f}"
        told = f"{loss}  {self._rate:,.0f} tokens/s  skew {report.skew:.2f}"
        told += _lost(report.layers.values()) + (f"  dead {self._dead}" if self._dead else "")
        self.progress(report.step, told)

    def progress(self, step: int, told: str) -> None:
        """Show how far the run is, and what there is to tell."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=told)
        elif step % self.every == 0 or step == self._steps:
            self.message(f"{self.unit} {step}/{self._steps}  {told}")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        shown = [f"{name} {value:.3f}" for name, value in metrics.items()]
        foreseen = [text for text in shown if text.startswith(AUXILIARY)]
        losses = "  ".join(text for text in shown if text not in foreseen)
        also = f"; {'  '.join(foreseen)}" if foreseen else ""
        self.message(f"step {step}: held-out {losses} (nats per token){also}")

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _lost(loads: Collection[LayerLoad]) -> str:
    """Rows dropped and tokens unrouted, as parts of all, where there are any."""
    told = ""
    if dropped := sum(load.dropped for load in loads):
        told += f"  dropped {dropped / (dropped + sum(load.rows for load in loads)):.1%}"
    if unrouted := sum(load.unrouted for load in loads):
        told += f"  unrouted {unrouted / sum(int(load.tokens_M.sum()) for load in loads):.1%}"
    return told
