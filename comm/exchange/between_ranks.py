"""What exchanges between ranks have in common: counts, order of rows, and rounds under skew."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from coterie.comm.exchange.base import Exchange, Rows, SplitExperts
from coterie.comm.exchange.fused.waits import Waits
from coterie.comm.exchange.meter import Meter
from coterie.comm.exchange.rounds import plan, rows_of_rounds
from coterie.comm.exchange.rows import all_to_all_rows
from coterie.comm.exchange.visits import visits
from coterie.csrc.inverse import invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute


class Trip(NamedTuple):
    """Who sends how much to whom, as this rank sees it; S and R count the group's ranks.

    What travels is either rows, each for one expert, or tokens, each for all its experts on a rank
    (``visit_A``, ``weight_A``).
    """

    sent_R: list[int]
    """Rows or tokens that go to each rank."""
    received_R: list[int]
    """Rows or tokens that come from each rank."""
    load_SL: Tensor
    """int64: rows that come from each rank for each local expert."""
    load_RL: Tensor
    """int64: rows that go to each rank for each of its experts."""
    begin_S: list[int]
    """Where what comes from each rank begins in what that rank sends."""
    most: int
    """Of what any rank sends; equal on all ranks."""
    visit_A: Tensor | None = None
    """int64: of the rows to compute, by (source rank, local expert), which of that rank's tokens
    each is; None: rows travel."""
    weight_A: Tensor | None = None
    """Their combine weights, where tokens travel: the results of a token are to be summed."""


class Again:
    """``on`` while a round runs again for what its backward pass needs: it has had its results."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *failed: object) -> None:
        self.on = False


class ExchangeBetweenRanks(ABC):
    """Rows go to the rank that holds their expert and come back.

    Splits may be uneven; a rank may send or receive nothing, and joins all the same.

    ``max_rows_factor``: where a rank would receive more rows than this many times the mean over
    ranks, the rows go in rounds of about the mean. All rounds but the last keep
    nothing on the receiving side: they are sent and computed again in the backward pass. The
    results are the same, up to the order of sums. None: always one round.

    ``deduplicate``: a token that goes to several experts of a rank is sent once, and the sum of its
    results there comes back.

    ``onward``: the exchange that takes tokens on from the rank they were sent to; None: they have
    arrived. It needs ``deduplicate``. Where it goes between ranks too, rounds are its own: those
    that share it need not have as many here (raises ValueError).
    """

    def __init__(
        self,
        group: ProcessGroup,
        max_rows_factor: float | None = None,
        deduplicate: bool = False,
        onward: Exchange | None = None,
    ) -> None:
        if onward is not None and not deduplicate:
            raise ValueError("rows have one expert each, and cannot go onward: deduplicate")
        if onward is not None and onward.ranks > 1 and max_rows_factor is not None:
            raise ValueError("max_rows_factor is for the exchange that goes onward")
        self.group = group
        self.rank = group.rank()
        self.ranks = group.size()
        self.max_rows_factor = max_rows_factor
        self.deduplicate = deduplicate
        self.meter = Meter(group)
        self.onward = onward
        self.again = Again()
        self.meters: Sequence[Meter] = (self.meter, *(onward.meters if onward else ()))
        self.waits: Sequence[Waits] = onward.waits if onward else ()

    @abstractmethod
    def travel(self, sent_AD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """The results of what this rank sends, sorted by the rank it goes to; differentiable.

        Rows are sorted by (global) expert, and their results are not weighted; those of tokens are
        summed over their rows on a rank. Every rank of the group calls."""

    def __call__(self, x_TD: Tensor, assignment: Rows, experts: SplitExperts) -> Tensor:
        with self.meter.counting(assignment.load_E):
            load_SE = self._gather(assignment.load_E)
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

    def _gather(self, count_E: Tensor) -> Tensor:
        """``count_SE``: int64 counts of each source rank, the same on all ranks."""
        count_SE = count_E.new_empty(self.ranks, count_E.numel())
        dist.all_gather(list(count_SE), count_E.contiguous(), group=self.group)
        return count_SE

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
        load_SRL = load_SE.unflatten(1, (self.ranks, -1))
        trip = self._trip(sent_SR, load_SRL[:, self.rank], load_SRL[self.rank])
        if self.deduplicate:
            token_A, trip = self._of_tokens(trip, token_A, weight_A, x_TD.shape[0])
        inverse = invert(token_A, x_TD.shape[0])

        def there_and_back(x_TD: Tensor) -> Tensor:
            return self.travel(permute(x_TD, token_A, inverse), trip, experts)

        if again:
            returned_AD = checkpoint(
                there_and_back,
                x_TD,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), self.again),
            )
        else:
            returned_AD = there_and_back(x_TD)
        return unpermute(returned_AD, None if self.deduplicate else weight_A, token_A, inverse)

    def _trip(self, sent_SR: list[list[int]], load_SL: Tensor, load_RL: Tensor) -> Trip:
        received_R = [sent_R[self.rank] for sent_R in sent_SR]
        begin_S = [sum(sent_R[: self.rank]) for sent_R in sent_SR]
        most = max(map(sum, sent_SR))
        return Trip(sent_SR[self.rank], received_R, load_SL, load_RL, begin_S, most)

    def _of_tokens(
        self, rows: Trip, token_A: Tensor, weight_A: Tensor, tokens: int
    ) -> tuple[Tensor, Trip]:
        """The tokens that go instead of ``rows``, and their trip; tells the ranks they go to what
        is to be computed of each."""
        mine = visits(token_A, rows.sent_R, tokens)
        with self.meter.counting(mine.count_R):
            sent_SR = self._gather(mine.count_R).tolist()

        def sent(fact_A: Tensor) -> Tensor:
            fact_A1 = fact_A[:, None]
            return all_to_all_rows(fact_A1, rows.sent_R, rows.received_R, self.meter)[:, 0]

        trip = self._trip(sent_SR, rows.load_SL, rows.load_RL)
        trip = trip._replace(visit_A=sent(mine.visit_A), weight_A=sent(weight_A))
        return mine.token_B, trip
