"""Expert choice (arXiv 2202.09368): each expert takes the tokens that score highest with it.

Every expert has the same number of rows, so nothing needs balancing; a token may have none or
many. Which tokens are taken depends on all others, later ones too: the loss is not that of a causal
model.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.core.random import uniform
from coterie.moe.assignment import Assignment, count
from coterie.moe.routers.base import BaseRouterConfig, Router, Routing
from coterie.moe.routers.competition import chosen
from coterie.moe.stats import routing_stats
from coterie.moe.tokens import TokenInfo


class ExpertChoiceSettings(BaseRouterConfig):
    """What all routers have in common whose experts choose."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Scores from logits: softmax over a token's experts, or an independent sigmoid for each."""
    capacity_factor: float = Field(default=1.0, gt=0)
    """Experts of a token, on average: an expert takes ⌊capacity_factor · tokens / experts⌋ tokens,
    but at least one."""
    scope: Literal["global", "rank"] = "global"
    """Tokens compete in the whole micro-batch, over all ranks (the numbers are the same in every
    layout), or only on their rank."""
    noise: bool = False
    """In training, add Gumbel noise to the logits (Gumbel-sigmoid; needs `score: sigmoid`)."""

    @model_validator(mode="after")
    def _noise(self) -> Self:
        if self.noise and self.score != "sigmoid":
            raise ValueError("noise needs score sigmoid, not softmax")
        return self

    @property
    def rows_per_token(self) -> float:
        return self.capacity_factor


class ExpertChoiceConfig(ExpertChoiceSettings):
    """Each expert chooses the tokens with the highest scores (expert choice)."""

    kind: Literal["expert_choice"] = "expert_choice"
    """Which router."""

    def check(self, num_experts: int) -> None:
        if self.capacity_factor > num_experts:
            raise ValueError(
                f"capacity_factor {self.capacity_factor:g} exceeds the {num_experts} experts "
                "that a token can have"
            )

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        self.check(num_experts)
        return ExpertChoiceRouter(width, (0,) * num_experts, self, axes)


class ExpertChoiceRouter(Router):
    """Logits x·W, scores, and for each expert its best tokens among those of its group.

    ``group_E``: the group of each expert, from 0. Experts of one group compete for a token's
    softmax and share the group's tokens. Here all are one group.
    """

    def __init__(
        self,
        width: int,
        groups: tuple[int, ...],
        config: ExpertChoiceSettings,
        axes: Axes = Axes(),
    ) -> None:
        super().__init__()
        self.config = config
        self.axes = axes
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(len(groups), width))

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        if info.k is not None:
            self.config.check_k(info.k, len(self.groups))
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD, info)
            open_TE = self._open(x_TD, info)
            score_TE, rank_TE = self._scores(logits_TE, open_TE)
            each_E = self._share(open_TE.device)
            chosen_ET = chosen(rank_TE, open_TE, each_E, info, self.axes, self.config.scope)
            expert_A, token_A = chosen_ET.nonzero(as_tuple=True)
            assignment = Assignment(
                token_A=token_A,
                expert_A=expert_A,
                weight_A=score_TE[token_A, expert_A],
                load_E=count(expert_A, len(self.groups)),
            )
            seen_TE = score_TE.detach().masked_fill(~open_TE, 0.0)
            prob_TE = seen_TE / (seen_TE.sum(-1, keepdim=True) + 1e-20)
            stats = routing_stats(assignment, prob_TE, info.padding_T)
        return Routing(assignment, {}, stats)

    def group_of(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        """int64 (T,): the group of experts that each token belongs to."""
        return torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)

    def _logits(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        logits_TE = x_TD.to(self.weight.dtype) @ self.weight.t()
        if self.training and self.config.noise and info.key_T is not None:
            logits_TE = logits_TE + _logistic(info.key_T, logits_TE)
        return logits_TE

    def _open(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        """bool (T, E): the tokens that an expert may take."""
        group_E = torch.tensor(self.groups, device=x_TD.device)
        open_TE = self.group_of(x_TD, info)[:, None] == group_E
        if info.padding_T is not None:
            open_TE = open_TE & ~info.padding_T[:, None]
        return open_TE

    def _scores(self, logits_TE: Tensor, open_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Combine weights, and what experts rank tokens by: in the same order as the weights, but
        without their underflow and saturation."""
        if self.config.score == "sigmoid":
            return logits_TE.sigmoid(), logits_TE.detach()
        # padding has no open expert: leave its row finite
        shut_TE = ~open_TE & open_TE.any(1, keepdim=True)
        log_TE = logits_TE.masked_fill(shut_TE, -torch.inf).log_softmax(-1)
        return log_TE.exp(), log_TE.detach()

    def _share(self, device: torch.device) -> Tensor:
        """float64 (E,): the part of its group's tokens that an expert takes."""
        sizes = [self.groups.count(group) for group in self.groups]
        sizes_E = torch.tensor(sizes, dtype=torch.float64, device=device)
        return self.config.capacity_factor / sizes_E


def _logistic(key_T: Tensor, like_TE: Tensor) -> Tensor:
    """The difference of two Gumbel(0, 1) numbers, which is Logistic(0, 1), by token and expert."""
    double = like_TE.dtype == torch.float64
    digits = 53 if double else 24
    u_TE = uniform(key_T, like_TE.shape[1], double=double) + 2.0 ** -(digits + 1)  # not zero
    return (u_TE.log() - (1 - u_TE).log()).to(like_TE.dtype)
