"""What exchanges between ranks have in common: counts, order of rows, and rounds under skew."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from coterie.comm.exchange.base import Rows, SplitExperts
from coterie.comm.exchange.meter import Meter
from coterie.comm.exchange.rounds import plan, rows_of_rounds
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute


class Trip(NamedTuple):
    """Who sends how many rows to whom, as this rank sees it; S and R count the group's ranks."""

    sent_R: list[int]
    """Rows that go to each rank."""
    received_R: list[int]
    """Rows that come from each rank."""
    load_SL: Tensor
    """int64: rows that come from each rank for each local expert."""


class ExchangeBetweenRanks(ABC):
    """Rows go to the rank that holds their expert and come back.

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
        self.meter = Meter(group)
        self.meters: Sequence[Meter] = (self.meter,)

    @abstractmethod
    def travel(self, sent_AD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """The results, unweighted, of this rank's rows, which are sorted by (global) expert, hence
        by the rank that holds it; differentiable. Every rank of the group calls."""

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: SplitExperts) -> Tensor:
        with self.meter.counting(assignment.load_E):
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
        experts: SplitExperts,
        again: bool = False,
    ) -> Tensor:
        """``again``: keep ``x_TD``, and repeat the way there and the experts for the gradients."""
        inverse = invert(token_A, x_TD.shape[0])
        trip = Trip(
            sent_SR[self.rank],
            [sent_R[self.rank] for sent_R in sent_SR],
            load_SE.unflatten(1, (self.ranks, -1))[:, self.rank],
        )

        def there_and_back(x_TD: Tensor) -> Tensor:
            return self.travel(permute(x_TD, token_A, inverse), trip, experts)

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
