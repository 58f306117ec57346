"""Rows to other ranks by all-to-all, differentiable."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
    with meter.waiting(x_AD):
        dist.all_to_all_single(y_AD, x_AD.contiguous(), received_R, sent_R, group=meter.group)
    return y_AD
