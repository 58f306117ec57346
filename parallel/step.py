"""One optimizer step: micro-batches forward and backward, gradients summed, checked, clipped."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.comm.reduce import sum_over
from coterie.comm.sequence import context_part
from coterie.data import IGNORE, Batch
from coterie.models import Decoder
from coterie.models.vocabulary import cross_entropy
from coterie.parallel.distributed import Ranks
from coterie.parallel.exchange_time import ExchangeClock, ExchangeTime
from coterie.parallel.finite import require_finite
from coterie.parallel.forward import through_stages
from coterie.parallel.frozen import update_frozen
from coterie.parallel.gradients import clip, global_norm, sum_gradients
from coterie.parallel.late_ranks import LateRanks, late_ranks
from coterie.parallel.load import LayerLoad
from coterie.parallel.micro_batch import token_info
from coterie.parallel.model import ParallelModel, Stage
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.pipeline import Pipeline, with_loss
from coterie.parallel.precision import Precision, autocast
from coterie.parallel.sharding import release
from coterie.parallel.tally import Tally


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
    layers: dict[int, LayerLoad]
    """What the experts had to do, by layer."""
    seconds: float
    stop: bool
    """Some rank was asked to stop."""
    exchange: ExchangeTime | None = None
    """What the exchanges between ranks took; None: all experts are on every rank."""
    late: LateRanks | None = None
    """Which ranks the fused exchange waited for; None: there is none."""

    @property
    def load(self) -> dict[int, list[int]]:
        """Rows for each expert, by layer."""
        return {layer: load.rows_E.tolist() for layer, load in self.layers.items()}

    @property
    def dropped(self) -> dict[int, int]:
        """Rows over capacity, by layer."""
        return {layer: load.dropped for layer, load in self.layers.items()}

    @property
    def entropy(self) -> dict[int, float]:
        """Mean entropy of the routing probabilities by layer, nats."""
        return {layer: load.entropy for layer, load in self.layers.items()}

    @property
    def skew(self) -> float:
        """Load of the busiest expert over the mean load, in the worst layer; 1 when balanced."""
        return max((load.skew for load in self.layers.values()), default=1.0)

    @property
    def rank_skew(self) -> float:
        """The same of the ranks that hold a layer's experts."""
        return max((load.rank_skew for load in self.layers.values()), default=1.0)


@dataclass(frozen=True)
class StepSettings:
    """What a step needs besides model, optimizer and data."""

    precision: Precision
    clip: float | None
    seed: int
    k: int | None = None
    """Experts for each token, where the router has a schedule."""
    resend: bool = False
    """Send the step's rows between ranks once more after it, to measure how long they travel."""


def train_step(
    model: ParallelModel,
    optimizer: Optimizer,
    batches: list[Batch],
    step: int,
    settings: StepSettings,
    stop: bool = False,
) -> StepReport:
    """Take step number ``step`` (from 1). ``batches``: the micro-batches of this rank's part of the
    global batch, whole sequences, the same on all ranks that share them.

    The loss is Σ cross-entropy / targets of the global batch + router losses averaged over the
    micro-batches: what one process with the whole batch would compute.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the weights are untouched.
    """
    started = time.perf_counter()
    tally = Tally(model.config, model.ranks)
    tally.count("stop", float(stop))
    targets = count_targets(batches, model.ranks)
    clock = ExchangeClock(model)
    with clock.running():
        forward_backward(model, batches, targets, settings, tally)
    clock.count(tally)
    sum_gradients(model)
    norm = global_norm(model)
    totals = tally.over_ranks()
    loss = totals.numbers["loss"]

    def again() -> None:
        forward_backward(model, batches, targets, settings, Tally(model.config, model.ranks))

    require_finite(loss, float(norm), step, model, again)
    if settings.clip is not None:
        clip(model, norm, settings.clip)
    optimizer.step()
    optimizer.zero_grad()
    if not model.config.auxiliary:
        rows = {layer: load.rows_E.tolist() for layer, load in totals.layers.items()}
        update_frozen(model, rows)
    moe = model.config.moe
    by_nodes = moe is not None and moe.exchange.route == "nodes"
    seconds = time.perf_counter() - started
    return StepReport(
        step=step,
        loss=loss,
        router_losses=totals.router_losses,
        grad_norm=float(norm),
        lr=optimizer.lr,
        tokens=int(totals.numbers["tokens"]),
        layers=totals.layers,
        seconds=seconds,
        stop=totals.numbers["stop"] > 0,
        exchange=clock.over_ranks(totals, seconds, settings.resend),
        late=late_ranks(totals, model.ranks, by_nodes),
    )


