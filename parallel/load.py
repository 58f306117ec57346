"""The load of a layer's experts over all ranks, in one step or over several."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerLoad:
    """What the experts of one layer had to do; loads of several steps add with ``+``."""

    rows_ME: Counts
    """Rows of each modality for each expert."""
    dropped_E: Counts
    """Rows that each expert refused because it was over capacity."""
    tokens_M: Counts
    """Tokens of each modality, without padding."""
    unrouted_M: Counts
    """Of these, tokens that no expert had."""
    rows_R: Counts
    """Rows for each rank of the layer's pipeline stage: the expert-parallel ranks in order, one
    group of them after the other. Ranks that split the width of the same experts count as one."""
    entropy: float
    """Of the routing probabilities, mean over tokens, nats."""

    def __add__(self, other: "LayerLoad") -> "LayerLoad":
        tokens, more = int(self.tokens_M.sum()), int(other.tokens_M.sum())
        total = self.entropy * tokens + other.entropy * more
        return LayerLoad(
            self.rows_ME + other.rows_ME,
            self.dropped_E + other.dropped_E,
            self.tokens_M + other.tokens_M,
            self.unrouted_M + other.unrouted_M,
            self.rows_R + other.rows_R,
            total / max(1, tokens + more),
        )

    @property
    def rows_E(self) -> Counts:
        """Rows for each expert."""
        return self.rows_ME.sum(0)

    @property
    def rows(self) -> int:
        """All rows."""
        return int(self.rows_ME.sum())

    @property
    def dropped(self) -> int:
        """All rows over capacity."""
        return int(self.dropped_E.sum())

    @property
    def unrouted(self) -> int:
        """All tokens that no expert had."""
        return int(self.unrouted_M.sum())

    @property
    def dead(self) -> int:
        """Experts without a row."""
        return int((self.rows_E == 0).sum())

    @property
    def skew(self) -> float:
        """Rows of the busiest expert over the mean; 1 when balanced."""
        return _over_mean(self.rows_E)

    @property
    def rank_skew(self) -> float:
        """Rows of the busiest rank over the mean; 1 when balanced."""
        return _over_mean(self.rows_R)


class LoadWindow:
    """Adds up the loads of steps until they are taken."""

    def __init__(self) -> None:
        self.steps = 0
        """How many are in it."""
        self._layers: dict[int, LayerLoad] = {}

    def add(self, layers: Mapping[int, LayerLoad]) -> None:
        """Those of a step, by layer."""
        self.steps += 1
        for layer, load in layers.items():
            self._layers[layer] = self._layers[layer] + load if layer in self._layers else load

    def take(self) -> dict[int, LayerLoad]:
        """The sums by layer; the window is empty afterwards."""
        taken, self._layers, self.steps = self._layers, {}, 0
        return taken


def _over_mean(rows: Counts) -> float:
    return float(rows.max() * rows.size / max(1, rows.sum()))
