"""What a step saw: summed over micro-batches on each rank, then over ranks, each thing once."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from coterie.comm.reduce import sum_over
from coterie.models import DecoderConfig
from coterie.moe.stats import RoutingStats
from coterie.parallel.distributed import Ranks


class Tally:
    """This rank's sums, brought to all ranks in one reduction.

    Every rank has the same entries, also those that other stages of the pipeline fill.
    """

    def __init__(self, config: DecoderConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self.numbers: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64, device=ranks.device)
            for name in (
                "stop",
                "loss",
                "tokens",
                *(f"router.{name}" for name in config.loss_names),
            )
        }
        layers = [layer for layer in range(config.layers) if config.is_moe(layer)]
        self.layers: dict[int, Tensor] = {
            layer: torch.zeros(
                config.experts_of(layer) + 3, dtype=torch.float64, device=ranks.device
            )
            for layer in layers
        }

    def count(self, name: str, value: Tensor | float) -> None:
        """Add to one of the numbers."""
        self.numbers[name] += value.detach() if isinstance(value, Tensor) else value

    def routing(self, losses: dict[str, Tensor], stats: dict[int, RoutingStats]) -> None:
        """Add what the routers of one micro-batch report."""
        for name, value in losses.items():
            self.count(f"router.{name}", value)
        for layer, seen in stats.items():
            sums = (seen.load_E, seen.dropped_E.sum(), seen.tokens, seen.entropy)
            self.layers[layer] += torch.cat([part.double().view(-1) for part in sums])

    def over_ranks(self) -> "Totals":
        """The sums over all ranks, on the host. All ranks call."""
        parts = [value.view(1) for value in self.numbers.values()] + list(self.layers.values())
        values = sum_over(torch.cat(parts), self._ranks.everyone).tolist()
        numbers = dict(zip(self.numbers, values, strict=False))
        rest = iter(values[len(numbers) :])
        layers = {
            layer: _layer(list(islice(rest, sums.numel()))) for layer, sums in self.layers.items()
        }
        return Totals(numbers, layers)


@dataclass(frozen=True)
class LayerTotals:
    """What a layer's router saw."""

    load: list[int]
    """Rows for each expert."""
    dropped: int
    """Rows over capacity."""
    entropy: float
    """Mean over tokens, nats."""


@dataclass(frozen=True)
class Totals:
    """The sums of a step over all ranks."""

    numbers: dict[str, float]
    layers: dict[int, LayerTotals]

    @property
    def router_losses(self) -> dict[str, float]:
        """By name."""
        prefix = "router."
        return {
            name.removeprefix(prefix): value
            for name, value in self.numbers.items()
            if name.startswith(prefix)
        }


def _layer(values: list[float]) -> LayerTotals:
    *load, dropped, tokens, entropy = values
    return LayerTotals([int(rows) for rows in load], int(dropped), entropy / max(1.0, tokens))
