"""The fused kernels of one NVLink domain: rows cross while experts compute (Comet, 2502.19811).

Each rank has a window that all ranks of the domain reach: flags, the rows that it sends and the
results that come back. ``fused_plan.plan`` says where received rows lie in the rank's pool; then
:func:`dispatch` pulls them and computes the first product, :func:`combine` computes the second one
and puts sums into the windows of the ranks that asked. Backward: :func:`dispatch_backward`, and
:func:`combine_backward`, which computes the weights' gradients in the time that is left.

Every function takes the ranks that this process stands for, as ``Here`` of each: one in a
distributed run, several on one GPU in tests and benchmarks (virtual ranks: one launch for all).
They run on the current stream of the device, and nothing waits for the host. What a rank waits for
in vain ends the launch; :func:`complaint` then says what it was.

Legend: R ranks, S sending ranks, L local experts, D width, F hidden width, H = 2F (gate then up), V
visits (a token comes to a rank once, for all its experts there), N received rows, P rows of the
pool, Q tiles of 128 of them.
"""

from collections.abc import Sequence
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


class Hidden(NamedTuple):
    """What :func:`dispatch` gives; rows of padding are zero, those after the last tile anything."""

    x_PD: Tensor
    h_PH: Tensor | None
    a_PF: Tensor


class HiddenGradient(NamedTuple):
    """What :func:`dispatch_backward` gives; padding as in :class:`Hidden`."""

    dy_PD: Tensor
    dh_PH: Tensor
    a_PF: Tensor
    """Weighted."""
    dweight_N: Tensor
    """float32, in the order of received rows."""


class WeightGradients(NamedTuple):
    """What :func:`combine_backward` gives."""

    dw_in_EHD: Tensor
    dw_out_EFD: Tensor


def dispatch(
    here: Sequence[Here],
    w_in_EHD: Sequence[Tensor],
    manner: Manner,
    keep: bool,
    closes: bool = False,
) -> list[Hidden]:
    """Rows from all windows, x · w_inᵀ and SwiGLU of them, in one launch.

    The rows that each rank sends must be in its window. keep: ``h_PH`` is wanted. closes: no
    :func:`combine` of this epoch follows; the launch ends when all ranks have what they need.
    """
    made, rows = [], []
    for one, w in zip(here, w_in_EHD, strict=True):
        _check(one, w, 2)
        pool, hidden, width = one.plan.pool_rows, w.shape[1] // 2, w.shape[2]
        h_PH = w.new_empty(pool, 2 * hidden) if keep else None
        made.append(Hidden(w.new_empty(pool, width), h_PH, w.new_empty(pool, hidden)))
        rows.append(
            _row(
                one, manner, w, hidden, arrival=True, pulls=1, closes=int(closes),
                pool_PD=made[-1].x_PD, hidden_PH=h_PH, act_PF=made[-1].a_PF,
            )
        )  # fmt: skip
    _launch("fused_dispatch", [rows], manner, manner.communication)
    return made


def hidden(
    here: Sequence[Here], x_PD: Sequence[Tensor], w_in_EHD: Sequence[Tensor], manner: Manner
) -> list[Hidden]:
    """:func:`dispatch` again, of rows that are in the pool."""
    made, rows = [], []
    for one, x, w in zip(here, x_PD, w_in_EHD, strict=True):
        pool, width = one.plan.pool_rows, w.shape[1] // 2
        made.append(Hidden(x, w.new_empty(pool, 2 * width), w.new_empty(pool, width)))
        rows.append(
            _row(
                one, manner, w, width, arrival=True,
                pool_PD=x, hidden_PH=made[-1].h_PH, act_PF=made[-1].a_PF,
            )
        )  # fmt: skip
    _launch("fused_dispatch", [rows], manner, 0)
    return made


def combine(
    here: Sequence[Here],
    left_PK: Sequence[Tensor],
    weights_EKD: Sequence[Tensor],
    manner: Manner,
    weighted: bool = True,
) -> list[Tensor]:
    """left · weights of each row, and for each visit the sum over its rows, weighted or not, put
    into ``home_VD`` of the rank that sent it, in one launch.

    It ends when all ranks have put theirs: then ``home_VD`` holds this rank's results, until the
    next dispatch. Returns the rows' results, y_PD.
    """
    made, rows = _results(here, left_PK, weights_EKD, manner, weighted)
    _launch("fused_combine", [rows], manner, manner.communication)
    return made


def dispatch_backward(
    here: Sequence[Here],
    w_out_EFD: Sequence[Tensor],
    h_PH: Sequence[Tensor],
    manner: Manner,
) -> list[HiddenGradient]:
    """Gradients of results from all windows, and what they make of the hidden activations.

    The gradient of the results of what each rank sent must be in its window.
    """
    made, rows = [], []
    for one, w, h in zip(here, w_out_EFD, h_PH, strict=True):
        _check(one, w, 1)
        pool, hidden, width = one.plan.pool_rows, w.shape[1], w.shape[2]
        partial_PN = _partial(one, w, manner)
        grad = HiddenGradient(
            w.new_empty(pool, width), torch.empty_like(h), w.new_empty(pool, hidden), partial_PN
        )
        made.append(grad)
        rows.append(
            _row(
                one, manner, w, hidden, arrival=True, pulls=1, pool_PD=grad.dy_PD, hidden_PH=h,
                act_PF=grad.a_PF, grad_PH=grad.dh_PH, partial_PN=partial_PN,
            )
        )  # fmt: skip
    _launch("fused_dispatch_backward", [rows], manner, manner.communication)
    return [
        grad._replace(dweight_N=grad.dweight_N.sum(1)[one.plan.place_N])
        for one, grad in zip(here, made, strict=True)
    ]


