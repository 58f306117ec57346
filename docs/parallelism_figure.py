"""The picture of docs/parallelism.md: sixteen ranks, and who shares what with whom.

python docs/parallelism_figure.py docs/images/parallelism.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from coterie.parallel.layout import Layout

LAYOUT = Layout(pp=2, dp_shard=2, cp=2, tp=2, ep=2, etp=2)
SHOWN = {
    "tp": "tp: heads, feed-forward width,\nvocabulary",
    "sequence": "cp × tp: parts of the same\nsequences",
    "shard": "dp_shard × cp: shards of\ndense parameters",
    "pp": "pp: stages of the pipeline",
    "expert": "ep × etp: rows travel to\nexperts and their slices",
    "expert_shard": "shards of expert\nparameters",
}


def draw(ax: Axes, axis: str, title: str) -> None:
    """A square for each rank, one colour for each group of ``axis``."""
    groups = LAYOUT.groups(axis).tolist()
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, members in enumerate(groups):
        for rank in members:
            row, column = divmod(rank, 8)
            colour = colours[2 * number % 20 + (2 * number // 20) % 2]
            ax.add_patch(plt.Rectangle((column, -row), 0.9, 0.9, color=colour))
            ax.text(column + 0.45, 0.45 - row, str(rank), ha="center", va="center", fontsize=8)
    ax.set_title(f"{title}", fontsize=9)
    ax.set_xlim(-0.1, 8)
    ax.set_ylim(-1.1, 1)
    ax.set_aspect("equal")
    ax.axis("off")


def main(path: Path) -> None:
    """Write the picture."""
    figure, grid = plt.subplots(2, 3, figsize=(10.5, 3.4))
    for ax, (axis, title) in zip(grid.flat, SHOWN.items(), strict=True):
        draw(ax, axis, title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
