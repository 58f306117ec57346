"""What travels between ranks, cut into pieces that are computed one by one."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.comm.exchange.all_to_all import ReceivedRows
from coterie.comm.exchange.between_ranks import Trip
from coterie.comm.exchange.plan import rounds_of
from coterie.csrc.inverse import Inverse, invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute


class Piece(NamedTuple):
    """Some of what one rank sends to another."""

    peer: int
    """The rank at the other end."""
    number: int
    """Its place among the pieces between the two."""
    sent: slice
    """Which of all that the sending rank sends, or of what it sends to this one."""

    @property
    def length(self) -> int:
        """P: rows or tokens."""
        return int(self.sent.stop - self.sent.start)


class Pieces(NamedTuple):
    """The pieces that a rank computes, and those that others compute for it."""

    local: list[Piece]
    inbound: list[Piece]
    """From other ranks, in the order of rounds; ``sent`` counts from 0 for each of these."""
    outbound: list[Piece]
    """To other ranks, in the order in which they are asked for."""

    @classmethod
    def of(cls, trip: Trip, rank: int, pieces: int) -> "Pieces":
        """Cut what travels on ``trip`` for ``rank``."""
        own, *others = rounds_of(rank, len(trip.sent_R))
        begin_R = [0, *accumulate(trip.sent_R)]
        # tokens are for several experts each: nothing says where to cut them
        of_rows = trip.visit_A is None
        go_RL = trip.load_RL.tolist() if of_rows else [[length] for length in trip.sent_R]
        come_SL = trip.load_SL.tolist() if of_rows else [[length] for length in trip.received_R]
        return cls(
            local=_cut(own, begin_R[own], go_RL[own], pieces),
            inbound=[p for peer in others for p in _cut(peer, 0, come_SL[peer], pieces)],
            outbound=[
                piece
                for peer in reversed(others)
                for piece in _cut(peer, begin_R[peer], go_RL[peer], pieces)
            ],
        )


def _cut(peer: int, begin: int, load: list[int], pieces: int) -> list[Piece]:
    """Of about equal length, from ``begin`` on: between two experts, where that is no more than a
    quarter of a piece away, so that products stay long."""
    length = sum(load)
    ends = list(accumulate(load))
    edges = [begin]
    for number in range(1, pieces):
        even = length * number // pieces
        between = min(ends, key=lambda end: abs(end - even))
        edges.append(begin + (between if 4 * pieces * abs(between - even) <= length else even))
    edges.append(begin + length)
    return [Piece(peer, number, slice(*pair)) for number, pair in enumerate(pairwise(edges))]


class Job(NamedTuple):
    """What a rank computes of one piece: A rows, sorted by local expert."""

    load: list[int]
    """Rows for each local expert."""
    row_A: Tensor | None = None
    """int64: the token of the piece that each row is of; None: the piece is these rows."""
    inverse: Inverse | None = None
    """Of ``row_A``."""
    weighed_A: Tensor | None = None
    """int64: where the weight of each row stands in ``Trip.weight_A``."""

    def weights(self, weight_A: Tensor | None) -> Tensor | None:
        """Of its rows, of those of all."""
        return None if weight_A is None or self.weighed_A is None else weight_A[self.weighed_A]

    def rows(self, x_PD: Tensor) -> Tensor:
        """x_AD, of what the piece holds."""
        if self.row_A is None or self.inverse is None:
            return x_PD
        return permute(x_PD, self.row_A, self.inverse)

    def sums(self, y_AD: Tensor, weight_A: Tensor | None) -> Tensor:
        """y_PD: results of rows, weighted, as results of what the piece holds."""
        if self.row_A is None or self.inverse is None:
            return y_AD
        return unpermute(y_AD, weight_A, self.row_A, self.inverse)


def jobs(cut: Pieces, trip: Trip, rank: int) -> list[Job]:
    """Of the local pieces, then of the inbound ones."""
    if trip.visit_A is not None:
        return _jobs_of_tokens(cut, trip, rank)
    load_SL = trip.load_SL.tolist()
    # local pieces count among all that this rank sends
    first = sum(trip.sent_R[:rank])
    local = [Job(_within(load_SL[rank], piece.sent, first)) for piece in cut.local]
    return local + [Job(_within(load_SL[piece.peer], piece.sent, 0)) for piece in cut.inbound]


def _within(load: list[int], rows: slice, first: int) -> list[int]:
    """Of rows sorted by expert, ``load`` for each, from row ``first`` on: those in ``rows``."""
    ends = torch.tensor([first, *load]).cumsum(0).clamp(rows.start, rows.stop)
    found: list[int] = ends.diff().tolist()
    return found


def _jobs_of_tokens(cut: Pieces, trip: Trip, rank: int) -> list[Job]:
    lengths = [piece.length for piece in (*cut.local, *cut.inbound)]
    return [
        Job(rows.load_E.tolist(), rows.token_A, invert(rows.token_A, length), weighed_A)
        for (rows, weighed_A), length in zip(rows_of_pieces(cut, trip, rank), lengths, strict=True)
    ]


def rows_of_pieces(cut: Pieces, trip: Trip, rank: int) -> list[tuple[ReceivedRows, Tensor]]:
    """What is to be computed of the tokens of the local pieces, then of the inbound ones; and where
    the weights of these rows stand in ``trip.weight_A``."""
    assert trip.visit_A is not None and trip.weight_A is not None, "rows travel, not tokens"
    load_SL = trip.load_SL
    experts = torch.arange(load_SL.shape[1], device=load_SL.device)
    begin_S = [0, *load_SL.sum(1).cumsum(0).tolist()]
    own = sum(trip.sent_R[:rank])
    found = []
    for piece, first in [(p, own) for p in cut.local] + [(p, 0) for p in cut.inbound]:
        begin, end = begin_S[piece.peer : piece.peer + 2]
        token_A = trip.visit_A[begin:end] + first - piece.sent.start
        mine_A = ((token_A >= 0) & (token_A < piece.length)).nonzero()[:, 0]
        expert_A = experts.repeat_interleave(load_SL[piece.peer])[mine_A]
        weighed_A = begin + mine_A
        load_L = torch.bincount(expert_A, minlength=len(experts))
        weight_A = trip.weight_A[weighed_A].detach()
        rows = ReceivedRows(token_A[mine_A], expert_A, weight_A, load_L)
        found.append((rows, weighed_A))
    return found
