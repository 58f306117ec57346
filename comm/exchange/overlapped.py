"""An exchange that hides the way of rows behind the experts' work (Comet, arXiv 2502.19811).

Rows travel in pieces. The experts compute whichever piece is there: one from another rank, whose
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
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.base import Passes, SplitExperts
from coterie.comm.exchange.between_ranks import ExchangeBetweenRanks, Trip
from coterie.comm.exchange.mail import Mail, Message, StreamMail, ThreadMail
from coterie.comm.exchange.pieces import Job, Piece, Route, jobs
from coterie.csrc.twins import acc_dtype


class OverlappedExchange(ExchangeBetweenRanks):
    """Rows travel while others are computed.

    ``pieces``: of what travels between any two ranks. ``slabs``: runs of columns that the results
    of a piece are computed and sent in. ``ahead``: how many messages a rank asks for before they
    are there (not on NCCL).
    """

    def __init__(
        self,
        group: ProcessGroup,
        max_rows_factor: float | None = None,
        deduplicate: bool = False,
        pieces: int = 4,
        slabs: int = 1,
        ahead: int = 2,
    ) -> None:
        super().__init__(group, max_rows_factor, deduplicate)
        self.pieces, self.slabs = pieces, slabs
        by_stream = dist.get_backend(group) == dist.Backend.NCCL
        self.mail: Mail = StreamMail(self.meter) if by_stream else ThreadMail(self.meter, ahead)

    def travel(self, sent_AD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """Every piece is computed once it is there."""
        weights = experts.weights()
        sent_AD = sent_AD.to(weights[0].dtype)
        width = sent_AD.shape[1]
        edges = [width * slab // self.slabs for slab in range(self.slabs + 1)]
        route = Route.of(trip, self.rank, self.pieces)
        columns = [slice(*pair) for pair in pairwise(edges)]
        way = _Way(self.mail, route, columns, trip.sent_R, trip.received_R)
        work = _Work(experts, jobs(route, trip, self.rank))
        returned_AD: Tensor = _Overlapped.apply(sent_AD, trip.weight_A, way, work, *weights)
        return returned_AD


class _Work(NamedTuple):
    experts: SplitExperts
    jobs: list[Job]
    """Of the local pieces, then of the inbound ones."""


class _Overlapped(torch.autograd.Function):
    """Pieces count from 0: the local ones, then the inbound ones."""

    @staticmethod
    def forward(
        ctx: Any,
        sent_AD: Tensor,
        weight_A: Tensor | None,
        way: "_Way",
        work: _Work,
        *weights: Tensor,
    ) -> Tensor:
        passes = work.experts.passes(*weights)
        keep = any(ctx.needs_input_grad)
        x: list[Tensor] = [sent_AD] * len(work.jobs)
        kept: list[list[Tensor]] = [[] for _ in work.jobs]

        def compute(number: int, x_PD: Tensor) -> Iterator[Tensor]:
            job = work.jobs[number]
            parts = list(passes.hidden(job.rows(x_PD), job.load))
            if keep:
                # what this rank sent to others is not to be kept with what it sent to itself
                x[number] = x_PD.clone() if number < len(way.route.local) else x_PD
                if work.experts.keeps:
                    kept[number] = [part.h_AH for part in parts]
            own_A = _of(weight_A, job)
            for columns in way.columns:
                yield job.sums(_joined(passes.result, parts, columns, x_PD), own_A)

        returned_AD = way.there_and_back(sent_AD, compute, lambda: False)
        if keep:
            products = (product for own in kept for product in own)
            ctx.save_for_backward(weight_A, *weights, *x, *products)
        ctx.way, ctx.work, ctx.weights = way, work, len(weights)
        ctx.products = [len(own) for own in kept]
        return returned_AD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dreturned_AD: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        weight_A, *others = ctx.saved_tensors
        saved = iter(others)
        weights = [next(saved) for _ in range(ctx.weights)]
        x = [next(saved) for _ in work.jobs]
        kept = [[next(saved) for _ in range(count)] for count in ctx.products]
        passes: Passes = work.experts.passes(*weights)
        needs = ctx.needs_input_grad[-len(weights) :]
        sums = passes.weight_sums(needs, acc_dtype(dreturned_AD))
        later: list[deque[Any]] = [deque() for _ in work.jobs]
        computed = [False] * len(work.jobs)
        dweight_A = None if weight_A is None else torch.empty_like(weight_A)

        def compute(number: int, dy_PD: Tensor) -> Iterator[Tensor]:
            job = work.jobs[number]
            x_AD, dy_AD = job.rows(x[number]), job.rows(dy_PD)
            own_A = _of(weight_A, job)
            parts = list(passes.hidden_gradients(dy_AD, x_AD, job.load, kept[number], own_A))
            kept[number].clear()
            if dweight_A is not None and job.weighed_A is not None:
                dweight_A[job.weighed_A] = torch.cat(
                    [part.dweight_A for part in parts if part.dweight_A is not None]
                )
            for columns in ctx.way.columns:
                yield job.sums(_joined(passes.row_gradient, parts, columns, dy_PD), None)
            later[number].extend(parts)
            computed[number] = True

        weight_sums = _InOrder(later, computed, sums.add if any(needs) else None)
        dsent_AD = ctx.way.there_and_back(dreturned_AD.contiguous(), compute, weight_sums.one)
        while weight_sums.one():
            pass
        return dsent_AD, dweight_A, None, None, *sums.to(dreturned_AD.dtype)


def _of(weight_A: Tensor | None, job: Job) -> Tensor | None:
    return None if weight_A is None or job.weighed_A is None else weight_A[job.weighed_A]


def _joined(
    function: Callable[[Any, slice], Tensor], parts: list[Any], columns: slice, like: Tensor
) -> Tensor:
    """Columns of all rows, of which each part has some."""
    rows = max((part.rows.stop for part in parts), default=0)
    y_AS = like.new_empty(rows, columns.stop - columns.start)
    for part in parts:
        y_AS[part.rows] = function(part, columns)
    return y_AS


class _Way(NamedTuple):
    """There and back, in pieces and slabs."""

    mail: Mail
    route: Route
    columns: list[slice]
    sent_R: list[int]
    received_R: list[int]

    def there_and_back(
        self,
        sent_AD: Tensor,
        compute: Callable[[int, Tensor], Iterator[Tensor]],
        fill: Callable[[], bool],
    ) -> Tensor:
        """The results of ``sent_AD``, those of other ranks computed on the way.

        ``compute``: the results of a piece, slab by slab. ``fill``: do something that nobody waits
        for, if there is anything, and say so; called where this rank would wait otherwise.
        """
        mail, route = self.mail, self.route
        self._note(sent_AD)
        returned_AD = torch.empty_like(sent_AD)
        there = mail.receive(
            Message(sent_AD.new_empty(piece.length, sent_AD.shape[1]), piece.peer, piece.number)
            for piece in route.inbound
        )
        slabs = [(piece, *slab) for piece in route.outbound for slab in enumerate(self.columns)]
        home = mail.receive(
            Message(self._room(returned_AD, piece, columns), piece.peer, self._tag(piece, slab))
            for piece, slab, columns in slabs
        )
        for piece in route.outbound:
            mail.send(Message(sent_AD[piece.sent], piece.peer, piece.number))

        local, inbound = (
            deque(enumerate(route.local)),
            deque(zip(route.inbound, there, strict=True)),
        )
        while local or inbound:
            if inbound and (inbound[0][1].ready() or not local):
                piece, arrival = inbound[0]
                if not arrival.ready() and fill():
                    continue
                inbound.popleft()
                number = len(route.local) + len(route.inbound) - len(inbound) - 1
                for slab, y_PS in enumerate(compute(number, mail.wait(arrival))):
                    mail.send(Message(y_PS, piece.peer, self._tag(piece, slab)))
            else:
                number, piece = local.popleft()
                slabs_of_own = compute(number, sent_AD[piece.sent])
                for columns, y_PS in zip(self.columns, slabs_of_own, strict=True):
                    returned_AD[piece.sent, columns] = y_PS
        for (piece, _, columns), arrival in zip(slabs, home, strict=True):
            while not arrival.ready() and fill():
                pass
            y_PS = mail.wait(arrival)
            if len(self.columns) > 1:
                returned_AD[piece.sent, columns] = y_PS
        mail.finish()
        return returned_AD

    def _tag(self, piece: Piece, slab: int) -> int:
        """Of results: all above those of what is sent there."""
        return len(self.route.local) + piece.number * len(self.columns) + slab

    def _room(self, returned_AD: Tensor, piece: Piece, columns: slice) -> Tensor:
        """Where a slab of results arrives: at its place, where that is not cut."""
        if len(self.columns) == 1:
            return returned_AD[piece.sent]
        return returned_AD.new_empty(piece.length, columns.stop - columns.start)

    def _note(self, sent_AD: Tensor) -> None:
        self.mail.meter.ship(self.sent_R, self.received_R, sent_AD)
        self.mail.meter.ship(self.received_R, self.sent_R, sent_AD)


class _InOrder:
    """Parts that are added up piece after piece, in whichever order the pieces are computed."""

    def __init__(
        self, parts: list[deque[Any]], computed: list[bool], add: Callable[[Any], None] | None
    ) -> None:
        self.parts, self.computed, self.add = parts, computed, add
        self.at = 0

    def one(self) -> bool:
        """Add one part, if that of the next piece is there."""
        if self.add is None:
            return False
        while self.at < len(self.parts) and self.computed[self.at]:
            if self.parts[self.at]:
                self.add(self.parts[self.at].popleft())
                return True
            self.at += 1
        return False
