"""The mixture-of-experts layer: a router, experts, shared experts, and the exchange between."""

from dataclasses import replace
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.config import ExchangeConfig
from coterie.core.config import Config
from coterie.csrc.fused_launch import HIDDEN
from coterie.moe.assignment import sliced
from coterie.moe.experts import Experts, ExpertsConfig
from coterie.moe.feed_forward import FeedForward, FeedForwardConfig
from coterie.moe.routers.base import Router, Routing
from coterie.moe.routers.config import RouterConfig
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.stats import LayerStats, layer_stats
from coterie.moe.tokens import TokenInfo


class MoEConfig(Config):
    """A mixture-of-experts layer."""

    experts: ExpertsConfig
    """The routed experts."""
    router: RouterConfig = TopKConfig()
    """How tokens choose experts."""
    shared: FeedForwardConfig | None = None
    """Shared experts: one feed-forward layer that every token passes (n experts: n × hidden)."""
    shared_gate: bool = False
    """Scale the shared experts' output by sigmoid(x · w) (Qwen2-MoE)."""
    shared_mix: bool = False
    """Weigh the routed and the shared experts' outputs by softmax(x · W + b), two weights for each
    token (DeepSpeed's residual MoE: with `router.k` 1 and one shared expert)."""
    route_before_attention: bool = False
    """Route by the residual stream that enters the block, not normalised, rather than by the
    layer's own input: what attention does not change is known before it (SmallThinker)."""
    exchange: ExchangeConfig = ExchangeConfig()
    """How rows get to experts on other ranks, and back."""
    max_rows_factor: float | None = Field(default=2.0, ge=1.0)
    """With experts spread over ranks: up to so many times the mean over ranks a rank takes its rows
    at once; beyond that in rounds of the mean, slower but in the same memory. Null: no limit."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.router.check(self.experts.count)
        if self.exchange.kind == "fused":
            self._check_fused()
        if self.route_before_attention and not self.router.sees_activations:
            raise ValueError(
                f"route_before_attention must be false with router.kind {self.router.kind}, which "
                "does not look at activations"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate needs shared experts, but shared is null")
        if self.shared_mix and self.shared is None:
            raise ValueError("shared_mix needs shared experts, but shared is null")
        if self.shared_mix and self.shared_gate:
            raise ValueError("shared_mix and shared_gate are two ways to weigh the shared experts")
        return self

    def _check_fused(self) -> None:
        activation, hidden = self.experts.activation, self.experts.hidden
        if activation != "swiglu":
            raise ValueError(
                f"experts.activation is {activation}, but with exchange.kind fused swiglu is "
                "accepted"
            )
        if hidden % HIDDEN:
            raise ValueError(
                f"experts.hidden is {hidden}, but with exchange.kind fused multiples of {HIDDEN} "
                "are accepted"
            )


class MoEOutput(NamedTuple):
    """What a layer returns besides the activations."""

    y: Tensor
    losses: dict[str, Tensor]
    """Scalars to add to the training loss: this rank's share, coefficients applied."""
    stats: LayerStats
    router_state: Tensor | None = None
    """What the next layer's router is to be told, (..., R); see ``Router.state``."""
    foresight: tuple[Tensor, ...] = ()
    """The router's; see ``Routing.foresight``."""


class MoELayer(nn.Module):
    """Replaces a transformer's feed-forward layer.

    ``axes``: the ranks it is spread over (default: all is on this rank). Each has tokens of its
    own, and all of them call together. ``exchange``: how rows reach the experts, if not as
    ``config`` says.
    ``recompute``: keep no hidden activations, compute them again in the backward pass.
    Parameters are uninitialised until :func:`coterie.models.initialise.initialise`.
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        axes: Axes = Axes(),
        exchange: Exchange | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.axes = axes
        self.exchange: Exchange = exchange or config.exchange.over(axes, config.max_rows_factor)
        self.router: Router = config.router.build(width, config.experts.count, axes)
        self.experts = Experts(width, config.experts, axes.ep, axes.etp, recompute)
        self.shared = (
            FeedForward(width, config.shared, axes.tp, recompute) if config.shared else None
        )
        self.shared_gate_D = nn.Parameter(torch.empty(width)) if config.shared_gate else None
        self.shared_mix = nn.Linear(width, 2) if config.shared_mix else None

    def forward(
        self, x: Tensor, info: TokenInfo | None = None, route_by: Tensor | None = None
    ) -> MoEOutput:
        """``x``: (..., D), flattened to T tokens in the order of ``info``'s tensors. ``route_by``:
        what the router sees of them (same shape), if not ``x``."""
        x_TD = x.reshape(-1, x.shape[-1])
        seen_TD = x_TD if route_by is None else route_by.reshape(x_TD.shape)
        info = info or TokenInfo()
        state_TR = self.router.state(seen_TD, info)
        told = info if state_TR is None else replace(info, router_state_TR=state_TR)
        routing: Routing = self.router(seen_TD, told)
        stats = layer_stats(routing.stats, routing.assignment, info, x_TD.shape[0])
        assignment = sliced(routing.assignment, self.axes.ep.size, self.axes.etp.size)
        y_TD = self.experts.over(self.exchange, x_TD, assignment)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate_D is not None:
                shared_TD = shared_TD * (x_TD @ self.shared_gate_D).sigmoid()[:, None]
            if self.shared_mix is not None:
                weight_T2 = self.shared_mix(x_TD).softmax(-1)
                y_TD, shared_TD = y_TD * weight_T2[:, :1], shared_TD * weight_T2[:, 1:]
            y_TD = y_TD + shared_TD
        state = None if state_TR is None else state_TR.unflatten(0, x.shape[:-1])
        return MoEOutput(y_TD.view_as(x), routing.losses, stats, state, routing.foresight)