def count_targets(batches: list[Batch], ranks: Ranks) -> Tensor:
    """Target tokens of the global batch, at least 1. All ranks call."""
    targets = torch.stack([(b.targets_BS != IGNORE).sum() for b in batches]).sum()
    if ranks.axes.sequence.rank > 0:  # the first of those that share sequences counts them
        targets = torch.zeros_like(targets)
    return sum_over(targets, ranks.axes.data.group).clamp(min=1)


def forward_backward(
    model: ParallelModel,
    batches: list[Batch],
    targets: Tensor,
    settings: StepSettings,
    tally: Tally,
) -> None:
    """Both passes over all micro-batches; gradients add up in the parameters. All ranks call."""
    ranks = model.ranks
    tokens = [context_part(batch.tokens_BS, ranks.axes.cp) for batch in batches]
    job = _TrainingJob(batches, targets, settings, tally, model)
    for stage in model.each_stage():
        stage.job = job
    if model.config.auxiliary:
        for micro, batch in enumerate(batches):
            _stage_by_stage(model, batch.tokens_BS, micro)
    elif ranks.layout.pp == 1:
        (stage,) = model.each_stage()
        for micro, tokens_BS in enumerate(tokens):
            stage(tokens_BS, torch.tensor([micro])).sum().backward()
    else:
        _pipeline(model, len(batches), tokens[0]).step(torch.cat(tokens))


def _stage_by_stage(model: ParallelModel, tokens_BS: Tensor, micro: int) -> None:
    """Both passes of one micro-batch where auxiliary routers alone are trained: no gradient crosses
    from one stage to another, so that each has its backward pass right away."""

    def run(stage: Stage, x: Tensor) -> Tensor:
        y: Tensor = stage(x, torch.tensor([micro]))
        if y.requires_grad:
            y.sum().backward()
        release(stage)
        return y.detach()

    through_stages(model, tokens_BS, run)


def _pipeline(model: ParallelModel, micro_batches: int, tokens_BS: Tensor) -> Pipeline:
    """The model's pipeline for micro-batches of this shape, made once."""
    rows, positions = tokens_BS.shape
    width = model.config.width + model.config.carried
    activations = (rows, positions // model.ranks.layout.tp, width)
    key = (micro_batches, activations)
    if key not in model.pipelines:
        model.pipelines[key] = Pipeline(model, micro_batches, activations)
    return model.pipelines[key]


class _TrainingJob:
    """A stage's part of the loss of one micro-batch, counted in the tally."""

    def __init__(
        self,
        batches: list[Batch],
        targets: Tensor,
        settings: StepSettings,
        tally: Tally,
        model: ParallelModel,
    ) -> None:
        self.batches = batches
        self.targets = targets
        self.settings = settings
        self.tally = tally
        self.axes = model.ranks.axes
        self.device = model.ranks.device
        self.vocabulary = model.config.vocabulary
        # auxiliary routers learn from the choices of the finished model, without noise
        self.seed = None if model.config.auxiliary else settings.seed

    def __call__(self, decoder: Decoder, x: Tensor, micro: int) -> Tensor:
        batch = self.batches[micro]
        info = token_info(batch, self.axes, self.seed, self.settings.k)
        with autocast(self.settings.precision, self.device):
            output = decoder(x, info)
        losses = {name: loss / len(self.batches) for name, loss in output.losses.items()}
        self.tally.routing(losses, output.stats)
        if decoder.embedding is not None and self.axes.sequence.rank == 0:
            self.tally.count("tokens", (~batch.padding_BS).sum())
        router = sum(losses.values(), start=torch.zeros((), device=self.device))
        if decoder.head is None:
            return with_loss(output.x, router) if losses else output.x
        return (self._cross_entropy(output.x, batch) + router).view(1)

    def _cross_entropy(self, logits_BSV: Tensor, batch: Batch) -> Tensor:
        targets_BS = context_part(batch.targets_BS, self.axes.cp)
        each_BS = cross_entropy(logits_BSV, targets_BS, self.vocabulary, self.axes.tp)
        loss = each_BS.sum() / self.targets
        if self.axes.tp.rank == 0:  # all ranks of tp have the same
            self.tally.count("loss", loss)
        return loss
