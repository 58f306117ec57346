"""An exchange that hides the way of rows behind the experts' work (Comet, arXiv 2502.19811).

Rows travel in pieces. The experts compute the next piece from other ranks if it is there, whose
results leave in slabs of columns while the next slab is computed, or else rows of this rank's own,
which need no way at all. In the backward pass gradients travel so, and gradients of weights, which
nobody waits for, fill the time that is left.

No sum depends on the order in which pieces arrive: results are the same to the bit.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.base import Exchange, SplitExperts
from coterie.comm.exchange.between_ranks import ExchangeBetweenRanks, Trip
from coterie.comm.exchange.fused.exchange import FusedExchange
from coterie.comm.exchange.mail import Mail, Message, mail_for
from coterie.comm.exchange.pieces import Piece, Pieces, jobs, rows_of_pieces
from coterie.comm.exchange.work import LocalWork, OnwardWork, Work
from coterie.csrc.twins import acc_dtype

_CROWD = 2
"""Pieces whose hidden gradients may wait for idle time; each takes as much memory as its hidden
activations."""


class OverlappedExchange(ExchangeBetweenRanks):
    """Rows travel while others are computed.

    ``pieces``: of what travels between any two ranks. ``slabs``: runs of columns that the results
    of a piece are computed and sent in. ``ahead``: how many messages a rank asks for before they
    are there (not on NCCL).

    Raises:
        ValueError: ``onward`` is fused, which leaves no gradients of weights for later.
    """

    def __init__(
        self,
        group: ProcessGroup,
        max_rows_factor: float | None = None,
        deduplicate: bool = False,
        onward: Exchange | None = None,
        pieces: int = 2,
        slabs: int = 1,
        ahead: int = 2,
    ) -> None:
        if isinstance(onward, FusedExchange):
            raise ValueError("a fused exchange goes onward from AllToAllExchange alone")
        super().__init__(group, max_rows_factor, deduplicate, onward)
        self.pieces, self.slabs, self.ahead = pieces, slabs, ahead
        self.mail: Mail | None = None
        """Made for the device of the first rows."""

    def travel(self, sent_AD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """Every piece is computed once it is there."""
        weights = experts.weights()
        sent_AD = sent_AD.to(weights[0].dtype)
        cut = Pieces.of(trip, self.rank, self.pieces)
        slabs = _slabs(sent_AD.shape[1], self.slabs)
        work: Work
        if self.onward is None:
            work = LocalWork(jobs(cut, trip, self.rank), experts, slabs)
        else:
            rows = rows_of_pieces(cut, trip, self.rank)
            work = OnwardWork(rows, self.onward, experts, slabs)
        if self.mail is None:
            self.mail = mail_for(sent_AD.device, self.meter, self.ahead)
        way = _Way(self.mail, cut, trip.sent_R, trip.received_R)
        home, grad = not self.again.on, torch.is_grad_enabled()
        returned_AD: Tensor = _Overlapped.apply(
            sent_AD, trip.weight_A, way, work, home, grad, *weights
        )
        return returned_AD


def _slabs(width: int, count: int) -> list[slice]:
    edges = [width * slab // count for slab in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


class _Overlapped(torch.autograd.Function):
    """Pieces count from 0: the local ones, then the inbound ones."""

    @staticmethod
    def forward(
        ctx: Any, sent_AD: Tensor, weight_A: Tensor | None, way: "_Way", work: Work, home: bool,
        grad: bool, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        passes = work.experts.passes(*weights)
        keep = grad and any(ctx.needs_input_grad)

        def compute(number: int, x_PD: Tensor) -> Iterator[Tensor]:
            if keep and number < len(way.cut.local):
                # what this rank sent to others is not to be kept with what it sent to itself
                x_PD = x_PD.clone()
            results = work.forward(number, x_PD, weight_A, passes, keep)
            return results if home else iter(())

        returned_AD = way.there_and_back(sent_AD, work, compute, _InOrder(work, None), home)
        if keep:
            ctx.save_for_backward(weight_A, *weights, *work.kept())
        ctx.way, ctx.work, ctx.weights = way, work, len(weights)
        return returned_AD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dreturned_AD: Tensor) -> tuple[Tensor | None, ...]:
        work: Work = ctx.work
        weight_A, *saved = ctx.saved_tensors
        weights = saved[: ctx.weights]
        work.give_back(saved[ctx.weights :])
        del saved
        passes = work.experts.passes(*weights)
        needs = ctx.needs_input_grad[-len(weights) :]
        sums = passes.weight_sums(needs, acc_dtype(dreturned_AD))
        dweight_A = None if weight_A is None else torch.empty_like(weight_A)

        def compute(number: int, dy_PD: Tensor) -> Iterator[Tensor]:
            return work.backward(number, dy_PD, weight_A, dweight_A, passes)

        later = _InOrder(work, sums.add if any(needs) else None)
        dreturned_AD = dreturned_AD.contiguous()
        dsent_AD = ctx.way.there_and_back(dreturned_AD, work, compute, later)
        while later.one():
            pass
        work.end()
        return dsent_AD, dweight_A, None, None, None, None, *sums.to(dreturned_AD.dtype)


class _Way(NamedTuple):
    """There and back in pieces, the results in slabs of columns."""

    mail: Mail
    cut: Pieces
    sent_R: list[int]
    received_R: list[int]

    def there_and_back(
        self,
        sent_AD: Tensor,
        work: Work,
        compute: Callable[[int, Tensor], Iterator[Tensor]],
        later: "_InOrder",
        home: bool = True,
    ) -> Tensor:
        """The results of ``sent_AD``, those of other ranks computed on the way.

        ``compute``: the results of a piece, slab by slab. ``later``: what nobody waits for, done
        where this rank would wait otherwise. ``home``: results are wanted; else ``compute`` gives
        none, nothing comes back, and what is returned is to be left alone.
        """
        mail, cut = self.mail, self.cut
        columns = work.slabs if home else []
        self._note(sent_AD, home)
        returned_AD = torch.empty_like(sent_AD)
        there = mail.receive(
            Message(sent_AD.new_empty(piece.length, sent_AD.shape[1]), piece.peer, piece.number)
            for piece in cut.inbound
        )
        slabs = [(piece, number) for piece in cut.outbound for number in range(len(columns))]
        back = mail.receive(
            Message(
                _room(returned_AD, piece, columns[number], len(columns)),
                piece.peer,
                self._tag(piece, number, len(columns)),
            )
            for piece, number in slabs
        )
        for piece in cut.outbound:
            mail.send(Message(sent_AD[piece.sent], piece.peer, piece.number))

        local = deque(enumerate(cut.local))
        inbound = deque(enumerate(zip(cut.inbound, there, strict=True), start=len(local)))
        while local or inbound:
            if later.crowded() and later.one():
                continue
            soon = inbound and not work.in_order and not later.crowded()
            if not local or (soon and inbound[0][1][1].ready()):
                number, (piece, arrival) = inbound[0]
                if mail.tells and not arrival.ready() and later.one():
                    continue
                inbound.popleft()
                for slab, y_PS in enumerate(compute(number, mail.wait(arrival))):
                    mail.send(Message(y_PS, piece.peer, self._tag(piece, slab, len(columns))))
            else:
                number, piece = local.popleft()
                for slab, y_PS in enumerate(compute(number, sent_AD[piece.sent])):
                    returned_AD[piece.sent, columns[slab]] = y_PS
        for (piece, slab), arrival in zip(slabs, back, strict=True):
            while not arrival.ready() and later.one():
                pass
            y_PS = mail.wait(arrival)
            if len(columns) > 1:
                returned_AD[piece.sent, columns[slab]] = y_PS
        mail.finish()
        return returned_AD

    def _tag(self, piece: Piece, slab: int, slabs: int) -> int:
        """Of results: all above those of what is sent there."""
        return len(self.cut.local) + piece.number * slabs + slab

    def _note(self, sent_AD: Tensor, home: bool) -> None:
        self.mail.meter.ship(self.sent_R, self.received_R, sent_AD)
        if home:
            self.mail.meter.ship(self.received_R, self.sent_R, sent_AD)


def _room(returned_AD: Tensor, piece: Piece, columns: slice, slabs: int) -> Tensor:
    """Where a slab of results arrives: at its place, where columns are not cut."""
    if slabs == 1:
        return returned_AD[piece.sent]
    return returned_AD.new_empty(piece.length, columns.stop - columns.start)


class _InOrder:
    """Parts that are added up piece after piece, in whichever order the pieces are computed;
    without ``add`` they are dropped."""

    def __init__(self, work: Work, add: Callable[[Any], None] | None) -> None:
        self.work, self.add = work, add
        self.at = 0

    def crowded(self) -> bool:
        """Whether parts of so many pieces are there that some should go first."""
        return sum(self.work.done) - self.at > _CROWD

    def one(self) -> bool:
        """Add one part, if that of the next piece is there."""
        while self.at < len(self.work.done) and self.work.done[self.at]:
            if parts := self.work.later[self.at]:
                part = parts.popleft()
                if self.add is not None:
                    self.add(part)
                return True
            self.at += 1
        return False
