"""A router that is a small network and hears what the router before it computed (ZAYA1)."""

from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axes, Axis
from coterie.moe.assignment import Assignment
from coterie.moe.routers.base import Router, Routing
from coterie.moe.routers.top_k import TopKConfig, TopKRouter
from coterie.moe.tokens import TokenInfo

SKIP_BIAS = -1.0
"""What the choice of skipping has added to its probability, always."""


class MLPConfig(TopKConfig):
    """Each token chooses the k experts that a small network of depth-averaged features scores
    highest (ZAYA1); all else as for `top_k`, jitter being of the last layer's input."""

    kind: Literal["mlp"] = "mlp"  # type: ignore[assignment]
    """Which router."""
    k: int = Field(default=1, ge=1)
    """Experts for each token."""
    renormalise: bool = False
    """Divide the k chosen scores by their sum."""
    hidden: int = Field(default=256, ge=1)
    """Width R of its features."""
    depth_average: bool = True
    """Add the features of the mixture-of-experts layer before, times a learned vector."""
    skip: bool = False
    """One more choice beside the experts, which gives a token nothing; its bias is -1. Needs
    `bias_update`."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """RMSNorm's epsilon."""

    @model_validator(mode="after")
    def _skips(self) -> Self:
        if self.skip and self.groups > 1:
            raise ValueError(
                f"skip is a choice beside all experts: groups must be 1, not {self.groups}"
            )
        if self.skip and self.bias_update is None:
            raise ValueError(
                "skip needs bias_update: its bias is -1, and only experts whose biases have "
                "fallen as low leave it a token"
            )
        return self

    @property
    def weight_sum(self) -> float | None:
        return None if self.skip else super().weight_sum

    @property
    def carried(self) -> int:
        return self.hidden if self.depth_average else 0

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        return MLPRouter(width, num_experts, self, axes.data, axes.sequence)


class MLPRouter(TopKRouter):
    """r = W_down x + γ ⊙ r of the layer before; logits W (gelu W₂ (gelu W₁ norm(r))).

    :meth:`state` computes r, ``forward`` finds it in the tokens' info. With ``config.skip`` the
    last logit is that of skipping: for capacity and losses an expert like others, but its rows are
    left out in the end.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        config: MLPConfig,
        data: Axis = Axis("data"),
        sequence: Axis = Axis("sequence"),
    ) -> None:
        super().__init__(config.hidden, num_experts + config.skip, config, data, sequence)
        self.skip = config.skip
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self.down = nn.Linear(width, config.hidden)
        self.depth_R = nn.Parameter(torch.empty(config.hidden)) if config.depth_average else None
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.first = nn.Linear(config.hidden, config.hidden)
        self.second = nn.Linear(config.hidden, config.hidden)

    def state(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        """r (T, R); ``info``: with that of the layer before, if there is one."""
        with torch.autocast(x_TD.device.type, enabled=False):
            state_TR = self.down(x_TD.to(self.weight.dtype))
            if self.depth_R is not None and info.router_state_TR is not None:
                state_TR = state_TR + self.depth_R * info.router_state_TR
            return state_TR

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        routing = super().forward(x_TD, info)
        return _without_last(routing) if self.skip else routing

    def _logits(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        if info.router_state_TR is None:
            raise ValueError("an MLP router needs its own state in router_state_TR")
        hidden_TR = F.gelu(self.first(self.norm(info.router_state_TR)))
        return super()._logits(F.gelu(self.second(hidden_TR)), info)

    def _biases(self) -> Tensor | None:
        if self.bias is None or not self.skip:
            return self.bias
        return F.pad(self.bias, (0, 1), value=SKIP_BIAS)


def _without_last(routing: Routing) -> Routing:
    """The same without the last expert's rows, which are at the end; nothing of it is counted."""
    rows, stats = routing.assignment, routing.stats
    kept = rows.token_A.numel() - int(rows.load_E[-1])
    load_E = rows.load_E[:-1]
    return Routing(
        Assignment(rows.token_A[:kept], rows.expert_A[:kept], rows.weight_A[:kept], load_E),
        routing.losses,
        replace(stats, load_E=load_E, dropped_E=stats.dropped_E[:-1]),
    )
