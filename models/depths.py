"""Mixture of depths (arXiv 2404.02258): blocks that only some tokens of a sequence pass.

A router scores the tokens of each sequence; those with the highest scores pass the block's
attention and feed-forward layer, x + g · f(x), attention seeing no others, and the rest skip it.
Which scores are the highest depends on later tokens too. So a predictor, trained beside, says from
a token alone whether its is one of them; with it evaluation and generation are causal.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.comm.sequence import (
    all_context_positions,
    context_part,
    gather,
    reduce_scatter,
    sequence_part,
)
from coterie.core.config import Config
from coterie.moe.routers.auxiliary import AuxiliaryRouter, foresight, foresight_loss
from coterie.moe.routers.competition import best
from coterie.moe.routers.config import RouterConfig
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.stats import LayerStats
from coterie.moe.tokens import TokenInfo


class BlockOutput(NamedTuple):
    """The result of a block."""

    x: Tensor
    """Activations (B, S, D)."""
    losses: dict[str, Tensor]
    """Router losses by name: this rank's shares, coefficients applied."""
    stats: LayerStats | None
    """What its experts saw; None: it has none."""
    foresight: tuple[Tensor, ...]
    """How well auxiliary routers foresaw each choice that they did not make
    (:func:`coterie.moe.routers.auxiliary.foresight`)."""
    router_state: Tensor | None
    """What the next block's router is to be told (B, S, R)."""


Inside = Callable[[Tensor, TokenInfo, Tensor | None, Tensor], BlockOutput]
"""A block's layers: activations, facts of their tokens, documents of whole sequences, and positions
of context-parallel ranks' tokens (B, C / cp) → their result."""


