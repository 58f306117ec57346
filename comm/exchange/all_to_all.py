"""The reference exchange: one all-to-all there, one back, with the experts between."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.base import ExpertFunction
from coterie.comm.exchange.between_ranks import ExchangeBetweenRanks, Trip
from coterie.comm.exchange.meter import Meter
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute


class AllToAllExchange(ExchangeBetweenRanks):
    """Rows go to the rank that holds their expert and come back, over any backend.

    The backward pass takes the same ways with the gradients.
    """

    def travel(self, sent_AD: Tensor, trip: Trip, experts: ExpertFunction) -> Tensor:
        """All rows go, then all experts compute, then all results come."""
        received_AD = all_to_all_rows(sent_AD, trip.sent_R, trip.received_R, self.group, self.meter)
        y_AD = _compute(received_AD, trip.load_SL, experts)
        return all_to_all_rows(y_AD, trip.received_R, trip.sent_R, self.group, self.meter)


def _compute(received_AD: Tensor, in_SE: Tensor, experts: ExpertFunction) -> Tensor:
    """Rows arrive by (source rank, expert); experts want them by (expert, source rank)."""
    by_expert_A = _by_expert(in_SE)
    back_A = invert(by_expert_A, by_expert_A.numel())
    x_AD = permute(received_AD, by_expert_A, back_A)
    del received_AD  # a copy less while the experts compute
    y_AD = experts(x_AD, in_SE.sum(0))
    arrival_A = back_A.row_A
    return permute(y_AD, arrival_A, invert(arrival_A, arrival_A.numel()))


def _by_expert(in_SE: Tensor) -> Tensor:
    """int64 order that sorts rows from (source rank, expert) to (expert, source rank)."""
    experts_SE = torch.arange(in_SE.shape[1], device=in_SE.device).expand_as(in_SE)
    return experts_SE.flatten().repeat_interleave(in_SE.flatten()).argsort(stable=True)


def all_to_all_rows(
    x_AD: Tensor,
    sent_R: list[int],
    received_R: list[int],
    group: ProcessGroup,
    meter: Meter | None = None,
) -> Tensor:
    """Send ``sent_R[r]`` rows to each rank r, receive ``received_R[r]``; differentiable."""
    return _AllToAllRows.apply(x_AD, sent_R, received_R, group, meter)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        sent_R: list[int],
        received_R: list[int],
        group: ProcessGroup,
        meter: Meter | None,
    ) -> Tensor:
        ctx.way_back = received_R, sent_R, group, meter
        return _exchange_rows(x_AD, sent_R, received_R, group, meter)

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None, None, None]:
        # the gradients travel the same ways back
        return _exchange_rows(dy_AD, *ctx.way_back), None, None, None, None


def _exchange_rows(
    x_AD: Tensor,
    sent_R: list[int],
    received_R: list[int],
    group: ProcessGroup,
    meter: Meter | None,
) -> Tensor:
    y_AD = x_AD.new_empty(sum(received_R), x_AD.shape[1])
    with meter.waiting(x_AD) if meter else nullcontext():
        dist.all_to_all_single(y_AD, x_AD.contiguous(), received_R, sent_R, group=group)
    if meter:
        meter.ship(sent_R, received_R, x_AD)
    return y_AD
