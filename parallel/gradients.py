"""Gradients over ranks: summed, measured, clipped.

Each rank's loss is its share of the global loss, so gradients are *summed*. An expert's gradient
already holds the tokens of all ranks of its expert-parallel group: the exchange's backward pass
brought them. It lacks only those of its replicas' groups.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup

from coterie.moe.experts import Experts
from coterie.parallel.distributed import Ranks

BUCKET = 16 * 2**20
"""Elements in one all-reduce, unless one tensor has more: for bandwidth, yet pipelined."""


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that live on one rank of an expert-parallel group alone."""
    return [p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank holds."""
    experts = {id(p) for p in expert_parameters(model)}
    return [p for p in model.parameters() if id(p) not in experts]


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Make every gradient that of the global loss, in place. All ranks call."""
    for parameter in model.parameters():
        if parameter.grad is None:
            # every rank must bring the same tensors to the sum
            parameter.grad = torch.zeros_like(parameter)
    _sum_in_buckets(dense_parameters(model), ranks.data_group)
    _sum_in_buckets(expert_parameters(model), ranks.replica_group)


def _sum_in_buckets(parameters: list[nn.Parameter], group: ProcessGroup | None) -> None:
    if group is None or group.size() == 1:
        return
    pending = []
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = _flatten_dense_tensors(bucket)
        pending.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        for gradient, total in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(total)


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def global_norm(model: nn.Module, ranks: Ranks) -> Tensor:
    """The 2-norm of the whole gradient, each parameter counted once, as one process has it.

    A float64 scalar, the same on every rank. All ranks call, after :func:`sum_gradients`.
    """
    dense = _square_sum(dense_parameters(model), ranks.device)
    experts = _square_sum(expert_parameters(model), ranks.device)
    if ranks.expert_group is not None:
        dist.all_reduce(experts, group=ranks.expert_group)
    return (dense + experts).sqrt()


def _square_sum(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def clip(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm where that is below one, in place."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
