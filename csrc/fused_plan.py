"""What a rank of a fused exchange receives, and where it lies in its pool.

The rules are those of coterie.comm.exchange.plan, for one rank, in one launch on the device.

Legend: S sending ranks, L local experts, V visits (a token comes to a rank once, for all its
experts there), N received rows, P rows of the pool, Q tiles of 128 of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.csrc import fused_ops
from coterie.csrc.inverse import invert

TILE = 128
"""Rows of a tile; each expert's rows begin at a multiple in the pool."""


class Plan(NamedTuple):
    """What a rank receives, and where it lies."""

    rank: int
    ranks: int
    experts: int
    begin_S: Tensor
    """int64: in the window of each S, the first row for this rank."""
    before_S1: Tensor
    """int64: visits received from ranks below; the last is V."""
    place_N: Tensor
    """int32: the row of the pool of each received row, by (source, expert)."""
    source_P: Tensor
    """int32: where each row of the pool comes from; -1: padding, which is zero."""
    row_P: Tensor
    """int32: its row in that rank's window."""
    weight_P: Tensor
    """float32: its combine weight, 0 in padding."""
    tile_7Q: Tensor
    """int32, (7, Q + 1): order of arrival, expert, last round, and runs of one expert in order of
    arrival and by place, two each; Q itself in the last column of the first. Q here counts what
    there may be at most."""
    span_L2: Tensor
    """int32: the first row and the number of rows of each expert."""
    offset_V1: Tensor
    """int64: of each visit, the first of its rows in ``visited_N``."""
    visited_N: Tensor
    """int32: places in the pool, by visit."""

    @property
    def pool_rows(self) -> int:
        """P: room for rows and padding."""
        return self.source_P.numel()


def pool_rows(rows: int, experts: int) -> int:
    """P, room for ``rows`` and padding, however they are spread over ``experts``: whole tiles, and
    at least one, since no tensor map has no rows."""
    return max(rows // TILE + min(rows, experts), 1) * TILE


def plan(
    load_SL: Tensor,
    visit_N: Tensor,
    weight_N: Tensor,
    received_S: Sequence[int],
    begin_S: Sequence[int],
    rank: int,
    run: int = 8,
) -> Plan:
    """Where the rows lie that ``rank`` receives; nothing waits for the device.

    load_SL: int64 rows from each rank for each local expert. visit_N, weight_N: of the rows, by
    (source, expert), which of the source's visits each is (int64), and its combine weight.
    received_S: visits from each rank. begin_S: where they begin in its window. run: tiles of one
    expert that share its weights while they are computed.
    """
    ranks, experts = load_SL.shape
    device, rows = load_SL.device, visit_N.numel()
    tiles = pool_rows(rows, experts) // TILE
    before_S1 = [0]
    for visits in received_S:
        before_S1.append(before_S1[-1] + visits)
    sources = torch.tensor([[*begin_S, 0], before_S1], device="cpu")
    sources = _moved(sources, device)
    begin, before = sources[0, :-1], sources[1]

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    place_N, global_N = empty(rows), empty(rows, dtype=torch.int64)
    source_P, row_P = empty(tiles * TILE), empty(tiles * TILE)
    weight_P = empty(tiles * TILE, dtype=torch.float32)
    tile_7Q, span_L2 = empty(7, tiles + 1), empty(experts, 2)
    fused_ops.library.fused_plan(
        *(load_SL.contiguous(), visit_N.contiguous(), begin, before),
        *(weight_N.detach().float().contiguous(), rank, run),
        *(place_N, global_N, source_P, row_P, weight_P, tile_7Q, span_L2),
    )
    row_N, offset_V1 = invert(global_N, before_S1[-1])
    return Plan(
        *(rank, ranks, experts, begin, before, place_N, source_P, row_P, weight_P, tile_7Q),
        *(span_L2, offset_V1, place_N[row_N]),
    )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return x
    return x.pin_memory().to(device, non_blocking=True)
