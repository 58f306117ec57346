"""Sinkhorn routing (S-BASE, arXiv 2202.01169): balanced choices in training, without a loss."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.comm.axis import Axes, Axis
from coterie.comm.reduce import sum_over
from coterie.moe.assignment import from_choices, kept
from coterie.moe.routers.base import Router, Routing, TokenChoiceConfig
from coterie.moe.stats import routing_stats
from coterie.moe.tokens import TokenInfo

TOLERANCE = 1e-4
"""Scaling ends when the experts' factors change by less, on average."""
ROUNDS = 200
"""It ends then in any case; near-equal experts take tens."""


class SinkhornConfig(TokenChoiceConfig):
    """In training the k best experts after Sinkhorn's balancing of the whole micro-batch, in
    evaluation the k best (S-BASE)."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    """Which router."""
    k: int = Field(default=1, ge=1)
    """Experts for each token. Combine weights: the sigmoid of the logit where it is one, else
    the softmax over all experts."""

    @property
    def rows_per_token(self) -> float:
        return self.k

    def check(self, num_experts: int) -> None:
        self.check_k(self.k, num_experts)

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        return SinkhornRouter(width, num_experts, self, axes.data)


class SinkhornRouter(Router):
    """Logits x·W; choices from the balanced matrix (without gradient), weights from the logits.

    ``data``: the ranks whose tokens are balanced together; all of them call.
    """

    def __init__(
        self, width: int, num_experts: int, config: SinkhornConfig, data: Axis = Axis("data")
    ) -> None:
        super().__init__()
        config.check(num_experts)
        self.config = config
        self.data = data
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        k = self.config.k if info.k is None else info.k
        self.config.check_k(k, self.num_experts)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = x_TD.to(self.weight.dtype) @ self.weight.t()
            rank_TE = logits_TE.detach()
            if self.training:
                rank_TE = rank_TE + log_factors(rank_TE, info.padding_T, self.data)
            expert_TK = rank_TE.topk(k, dim=-1).indices
            # the authors' choice follows the router, not how many experts an evaluation asks for
            one = self.config.k == 1
            score_TE = logits_TE.sigmoid() if one else logits_TE.softmax(-1)
            weight_TK = score_TE.gather(1, expert_TK)
            keep_TK = kept(expert_TK, info.padding_T)
            assignment = from_choices(expert_TK, weight_TK, self.num_experts, keep_TK)
            prob_TE = logits_TE.detach().softmax(-1)
            stats = routing_stats(assignment, prob_TE, info.padding_T)
        return Routing(assignment, {}, stats)


def log_factors(logits_TE: Tensor, padding_T: Tensor | None, data: Axis) -> Tensor:
    """(E,): what to add to the logits so that softmax over experts is balanced: the logarithms of
    the experts' factors when rows of exp(logits) are scaled to 1/T and columns to 1/E in turns.

    T counts the tokens of all ranks of ``data``. A row's own factor changes no choice in it. Rows
    are shifted by their largest logit first, so that nothing overflows.
    """
    tokens, experts = logits_TE.shape
    cost_TE = (logits_TE - logits_TE.amax(-1, keepdim=True)).exp()
    counted = torch.tensor([tokens], device=logits_TE.device)
    if padding_T is not None:
        cost_TE = cost_TE.masked_fill(padding_T[:, None], 0.0)
        counted = (~padding_T).sum().view(1)
    total = sum_over(counted, data.group).clamp(min=1)
    eps = 1e-8
    factor_E = torch.ones(experts, dtype=cost_TE.dtype, device=cost_TE.device)
    for _ in range(ROUNDS):
        row_T = 1 / (total * (cost_TE @ factor_E + eps))
        column_E = sum_over(row_T @ cost_TE, data.group)
        before_E, factor_E = factor_E, 1 / (experts * (column_E + eps))
        if float((factor_E - before_E).abs().mean()) < TOLERANCE:
            break
    return factor_E.log()
