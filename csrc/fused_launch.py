"""What a launch of the fused kernels is told, and what it tells when it fails.

The kernels read it as a table of words, a row for each rank that this process stands for
(``Rank`` in csrc/fused_kernels/rank.h). Legend: csrc/fused.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from coterie.csrc import fused_ops
from coterie.csrc.fused_plan import Plan

WIDTH, HIDDEN = 64, 128
"""What the width and the hidden width must be multiples of."""
TILE_COLUMNS = (256, 128)
"""Of tiles: there are kernels for each."""
MOST_RANKS, MOST_SLABS = 64, 16
FLAG_BYTES = 1024
"""At the start of a window; all 0 before its first use."""
_READY = 16 + MOST_RANKS  # counters before those of tiles or slabs

_FIELDS = (
    *("rank", "ranks", "epoch", "window_R", "rows_at", "home_at", "begin_R", "before_R1"),
    *("source_P", "row_P", "weight_P", "tiles", "expert_Q", "order_Q", "round_Q", "run_Q2"),
    *("span_L2", "offset_V1", "place_N", "pool_rows", "experts", "width", "hidden"),
    *("inner", "pool_PD", "left_PK", "weights", "hidden_PH", "act_PF", "grad_PH"),
    *("partial_PN", "counters", "failure", "patience", "pulls", "closes", "slabs", "pace"),
    "waits",
)
"""Of ``Rank`` in csrc/fused_kernels/rank.h, in its order."""


class Manner(NamedTuple):
    """How a launch is worked off; results depend on it, by their rounding, in ``tile_columns``
    alone."""

    communication: int = 16
    """Blocks that move rows first, out of one for each multiprocessor; at most half of a rank's."""
    slabs: int = 4
    """Runs of columns in which results are computed and sent, up to ``MOST_SLABS``."""
    blocks: int = 0
    """Of each rank; 0: as many as the device runs at a time."""
    patience: float = 30.0
    """Seconds that a rank waits for another one."""
    pace: int = 0
    """Bytes that cross per microsecond, for an emulated link; 0: as fast as it goes."""
    tile_columns: int = TILE_COLUMNS[0]
    """What a block computes of 128 rows at a time: one of ``TILE_COLUMNS``."""


class Windows(NamedTuple):
    """The windows of a domain, as one of its ranks reaches them."""

    address_R: Tensor
    """int64, on the device: where each rank's window begins; it is a multiple of 128."""
    rows_VD: Tensor
    """bfloat16: where this rank puts the rows that it sends; its capacity is the same on all."""
    home_VD: Tensor
    """bfloat16: where their results arrive; as many."""

    @staticmethod
    def bytes_for(capacity: int, width: int) -> int:
        """What a window takes that holds ``capacity`` rows each way."""
        return FLAG_BYTES + 2 * capacity * width * 2

    @classmethod
    def of(cls, memory: Tensor, address_R: Tensor, capacity: int, width: int) -> "Windows":
        """``memory``: uint8, this rank's window."""
        size = capacity * width * 2
        rows, home = (
            memory[start : start + size].view(torch.bfloat16).view(capacity, width)
            for start in (FLAG_BYTES, FLAG_BYTES + size)
        )
        return cls(address_R, rows, home)


class Here(NamedTuple):
    """A rank that this process stands for."""

    plan: Plan
    windows: Windows
    epoch: int
    """Number of this dispatch or its combine: one more for each dispatch, from 1 on, equal on all
    ranks."""
    waits_2R: Tensor | None = None
    """int64, on the device: launches add the nanoseconds that they waited for each rank, for its
    rows and for its end (of a launch the longest for its rows)."""


class Row(NamedTuple):
    """One rank of a launch: its words, and what they point to."""

    words: list[int]
    keeps: list[Tensor]


