"""Counts and stable sort by expert: the order in which choices become rows."""

import torch
from torch import Tensor

from coterie.csrc import loader

_MOST_EXPERTS = 1024  # that the CUDA kernel has counters for


def sort_by_expert(
    expert_A: Tensor, num_experts: int, keep_A: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(order_A, load_E), both int64: choices sorted by expert, equals in the order they had, and
    how many each expert has. Differentiates nothing; never waits for a GPU.

    expert_A: int64, expert ids below ``num_experts``. keep_A: bool; choices that are not kept come
    last, in their order, and are not counted: ``order_A[:load_E.sum()]`` is without them.

    Beyond 1024 experts plain PyTorch runs. Raises ValueError for shapes or dtypes that do not fit.
    An id out of range raises RuntimeError on the CPU and stops the kernel on a GPU.
    """
    if expert_A.dim() != 1 or expert_A.dtype != torch.int64:
        raise ValueError(
            f"expert_A must be int64 with 1 dimension, got {expert_A.dtype} of shape "
            f"{tuple(expert_A.shape)}"
        )
    if keep_A is not None and (keep_A.shape != expert_A.shape or keep_A.dtype != torch.bool):
        raise ValueError(
            f"keep_A must be bool of shape {tuple(expert_A.shape)}, got {keep_A.dtype} of shape "
            f"{tuple(keep_A.shape)}"
        )
    if num_experts > _MOST_EXPERTS:
        return loader.twin("sort_by_expert")(expert_A, num_experts, keep_A)
    return loader.kernel("sort_by_expert", expert_A.device.type)(expert_A, num_experts, keep_A)
