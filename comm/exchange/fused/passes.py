"""The two passes of a fused exchange, as launches, without autograd.

Each takes the ranks that this process stands for (csrc/fused.py): one of a distributed run, or all
of a domain on one device (virtual.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from coterie.csrc import fused
from coterie.csrc.fused import Hidden
from coterie.csrc.fused_launch import Here, Manner


class Results(NamedTuple):
    """Of the rows that a rank sent: (V, D)."""

    returned_VD: Tensor
    hidden: Hidden
    """What the backward pass needs; ``h_PH`` where it was to be kept."""


class Gradients(NamedTuple):
    """What a rank gets from a backward pass."""

    dsent_VD: Tensor
    dweight_N: Tensor
    """float32: of the combine weights of received rows."""
    dw_in_EHD: Tensor | None
    dw_out_EFD: Tensor | None


def forward(
    here: Sequence[Here],
    sent_VD: Sequence[Tensor],
    w_in_EHD: Sequence[Tensor],
    w_out_EFD: Sequence[Tensor],
    manner: Manner,
    keep: bool,
) -> list[Results]:
    """There, through the experts, and back; ``keep``: the first product, for the backward pass."""
    _fill(here, sent_VD)
    hidden = fused.dispatch(here, w_in_EHD, manner, keep)
    fused.combine(here, [one.a_PF for one in hidden], w_out_EFD, manner, weighted=True)
    return [
        Results(returned, own._replace(a_PF=own.x_PD.new_empty(0)))
        for returned, own in zip(_home(here, sent_VD), hidden, strict=True)
    ]


def arrive(
    here: Sequence[Here],
    sent_VD: Sequence[Tensor],
    w_in_EHD: Sequence[Tensor],
    manner: Manner,
    keep: bool,
) -> list[Hidden]:
    """There alone, for what the backward pass needs; nothing comes back."""
    _fill(here, sent_VD)
    hidden = fused.dispatch(here, w_in_EHD, manner, keep, closes=True)
    return [own._replace(a_PF=own.x_PD.new_empty(0)) for own in hidden]


def backward(
    here: Sequence[Here],
    dreturned_VD: Sequence[Tensor],
    hidden: Sequence[Hidden],
    w_in_EHD: Sequence[Tensor],
    w_out_EFD: Sequence[Tensor],
    manner: Manner,
    of_weights: bool = True,
) -> list[Gradients]:
    """Gradients there, through the experts, and back; a dispatch with a number of its own.

    ``of_weights``: whether theirs are wanted; that of other ranks may differ. Where ``h_PH`` was
    not kept it is computed again, from rows that are still there.
    """
    if any(own.h_PH is None for own in hidden):
        hidden = fused.hidden(here, [own.x_PD for own in hidden], w_in_EHD, manner)
    _fill(here, dreturned_VD)
    h_PH = [own.h_PH for own in hidden if own.h_PH is not None]
    grads = fused.dispatch_backward(here, w_out_EFD, h_PH, manner)
    dh_PH = [grad.dh_PH for grad in grads]
    weights: Sequence[tuple[Tensor | None, Tensor | None]]
    if of_weights:
        weights = fused.combine_backward(
            here,
            dh_PH,
            w_in_EHD,
            [own.x_PD for own in hidden],
            [grad.a_PF for grad in grads],
            [grad.dy_PD for grad in grads],
            manner,
        )
    else:
        fused.combine(here, dh_PH, w_in_EHD, manner, weighted=False)
        weights = [(None, None)] * len(grads)
    dsent_VD = _home(here, dreturned_VD)
    return [
        Gradients(dsent, grad.dweight_N, *own)
        for dsent, grad, own in zip(dsent_VD, grads, weights, strict=True)
    ]


def _fill(here: Sequence[Here], sent_VD: Sequence[Tensor]) -> None:
    for one, sent in zip(here, sent_VD, strict=True):
        one.windows.rows_VD[: len(sent)].copy_(sent)


def _home(here: Sequence[Here], sent_VD: Sequence[Tensor]) -> list[Tensor]:
    """The results, out of the windows: the next exchange overwrites those."""
    return [
        one.windows.home_VD[: len(sent)].clone() for one, sent in zip(here, sent_VD, strict=True)
    ]
