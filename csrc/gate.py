"""Top-k gating: from logits to the chosen experts, their combine weights, and all scores."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coterie.csrc import loader

Score = Literal["softmax", "sigmoid"]
_MOST_EXPERTS, _MOST_CHOICES, _MOST_GROUPS = 512, 64, 32  # that the CUDA kernel takes


class Gate(NamedTuple):
    """What each token chose; K choices in descending order, of equals the lower id first."""

    expert_TK: Tensor  # int64, K different experts for each token
    weight_TK: Tensor  # the combine weights, of the logits' dtype
    score_TE: Tensor  # of the logits' dtype; for softmax the probabilities


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        k: int,
        sigmoid: bool,
        renormalise: bool,
        scale: float,
        groups: int,
        top_groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _way("gate", logits_TE, k, groups)
        expert_TK, weight_TK, score_TE = run(
            logits_TE, bias_E, k, sigmoid, renormalise, scale, groups, top_groups
        )
        ctx.save_for_backward(score_TE, expert_TK)
        ctx.settings = sigmoid, renormalise, scale
        ctx.mark_non_differentiable(expert_TK)
        ctx.set_materialize_grads(False)
        return expert_TK, weight_TK, score_TE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _: None, dweight_TK: Tensor | None, dscore_TE: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        score_TE, expert_TK = ctx.saved_tensors
        run = _way("gate_backward", score_TE, expert_TK.shape[1])
        dlogits_TE = run(dweight_TK, dscore_TE, score_TE, expert_TK, *ctx.settings)
        return dlogits_TE, *7 * [None]


def gate(
    logits_TE: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> Gate:
    """Each token's k best experts by score + bias, weighed by their scores.

    logits_TE: float32, float64, bfloat16 or float16. score: softmax over the E experts, or a
    sigmoid for each. bias_E: of the logits' dtype, for the choice alone, no gradient. renormalise:
    divide the k scores by their sum. scale: factor on the weights. groups: of experts; a token
    chooses inside the ``top_groups`` whose two best together are best (DeepSeek-V3, arXiv
    2412.19437, §2.1.2). Weights and scores are differentiable.

    Beyond 512 experts, 64 choices or 32 groups plain PyTorch runs. Raises ValueError for shapes or
    numbers that do not fit.
    """
    if logits_TE.dim() != 2:
        raise ValueError(f"logits_TE must have 2 dimensions, got {logits_TE.dim()}")
    experts = logits_TE.shape[1]
    if bias_E is not None and (bias_E.shape != (experts,) or bias_E.dtype != logits_TE.dtype):
        raise ValueError(
            f"bias_E must hold {experts} numbers of {logits_TE.dtype}, got {bias_E.dtype} of shape "
            f"{tuple(bias_E.shape)}"
        )
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"groups {groups} must divide the {experts} experts, and top_groups {top_groups} be "
            "from 1 to groups"
        )
    if top_groups < groups and experts < 2 * groups:
        raise ValueError(f"{experts} experts in {groups} groups leave one for each: 2 are needed")
    if not 1 <= k <= experts // groups * top_groups:
        raise ValueError(
            f"k {k} must be from 1 to the {experts // groups * top_groups} experts that a token "
            "may choose from"
        )
    bias_E = None if bias_E is None else bias_E.detach()
    sigmoid = score == "sigmoid"
    return Gate(*_Gate.apply(logits_TE, bias_E, k, sigmoid, renormalise, scale, groups, top_groups))


def _way(op: str, x_TE: Tensor, k: int, groups: int = 1) -> Callable[..., Any]:
    """The kernel, or the twin where the kernel does not reach."""
    if x_TE.shape[1] > _MOST_EXPERTS or k > _MOST_CHOICES or groups > _MOST_GROUPS:
        return loader.twin(op)
    return loader.kernel(op, x_TE.device.type)
