"""Draw what a run of configs/quickstart.yaml looked like: losses, drawn digits, expert load.

    python docs/quickstart_figure.py runs/quickstart docs/images/quickstart.png

Losses and loads are read from the run's metrics.jsonl, the digits from its TensorBoard files.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_LINES = {"text": "tab:blue", "image": "tab:orange"}
_AVERAGED = 10
"""Reports that the last heat map adds up: one step is noisy."""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("out", type=Path, help="the PNG file to write")
    arguments = parser.parse_args()
    steps, evaluations = read_metrics(arguments.run / "metrics.jsonl")
    if not steps:
        print(f"{arguments.run / 'metrics.jsonl'} holds no step yet", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    compose(steps, evaluations, last_images(arguments.run / "tensorboard"), arguments.out)
    return 0


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training steps, evaluations), in order."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "held_out/loss" in r]


def last_images(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The newest image of each prompt, (H, W) grey, by prompt, in the order drawn first."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    prefix = "generated/"
    tags = [tag for tag in events.Tags()["images"] if tag.startswith(prefix)]
    pictures = {tag: events.Images(tag)[-1].encoded_image_string for tag in tags}
    return {
        tag.removeprefix(prefix): np.asarray(Image.open(io.BytesIO(png)).convert("L"))
        for tag, png in pictures.items()
    }


def compose(
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    images: dict[str, npt.NDArray[np.uint8]],
    out: Path,
) -> None:
    """One figure: the losses at the left, digits above expert loads at the right."""
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    columns: Any = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    left, right = columns
    _draw_losses(left.subplots(), steps, evaluations)
    top, bottom = right.subfigures(2, 1, height_ratios=[1.35, 1])
    if images:
        _draw_images(top.subplots(2, -(-len(images) // 2), squeeze=False), images)
    top.suptitle("drawn after the last step, one sample for each caption", fontsize=9)
    _draw_loads(bottom, steps)
    figure.savefig(out)


def _draw_losses(
    axes: Axes, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]
) -> None:
    axes.plot(
        [r["step"] for r in steps], [r["loss"] for r in steps], color="0.6", lw=1, label="training"
    )
    at = [r["step"] for r in evaluations]
    axes.plot(at, [r["held_out/loss"] for r in evaluations], "ko-", ms=5, label="held-out")
    for name, colour in _LINES.items():
        key = f"held_out/loss/{name}"
        if all(key in r for r in evaluations):
            axes.plot(at, [r[key] for r in evaluations], ".--", color=colour, label=f"… {name}")
    if evaluations:
        last = evaluations[-1]
        axes.annotate(
            f"{last['held_out/loss']:.3f}",
            (last["step"], last["held_out/loss"]),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", xlim=(0, 1.08 * steps[-1]["step"]))
    axes.set_title("loss", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_images(grid: Any, images: dict[str, npt.NDArray[np.uint8]]) -> None:
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (prompt, picture_HW) in zip(grid.flat, sorted_prompts(images), strict=False):
        axes.imshow(picture_HW, cmap="gray", vmin=0, vmax=255)
        axes.set_title(prompt, fontsize=8, pad=2)


def sorted_prompts(
    images: dict[str, npt.NDArray[np.uint8]],
) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """By the digit that is asked for; other prompts last, by name."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    place = {f"a digit {name}": number for number, name in enumerate(names)}
    return sorted(images.items(), key=lambda item: (place.get(item[0], len(place)), item[0]))


def _draw_loads(figure: Any, steps: list[dict[str, Any]]) -> None:
    with_load = [r for r in steps if r["load"]]
    if not with_load:
        return
    grid = figure.subplots(1, 2, sharey=True)
    for axes, records in zip(grid, (with_load[:1], with_load[-_AVERAGED:]), strict=True):
        layers = list(records[0]["load"])
        rows_LE = np.sum([[r["load"][layer] for layer in layers] for r in records], axis=0)
        share_LE = rows_LE / rows_LE.mean(axis=1, keepdims=True)
        drawn = axes.imshow(share_LE, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
        first, last = records[0]["step"], records[-1]["step"]
        when = f"step {first}" if first == last else f"steps {first}–{last}"
        axes.set_title(f"expert load, {when}", fontsize=9)
        axes.set(xlabel="expert", xticks=range(share_LE.shape[1]))
        axes.set_yticks(range(len(layers)), layers)
    grid[0].set_ylabel("layer")
    figure.colorbar(drawn, ax=grid, label="rows / even share")


if __name__ == "__main__":
    sys.exit(main())
