"""Token-choice top-k routing: Switch, GShard-like, Mixtral, Qwen3-MoE, DeepSeek-V3 scores."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.comm.axis import Axes, Axis
from coterie.core.random import uniform
from coterie.csrc.gate import gate
from coterie.moe.assignment import Assignment, count, from_choices, kept
from coterie.moe.losses import global_counts, sequence_balance, switch_balance, z_loss
from coterie.moe.routers.base import BaseRouterConfig, Router, Routing
from coterie.moe.routers.capacity import within_shared_capacity
from coterie.moe.stats import RoutingStats
from coterie.moe.tokens import TokenInfo


class TopKConfig(BaseRouterConfig):
    """Each token chooses the k experts with the highest scores."""

    kind: Literal["top_k"] = "top_k"
    """Which router."""
    k: int = Field(default=2, ge=1)
    """Experts for each token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Scores from logits: softmax over the experts, or an independent sigmoid for each."""
    renormalise: bool = True
    """Divide the k chosen scores by their sum."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the combine weights (DeepSeek-V3: routed_scaling_factor)."""
    groups: int = Field(default=1, ge=1)
    """Experts in this many equal groups; a token chooses inside its best `top_groups` of them."""
    top_groups: int = Field(default=1, ge=1)
    """Groups a token may choose from (DeepSeek-V3: topk_group)."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Rows an expert takes from a sequence, as a multiple of the even share; null: no limit."""
    drop: Literal["position", "score"] = "position"
    """Of rows over capacity, keep those first in the sequence, or those with the highest score."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of the Switch balance loss."""
    z_loss: float = Field(default=1e-3, ge=0)
    """Coefficient of the router z-loss."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training, multiply the router's input by noise uniform in [1 - jitter, 1 + jitter)."""
    bias_update: float | None = Field(default=None, ge=0)
    """Choose by score + bias, weigh by score; after each step the bias of an expert with less than
    the mean load grows by this, of one with more it falls (DeepSeek-V3: 0.001); null: no bias."""
    sequence_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the balance loss inside each sequence (DeepSeek-V3: 0.0001)."""

    @model_validator(mode="after")
    def _consistent(self) -> "TopKConfig":
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups {self.top_groups} must be at most groups {self.groups}")
        if self.bias_update and self.capacity_factor is not None and self.capacity_factor <= 1:
            raise ValueError(
                f"bias_update needs a capacity_factor above 1 or null, not {self.capacity_factor}: "
                "with it no expert would ever be seen to have more than the mean"
            )
        return self

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that the router returns in training."""
        named = {
            "balance": self.balance_loss,
            "sequence": self.sequence_loss,
            "z": self.z_loss,
        }
        return tuple(name for name, coefficient in named.items() if coefficient)

    @property
    def causal(self) -> bool:
        """Not where a later token with a higher score may take a token's place."""
        return self.capacity_factor is None or self.drop == "position"

    @property
    def rows_per_token(self) -> float:
        return self.k

    @property
    def weight_sum(self) -> float | None:
        return self.scale if self.renormalise else None

    def check(self, num_experts: int) -> None:
        if num_experts % self.groups:
            raise ValueError(f"{num_experts} experts do not divide into {self.groups} groups")
        self.check_k(self.k, num_experts)
        if self.groups > 1 and num_experts // self.groups < 2:
            raise ValueError(
                f"groups are ranked by their two best experts, but {num_experts} experts in "
                f"{self.groups} groups leave one for each"
            )

    def check_k(self, k: int, num_experts: int) -> None:
        eligible = num_experts // self.groups * self.top_groups
        if k > eligible:
            raise ValueError(f"k {k} exceeds the {eligible} experts a token may choose from")
        if k < 1:
            raise ValueError(f"k {k} must be at least 1")

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        return TopKRouter(width, num_experts, self, axes.data, axes.sequence)


