"""The shapes and dtypes of the native ops' results, for torch.compile and fake tensors."""

import torch
from torch import Tensor


@torch.library.register_fake("coterie::permute")
def _permute(x: Tensor, token: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_empty(token.shape[0], x.shape[1])


@torch.library.register_fake("coterie::unpermute")
def _unpermute(x: Tensor, weight: Tensor | None, row: Tensor, offset: Tensor) -> Tensor:
    return x.new_empty(offset.shape[0] - 1, x.shape[1])


@torch.library.register_fake("coterie::unpermute_backward")
def _unpermute_backward(
    dy: Tensor, x: Tensor, weight: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("coterie::invert")
def _invert(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    return token.new_empty(token.shape[0]), token.new_empty(num_tokens + 1)


@torch.library.register_fake("coterie::sort_by_expert")
def _sort_by_expert(expert: Tensor, num_experts: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return expert.new_empty(expert.shape[0]), expert.new_empty(num_experts)


@torch.library.register_fake("coterie::gate")
def _gate(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    expert = logits.new_empty(logits.shape[0], k, dtype=torch.int64)
    return expert, logits.new_empty(logits.shape[0], k), logits.new_empty(logits.shape)


@torch.library.register_fake("coterie::gate_backward")
def _gate_backward(
    dweight: Tensor | None,
    dscore: Tensor | None,
    score: Tensor,
    expert: Tensor,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
) -> Tensor:
    return score.new_empty(score.shape)


@torch.library.register_fake("coterie::swiglu")
def _swiglu(h: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@torch.library.register_fake("coterie::swiglu_backward")
def _swiglu_backward(da: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(da.shape)
