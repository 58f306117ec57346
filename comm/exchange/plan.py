"""What every rank of an exchange receives, where it lies, and in which order it is worked on.

Pure functions of the counts alone, the same on all ranks, for exchanges that overlap with compute
(Comet, arXiv 2502.19811, section 3). A rank's rows arrive in rounds: in round j rank r receives
from rank r - j (mod R), and sends to rank r + j, so that no two ranks send to the same one. Round
0 is its own rows, which are there.

Nothing here waits for the device: sizes that only the counts know are given by the caller.

Legend: S and R sending and receiving ranks (all ranks of the group), E global experts, L local
ones, J rounds, P rows of a pool, Q tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pools(NamedTuple):
    """Where each rank keeps the rows it receives: sorted by local expert, then by round."""

    start_RLS: Tensor
    """int64: in the pool of R, the first row that S sent for expert L."""
    rows_RLS: Tensor
    """int64: how many there are."""
    start_RL: Tensor
    """int64: the first row of each expert, a multiple of the alignment."""
    size_R: Tensor
    """int64: rows of each pool, those between experts that only align included."""


class Tiles(NamedTuple):
    """Rows of one expert that are computed together, in the order of work.

    A tile may start once all rows are there that it reads, and finishes some rows of each rank
    that sent any. Both are said by ``rows_QS``: where it is above 0, the tile waits for S before,
    and counts for S afterwards.
    """

    expert_Q: Tensor
    """int64: the local expert."""
    first_Q: Tensor
    """int64: the tile's first row in the pool."""
    rows_QS: Tensor
    """int64: its rows from each rank; all 0 in tiles that only fill up ``tiles``, at the end."""
    last_round_Q: Tensor
    """int64: the round with which its last rows arrive; 0: all are the rank's own; R: it is
    empty."""


def rounds_of(rank: int, ranks: int) -> list[int]:
    """The rank that ``rank`` receives from in each round; the first is itself."""
    return [(rank - j) % ranks for j in range(ranks)]


def pools(load_SE: Tensor, align: int = 1) -> Pools:
    """Of the int64 rows that each rank sends to each expert. Experts start at multiples of
    ``align``."""
    ranks = load_SE.shape[0]
    rows_RLS = load_SE.unflatten(1, (ranks, -1)).permute(1, 2, 0)
    rank = torch.arange(ranks, device=load_SE.device)
    # it is its own inverse: S sends to R in round R - S, R receives in round J from R - J
    turn_RLS = ((rank[:, None] - rank) % ranks)[:, None].expand_as(rows_RLS)
    rows_RLJ = rows_RLS.gather(2, turn_RLS)
    whole_RL = (rows_RLS.sum(2) + align - 1) // align * align
    end_RL = whole_RL.cumsum(1)
    start_RL = end_RL - whole_RL
    start_RLJ = start_RL[..., None] + rows_RLJ.cumsum(2) - rows_RLJ
    return Pools(start_RLJ.gather(2, turn_RLS), rows_RLS, start_RL, end_RL[:, -1])


def tiles(pool: Pools, rank: int, tile: int, count: int) -> Tiles:
    """The tiles of ``rank``'s pool, ``tile`` rows each but for an expert's last.

    Those come first that can start first: by the last round they need, then by expert. ``count``:
    how many to return, at least :func:`most_tiles`'s or the exact number; what is missing is
    filled up with empty ones.
    """
    rows_LS, start_LS, start_L = pool.rows_RLS[rank], pool.start_RLS[rank], pool.start_RL[rank]
    experts, ranks = rows_LS.shape
    end_L = start_L + rows_LS.sum(1)
    tiles_L = (end_L - start_L + tile - 1) // tile
    made_L = tiles_L.cumsum(0)
    number_Q = torch.arange(count, device=rows_LS.device)
    slot_Q = torch.searchsorted(made_L, number_Q, right=True)  # past the experts: an empty tile
    expert_Q = slot_Q.clamp(max=experts - 1)
    first_Q = start_L[expert_Q] + (number_Q - (made_L - tiles_L)[expert_Q]) * tile
    end_Q = torch.minimum(first_Q + tile, end_L[expert_Q])

    # of equal starts (segments without rows) the last one; its last row's segment has rows
    turn_J = (rank - torch.arange(ranks, device=rows_LS.device)) % ranks
    segment_Q = torch.searchsorted(start_LS[:, turn_J].flatten(), end_Q - 1, right=True) - 1
    last_Q = torch.where(slot_Q < experts, segment_Q % ranks, ranks)
    last_Q, order_Q = last_Q.sort(stable=True)
    expert_Q, first_Q = expert_Q[order_Q], first_Q[order_Q]

    # What a tile and a segment share; in place, since (Q, S) is large. An empty tile does not end
    # after its first row: both bounds become its end.
    first_Q1, end_Q1 = first_Q[:, None], end_Q[order_Q, None]
    rows_QS = (start_LS + rows_LS)[expert_Q].clamp_(first_Q1, end_Q1)
    rows_QS -= start_LS[expert_Q].clamp_(first_Q1, end_Q1)
    return Tiles(expert_Q, first_Q, rows_QS, last_Q)


def most_tiles(rows: int, experts: int, tile: int) -> int:
    """The most tiles that ``rows`` rows of ``experts`` experts can make."""
    return rows // tile + min(rows, experts)


def places(pool: Pools, load_E: Tensor, rank: int, rows: int) -> Tensor:
    """place_A: where each of ``rank``'s rows, sorted by expert, lies in the pool of the rank that
    holds its expert. ``rows``: their number, the sum of ``load_E``."""
    start_E = pool.start_RLS[:, :, rank].flatten()
    before_E = load_E.cumsum(0) - load_E
    place_A = (start_E - before_E).repeat_interleave(load_E, output_size=rows)
    place_A += torch.arange(rows, device=load_E.device)
    return place_A
