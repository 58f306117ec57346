"""One format for every router's decision: which rows go to which expert, with which weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.csrc.sort import sort_by_expert


@dataclass(frozen=True)
class Assignment:
    """A rows sent to E experts, sorted by expert, then by token.

    Token choice, expert choice, modality groups, capacity with drops: all are an ``Assignment``,
    so every router works with every exchange. A token may appear in 0, 1 or many rows.
    """

    token_A: Tensor
    """int64: the token of each row."""
    expert_A: Tensor
    """int64, non-decreasing: the (global) expert of each row."""
    weight_A: Tensor
    """float: the combine weight; carries the router's gradient."""
    load_E: Tensor
    """int64: rows for each (global) expert; sums to A."""


def from_choices(
    expert_TK: Tensor, weight_TK: Tensor, num_experts: int, keep_TK: Tensor | None = None
) -> Assignment:
    """The assignment in which token t goes to its K chosen experts.

    ``expert_TK`` int64, ``weight_TK`` float, ``keep_TK`` bool: choices not kept (padding, over
    capacity) become no row. Without ``keep_TK`` nothing here waits for the device.
    """
    expert_flat = expert_TK.flatten()
    keep_flat = None if keep_TK is None else keep_TK.flatten()
    # flat order is by token, so a stable sort by expert sorts by (expert, token)
    order_A, load_E = sort_by_expert(expert_flat, num_experts, keep_flat)
    if keep_flat is not None:
        order_A = order_A[: int(load_E.sum())]
    return Assignment(
        token_A=order_A // expert_TK.shape[1],
        expert_A=expert_flat[order_A],
        weight_A=weight_TK.flatten()[order_A],
        load_E=load_E,
    )


def kept(expert_TK: Tensor, padding_T: Tensor | None) -> Tensor | None:
    """``keep_TK`` of :func:`from_choices`: every choice but padding's."""
    return None if padding_T is None else (~padding_T)[:, None].expand_as(expert_TK)


def count(expert_A: Tensor, num_experts: int) -> Tensor:
    """int64 rows for each expert, (E,); unlike ``bincount`` it never waits for a CUDA device."""
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_A.device)
    return load_E.scatter_add_(0, expert_A, torch.ones_like(expert_A))


def sliced(assignment: Assignment, ep: int, slices: int) -> Assignment:
    """The same rows for experts cut into ``slices`` along their hidden width.

    Each row goes to all slices of its expert, and the sum over a token's rows adds up their
    outputs: tensor parallelism inside experts is routing to more, thinner ones. They count by
    (expert-parallel rank, slice, expert of that rank), as the ranks of an ep × etp group hold them.
    """
    if slices == 1:
        return assignment
    num_experts = assignment.load_E.numel()
    each = num_experts // ep
    expert_A = assignment.expert_A.repeat_interleave(slices)
    slice_A = torch.arange(slices, device=expert_A.device).repeat(assignment.expert_A.numel())
    virtual_A = (expert_A // each * slices + slice_A) * each + expert_A % each
    order_A = virtual_A.argsort(stable=True)
    row_A = order_A // slices
    load_RE = assignment.load_E.view(ep, 1, each).expand(ep, slices, each)
    return Assignment(
        token_A=assignment.token_A[row_A],
        expert_A=virtual_A[order_A],
        weight_A=assignment.weight_A[row_A],
        load_E=load_RE.reshape(-1),
    )