def table_row(
    one: Here,
    manner: Manner,
    weights: Tensor,
    hidden: int,
    arrival: bool,
    **fields: int | Tensor | None,
) -> Row:
    """``one``'s row of a launch's table. ``weights`` give width (their last) and device.

    ``arrival``: tiles come in the order in which they can start, else by place. ``fields``: more of
    ``Rank``, by name; a field that is not given is 0.
    """
    plan, windows = one.plan, one.windows
    wide = plan.tile_7Q.shape[1]
    tile = plan.tile_7Q.flatten()
    counters = torch.zeros(_READY + max(wide, MOST_SLABS), dtype=torch.int32, device=weights.device)
    capacity, width = windows.rows_VD.shape
    values: dict[str, int | Tensor | None] = {
        "rank": plan.rank,
        "ranks": plan.ranks,
        "epoch": one.epoch,
        "window_R": windows.address_R,
        "rows_at": FLAG_BYTES,
        "home_at": FLAG_BYTES + capacity * width * 2,
        "begin_R": plan.begin_S,
        "before_R1": plan.before_S1,
        "source_P": plan.source_P,
        "row_P": plan.row_P,
        "weight_P": plan.weight_P,
        "tiles": tile[wide - 1 :],
        "expert_Q": tile[wide:],
        "order_Q": tile if arrival else None,
        "round_Q": tile[2 * wide :],
        "run_Q2": tile[(3 if arrival else 5) * wide :],
        "span_L2": plan.span_L2,
        "offset_V1": plan.offset_V1,
        "place_N": plan.visited_N,
        "pool_rows": plan.pool_rows,
        "experts": plan.experts,
        "width": weights.shape[2],
        "hidden": hidden,
        "weights": weights.contiguous(),
        "counters": counters,
        "failure": _failure(weights.device),
        "patience": int(manner.patience * 1e9),
        "slabs": 1,
        "pace": manner.pace,
        "waits": one.waits_2R,
        **fields,
    }
    words, keeps = [], []
    for name in _FIELDS:
        value = values.pop(name, None)
        if isinstance(value, Tensor):
            assert value.is_contiguous(), name
            keeps.append(value)
            value = value.data_ptr()
        words.append(value or 0)
    assert not values, f"no field of a launch: {sorted(values)}"
    return Row(words, keeps)


def launch(name: str, tables: list[list[Row]], manner: Manner, *communication: int) -> None:
    """Kernel ``name`` of the manner's tiles, with a table for each of its tasks, on the current
    stream; ``communication``: blocks that move rows first, where the kernel has such."""
    like = tables[0][0].keeps[0]
    words = [torch.tensor([row.words for row in rows], dtype=torch.int64) for rows in tables]
    kernel = getattr(fused_ops.library, f"{name}_{_tile_columns(manner)}")
    kernel(*words, like, manner.blocks, *communication)


def across(manner: Manner, width: int) -> int:
    """Tiles side by side in ``width`` columns."""
    return -(-width // _tile_columns(manner))


def _tile_columns(manner: Manner) -> int:
    if manner.tile_columns not in TILE_COLUMNS:
        raise ValueError(
            f"fused experts: tiles of {' or '.join(map(str, TILE_COLUMNS))} columns are accepted, "
            f"not of {manner.tile_columns}"
        )
    return manner.tile_columns


def slabs(manner: Manner, width: int) -> int:
    """In which ``width`` columns of results are computed: the manner's, a tile wide at least."""
    return max(1, min(manner.slabs, MOST_SLABS, across(manner, width)))


_COMPLAINTS = {
    1: "rank {1} waited for the rows of rank {2} (epoch {3}; that rank is in {4})",
    2: "rank {1} waited for the rows of its tile {2} ({3} parts; {4} were there)",
    3: "rank {1} waited for its results of slab {2} ({3} tiles; {4} were done)",
    4: "rank {1} waited for rank {2} to end epoch {3} (that rank had ended {4})",
}
_failures: dict[torch.device, Tensor] = {}


def complaint() -> str | None:
    """What a launch of this process waited for in vain, in one sentence; None: nothing."""
    for told in _failures.values():
        what, *_ = words = told.tolist()
        if what:
            return f"fused exchange: {_COMPLAINTS[what].format(*words)}"
    return None


def _failure(device: torch.device) -> Tensor:
    """Memory of the host that the device writes to, even in a launch that fails."""
    if device not in _failures:
        words = torch.zeros(5, dtype=torch.int64)
        _failures[device] = words.pin_memory() if device.type == "cuda" else words
    return _failures[device]
