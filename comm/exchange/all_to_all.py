"""The reference exchange: one all-to-all there, one back, with the experts between."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.base import ExpertFunction, Rows
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute


class AllToAllExchange:
    """Rows go to the rank that holds their expert and come back, over any backend.

    Splits may be uneven; a rank may send or receive nothing, and joins all the same.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.ranks = group.size()

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: ExpertFunction) -> Tensor:
        inverse = invert(assignment.token_A, x_TD.shape[0])
        # sorted by expert, hence by the rank that holds it
        sent_AD = permute(x_TD, assignment.token_A, inverse)

        out_RE = assignment.load_E.view(self.ranks, -1)
        in_RE = torch.empty_like(out_RE)
        dist.all_to_all_single(in_RE, out_RE.contiguous(), group=self.group)
        out_R, in_R = torch.stack([out_RE.sum(1), in_RE.sum(1)]).tolist()

        # rows arrive by (source rank, expert); experts want them by (expert, source rank)
        received_AD = all_to_all_rows(sent_AD, out_R, in_R, self.group)
        by_expert_A = _by_expert(in_RE)
        back_A = invert(by_expert_A, by_expert_A.numel())
        y_AD = experts(permute(received_AD, by_expert_A, back_A), in_RE.sum(0))
        arrival_A = back_A.row_A
        y_AD = permute(y_AD, arrival_A, invert(arrival_A, arrival_A.numel()))

        returned_AD = all_to_all_rows(y_AD, in_R, out_R, self.group)
        return unpermute(returned_AD, assignment.weight_A, assignment.token_A, inverse)


def _by_expert(in_RE: Tensor) -> Tensor:
    """int64 order that sorts rows from (source rank, expert) to (expert, source rank)."""
    experts_RE = torch.arange(in_RE.shape[1], device=in_RE.device).expand_as(in_RE)
    return experts_RE.flatten().repeat_interleave(in_RE.flatten()).argsort(stable=True)


def all_to_all_rows(
    x_AD: Tensor, sent_R: list[int], received_R: list[int], group: ProcessGroup
) -> Tensor:
    """Send ``sent_R[r]`` rows to each rank r, receive ``received_R[r]``; differentiable."""
    return _AllToAllRows.apply(x_AD, sent_R, received_R, group)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, sent_R: list[int], received_R: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.sent_R, ctx.received_R, ctx.group = sent_R, received_R, group
        return _exchange_rows(x_AD, sent_R, received_R, group)

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None, None]:
        # the gradients travel the same ways back
        return _exchange_rows(dy_AD, ctx.received_R, ctx.sent_R, ctx.group), None, None, None


def _exchange_rows(
    x_AD: Tensor, sent_R: list[int], received_R: list[int], group: ProcessGroup
) -> Tensor:
    y_AD = x_AD.new_empty(sum(received_R), x_AD.shape[1])
    dist.all_to_all_single(y_AD, x_AD.contiguous(), received_R, sent_R, group=group)
    return y_AD
