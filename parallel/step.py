"""One optimizer step: micro-batches forward and backward, gradients summed, checked, clipped."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.comm.reduce import sum_over
from coterie.data import IGNORE, Batch
from coterie.models import Decoder
from coterie.moe.stats import RoutingStats
from coterie.parallel.distributed import Ranks
from coterie.parallel.finite import require_finite
from coterie.parallel.gradients import clip, global_norm, sum_gradients
from coterie.parallel.micro_batch import cross_entropy_sum, token_info
from coterie.parallel.precision import Precision, autocast


@dataclass(frozen=True)
class StepReport:
    """What a step saw, over all ranks."""

    step: int
    """The step just taken, from 1."""
    loss: float
    """Cross-entropy, nats per target token."""
    router_losses: dict[str, float]
    """Summed over layers, mean over micro-batches, coefficients applied."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Tokens without padding."""
    load: dict[int, list[int]]
    """Rows for each expert, by layer."""
    dropped: dict[int, int]
    """Rows over capacity, by layer."""
    entropy: dict[int, float]
    """Mean entropy of the routing probabilities by layer, nats."""
    seconds: float
    stop: bool
    """Some rank was asked to stop."""

    @property
    def skew(self) -> float:
        """Load of the busiest expert over the mean load, in the worst layer; 1 when balanced."""
        ratios = [max(rows) * len(rows) / max(1, sum(rows)) for rows in self.load.values()]
        return max(ratios, default=1.0)


@dataclass(frozen=True)
class StepSettings:
    """What a step needs besides model, optimizer and data."""

    precision: Precision
    clip: float | None
    seed: int


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    step: int,
    ranks: Ranks,
    settings: StepSettings,
    stop: bool = False,
) -> StepReport:
    """Take step number ``step`` (from 1) on this rank's part of the global batch.

    The loss is Σ cross-entropy / targets of the global batch + router losses averaged over the
    micro-batches: what one process with the whole batch would compute.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the weights are untouched.
    """
    started = time.perf_counter()
    tally = _accumulate(model, batches, ranks, settings, stop)
    sum_gradients(model, ranks)
    norm = global_norm(model, ranks)
    total = tally.over(ranks)
    require_finite(
        total.loss, float(norm), step, model, batches, ranks, settings.precision, settings.seed
    )
    if settings.clip is not None:
        clip(model, norm, settings.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.report(step, float(norm), optimizer, time.perf_counter() - started)


def _accumulate(
    model: Decoder, batches: list[Batch], ranks: Ranks, settings: StepSettings, stop: bool
) -> "_Tally":
    """Forward and backward over the micro-batches; gradients add up in the parameters."""
    targets = torch.stack([(b.targets_BS != IGNORE).sum() for b in batches]).sum()
    targets = sum_over(targets, ranks.data_group).clamp(min=1)
    tally = _Tally(stop, ranks.device)
    for batch in batches:
        with autocast(settings.precision, ranks.device):
            output = model(batch.tokens_BS, token_info(batch, settings.seed))
            entropy = cross_entropy_sum(output.logits_BSV, batch.targets_BS) / targets
        router = {name: loss / len(batches) for name, loss in output.losses.items()}
        torch.stack(
            [entropy, *(loss.to(entropy.dtype) for loss in router.values())]
        ).sum().backward()
        tally.add(entropy, router, output.stats, batch)
    return tally


class _Tally:
    """This rank's sums over the micro-batches, brought to all ranks in one reduction."""

    def __init__(self, stop: bool, device: torch.device) -> None:
        self.numbers: dict[str, Tensor] = {"stop": torch.tensor(float(stop), device=device)}
        self.stats: dict[int, RoutingStats] = {}

    def add(
        self, loss: Tensor, router: dict[str, Tensor], stats: dict[int, RoutingStats], batch: Batch
    ) -> None:
        self._count("loss", loss)
        self._count("tokens", (~batch.padding_BS).sum())
        for name, value in router.items():
            self._count(f"router.{name}", value)
        for layer, seen in stats.items():
            self.stats[layer] = self.stats[layer] + seen if layer in self.stats else seen

    def _count(self, name: str, value: Tensor) -> None:
        value = value.detach().to(torch.float64)
        self.numbers[name] = self.numbers[name] + value if name in self.numbers else value

    def over(self, ranks: Ranks) -> "_Totals":
        """The sums over all ranks, on the host."""
        parts = [value.to(torch.float64).view(1) for value in self.numbers.values()]
        for seen in self.stats.values():
            sums = (seen.load_E, seen.dropped_E.sum(), seen.tokens, seen.entropy)
            parts += [part.to(torch.float64).view(-1) for part in sums]
        values = sum_over(torch.cat(parts), ranks.data_group).tolist()
        numbers = dict(zip(self.numbers, values, strict=False))
        place = len(self.numbers)
        layers: dict[int, _LayerTotals] = {}
        for layer, seen in self.stats.items():
            experts = seen.load_E.numel()
            load, rest = values[place : place + experts], values[place + experts :]
            layers[layer] = _LayerTotals([int(rows) for rows in load], *rest[:3])
            place += experts + 3
        return _Totals(numbers, layers)


@dataclass(frozen=True)
class _LayerTotals:
    load: list[int]
    dropped: float
    tokens: float
    entropy: float


@dataclass(frozen=True)
class _Totals:
    numbers: dict[str, float]
    layers: dict[int, _LayerTotals]

    @property
    def loss(self) -> float:
        return self.numbers["loss"]

    def report(
        self, step: int, norm: float, optimizer: torch.optim.Optimizer, seconds: float
    ) -> StepReport:
        prefix = "router."
        return StepReport(
            step=step,
            loss=self.loss,
            router_losses={
                name.removeprefix(prefix): value
                for name, value in self.numbers.items()
                if name.startswith(prefix)
            },
            grad_norm=norm,
            lr=optimizer.param_groups[0]["lr"],
            tokens=int(self.numbers["tokens"]),
            load={layer: seen.load for layer, seen in self.layers.items()},
            dropped={layer: int(seen.dropped) for layer, seen in self.layers.items()},
            entropy={n: seen.entropy / max(1.0, seen.tokens) for n, seen in self.layers.items()},
            seconds=seconds,
            stop=self.numbers["stop"] > 0,
        )
