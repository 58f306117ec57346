"""The reference exchange: one all-to-all there, one back, with the experts between."""

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from coterie.comm.exchange.base import ExpertFunction, Rows
from coterie.comm.exchange.rounds import plan, rows_of_rounds
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute


class AllToAllExchange:
    """Rows go to the rank that holds their expert and come back, over any backend.

    Splits may be uneven; a rank may send or receive nothing, and joins all the same.

    ``max_rows_factor``: where a rank would receive more rows than this many times the mean over
    ranks, the rows go in rounds of about the mean. All rounds but the last keep
    nothing on the receiving side: they are sent and computed again in the backward pass. The
    results are the same, up to the order of sums. None: always one round.
    """

    def __init__(self, group: ProcessGroup, max_rows_factor: float | None = None) -> None:
        self.group = group
        self.rank = group.rank()
        self.ranks = group.size()
        self.max_rows_factor = max_rows_factor

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: ExpertFunction) -> Tensor:
        load_SE = _gather(assignment.load_E, self.group)
        sent_SR = self._between_ranks(load_SE)
        load_nSE = plan(load_SE, sent_SR, self.max_rows_factor)
        token_A, weight_A = assignment.token_A, assignment.weight_A
        if load_nSE is None:
            return self._round(x_TD, token_A, weight_A, load_SE, sent_SR, experts)

        # The last round comes first in the backward pass: what it keeps is gone when the others
        # run again.
        rows_n = rows_of_rounds(load_nSE[:, self.rank])
        sent_nSR = self._between_ranks(load_nSE)
        again_n = [True] * (len(rows_n) - 1) + [False]
        rounds = (
            self._round(x_TD, token_A[rows_A], weight_A[rows_A], load, sent, experts, again)
            for rows_A, load, sent, again in zip(rows_n, load_nSE, sent_nSR, again_n, strict=True)
        )
        return reduce(torch.add, rounds)

    def _between_ranks(self, load_SE: Tensor) -> Any:
        """Rows from each source to each rank, as nested lists (…, S, R); waits for the device."""
        return load_SE.unflatten(-1, (self.ranks, -1)).sum(-1).tolist()

    def _round(
        self,
        x_TD: Tensor,
        token_A: Tensor,
        weight_A: Tensor,
        load_SE: Tensor,
        sent_SR: list[list[int]],
        experts: ExpertFunction,
        again: bool = False,
    ) -> Tensor:
        """``again``: keep ``x_TD``, and repeat the way there and the experts for the gradients."""
        inverse = invert(token_A, x_TD.shape[0])
        in_SE = load_SE.unflatten(1, (self.ranks, -1))[:, self.rank]
        out_R, in_R = sent_SR[self.rank], [sent_R[self.rank] for sent_R in sent_SR]

        def there_and_back(x_TD: Tensor) -> Tensor:
            # sorted by expert, hence by the rank that holds it
            received_AD = all_to_all_rows(permute(x_TD, token_A, inverse), out_R, in_R, self.group)
            return all_to_all_rows(_compute(received_AD, in_SE, experts), in_R, out_R, self.group)

        if again:
            returned_AD = checkpoint(there_and_back, x_TD, use_reentrant=False)
        else:
            returned_AD = there_and_back(x_TD)
        return unpermute(returned_AD, weight_A, token_A, inverse)


def _gather(load_E: Tensor, group: ProcessGroup) -> Tensor:
    """int64 rows from each source rank for each expert, the same on all ranks."""
    load_SE = load_E.new_empty(group.size(), load_E.numel())
    dist.all_gather(list(load_SE), load_E.contiguous(), group=group)
    return load_SE


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
