"""The feed-forward of many experts over rows sorted by expert."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.csrc.matmul import mm, pad_rows
from coterie.moe.activations import ACTIVATIONS, ActivationName


def grouped_ffn(
    x_AD: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor, load_E: Tensor, activation: ActivationName
) -> Tensor:
    """y_AD = act(x · w_in[e]ᵀ) · w_out[e], rows in runs of ``load_E`` by expert.

    All operands of one dtype. bfloat16 on a Hopper GPU takes torch's grouped matrix product, which
    does not wait for the device; everything else takes a loop over the experts (which needs the
    counts on the host) with a hand-written backward pass.
    """
    if _grouped_mm_fits(x_AD, w_in_EHD, w_out_EFD):
        offset_E = load_E.cumsum(0, dtype=torch.int32)
        a_AF = ACTIVATIONS[activation].forward(F.grouped_mm(x_AD, w_in_EHD.mT, offs=offset_E))
        return F.grouped_mm(a_AF, w_out_EFD, offs=offset_E)
    return _LoopFFN.apply(x_AD, w_in_EHD, w_out_EFD, load_E.tolist(), activation)


def _grouped_mm_fits(x_AD: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> bool:
    """Rows must be multiples of 16 bytes; on Blackwell the gradients of experts without rows were
    wrong (pytorch issue 172439)."""
    if not x_AD.is_cuda or x_AD.dtype != torch.bfloat16:
        return False
    widths = (x_AD.shape[1], w_in_EHD.shape[1], w_out_EFD.shape[1])
    aligned = all(width % 8 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(x_AD.device)[0] == 9


class _LoopFFN(torch.autograd.Function):
    """One expert after the other, with one gradient tensor for the weights of all.

    Autograd over ``w[e]`` would instead allocate and add a gradient of all experts for each of
    them: E² memory traffic, which is most of the time of a layer of many small experts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        w_in_EHD: Tensor,
        w_out_EFD: Tensor,
        load: list[int],
        activation: ActivationName,
    ) -> Tensor:
        act = ACTIVATIONS[activation].forward
        x_E = [pad_rows(x) for x in x_AD.split(load)]
        h_E, y_E = [], []
        for x, w_in, w_out, rows in zip(x_E, w_in_EHD, w_out_EFD, load, strict=True):
            h_E.append(mm(x, w_in.t()))
            y_E.append(mm(act(h_E[-1]), w_out)[:rows])
        ctx.save_for_backward(w_in_EHD, w_out_EFD, *x_E, *h_E)
        ctx.load, ctx.activation = load, activation
        return torch.cat(y_E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor | None, ...]:
        w_in_EHD, w_out_EFD, *kept = ctx.saved_tensors
        x_E, h_E = kept[: len(ctx.load)], kept[len(ctx.load) :]
        needs_x, needs_in, needs_out = ctx.needs_input_grad[:3]
        act_backward = ACTIVATIONS[ctx.activation].backward
        dw_in_EHD = torch.empty_like(w_in_EHD) if needs_in else None
        dw_out_EFD = torch.empty_like(w_out_EFD) if needs_out else None
        dx_E = []
        for e, (x, h, dy) in enumerate(zip(x_E, h_E, dy_AD.split(ctx.load), strict=True)):
            dy = pad_rows(dy.contiguous())
            dh, a = act_backward(mm(dy, w_out_EFD[e].t()), h)
            # a product over no rows is zero: an expert without rows has a zero gradient
            if dw_out_EFD is not None:
                dw_out_EFD[e] = mm(a.t(), dy)
            if dw_in_EHD is not None:
                dw_in_EHD[e] = mm(dh.t(), x)
            if needs_x:
                dx_E.append(mm(dh, w_in_EHD[e])[: ctx.load[e]])
        return torch.cat(dx_E) if needs_x else None, dw_in_EHD, dw_out_EFD, None, None
