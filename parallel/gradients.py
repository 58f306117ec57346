"""Gradients over ranks: summed, measured, clipped.

Each rank's loss is its share of the global loss, so gradients are *summed*, over the ranks that
hold the same parameter and saw other tokens:

* a dense parameter that tp splits: the replicas (the gathering of the sequence brought the tokens
  of the other ranks of tp); one that tp does not split: these and the ranks of tp;
* an expert: its replicas alone, since the exchange brought the tokens of all other ranks.

Where parameters are sharded, the reduce-scatter has summed over the shards and replicas already.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup

from coterie.parallel.layout import Layout
from coterie.parallel.model import ParallelModel, local
from coterie.parallel.placement import Place

BUCKET = 2**20
"""Elements in one all-reduce of several tensors; a tensor that has more travels by itself, where it
lies."""


def sum_gradients(model: ParallelModel) -> None:
    """Make every gradient that of the global loss, in place. All ranks call."""
    by_axis: dict[str, list[Tensor]] = {}
    for name, parameter in model.named():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            # every rank must bring the same tensors to the sum
            parameter.grad = torch.zeros_like(parameter)
        axis = summed_over(model.places[name], model.ranks.layout)
        if axis is not None:
            by_axis.setdefault(axis, []).append(local(parameter.grad))
    for axis, gradients in by_axis.items():
        _sum_in_buckets(gradients, model.ranks.groups.get(axis))


def summed_over(place: Place, layout: Layout) -> str | None:
    """The axis of the layout over which a gradient is still to be summed after the backward pass;
    None: none."""
    if place.expert:
        return "expert_replicate" if layout.expert_shard == 1 else None
    partial = not place.tensor_parallel and layout.tp > 1
    if layout.shard > 1:
        return "tp" if partial else None
    return "data" if partial else "replicate"


def _sum_in_buckets(tensors: list[Tensor], group: ProcessGroup | None) -> None:
    if group is None:
        return
    pending = []
    for bucket in _buckets(tensors):
        flat = bucket[0].contiguous() if len(bucket) == 1 else _flatten_dense_tensors(bucket)
        pending.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        if flat is not bucket[0]:
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order; the same on all ranks, whose tensors have the same shapes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() > BUCKET:
            yield [tensor]
            continue
        elements = sum(other.numel() for other in bucket)
        if bucket and (elements + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def global_norm(model: ParallelModel) -> Tensor:
    """The 2-norm of the whole gradient, each parameter counted once, as one process has it.

    A float64 scalar, the same on every rank. All ranks call, after :func:`sum_gradients`.
    """
    owned = [g for name, g in _gradients(model) if model.places[name].owner]
    square = torch.zeros((), dtype=torch.float64, device=model.ranks.device)
    if owned:
        norms = torch._foreach_norm(owned, 2)  # asking for float64 would copy every gradient
        square += torch.stack(norms).double().square().sum()
    if model.ranks.everyone is not None:
        dist.all_reduce(square, group=model.ranks.everyone)
    return square.sqrt()


def clip(model: ParallelModel, norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm where that is below one, in place."""
    scale = limit / (norm + 1e-6)
    if scale < 1:
        gradients = [gradient for _, gradient in _gradients(model)]
        if gradients:  # a stage may have frozen parameters alone
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))


def _gradients(model: ParallelModel) -> list[tuple[str, Tensor]]:
    return [(name, local(p.grad)) for name, p in model.named() if p.grad is not None]
