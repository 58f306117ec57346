"""The feed-forward of many experts over rows sorted by expert."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.moe.activations import ACTIVATIONS, ActivationName


def grouped_ffn(
    x_AD: Tensor, w_in_EDH: Tensor, w_out_EFD: Tensor, load_E: Tensor, activation: ActivationName
) -> Tensor:
    """y_AD = act(x · w_in[e]) · w_out[e], rows in runs of ``load_E`` by expert.

    All operands of one dtype. Half precision on CUDA takes torch's grouped matrix product, which
    never waits for the device; everything else takes a loop over the experts (which needs the
    counts on the host) with a hand-written backward pass.
    """
    if x_AD.is_cuda and x_AD.dtype == torch.bfloat16:
        offset_E = load_E.cumsum(0, dtype=torch.int32)
        a_AF = ACTIVATIONS[activation].forward(F.grouped_mm(x_AD, w_in_EDH, offs=offset_E))
        return F.grouped_mm(a_AF, w_out_EFD, offs=offset_E)
    return _LoopFFN.apply(x_AD, w_in_EDH, w_out_EFD, load_E.tolist(), activation)


def _runs(load: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, rows in enumerate(load):
        yield expert, slice(start, start + rows)
        start += rows


class _LoopFFN(torch.autograd.Function):
    """One expert after the other, each result written straight into its slice of the whole.

    Autograd over ``w[e]`` would instead allocate and add a gradient of all experts for each of
    them: E² memory traffic, which is most of the time of a layer of many small experts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        w_in_EDH: Tensor,
        w_out_EFD: Tensor,
        load: list[int],
        activation: ActivationName,
    ) -> Tensor:
        act = ACTIVATIONS[activation].forward
        h_AH = x_AD.new_empty(x_AD.shape[0], w_in_EDH.shape[2])
        y_AD = torch.empty_like(x_AD)
        for e, rows in _runs(load):
            torch.mm(x_AD[rows], w_in_EDH[e], out=h_AH[rows])
            torch.mm(act(h_AH[rows]), w_out_EFD[e], out=y_AD[rows])
        ctx.save_for_backward(x_AD, w_in_EDH, w_out_EFD, h_AH)
        ctx.load, ctx.activation = load, activation
        return y_AD

    @staticmethod
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, w_in_EDH, w_out_EFD, h_AH = ctx.saved_tensors
        needs_x, needs_in, needs_out = ctx.needs_input_grad[:3]
        act_backward = ACTIVATIONS[ctx.activation].backward
        dy_AD = dy_AD.contiguous()
        dx_AD = torch.empty_like(x_AD) if needs_x else None
        dw_in_EDH = torch.empty_like(w_in_EDH) if needs_in else None
        dw_out_EFD = torch.empty_like(w_out_EFD) if needs_out else None
        for e, rows in _runs(ctx.load):
            da_AF = torch.mm(dy_AD[rows], w_out_EFD[e].t())
            dh_AH, a_AF = act_backward(da_AF, h_AH[rows])
            # a product over no rows writes zeros: an expert without rows has a zero gradient
            if dw_out_EFD is not None:
                torch.mm(a_AF.t(), dy_AD[rows], out=dw_out_EFD[e])
            if dw_in_EDH is not None:
                torch.mm(x_AD[rows].t(), dh_AH, out=dw_in_EDH[e])
            if dx_AD is not None:
                torch.mm(dh_AH, w_in_EDH[e].t(), out=dx_AD[rows])
        return dx_AD, dw_in_EDH, dw_out_EFD, None, None
