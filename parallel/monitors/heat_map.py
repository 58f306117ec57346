"""Pictures of the load: layers down, experts or ranks across.

Drawn with Pillow, in a millisecond or two: all ranks wait while rank 0 reports.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from coterie.parallel.load import LayerLoad

if TYPE_CHECKING:  # slow to import: only where something is drawn
    from matplotlib.colors import Colormap

Picture = npt.NDArray[np.uint8]
"""(H, W, 3)."""

_HIGH = 22  # pixels of a cell
_WIDE = range(8, 31)  # of which a cell has as many as fit into _WIDTH
_WIDTH = 1280
_LEFT, _TOP, _RIGHT, _BOTTOM = 46, 26, 86, 36
_INK = (40, 40, 40)


def heat_map(rows: Mapping[int, npt.ArrayLike], across: str = "expert") -> Picture:
    """Rows over the layer's even share, by layer; a cross marks what had none.

    Layers may have different numbers of experts; the missing ones stay white.
    """
    share = {}
    for layer, given in rows.items():
        rows_E = np.asarray(given, dtype=np.float64)
        share[layer] = rows_E * rows_E.size / max(1.0, rows_E.sum())
    return _draw(share, across, "rows / even share", "coolwarm", 2.0, cross_zero=True)


def dropped_map(layers: Mapping[int, LayerLoad]) -> Picture:
    """Rows over capacity, of those that wanted to go to the expert."""
    share = {
        layer: load.dropped_E / np.maximum(1, load.rows_E + load.dropped_E)
        for layer, load in layers.items()
    }
    return _draw(share, "expert", "dropped / wanted", "Reds", 1.0)


def unrouted_map(layers: Mapping[int, LayerLoad], modalities: tuple[str, ...]) -> Picture:
    """Tokens that no expert had, of all tokens of a modality."""
    share = {
        layer: load.unrouted_M / np.maximum(1, load.tokens_M) for layer, load in layers.items()
    }
    return _draw(share, ", ".join(modalities), "unrouted / tokens", "Reds", 1.0)


def _draw(
    values: Mapping[int, npt.NDArray[np.float64]],
    across: str,
    title: str,
    colours: str,
    most: float,
    cross_zero: bool = False,
) -> Picture:
    """``most`` has the last of the ``colours`` (a colour map of matplotlib's), and so has more."""
    from matplotlib import colormaps

    columns = max(map(len, values.values()))
    wide = min(max(_WIDTH // columns, _WIDE.start), _WIDE.stop - 1)
    right, bottom = _LEFT + columns * wide, _TOP + len(values) * _HIGH
    image = Image.new("RGB", (max(right, 160) + _RIGHT, max(bottom, 90) + _BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 6), title, fill=_INK)
    colour = colormaps[colours]
    for row, (layer, value_E) in enumerate(values.items()):
        y = _TOP + row * _HIGH
        draw.text((_LEFT - 8, y + _HIGH // 2), str(layer), fill=_INK, anchor="rm")
        shade_E3 = np.round(np.array(colour(value_E / most))[:, :3] * 255).astype(int)
        for place, shade in enumerate(shade_E3.tolist()):
            x = _LEFT + place * wide
            draw.rectangle((x, y, x + wide - 2, y + _HIGH - 2), fill=tuple(shade))
            if cross_zero and value_E[place] == 0:
                _cross(draw, x + wide // 2 - 1, y + _HIGH // 2 - 1)
    every = -(-columns * 24 // (columns * wide))
    for place in range(0, columns, every):
        draw.text((_LEFT + place * wide + wide // 2, bottom + 8), str(place), _INK, anchor="mm")
    draw.text((_LEFT, bottom + 18), f"{across} (layers down)", fill=_INK)
    _legend(draw, max(right, 160) + 20, colour, most)
    return np.asarray(image)


def _cross(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for slope in (1, -1):
        draw.line((x - 3, y - 3 * slope, x + 3, y + 3 * slope), fill="white")


def _legend(draw: ImageDraw.ImageDraw, x: int, colour: "Colormap", most: float) -> None:
    for line in range(64):
        shade = tuple(round(255 * part) for part in colour(1 - line / 63)[:3])
        draw.line((x, _TOP + line, x + 12, _TOP + line), fill=shade)
    for part in (0.0, 0.5, 1.0):
        draw.text((x + 18, _TOP + 63 * (1 - part)), f"{part * most:g}", fill=_INK, anchor="lm")
