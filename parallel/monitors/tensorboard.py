"""TensorBoard: scalars, the layer × expert load, generated images."""

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from coterie.parallel.monitors.base import Monitor, RunFacts
from coterie.parallel.step import StepReport

_ZOOM = 16  # generated images are a few pixels wide


class TensorBoard(Monitor):
    """Writes event files into the run's folder ``tensorboard``."""

    def __init__(self, every: int, heat_map_every: int) -> None:
        self.every = every
        self.heat_map_every = heat_map_every
        self._writer: SummaryWriter | None = None
        self._facts: RunFacts | None = None

    def start(self, facts: RunFacts) -> None:
        # points of a killed run beyond the checkpoint are dropped from view
        folder = str(facts.folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=facts.first_step + 1)
        self._facts = facts

    def step(self, report: StepReport) -> None:
        assert self._writer is not None and self._facts is not None, "start() comes first"
        last = report.step == self._facts.steps
        if report.step % self.every == 0 or last:
            for name, value in _scalars(report).items():
                self._writer.add_scalar(name, value, report.step)
        if report.load and (report.step % self.heat_map_every == 0 or last):
            self._writer.add_image("load", heat_map(report.load), report.step, dataformats="HWC")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        assert self._writer is not None, "start() comes first"
        for name, value in metrics.items():
            self._writer.add_scalar(f"held_out/{name}", value, step)

    def images(self, step: int, images: dict[str, npt.NDArray[np.int64]]) -> None:
        assert self._writer is not None and self._facts is not None, "start() comes first"
        for prompt, image_HW in images.items():
            grey_HW = (image_HW * 255 // (self._facts.image_levels - 1)).astype(np.uint8)
            large_HW = grey_HW.repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1)
            self._writer.add_image(f"generated/{prompt}", large_HW, step, dataformats="HW")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _scalars(report: StepReport) -> dict[str, float]:
    return {
        "train/loss": report.loss,
        **{f"router/{name}": value for name, value in report.router_losses.items()},
        **{f"router/entropy/layer {layer}": value for layer, value in report.entropy.items()},
        "router/skew": report.skew,
        "router/dropped": sum(report.dropped.values()),
        "train/grad_norm": report.grad_norm,
        "train/lr": report.lr,
        "train/tokens_per_second": report.tokens / report.seconds,
    }


def heat_map(load: dict[int, list[int]]) -> npt.NDArray[np.uint8]:
    """A picture, (H, W, 3): layers down, experts across, rows over the layer's even share.

    Layers may have different numbers of experts; the missing ones stay white.
    """
    experts = max(map(len, load.values()))
    share_LE = np.full((len(load), experts), np.nan)
    for row, rows in enumerate(load.values()):
        share_LE[row, : len(rows)] = np.array(rows) * len(rows) / max(1, sum(rows))
    figure = Figure(figsize=(2 + 0.35 * min(experts, 64), 1.2 + 0.35 * len(load)), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(share_LE, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", title="rows / even share")
    axes.set_yticks(range(len(load)), [str(layer) for layer in load])
    figure.colorbar(drawn)
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
