"""Held-out loss against the number of experts for each token, as bars of text and as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from coterie.core.errors import UserError

_WIDTH = 30  # characters of the longest bar
_FORMATS = (".png", ".svg", ".pdf")
_LOSSES = ("loss", "non_causal/loss")  # how their names begin


def check_plot(path: Path) -> None:
    """Raises UserError unless ``path`` can be drawn into."""
    if path.suffix not in _FORMATS:
        raise UserError(f"--plot {path}: must end in {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")


def loss_lines(losses: dict[int, dict[str, float]]) -> list[str]:
    """A line for each k: its losses, and a bar for what it is above the lowest, the longest for the
    highest."""
    totals = [_total(found) for found in losses.values()]
    low, span = min(totals), max(totals) - min(totals)
    lines = []
    for k, found in losses.items():
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        bar = round(_WIDTH * (_total(found) - low) / span) if span else 0
        lines.append(f"k {k:<4} {shown}  {'█' * bar}".rstrip())
    return lines


def _total(found: dict[str, float]) -> float:
    """The loss of all modalities: the first, by whatever name."""
    return next(iter(found.values()))


def draw_losses(losses: dict[int, dict[str, float]], path: Path) -> None:
    """Draw the losses by k into ``path``, a PNG, SVG or PDF file by its ending. UserError where it
    cannot be written."""
    check_plot(path)
    figure = Figure(figsize=(6, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="experts for each token", ylabel="held-out loss, nats per token"
    )
    numbers = sorted(losses)
    names = (name for name in losses[numbers[0]] if name.startswith(_LOSSES))
    for name in names:
        axes.plot(numbers, [losses[k][name] for k in numbers], "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(k) for k in numbers])
    axes.minorticks_off()
    axes.legend()
    try:
        canvas.figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
