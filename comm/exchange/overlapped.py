"""An exchange that hides the way of rows behind the experts' work (Comet, arXiv 2502.19811).

Rows travel in pieces. The experts compute whichever piece is there: one from another rank, whose
results are then on their way back while the next is computed, or else rows of this rank's own,
which need no way at all. In the backward pass gradients travel so, and gradients of weights, which
nobody waits for, fill the time that is left.

No sum depends on the order in which pieces arrive: results are the same to the bit.
"""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.exchange.base import SplitExperts
from coterie.comm.exchange.between_ranks import ExchangeBetweenRanks, Trip
from coterie.comm.exchange.mail import Mail, Message, StreamMail, ThreadMail
from coterie.comm.exchange.plan import rounds_of
from coterie.csrc.twins import acc_dtype


class OverlappedExchange(ExchangeBetweenRanks):
    """Rows travel while others are computed.

    ``pieces``: of the rows between any two ranks. ``ahead``: how many messages a rank asks for
    before they are there (not on NCCL).
    """

    def __init__(
        self,
        group: ProcessGroup,
        max_rows_factor: float | None = None,
        pieces: int = 4,
        ahead: int = 2,
    ) -> None:
        super().__init__(group, max_rows_factor)
        self.pieces = pieces
        by_stream = dist.get_backend(group) == dist.Backend.NCCL
        self.mail: Mail = StreamMail(self.meter) if by_stream else ThreadMail(self.meter, ahead)

    def travel(self, sent_AD: Tensor, trip: Trip, experts: SplitExperts) -> Tensor:
        """Every piece is computed once it is there."""
        weights = experts.weights()
        sent_AD = sent_AD.to(weights[0].dtype)
        route = Route.of(trip, self.rank, self.pieces)
        returned_AD: Tensor = _Overlapped.apply(sent_AD, self.mail, route, experts, *weights)
        return returned_AD


class Piece(NamedTuple):
    """Some of the rows that one rank sends to another."""

    peer: int
    """The rank at the other end."""
    number: int
    """Its place among the pieces between the two."""
    rows: slice
    """Among the rows that the sending rank sends to all."""
    load: list[int]
    """Rows for each local expert of the receiving rank, where that is this one."""


class Route(NamedTuple):
    """The pieces that a rank computes, and those that others compute for it."""

    local: list[Piece]
    inbound: list[Piece]
    """From other ranks, in the order of rounds; ``rows`` counts from 0 for each of these."""
    outbound: list[Piece]
    """To other ranks, in the order in which they are asked for."""

    @classmethod
    def of(cls, trip: Trip, rank: int, pieces: int) -> "Route":
        """Cut the rows of ``trip`` for ``rank``."""
        loads, ranks = trip.load_SL.tolist(), len(trip.sent_R)
        own, *others = rounds_of(rank, ranks)
        begin_R = [0, *torch.tensor(trip.sent_R).cumsum(0).tolist()]
        return cls(
            local=_cut(own, begin_R[own], loads[own], pieces),
            inbound=[piece for peer in others for piece in _cut(peer, 0, loads[peer], pieces)],
            outbound=[
                piece
                for peer in reversed(others)
                for piece in _cut(peer, begin_R[peer], [trip.sent_R[peer]], pieces)
            ],
        )


def _cut(peer: int, begin: int, load: list[int], pieces: int) -> list[Piece]:
    """Rows from ``begin`` on, sorted by expert, in pieces of equal length up to one row."""
    rows = sum(load)
    edges = [rows * number // pieces for number in range(pieces + 1)]
    ends = torch.tensor(load).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, load, strict=True)]
    found = []
    for number, (low, high) in enumerate(pairwise(edges)):
        mine = [
            max(0, min(end, high) - max(start, low))
            for start, end in zip(starts, ends, strict=True)
        ]
        found.append(Piece(peer, number, slice(begin + low, begin + high), mine))
    return found