class TopKRouter(Router):
    """Logits x·W, scores, the k best experts of each token.

    ``data``: the ranks whose tokens make up the global micro-batch; the balance statistics are
    counted over them. ``sequence``: those that hold parts of the same sequences; capacity is
    counted over whole ones.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        config: TopKConfig,
        data: Axis = Axis("data"),
        sequence: Axis = Axis("sequence"),
    ) -> None:
        super().__init__()
        config.check(num_experts)
        self.config = config
        self.data = data
        self.sequence = sequence
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias: nn.Parameter | None = None
        if config.bias_update is not None:
            self.bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        config = self.config
        k = config.k if info.k is None else info.k
        config.check_k(k, self.num_experts)
        # autocast would round the logits to half precision, and near-ties would change experts
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD, info)
            expert_TK, weight_TK, score_TE = gate(
                logits_TE,
                k,
                score=config.score,
                bias_E=self._biases(),
                renormalise=config.renormalise,
                scale=config.scale,
                groups=config.groups,
                top_groups=config.top_groups,
            )
            chosen_TK = keep_TK = kept(expert_TK, info.padding_T)
            if config.capacity_factor is not None:
                keep_TK = within_shared_capacity(
                    expert_TK,
                    weight_TK.detach(),
                    info,
                    self.sequence,
                    self.num_experts,
                    config.capacity_factor,
                    by_score=config.drop == "score",
                )
            assignment = from_choices(expert_TK, weight_TK, self.num_experts, keep_TK)
            chosen_E = assignment.load_E
            if config.capacity_factor is not None:
                chosen = expert_TK.flatten() if chosen_TK is None else expert_TK[chosen_TK]
                chosen_E = count(chosen, self.num_experts)
            return self._with_losses(assignment, expert_TK, chosen_E, logits_TE, score_TE, info)

    def updates(self, load_E: Tensor) -> dict[str, Tensor]:
        """b += u · sign(mean load - load) (DeepSeek-V3, arXiv 2412.19437, §2.1.2)."""
        if not self.config.bias_update:
            return {}
        load_E = load_E.double()
        return {"bias": self.config.bias_update * (load_E.mean() - load_E).sign()}

    def _logits(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        x_TD = x_TD.to(self.weight.dtype)
        if self.training and self.config.jitter and info.key_T is not None:
            noise_TD = uniform(info.key_T, x_TD.shape[1], double=x_TD.dtype == torch.float64)
            x_TD = x_TD * (1 + self.config.jitter * (2 * noise_TD - 1))
        return x_TD @ self.weight.t()

    def _biases(self) -> Tensor | None:
        """What is added to the scores for the choice alone."""
        return self.bias

    def _with_losses(
        self,
        assignment: Assignment,
        expert_TK: Tensor,
        chosen_E: Tensor,
        logits_TE: Tensor,
        score_TE: Tensor,
        info: TokenInfo,
    ) -> Routing:
        config, padding_T = self.config, info.padding_T
        prob_TE = score_TE
        if config.score == "sigmoid":
            prob_TE = score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)
        if padding_T is not None:
            prob_TE = prob_TE.masked_fill(padding_T[:, None], 0.0)
            tokens = (~padding_T).sum()
        else:
            tokens = torch.full((), prob_TE.shape[0], dtype=torch.int64, device=prob_TE.device)

        losses: dict[str, Tensor] = {}
        if self.training and (config.balance_loss or config.z_loss):
            load_total_E, tokens_total = global_counts(chosen_E, tokens, self.data.group)
            if config.balance_loss:
                balance = switch_balance(prob_TE, load_total_E, tokens_total, expert_TK.shape[1])
                losses["balance"] = config.balance_loss * balance
            if config.z_loss:
                losses["z"] = config.z_loss * z_loss(logits_TE, padding_T, tokens_total)
        if self.training and config.sequence_loss:
            losses["sequence"] = config.sequence_loss * sequence_balance(
                prob_TE, expert_TK, info.sequence_T, padding_T, self.sequence, self.data
            )
        stats = RoutingStats(
            load_E=assignment.load_E,
            dropped_E=chosen_E - assignment.load_E,
            tokens=tokens,
            entropy=torch.special.entr(prob_TE.detach()).sum(),
        )
        return Routing(assignment, losses, stats)
