"""Rows to other ranks by all-to-all, differentiable."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.meter import Meter


def all_to_all_rows(x_AD: Tensor, sent_R: list[int], received_R: list[int], meter: Meter) -> Tensor:
    """Send ``sent_R[r]`` rows to each rank r of the meter's group, receive ``received_R[r]``;
    differentiable."""
    received_AD: Tensor = _AllToAllRows.apply(x_AD, sent_R, received_R, meter)
    return received_AD


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, sent_R: list[int], received_R: list[int], meter: Meter
    ) -> Tensor:
        ctx.sent_R, ctx.received_R, ctx.meter = sent_R, received_R, meter
        return _exchange_rows(x_AD, sent_R, received_R, meter)

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None, None]:
        # the gradients travel the same ways back
        return _exchange_rows(dy_AD, ctx.received_R, ctx.sent_R, ctx.meter), None, None, None


def _exchange_rows(x_AD: Tensor, sent_R: list[int], received_R: list[int], meter: Meter) -> Tensor:
    meter.ship(sent_R, received_R, x_AD)
    y_AD = x_AD.new_empty(sum(received_R), x_AD.shape[1])
    x_AD = x_AD.contiguous()
    with meter.waiting(x_AD):
        for work in start_all_to_all(y_AD, x_AD, received_R, sent_R, meter.group):
            work.wait()
    return y_AD


def start_all_to_all(
    received_AD: Tensor,
    sent_AD: Tensor,
    received_R: Sequence[int],
    sent_R: Sequence[int],
    group: ProcessGroup,
) -> list[dist.Work]:
    """``all_to_all_single`` of contiguous rows; to be waited for, all of it.

    On the CPU every rank asks for what it receives before it sends anything. Gloo's own all-to-all
    does not: its question waits behind its own rows, on the same connection, and rows go one way
    between two ranks, then the other (``python benchmarks/both_ways.py``).
    """
    if sent_AD.device.type != "cpu":
        work = dist.all_to_all_single(
            received_AD, sent_AD, list(received_R), list(sent_R), group=group, async_op=True
        )
        return [work]
    rank, ranks = group.rank(), group.size()
    received, sent = list(_parts(received_AD, received_R)), list(_parts(sent_AD, sent_R))
    works = []
    for turn in range(1, ranks):
        peer = (rank - turn) % ranks
        if received_R[peer]:
            works.append(dist.irecv(received[peer], group=group, group_src=peer))
    for turn in range(1, ranks):
        peer = (rank + turn) % ranks
        if sent_R[peer]:
            works.append(dist.isend(sent[peer], group=group, group_dst=peer))
    received[rank].copy_(sent[rank])
    return [work for work in works if work is not None]


def _parts(rows_AD: Tensor, lengths_R: Sequence[int]) -> Iterator[Tensor]:
    """Of each rank."""
    for begin, end in pairwise(accumulate(lengths_R, initial=0)):
        yield rows_AD[begin:end]