def combine_backward(
    here: Sequence[Here],
    dh_PH: Sequence[Tensor],
    w_in_EHD: Sequence[Tensor],
    x_PD: Sequence[Tensor],
    a_PF: Sequence[Tensor],
    dy_PD: Sequence[Tensor],
    manner: Manner,
) -> list[WeightGradients]:
    """dh · w_in of each row, and the sums over a visit's rows put as by :func:`combine`; and in
    the time that is left the gradients of the weights, dhᵀ · x and aᵀ · dy; in one launch."""
    _, rows = _results(here, dh_PH, w_in_EHD, manner, weighted=False)
    dw_out, rows_out = _gradients(here, a_PF, dy_PD, manner)
    dw_in, rows_in = _gradients(here, dh_PH, x_PD, manner)
    _launch("fused_combine_backward", [rows, rows_out, rows_in], manner, manner.communication)
    return list(map(WeightGradients, dw_in, dw_out))


def weight_gradient(
    here: Sequence[Here], left_PM: Sequence[Tensor], right_PD: Sequence[Tensor], manner: Manner
) -> list[Tensor]:
    """Of each expert leftᵀ · right over its rows: dw_EMD; zeros for one without rows."""
    made, rows = _gradients(here, left_PM, right_PD, manner)
    _launch("fused_weight_gradient", [rows], manner)
    return made


def _results(
    here: Sequence[Here],
    left_PK: Sequence[Tensor],
    weights_EKD: Sequence[Tensor],
    manner: Manner,
    weighted: bool,
) -> tuple[list[Tensor], list["_Row"]]:
    """Room for left · weights, and a launch's rows for them."""
    made, rows = [], []
    for one, left, w in zip(here, left_PK, weights_EKD, strict=True):
        made.append(w.new_empty(one.plan.pool_rows, w.shape[2]))
        weight_P = one.plan.weight_P if weighted else None
        rows.append(
            _row(
                one, manner, w, HIDDEN, arrival=False, inner=w.shape[1],
                slabs=_slabs(manner, w.shape[2]), left_PK=left, pool_PD=made[-1], weight_P=weight_P,
            )
        )  # fmt: skip
    return made, rows


def _gradients(
    here: Sequence[Here], left_PM: Sequence[Tensor], right_PD: Sequence[Tensor], manner: Manner
) -> tuple[list[Tensor], list["_Row"]]:
    """Room for leftᵀ · right of each expert, and a launch's rows for them."""
    made, rows = [], []
    for one, left, right in zip(here, left_PM, right_PD, strict=True):
        size = (one.plan.experts, left.shape[1], right.shape[1])
        made.append(right.new_empty(size))
        rows.append(
            _row(
                one, manner, made[-1], HIDDEN, arrival=False, inner=left.shape[1],
                left_PK=left, pool_PD=right,
            )
        )  # fmt: skip
    return made, rows


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


def _across(manner: Manner, width: int) -> int:
    """Tiles side by side."""
    return -(-width // _tile_columns(manner))


def _tile_columns(manner: Manner) -> int:
    if manner.tile_columns not in TILE_COLUMNS:
        raise ValueError(
            f"fused experts: tiles of {' or '.join(map(str, TILE_COLUMNS))} columns are accepted, "
            f"not of {manner.tile_columns}"
        )
    return manner.tile_columns


def _slabs(manner: Manner, width: int) -> int:
    return max(1, min(manner.slabs, MOST_SLABS, _across(manner, width)))


def _check(one: Here, weights: Tensor, parts: int) -> None:
    experts, rows, width = weights.shape
    fits = width % WIDTH == 0 and rows % (parts * HIDDEN) == 0
    if not fits or experts != one.plan.experts or weights.dtype != torch.bfloat16:
        raise ValueError(
            f"fused experts: {one.plan.experts} bfloat16 experts, a width that is a multiple of "
            f"{WIDTH} and a hidden width that is one of {HIDDEN} are accepted, not {weights.dtype} "
            f"weights of {tuple(weights.shape)}"
        )


def _partial(one: Here, w_out_EFD: Tensor, manner: Manner) -> Tensor:
    """Room for what each tile contributes to the gradient of a row's weight."""
    size = (one.plan.pool_rows, _across(manner, w_out_EFD.shape[1]))
    return torch.empty(size, dtype=torch.float32, device=w_out_EFD.device)


class _Row(NamedTuple):
    """One rank of a launch: its words, and what they point to."""

    words: list[int]
    keeps: list[Tensor]


def _row(
    one: Here,
    manner: Manner,
    weights: Tensor,
    hidden: int,
    arrival: bool,
    **fields: int | Tensor | None,
) -> _Row:
    """``arrival``: tiles come in the order in which they can start, else by place."""
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
    return _Row(words, keeps)


def _launch(name: str, tables: list[list[_Row]], manner: Manner, *communication: int) -> None:
    like = tables[0][0].keeps[0]
    words = [torch.tensor([row.words for row in rows], dtype=torch.int64) for rows in tables]
    kernel = getattr(fused_ops.library, f"{name}_{_tile_columns(manner)}")
    kernel(*words, like, manner.blocks, *communication)
