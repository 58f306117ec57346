"""What a step saw: summed over micro-batches on each rank, then over ranks, each thing once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.comm.reduce import sum_over
from coterie.data import MODALITIES
from coterie.models import DecoderConfig
from coterie.moe.stats import LayerStats
from coterie.parallel.distributed import Ranks
from coterie.parallel.load import LayerLoad


class Tally:
    """This rank's sums, brought to all ranks in one reduction.

    Every rank has the same entries, also those that other stages of the pipeline fill.
    """

    def __init__(self, config: DecoderConfig, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self.numbers: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64, device=ranks.device)
            for name in (
                "stop",
                "loss",
                "tokens",
                "exchange.ranks",
                "exchange.counts",
                "exchange.exposed",
                *(f"router.{name}" for name in config.loss_names),
            )
        }
        self.layers: dict[int, Tensor] = {
            layer: torch.zeros(
                _counts(config.experts_of(layer)) + 1, dtype=torch.float64, device=ranks.device
            )
            for layer in range(config.layers)
            if config.is_moe(layer)
        }
        """Counts in the order of ``_counted``, then the entropy."""

        fused = config.moe is not None and config.moe.exchange.kind == "fused"
        self.waits_2W = torch.zeros(
            2, ranks.world if fused else 0, dtype=torch.float64, device=ranks.device
        )
        """Seconds that this rank's launches waited for each rank: for its rows, for its end."""

    def count(self, name: str, value: Tensor | float) -> None:
        """Add to one of the numbers."""
        self.numbers[name] += value.detach() if isinstance(value, Tensor) else value

    def wait(self, members: list[int], seconds_2R: Tensor | None) -> None:
        """Add what this rank's launches waited for the ranks ``members``."""
        if seconds_2R is not None:
            self.waits_2W[:, members] += seconds_2R

    def routing(self, losses: dict[str, Tensor], stats: dict[int, LayerStats]) -> None:
        """Add what the layers report of one micro-batch."""
        for name, value in losses.items():
            self.count(f"router.{name}", value)
        for layer, seen in stats.items():
            sums = self.layers[layer]
            sums[:-1] += _counted(seen)
            sums[-1] += seen.entropy

    def over_ranks(self) -> "Totals":
        """The sums over all ranks, on the host. All ranks call."""
        own = {layer: self._with_ranks(layer, sums) for layer, sums in self.layers.items()}
        parts = [value.view(1) for value in self.numbers.values()]
        parts += [self.waits_2W.view(-1), *own.values()]
        values = sum_over(torch.cat(parts), self._ranks.everyone).cpu().numpy()
        count = len(self.numbers)
        numbers, waits, counts = np.split(values, [count, count + self.waits_2W.numel()])
        named = dict(zip(self.numbers, numbers.tolist(), strict=True))
        ends = np.cumsum([sums.numel() for sums in own.values()])[:-1]
        layers = {
            layer: _load(of_layer, self._config.experts_of(layer))
            for layer, of_layer in zip(own, np.split(counts, ends), strict=False)
        }
        return Totals(named, layers, waits.reshape(2, -1))

    def _with_ranks(self, layer: int, sums: Tensor) -> Tensor:
        """``sums``, then the rows that this rank's tokens give each rank of its stage."""
        layout, place = self._ranks.layout, self._ranks.place
        groups = layout.expert_replicate * layout.expert_shard
        rows_GR = sums.new_zeros(groups, layout.ep)
        load_ME = sums[: len(MODALITIES) * self._config.experts_of(layer)]
        group = place.expert_replicate * layout.expert_shard + place.expert_shard
        rows_GR[group] = load_ME.view(len(MODALITIES), layout.ep, -1).sum((0, 2))
        return torch.cat([sums, rows_GR.view(-1)])


@dataclass(frozen=True)
class Totals:
    """The sums of a step over all ranks."""

    numbers: dict[str, float]
    layers: dict[int, LayerLoad]
    waits_2W: npt.NDArray[np.float64]
    """As in ``Tally``; W counts the ranks of the run, if they have such launches, else none."""

    @property
    def router_losses(self) -> dict[str, float]:
        """By name."""
        prefix = "router."
        return {
            name.removeprefix(prefix): value
            for name, value in self.numbers.items()
            if name.startswith(prefix)
        }


def _counted(seen: LayerStats) -> Tensor:
    """int64: all counts of a layer in a row."""
    return torch.cat([seen.load_ME.view(-1), seen.dropped_E, seen.tokens_M, seen.unrouted_M])


def _counts(experts: int) -> int:
    """How many these are."""
    modalities = len(MODALITIES)
    return modalities * experts + experts + 2 * modalities


def _load(values: npt.NDArray[np.float64], experts: int) -> LayerLoad:
    """What a layer's sums say."""
    modalities = len(MODALITIES)
    sizes = [modalities * experts, experts, modalities, modalities, 1]
    rows, dropped, tokens, unrouted, entropy, ranks = np.split(values, np.cumsum(sizes))
    return LayerLoad(
        rows.astype(np.int64).reshape(modalities, experts),
        dropped.astype(np.int64),
        tokens.astype(np.int64),
        unrouted.astype(np.int64),
        ranks.astype(np.int64),
        float(entropy[0] / max(1.0, tokens.sum())),
    )
