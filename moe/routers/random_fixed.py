"""SMoE-Dropout (arXiv 2303.01610): a random router that never learns, and k that grows.

Experts cannot agree with a router that is fixed on a division of labour that leaves most of them
idle, and a model trained with ever more of them can be run with any number (self-slimmable).
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.csrc.gate import gate
from coterie.moe.assignment import from_choices, kept
from coterie.moe.routers.base import Router, Routing, TokenChoiceConfig
from coterie.moe.stats import routing_stats
from coterie.moe.tokens import TokenInfo

Schedule = Literal["constant", "linear", "cosine", "exponential", "multi_step"]


class RandomFixedConfig(TokenChoiceConfig):
    """A random router that is not trained, with more and more experts for each token
    (SMoE-Dropout)."""

    kind: Literal["random_fixed"] = "random_fixed"
    """Which router."""
    first_k: int = Field(default=1, ge=1)
    """Experts for each token when training begins."""
    k: int = Field(default=2, ge=1)
    """Experts for each token when it ends, and in evaluation."""
    schedule: Schedule = "linear"
    """How k goes from `first_k` to `k`: in even steps; fast at first (cosine, exponential); doubled
    at even intervals (multi_step); constant: `k` throughout."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the combine weights. They sum to one: experts that are slices of one trained
    feed-forward layer need their number."""

    @model_validator(mode="after")
    def _growing(self) -> Self:
        if self.first_k > self.k:
            raise ValueError(f"first_k {self.first_k} must be at most k {self.k}")
        return self

    @property
    def rows_per_token(self) -> float:
        return self.k

    @property
    def weight_sum(self) -> float | None:
        return self.scale

    def check(self, num_experts: int) -> None:
        self.check_k(self.k, num_experts)

    def k_at(self, step: int, steps: int) -> int:
        """As the authors' code has it; a half is rounded to the even neighbour."""
        first, last = self.first_k, self.k
        match self.schedule:
            case "constant":
                k = last
            case "linear":
                k = round((last - first) * step / steps) + first
            case "cosine":
                k = round((first - last) * math.cos(math.pi * step / (2 * steps))) + last
            case "exponential":  # .99 to the 300th is small; shorter runs decay as far as they get
                k = round((first - last) * 0.99 ** (step // max(1, steps // 300))) + last
            case "multi_step":
                doublings = math.ceil(math.log2(last / first))
                k = first * 2 ** (step * (doublings + 1) // steps)
        return min(max(k, first), last)

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        return RandomFixedRouter(width, num_experts, self)


class RandomFixedRouter(Router):
    """The k largest of x·W, and softmax over these k; W is frozen, the gradient goes to x."""

    def __init__(self, width: int, num_experts: int, config: RandomFixedConfig) -> None:
        super().__init__()
        config.check(num_experts)
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, width), requires_grad=False)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        k = self.config.k if info.k is None else info.k
        self.config.check_k(k, self.num_experts)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = x_TD.to(self.weight.dtype) @ self.weight.t()
            expert_TK, weight_TK, score_TE = gate(logits_TE, k, scale=self.config.scale)
            keep_TK = kept(expert_TK, info.padding_T)
            assignment = from_choices(expert_TK, weight_TK, self.num_experts, keep_TK)
            stats = routing_stats(assignment, score_TE.detach(), info.padding_T)
        return Routing(assignment, {}, stats)
