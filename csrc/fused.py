"""The fused kernels of one NVLink domain: rows cross while experts compute (Comet, 2502.19811).

Each rank has a window that all ranks of the domain reach: flags, the rows that it sends and the
results that come back. ``fused_plan.plan`` says where received rows lie in the rank's pool; then
:func:`dispatch` pulls them and computes the first product, :func:`combine` computes the second one
and puts sums into the windows of the ranks that asked. Backward: :func:`dispatch_backward`, and
:func:`combine_backward`, which computes the weights' gradients in the time that is left.

Every function takes the ranks that this process stands for, as ``Here`` of each: one in a
distributed run, several on one GPU in tests and benchmarks (virtual ranks: one launch for all).
They run on the current stream of the device, and nothing waits for the host. What a rank waits for
in vain ends the launch; ``fused_launch.complaint`` then says what it was.

Legend: R ranks, S sending ranks, L local experts, D width, F hidden width, H = 2F (gate then up), V
visits (a token comes to a rank once, for all its experts there), N received rows, P rows of the
pool, Q tiles of 128 of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.csrc.fused_launch import (
    HIDDEN,
    WIDTH,
    Here,
    Manner,
    Row,
    across,
    launch,
    slabs,
    table_row,
)


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
            table_row(
                one, manner, w, hidden, arrival=True, pulls=1, closes=int(closes),
                pool_PD=made[-1].x_PD, hidden_PH=h_PH, act_PF=made[-1].a_PF,
            )
        )  # fmt: skip
    launch("fused_dispatch", [rows], manner, manner.communication)
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
            table_row(
                one, manner, w, width, arrival=True,
                pool_PD=x, hidden_PH=made[-1].h_PH, act_PF=made[-1].a_PF,
            )
        )  # fmt: skip
    launch("fused_dispatch", [rows], manner, 0)
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
    launch("fused_combine", [rows], manner, manner.communication)
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
            table_row(
                one, manner, w, hidden, arrival=True, pulls=1, pool_PD=grad.dy_PD, hidden_PH=h,
                act_PF=grad.a_PF, grad_PH=grad.dh_PH, partial_PN=partial_PN,
            )
        )  # fmt: skip
    launch("fused_dispatch_backward", [rows], manner, manner.communication)
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
    launch("fused_combine_backward", [rows, rows_out, rows_in], manner, manner.communication)
    return list(map(WeightGradients, dw_in, dw_out))


def weight_gradient(
    here: Sequence[Here], left_PM: Sequence[Tensor], right_PD: Sequence[Tensor], manner: Manner
) -> list[Tensor]:
    """Of each expert leftᵀ · right over its rows: dw_EMD; zeros for one without rows."""
    made, rows = _gradients(here, left_PM, right_PD, manner)
    launch("fused_weight_gradient", [rows], manner)
    return made


def _results(
    here: Sequence[Here],
    left_PK: Sequence[Tensor],
    weights_EKD: Sequence[Tensor],
    manner: Manner,
    weighted: bool,
) -> tuple[list[Tensor], list[Row]]:
    """Room for left · weights, and a launch's rows for them."""
    made, rows = [], []
    for one, left, w in zip(here, left_PK, weights_EKD, strict=True):
        made.append(w.new_empty(one.plan.pool_rows, w.shape[2]))
        weight_P = one.plan.weight_P if weighted else None
        rows.append(
            table_row(
                one, manner, w, HIDDEN, arrival=False, inner=w.shape[1],
                slabs=slabs(manner, w.shape[2]), left_PK=left, pool_PD=made[-1], weight_P=weight_P,
            )
        )  # fmt: skip
    return made, rows


def _gradients(
    here: Sequence[Here], left_PM: Sequence[Tensor], right_PD: Sequence[Tensor], manner: Manner
) -> tuple[list[Tensor], list[Row]]:
    """Room for leftᵀ · right of each expert, and a launch's rows for them."""
    made, rows = [], []
    for one, left, right in zip(here, left_PM, right_PD, strict=True):
        size = (one.plan.experts, left.shape[1], right.shape[1])
        made.append(right.new_empty(size))
        rows.append(
            table_row(
                one, manner, made[-1], HIDDEN, arrival=False, inner=left.shape[1],
                left_PK=left, pool_PD=right,
            )
        )  # fmt: skip
    return made, rows


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
    size = (one.plan.pool_rows, across(manner, w_out_EFD.shape[1]))
    return torch.empty(size, dtype=torch.float32, device=w_out_EFD.device)