class _Overlapped(torch.autograd.Function):
    """Pieces count from 0: the local ones, then the inbound ones."""

    @staticmethod
    def forward(
        ctx: Any, sent_AD: Tensor, mail: Mail, route: Route, experts: SplitExperts, *weights: Tensor
    ) -> Tensor:
        passes, pieces = experts.passes(*weights), [*route.local, *route.inbound]
        keep = any(ctx.needs_input_grad)
        x: list[Tensor] = [sent_AD] * len(pieces)
        kept: list[list[Tensor]] = [[] for _ in pieces]

        def compute(number: int, x_AD: Tensor) -> Tensor:
            y_AD, products = passes.forward(x_AD, pieces[number].load, keep and experts.keeps)
            if keep:
                # what this rank sent to others is not to be kept with what it sent to itself
                x[number] = x_AD.clone() if number < len(route.local) else x_AD
                kept[number] = products
            return y_AD

        returned_AD = _there_and_back(mail, route, sent_AD, compute, lambda: False)
        if keep:
            ctx.save_for_backward(*weights, *x, *(product for own in kept for product in own))
        ctx.mail, ctx.route, ctx.experts = mail, route, experts
        ctx.weights, ctx.products = len(weights), [len(own) for own in kept]
        return returned_AD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dreturned_AD: Tensor) -> tuple[Tensor | None, ...]:
        pieces = [*ctx.route.local, *ctx.route.inbound]
        saved = iter(ctx.saved_tensors)
        weights = [next(saved) for _ in range(ctx.weights)]
        x = [next(saved) for _ in pieces]
        kept = [[next(saved) for _ in range(count)] for count in ctx.products]
        passes = ctx.experts.passes(*weights)
        needs = ctx.needs_input_grad[-len(weights) :]
        sums = passes.weight_sums(needs, acc_dtype(dreturned_AD))
        later: list[deque[Any]] = [deque() for _ in pieces]
        computed = [False] * len(pieces)

        def compute(number: int, dy_AD: Tensor) -> Tensor:
            dx_AD = torch.empty_like(x[number])
            for rows, part in passes.hidden_gradients(
                dy_AD, x[number], pieces[number].load, kept[number]
            ):
                dx_AD[rows] = passes.row_gradient(part)
                later[number].append(part)
            kept[number].clear()
            computed[number] = True
            return dx_AD

        weight_sums = _InOrder(later, computed, sums.add if any(needs) else None)
        dsent_AD = _there_and_back(
            ctx.mail, ctx.route, dreturned_AD.contiguous(), compute, weight_sums.one
        )
        while weight_sums.one():
            pass
        return dsent_AD, None, None, None, *sums.to(dreturned_AD.dtype)


def _there_and_back(
    mail: Mail,
    route: Route,
    sent_AD: Tensor,
    compute: Callable[[int, Tensor], Tensor],
    fill: Callable[[], bool],
) -> Tensor:
    """The results of the rows ``sent_AD``, those of other ranks computed on the way.

    ``compute``: the results of a piece. ``fill``: do something that nobody waits for, if there is
    anything, and say so; called where this rank would wait otherwise.
    """
    returned_AD = torch.empty_like(sent_AD)
    width, results = sent_AD.shape[1], len(route.local)
    there = mail.receive(
        Message(sent_AD.new_empty(sum(piece.load), width), piece.peer, piece.number)
        for piece in route.inbound
    )
    home = mail.receive(
        Message(returned_AD[piece.rows], piece.peer, results + piece.number)
        for piece in route.outbound
    )
    for piece in route.outbound:
        mail.send(Message(sent_AD[piece.rows], piece.peer, piece.number))

    local, inbound = deque(enumerate(route.local)), deque(zip(route.inbound, there, strict=True))
    while local or inbound:
        if inbound and (inbound[0][1].ready() or not local):
            piece, arrival = inbound[0]
            if not arrival.ready() and fill():
                continue
            inbound.popleft()
            number = len(route.local) + len(route.inbound) - len(inbound) - 1
            y_AD = compute(number, mail.wait(arrival))
            mail.send(Message(y_AD, piece.peer, results + piece.number))
        else:
            number, piece = local.popleft()
            returned_AD[piece.rows] = compute(number, sent_AD[piece.rows])
    for arrival in home:
        while not arrival.ready() and fill():
            pass
        mail.wait(arrival)
    mail.finish()
    return returned_AD


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
