"""The plain rival of :mod:`coterie.moe.routers.kmeans`: a linear gate that is trained by gradient.

Top-1 as in Switch (arXiv 2101.03961): the output is multiplied by the winner's probability, which
is the only way a gradient has to the gate.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from coterie.core.config import Config
from coterie.core.random import generator
from coterie.moe.assignment import from_choices, kept
from coterie.moe.routers.base import Router, Routing
from coterie.moe.stats import RoutingStats
from coterie.moe.tokens import TokenInfo


class GradientConfig(Config):
    """One expert for each environment, chosen by a gate that is trained with the experts."""

    kind: Literal["gradient"] = "gradient"
    """Which router."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that the router returns in training: none."""
        return ()


class GradientRouter(Router):
    """Logits [ξ, 1]·W of contexts ξ (E environments × D), softmax over M experts, the best one."""

    def __init__(self, width: int, num_experts: int, seed: int = 0) -> None:
        super().__init__()
        self.num_experts = num_experts
        shape, gen = (width + 1, num_experts), generator("gradient gate", seed)
        draws = 2 * torch.rand(*shape, generator=gen, dtype=torch.float64) - 1
        self.weight = nn.Parameter((draws * (width + 1) ** -0.5).to(torch.get_default_dtype()))

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        """Route contexts ``x_TD``."""
        expert_T1 = self.experts_of(x_TD)[:, None]
        keep_T1 = kept(expert_T1, info.padding_T)
        weight_T1 = self.weights_of(x_TD, expert_T1[:, 0])[:, None]
        assignment = from_choices(expert_T1, weight_T1, self.num_experts, keep_T1)
        load_E = assignment.load_E
        entropy_T = torch.special.entr(self._probabilities(x_TD).detach()).sum(-1)
        if info.padding_T is not None:
            entropy_T = entropy_T[~info.padding_T]
        stats = RoutingStats(load_E, torch.zeros_like(load_E), load_E.sum(), entropy_T.sum())
        return Routing(assignment, {}, stats)

    @torch.no_grad()
    def experts_of(self, context_ED: Tensor) -> Tensor:
        """int64: the expert of each context."""
        return self._probabilities(context_ED).argmax(-1)

    def weights_of(self, context_ED: Tensor, expert_E: Tensor) -> Tensor:
        """The probability of each environment's expert, with gradient."""
        return self._probabilities(context_ED).gather(1, expert_E[:, None])[:, 0]

    def _probabilities(self, context_ED: Tensor) -> Tensor:
        return (context_ED @ self.weight[:-1] + self.weight[-1]).softmax(-1)
