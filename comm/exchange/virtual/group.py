"""What virtual ranks bring, and the plan that all of them know before a row travels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from coterie.comm.exchange.base import Rows
from coterie.comm.exchange.plan import Pools, places, pools, tiles


class Activation(Protocol):
    """What stands between an expert's two products; ``coterie.moe.activations`` has them."""

    @property
    def forward(self) -> Callable[[Tensor], Tensor]:
        """h_PH → a_PF."""

    @property
    def backward(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(da_PF, h_PH) → (dh_PH, a_PF); linear in da."""


@dataclass(frozen=True)
class VirtualExperts:
    """One rank's experts: y = activation(x · w_inᵀ) · w_out."""

    w_in_LHD: Tensor
    w_out_LFD: Tensor
    activation: Activation


@dataclass(frozen=True)
class VirtualRank:
    """What one rank brings."""

    x_TD: Tensor
    assignment: Rows
    experts: VirtualExperts


class Tile(NamedTuple):
    """Rows of one expert that are computed together."""

    number: int
    """Its place in the order of work."""
    expert: int
    rows: slice
    """Of the pool."""
    rows_S: list[int]
    """How many of them come from each rank."""


class VirtualGroup:
    """Ranks that exchange, and their plan.

    ``tile`` rows and ``slabs`` runs of columns (as even as they can be) are computed at a time.
    """

    def __init__(self, ranks: Sequence[VirtualRank], tile: int = 128, slabs: int = 1) -> None:
        self.ranks = ranks
        width = ranks[0].x_TD.shape[1]
        edges = [width * slab // slabs for slab in range(slabs + 1)]
        self.columns = [slice(*pair) for pair in pairwise(edges)]
        load_SE = torch.stack([rank.assignment.load_E for rank in ranks])
        pool = pools(load_SE, align=tile)
        self.size_R: list[int] = pool.size_R.tolist()
        """Rows of each rank's pool."""
        self.tiles = [_tiles(pool, rank, tile) for rank in range(len(ranks))]
        """Of each rank, in the order of work."""
        self.place_A = [
            places(pool, load_E, rank, int(load_E.sum())) for rank, load_E in enumerate(load_SE)
        ]
        """Of each rank's rows: where they lie in the pool of the rank that holds their expert."""
        local = load_SE.shape[1] // len(ranks)
        self.holder_A = [rank.assignment.expert_A // local for rank in ranks]
        """Of each rank's rows: the rank that holds the expert."""

    def sent_A(self, source: int, holder: int, rows: slice = slice(None)) -> Tensor:
        """Which rows ``source`` sends to ``holder``; of those into ``rows`` of its pool alone."""
        place_A = self.place_A[source]
        first, end, _ = rows.indices(self.size_R[holder])
        sent_A = (self.holder_A[source] == holder) & (place_A >= first) & (place_A < end)
        return sent_A.nonzero().flatten()

    def poisoned_pools(self, *width: int) -> list[Tensor]:
        """For each rank a buffer with a place for each row of its pool: NaN."""
        return [
            rank.x_TD.new_full((size, *width), torch.nan)
            for rank, size in zip(self.ranks, self.size_R, strict=True)
        ]


def _tiles(pool: Pools, rank: int, tile: int) -> list[Tile]:
    rows_L = pool.rows_RLS[rank].sum(1)
    found = tiles(pool, rank, tile, int((-(-rows_L // tile)).sum()))
    columns = (found.expert_Q.tolist(), found.first_Q.tolist(), found.rows_QS.tolist())
    return [
        Tile(number, expert, slice(first, first + sum(rows_S)), rows_S)
        for number, (expert, first, rows_S) in enumerate(zip(*columns, strict=True))
    ]
