"""The classical pipeline in two chunks (Tutel, FasterMoE): one half travels, the other is computed.

Tokens are cut in two halves. While the experts compute the first, the second is on its way to them;
while they compute the second, the results of the first are on their way back. Never are two
all-to-alls under way at once, as on a stream of their own they would not be.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.all_to_all import _compute
from coterie.comm.exchange.base import Rows, SplitExperts
from coterie.comm.exchange.rows import start_all_to_all
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute

HALVES = 2


class TwoChunkExchange:
    """Rows go to the rank that holds their expert and come back, in two halves.

    The backward pass is the same pipeline with the gradients: autograd takes these steps in
    reverse, and there each departure is an arrival.
    """

    meters = ()
    waits = ()

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: SplitExperts) -> Tensor:
        tokens = len(x_TD)
        half_A = assignment.token_A * HALVES // max(tokens, 1)
        rows_H = [(half_A == half).nonzero().squeeze(1) for half in range(HALVES)]
        load_SHRL = self._loads([assignment.expert_A[rows_A] for rows_A in rows_H], assignment)
        sent_SHR = load_SHRL.sum(-1).tolist()
        inverse_H = [invert(assignment.token_A[rows_A], tokens) for rows_A in rows_H]
        rows = [
            permute(x_TD, assignment.token_A[rows_A], inverse)
            for rows_A, inverse in zip(rows_H, inverse_H, strict=True)
        ]
        there, back = [], []
        for half in range(HALVES):
            sent_R = sent_SHR[self.rank][half]
            received_R = [sent_HR[half][self.rank] for sent_HR in sent_SHR]
            there.append(_Trip(self.group, sent_R, received_R))
            back.append(_Trip(self.group, received_R, sent_R))
        load_HSL = load_SHRL[:, :, self.rank].unbind(1)

        first = there[0].arrive(there[0].leave(rows[0]))
        second = there[1].leave(rows[1])
        first = _compute(first, load_HSL[0], experts)
        second = there[1].arrive(second)
        first = back[0].leave(first)
        second = _compute(second, load_HSL[1], experts)
        first = back[0].arrive(first)
        second = back[1].arrive(back[1].leave(second))

        first_TD, second_TD = (
            unpermute(y_AD, assignment.weight_A[rows_A], assignment.token_A[rows_A], inverse)
            for y_AD, rows_A, inverse in zip((first, second), rows_H, inverse_H, strict=True)
        )
        return first_TD + second_TD

    def _loads(self, expert_HA: list[Tensor], assignment: Rows) -> Tensor:
        """int64 rows from each source rank, in each half, to each rank's local experts."""
        count = assignment.load_E.numel()
        load_HE = torch.stack([torch.bincount(expert_A, minlength=count) for expert_A in expert_HA])
        load_SHE = load_HE.new_empty(self.ranks, *load_HE.shape)
        dist.all_gather(list(load_SHE), load_HE, group=self.group)
        return load_SHE.unflatten(2, (self.ranks, -1))


class _Trip:
    """An all-to-all that is under way between :meth:`leave` and :meth:`arrive`; differentiable.

    Between the two a tensor of the sent rows' shape stands for it, so that the gradient, which
    travels the other way, has that shape when it arrives.
    """

    def __init__(self, group: ProcessGroup, sent_R: list[int], received_R: list[int]) -> None:
        self.group, self.sent_R, self.received_R = group, sent_R, received_R

    def leave(self, x_AD: Tensor) -> Tensor:
        """Start with the rows ``x_AD``."""
        under_way: Tensor = _Leave.apply(x_AD, self)
        return under_way

    def arrive(self, under_way: Tensor) -> Tensor:
        """Wait for the rows that come here."""
        y_AD: Tensor = _Arrive.apply(under_way, self)
        return y_AD

    def _start(self, x_AD: Tensor, sent_R: list[int], received_R: list[int]) -> Tensor:
        y_AD = x_AD.new_empty(sum(received_R), x_AD.shape[1])
        self._rows = x_AD.contiguous()  # alive until they are gone
        self._works = start_all_to_all(y_AD, self._rows, received_R, sent_R, self.group)
        return y_AD

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        del self._works, self._rows


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.received_AD = trip._start(x_AD, trip.sent_R, trip.received_R)
        return x_AD.view_as(x_AD)

    @staticmethod
    def backward(ctx: Any, dx_AD: Tensor) -> tuple[Tensor, None]:
        ctx.trip._wait()
        return dx_AD, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip._wait()
        received_AD = trip.received_AD
        del trip.received_AD
        return received_AD

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        return trip._start(dy_AD, trip.received_R, trip.sent_R), None
