"""Hash layers (arXiv 2106.04426): a token's id says its experts; nothing is learned."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.comm.axis import Axes
from coterie.core.random import fold, uniform
from coterie.moe.assignment import from_choices, kept
from coterie.moe.routers.base import Router, Routing, TokenChoiceConfig
from coterie.moe.stats import routing_stats
from coterie.moe.tokens import TokenInfo


class HashConfig(TokenChoiceConfig):
    """Experts by a random hash of the token's id (hash layers)."""

    kind: Literal["hash"] = "hash"
    """Which router."""
    k: int = Field(default=1, ge=1)
    """Experts for each token, all different, each with weight 1 / k."""
    seed: int = Field(default=0, ge=0)
    """Of the hash."""

    @property
    def sees_activations(self) -> bool:
        return False

    @property
    def rows_per_token(self) -> float:
        return self.k

    @property
    def weight_sum(self) -> float | None:
        return 1.0

    def check(self, num_experts: int) -> None:
        self.check_k(self.k, num_experts)

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        return HashRouter(num_experts, self)


class HashRouter(Router):
    """A token id's experts are those with the largest of E random numbers that it is the key of."""

    def __init__(self, num_experts: int, config: HashConfig) -> None:
        super().__init__()
        config.check(num_experts)
        self.config = config
        self.num_experts = num_experts

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        if info.token_T is None:
            raise ValueError("a hash router needs the token_T of its tokens: their ids")
        k = self.config.k if info.k is None else info.k
        self.config.check_k(k, self.num_experts)
        number_TE = uniform(fold(info.token_T, "hash", self.config.seed), self.num_experts)
        expert_TK = number_TE.topk(k, dim=-1).indices
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        weight_TK = torch.full(expert_TK.shape, 1 / k, dtype=dtype, device=x_TD.device)
        keep_TK = kept(expert_TK, info.padding_T)
        assignment = from_choices(expert_TK, weight_TK, self.num_experts, keep_TK)
        prob_TE = torch.zeros(number_TE.shape, dtype=dtype, device=x_TD.device)
        prob_TE.scatter_(1, expert_TK, 1 / k)
        return Routing(assignment, {}, routing_stats(assignment, prob_TE, info.padding_T))
