"""TensorBoard: scalars, heat maps of the load, generated images."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from coterie.data import MODALITIES
from coterie.parallel.load import LayerLoad, LoadWindow
from coterie.parallel.monitors.base import Monitor, RunFacts, due, exchange_figures
from coterie.parallel.monitors.heat_map import Picture, dropped_map, heat_map, unrouted_map
from coterie.parallel.step import StepReport

if TYPE_CHECKING:  # slow to import: only on the rank that writes
    from torch.utils.tensorboard import SummaryWriter

_ZOOM = 16  # generated images are a few pixels wide


class TensorBoard(Monitor):
    """Writes event files into the run's folder ``tensorboard``."""

    def __init__(self, every: int, heat_map_every: int) -> None:
        self.every = every
        self.heat_map_every = heat_map_every
        self._writer: SummaryWriter | None = None
        self._facts: RunFacts | None = None
        self._since_scalars, self._since_maps = LoadWindow(), LoadWindow()

    def start(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # points of a killed run beyond the checkpoint are dropped from view
        folder = str(facts.folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=facts.first_step + 1)
        self._facts = facts

    def step(self, report: StepReport) -> None:
        assert self._writer is not None and self._facts is not None, "start() comes first"
        self._since_scalars.add(report.layers)
        self._since_maps.add(report.layers)
        last = report.step == self._facts.steps
        if due(report, self.every, self._facts.steps):
            scalars = {**_scalars(report), **_load_scalars(report, self._since_scalars.take())}
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, report.step)
        if report.layers and (report.step % self.heat_map_every == 0 or last):
            for name, picture in _pictures(self._since_maps.take()):
                self._writer.add_image(name, picture, report.step, dataformats="HWC")

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
        "train/grad_norm": report.grad_norm,
        "train/lr": report.lr,
        "train/tokens_per_second": report.tokens / report.seconds,
        **exchange_figures(report),
    }


def _load_scalars(report: StepReport, window: dict[int, LayerLoad]) -> dict[str, float]:
    """Of the step, but for dead experts: those without a row in the whole ``window``."""
    loads = report.layers
    found = {
        "router/skew": report.skew,
        "router/rank_skew": report.rank_skew,
        "router/dropped": sum(load.dropped for load in loads.values()),
        "router/unrouted": sum(load.unrouted for load in loads.values()),
        "router/dead": sum(load.dead for load in window.values()),
    }
    for layer, load in loads.items():
        of_layer = {
            "entropy": load.entropy,
            "skew": load.skew,
            "rank_skew": load.rank_skew,
            "dropped": load.dropped,
            "dead": window[layer].dead,
        }
        for modality, name in enumerate(MODALITIES):
            of_layer[f"unrouted {name}"] = int(load.unrouted_M[modality])
        found |= {f"router/{name}/layer {layer}": value for name, value in of_layer.items()}
    return found


def _pictures(window: dict[int, LayerLoad]) -> Iterator[tuple[str, Picture]]:
    """Heat maps by name; what did not occur is not drawn."""
    yield "load", heat_map({layer: load.rows_E for layer, load in window.items()})
    for modality, name in enumerate(MODALITIES):
        rows = {layer: load.rows_ME[modality] for layer, load in window.items()}
        if any(rows_E.any() for rows_E in rows.values()):
            yield f"load/{name}", heat_map(rows)
    if any(load.dropped for load in window.values()):
        yield "dropped", dropped_map(window)
    if any(load.unrouted for load in window.values()):
        yield "unrouted", unrouted_map(window, MODALITIES)
    if any(load.rows_R.size > 1 for load in window.values()):
        yield "ranks", heat_map({n: load.rows_R for n, load in window.items()}, "rank")
