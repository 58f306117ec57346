"""Expert choice (arXiv 2202.09368): each expert takes the tokens that score highest with it.

Every expert has the same number of rows, so nothing needs balancing; a token may have none or
many. Which tokens are taken depends on all others, later ones too: the loss is not that of a causal
model, until auxiliary routers foresee the choice (:mod:`coterie.moe.routers.auxiliary`).
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.core.random import uniform
from coterie.moe.assignment import Assignment, count
from coterie.moe.routers.auxiliary import AuxiliaryRouter, foresight, foresight_loss
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
    auxiliary: bool = False
    """The model's second stage: auxiliary routers learn to foresee from a token alone which experts
    take it, while all else stays as it is (and there is no noise); in evaluation they choose, so
    that routing is causal. `coterie train RUN --stage aux` sets it."""

    @model_validator(mode="after")
    def _noise(self) -> Self:
        if self.noise and self.score != "sigmoid":
            raise ValueError("noise needs score sigmoid, not softmax")
        return self

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("auxiliary",) if self.auxiliary else ()

    @property
    def causal(self) -> bool:
        return self.auxiliary

    @property
    def foresees(self) -> bool:
        return self.auxiliary

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
        self.auxiliary: nn.ModuleList | None = None
        if config.auxiliary:
            sizes = (groups.count(group) for group in range(max(groups) + 1))
            self.auxiliary = nn.ModuleList(AuxiliaryRouter(width, size) for size in sizes)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        if info.k is not None:
            self.config.check_k(info.k, len(self.groups))
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD, info)
            group_T = self.group_of(x_TD, info)
            open_TE = self._open(group_T, info)
            score_TE, rank_TE = self._scores(logits_TE, open_TE)
            foreseen_TE = self._foreseen(x_TD, group_T)
            losses: dict[str, Tensor] = {}
            seen: tuple[Tensor, ...] = ()
            if foreseen_TE is not None and not (self.training or info.by_choice):
                chosen_ET = ((foreseen_TE > 0) & open_TE).t()
            else:
                each_E = self._share(open_TE.device)
                chosen_ET = chosen(rank_TE, open_TE, each_E, info, self.axes, self.config.scope)
                if foreseen_TE is not None:
                    pairs = (foreseen_TE, chosen_ET.t(), open_TE)
                    losses["auxiliary"] = foresight_loss(*pairs, self.axes.data)
                    seen = (foresight(*pairs),)
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
        return Routing(assignment, losses, stats, seen)

    def group_of(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        """int64 (T,): the group of experts that each token belongs to."""
        return torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)

    def _logits(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        logits_TE = x_TD.to(self.weight.dtype) @ self.weight.t()
        noise = self.training and self.config.noise and not self.config.auxiliary
        if noise and info.key_T is not None:
            logits_TE = logits_TE + _logistic(info.key_T, logits_TE)
        return logits_TE

    def _open(self, group_T: Tensor, info: TokenInfo) -> Tensor:
        """bool (T, E): the tokens that an expert may take."""
        group_E = torch.tensor(self.groups, device=group_T.device)
        open_TE = group_T[:, None] == group_E
        if info.padding_T is not None:
            open_TE = open_TE & ~info.padding_T[:, None]
        return open_TE

    def _foreseen(self, x_TD: Tensor, group_T: Tensor) -> Tensor | None:
        """The auxiliary routers' logits (T, E), zero for experts of other groups; None: there are
        none."""
        if self.auxiliary is None:
            return None
        group_E = torch.tensor(self.groups, device=x_TD.device)
        logits_TE = x_TD.new_zeros(x_TD.shape[0], len(self.groups), dtype=self.weight.dtype)
        for group, auxiliary in enumerate(self.auxiliary):
            token_T1 = (group_T == group).nonzero()
            expert_E = (group_E == group).nonzero().view(-1)
            mine_TE = auxiliary(x_TD[token_T1.view(-1)])
            logits_TE = logits_TE.index_put((token_T1, expert_E), mine_TE)
        return logits_TE

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