class MixtureOfDepthsConfig(Config):
    """Blocks that only the tokens with the highest scores pass."""

    capacity: float = Field(default=0.25, gt=0, le=1)
    """Part of a sequence's tokens that pass: ⌊capacity · tokens⌋ of each sequence, padding not
    counted, but at least one."""
    every: int = Field(default=2, ge=1)
    """One block in so many is such a block."""
    first: int = Field(default=0, ge=0)
    """The first of them, from 0."""
    score: Literal["sigmoid", "linear"] = "sigmoid"
    """What multiplies the block's result, of the router's r = x · w: sigmoid(r) (MoMa), or r (as
    first published)."""
    predictor: bool = False
    """Train, beside all else, a predictor of which tokens pass, by a loss of its own (its gradients
    reach nothing else, but count in the norm that `optimizer.clip` limits); evaluation and
    generation then ask it, token by token. Without it they too take the highest scores, which
    depend on later tokens."""
    auxiliary: bool = False
    """The model's second stage: the same predictor is trained while all else stays as it is.
    `coterie train RUN --stage aux` sets it."""

    @property
    def causal(self) -> bool:
        """Whether, in evaluation, what passes is chosen without a look at later tokens."""
        return self.foresees

    @property
    def foresees(self) -> bool:
        """Whether there is a predictor."""
        return self.predictor or self.auxiliary

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that such blocks return in training."""
        return ("depth_predictor",) if self.foresees else ()

    def check(self, layers: int, router: RouterConfig | None) -> None:
        """Raise ``ValueError`` when a model of ``layers`` whose experts have ``router`` cannot have
        such blocks."""
        if self.first >= layers:
            raise ValueError(
                f"mixture_of_depths.first is {self.first}, but layers are 0 to {layers - 1}"
            )
        if router is not None and router.carried:
            raise ValueError(
                "mixture_of_depths needs moe.router.depth_average false: tokens that skip a block "
                "have nothing to tell the next router"
            )
        capacity = router.capacity_factor if isinstance(router, TopKConfig) else None
        if self.foresees and capacity is not None:
            raise ValueError(
                f"moe.router.capacity_factor is {capacity:g}, but with mixture_of_depths it must "
                "be null for a model that is causal: how many tokens an expert may have would "
                "depend on how many later ones pass the block"
            )

    def chooses(self, layer: int) -> bool:
        """Whether block ``layer`` is such a block."""
        return layer >= self.first and (layer - self.first) % self.every == 0

    def places(self, length: int, tp: int = 1, cp: int = 1) -> int:
        """C: how many tokens of a sequence of ``length`` the block computes in training; rounded up
        to what so many ranks can split."""
        return _rounded(max(1, int(self.capacity * length + 1e-9)), tp, cp)


def _rounded(places: int, tp: int, cp: int) -> int:
    unit = tp * cp * (2 if cp > 1 else 1)
    return -(-places // unit) * unit


class Depths(nn.Module):
    """Chooses tokens, takes them through a block's layers, and adds g · f(x) to each.

    f(x) is what the layers add to x: with g = 1 and all tokens it is the plain block. Over ``axes``
    the chosen tokens of a sequence are spread evenly over the ranks that hold parts of it.
    """

    def __init__(self, width: int, config: MixtureOfDepthsConfig, axes: Axes = Axes()) -> None:
        super().__init__()
        self.config, self.axes = config, axes
        self.weight_D = nn.Parameter(torch.empty(width))
        self.predictor = AuxiliaryRouter(width, 1) if config.foresees else None

    def forward(
        self, x_BSD: Tensor, info: TokenInfo, document_BS: Tensor | None, inside: Inside
    ) -> BlockOutput:
        """``x_BSD`` and ``info``: of this rank's tokens; ``document_BS``: of whole sequences."""
        whole = whole_sequences(info, x_BSD, self.axes)
        with torch.autocast(x_BSD.device.type, enabled=False):
            score_BS = x_BSD.to(self.weight_D.dtype) @ self.weight_D
            asked_BS = None if self.predictor is None else self.predictor(x_BSD).squeeze(-1)
        foretold_BS = None if self.training or info.by_choice else asked_BS
        chosen_BS = self._chosen(score_BS, foretold_BS, whole)
        passing = self._passing(chosen_BS, fixed=foretold_BS is None)

        own_BC = sequence_part(passing.token_BC, self.axes.cp, self.axes.tp)
        passes_T = sequence_part(passing.passes_BC, self.axes.cp, self.axes.tp).flatten()
        own = whole.map(lambda x_T: x_T.view_as(chosen_BS).gather(1, own_BC).flatten())
        if document_BS is not None:
            document_BS = document_BS.gather(1, passing.token_BC)
        position_BC = context_part(passing.token_BC, self.axes.cp)
        courier = Courier(passing, x_BSD.shape[1], self.axes)
        taken_BCD = courier.bring(x_BSD)
        inner = inside(taken_BCD, replace(own, padding_T=~passes_T), document_BS, position_BC)
        gate_BS = score_BS.sigmoid() if self.config.score == "sigmoid" else score_BS
        result_BSD = courier.add(x_BSD, gate_BS, inner.x - taken_BCD)
        losses, seen = inner.losses, inner.foresight
        if asked_BS is not None and foretold_BS is None:
            pairs = self._pairs(asked_BS, chosen_BS, info.padding_T)
            if self.training:
                losses = {**losses, "depth_predictor": foresight_loss(*pairs, self.axes.data)}
            else:
                seen = (*seen, foresight(*pairs))
        return BlockOutput(result_BSD, losses, inner.stats, seen, None)

    @torch.no_grad()
    def _chosen(self, score_BS: Tensor, foretold_BS: Tensor | None, whole: TokenInfo) -> Tensor:
        """bool (B, S), by position in whole sequences: the tokens that pass, those with the highest
        scores or those that the predictor says."""
        ranked_BS = _by_position(score_BS if foretold_BS is None else foretold_BS, self.axes)
        open_BS = torch.ones_like(ranked_BS, dtype=torch.bool)
        if whole.padding_T is not None:
            open_BS = ~whole.padding_T.view_as(ranked_BS)
        if foretold_BS is not None or not len(ranked_BS):
            return open_BS & (ranked_BS > 0)
        share_B = ranked_BS.new_full((len(ranked_BS),), self.config.capacity, dtype=torch.float64)
        return best(ranked_BS.float(), open_BS, share_B)

    def _passing(self, chosen_BS: Tensor, fixed: bool) -> "Passing":
        """The tokens that pass in their order, then others up to a number of places, ``fixed`` or
        as many as a sequence needs."""
        count_B = chosen_BS.sum(1)
        rows, length = chosen_BS.shape
        tp, cp = self.axes.tp.size, self.axes.cp.size
        places = self.config.places(length, tp, cp)
        if not fixed:
            places = _rounded(max(1, int(count_B.max())) if rows else 1, tp, cp)
        token_BC = (~chosen_BS).long().argsort(dim=1, stable=True)[:, :places]
        passes_BC = torch.arange(places, device=chosen_BS.device) < count_B[:, None]
        return Passing(token_BC, passes_BC)

    def _pairs(
        self, asked_BS: Tensor, chosen_BS: Tensor, padding_T: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of this rank's tokens: what the predictor says, what is right, and which ones count."""
        right_BS = sequence_part(chosen_BS, self.axes.cp, self.axes.tp)
        open_BS = torch.ones_like(right_BS)
        if padding_T is not None:
            open_BS = ~padding_T.view_as(right_BS)
        return asked_BS, right_BS, open_BS


@dataclass(frozen=True)
class Passing:
    """Which tokens of whole sequences have a place in the block; the same on all ranks that hold
    parts of them."""

    token_BC: Tensor
    """int64: the token's position in its sequence."""
    passes_BC: Tensor
    """bool: False for a token that only fills its place, and skips the block."""


class Courier:
    """Brings tokens from where they are to where the block computes them, and back.

    Each rank of ``axes.sequence`` puts its own tokens in their places among all C, with zeros
    elsewhere; a reduce-scatter adds these up and leaves each rank its part. Back, all C are
    gathered, and each rank takes its own. ``length``: positions of a sequence on this rank.
    """

    def __init__(self, passing: Passing, length: int, axes: Axes) -> None:
        self.sequence = axes.sequence
        token_BC, device = passing.token_BC, passing.token_BC.device
        # ranks hold positions, and get places, in this order
        order_S = all_context_positions(length * self.sequence.size, axes.cp, device)
        order_C = all_context_positions(token_BC.shape[1], axes.cp, device)
        column_BC = order_S.argsort()[token_BC[:, order_C]]
        mine_BC = column_BC // length == self.sequence.rank
        self.column_BC1 = torch.where(mine_BC, column_BC % length, 0)[..., None]
        self.away_BC1 = ~mine_BC[..., None]
        self.skips_BC1 = ~(mine_BC & passing.passes_BC[:, order_C])[..., None]

    def bring(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) of this rank's positions → (B, C, D) of its places."""
        x_BCD = x_BSD.gather(1, self.column_BC1.expand(-1, -1, x_BSD.shape[2]))
        if self.sequence.size == 1:
            return x_BCD
        return reduce_scatter(x_BCD.masked_fill(self.away_BC1, 0.0), 1, self.sequence)

    def add(self, x_BSD: Tensor, gate_BS: Tensor, f_BCD: Tensor) -> Tensor:
        """``x_BSD`` plus, for the tokens that pass, ``gate_BS`` times what their places hold."""
        f_BCD = gather(f_BCD, 1, self.sequence)
        y_BCD = gate_BS.gather(1, self.column_BC1[..., 0])[..., None] * f_BCD
        y_BCD = y_BCD.to(x_BSD.dtype).masked_fill(self.skips_BC1, 0.0)
        return x_BSD.scatter_add(1, self.column_BC1.expand_as(y_BCD), y_BCD)


def whole_sequences(info: TokenInfo, x_BSD: Tensor, axes: Axes) -> TokenInfo:
    """Of the sequences that ranks of ``axes.sequence`` hold parts of, the facts of all tokens, by
    position: (B · S). ``x_BSD``: this rank's activations, for their shape."""
    if axes.sequence.size == 1:
        return info
    parts = [fact for fact in vars(info).values() if isinstance(fact, Tensor)]
    if not parts:
        return info
    facts_BSN = torch.stack([part.view(x_BSD.shape[:2]).long() for part in parts], -1)
    whole = iter(_by_position(facts_BSN, axes).unbind(-1))
    return info.map(lambda part: next(whole).flatten().to(part.dtype))


def _by_position(x: Tensor, axes: Axes) -> Tensor:
    """(B, S, …) of this rank → of whole sequences, in the order of their positions."""
    x = gather(x, 1, axes.sequence)
    if axes.cp.size == 1:
        return x
    return x[:, all_context_positions(x.shape[1], axes.cp, x.device).argsort()]
