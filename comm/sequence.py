"""Activations that ranks split along the sequence: who has which positions, and how they meet.

Sequence parallelism (Megatron-LM, arXiv 2205.05198, §4.2.2) and context parallelism.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.comm.parts import all_gather

# torch 2.13 renamed them, and warns of the names that 2.11 has
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def context_positions(length: int, cp: Axis, device: torch.device | None = None) -> Tensor:
    """int64 positions of a sequence that context-parallel rank ``cp`` holds, in its order.

    The sequence is cut in 2 · size pieces; rank r holds piece r and its mirror image, so that all
    have the same work in causal attention.
    """
    position_S = torch.arange(length, device=device)
    if cp.size == 1:
        return position_S
    pieces = position_S.view(2 * cp.size, length // (2 * cp.size))
    return torch.cat([pieces[cp.rank], pieces[2 * cp.size - 1 - cp.rank]])


def all_context_positions(length: int, cp: Axis, device: torch.device | None = None) -> Tensor:
    """The positions of all context-parallel ranks, one after the other."""
    ranks = (Axis(cp.name, rank, cp.size) for rank in range(cp.size))
    return torch.cat([context_positions(length, rank, device) for rank in ranks])


def context_part(x_BS: Tensor, cp: Axis) -> Tensor:
    """The columns of ``x_BS`` (whole sequences) that context-parallel rank ``cp`` holds."""
    if cp.size == 1:
        return x_BS
    return x_BS[:, context_positions(x_BS.shape[1], cp, x_BS.device)]


def sequence_part(x_BS: Tensor, cp: Axis, tp: Axis) -> Tensor:
    """The columns whose activations this rank holds between layers: tp splits those of cp."""
    x_BS = context_part(x_BS, cp)
    if tp.size == 1:
        return x_BS
    part = tp.part(x_BS.shape[1])
    return x_BS[:, part.start : part.stop]


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """All ranks' parts, joined along ``dim`` in rank order; the gradient is reduce-scattered."""
    return x if axis.size == 1 else _Gather.apply(x, dim, axis)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The sum over ranks, of which each keeps its part of ``dim``; the gradient is gathered."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, dim, axis)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _gathered(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _scattered_sum(dy, ctx.dim, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _scattered_sum(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(dy, ctx.dim, ctx.axis), None, None


def _gathered(x: Tensor, dim: int, axis: Axis) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(axis.size, *x.shape)
    all_gather(y.flatten(0, 1), x, group=axis.group)
    return y.movedim(0, dim).flatten(dim, dim + 1)


def _scattered_sum(x: Tensor, dim: int, axis: Axis) -> Tensor:
    parts = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    y = torch.empty_like(parts[0])
    _reduce_scatter(y, parts.flatten(0, 1), group=axis.group)
    return y
