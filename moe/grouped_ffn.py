"""The feed-forward of many experts over rows sorted by expert."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.csrc.matmul import mm, mm_into, pad_rows
from coterie.csrc.twins import acc_dtype
from coterie.moe.activations import ACTIVATIONS, ActivationName

_LONGEST = 2048  # rows; a product of as many is large enough to be fast


def grouped_ffn(
    x_AD: Tensor,
    w_in_EHD: Tensor,
    w_out_EFD: Tensor,
    load_E: Tensor,
    activation: ActivationName,
    recompute: bool = False,
) -> Tensor:
    """y_AD = act(x · w_in[e]ᵀ) · w_out[e], rows in runs of ``load_E`` by expert.

    All operands of one dtype. bfloat16 on a Hopper GPU takes torch's grouped matrix product, which
    does not wait for the device; everything else takes a loop over the experts (which needs the
    counts on the host) with a hand-written backward pass.

    ``recompute``: of the rows only ``x_AD`` is kept for the backward pass, and x · w_in is computed
    again; the results are bit-identical.
    """
    if not _grouped_mm_fits(x_AD, w_in_EHD, w_out_EFD):
        return _LoopFFN.apply(x_AD, w_in_EHD, w_out_EFD, load_E.tolist(), activation, recompute)
    operands = (x_AD, w_in_EHD, w_out_EFD, load_E, activation)
    if recompute:
        return checkpoint(_grouped_mm_ffn, *operands, use_reentrant=False)
    return _grouped_mm_ffn(*operands)


def _grouped_mm_ffn(
    x_AD: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor, load_E: Tensor, activation: ActivationName
) -> Tensor:
    offset_E = load_E.cumsum(0, dtype=torch.int32)
    a_AF = ACTIVATIONS[activation].forward(F.grouped_mm(x_AD, w_in_EHD.mT, offs=offset_E))
    return F.grouped_mm(a_AF, w_out_EFD, offs=offset_E)


def _grouped_mm_fits(x_AD: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> bool:
    """Rows must be multiples of 16 bytes; on Blackwell the gradients of experts without rows were
    wrong (pytorch issue 172439)."""
    if not x_AD.is_cuda or x_AD.dtype != torch.bfloat16:
        return False
    widths = (x_AD.shape[1], w_in_EHD.shape[1], w_out_EFD.shape[1])
    aligned = all(width % 8 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(x_AD.device)[0] == 9


class _LoopFFN(torch.autograd.Function):
    """One run of rows after the other, with one gradient tensor for the weights of all experts.

    Autograd over ``w[e]`` would instead allocate and add a gradient of all experts for each of
    them: E² memory traffic, which is most of the time of a layer of many small experts. Nothing of
    hidden width is as long as all rows but what is kept for the backward pass: without recompute
    the first product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: Tensor,
        w_in_EHD: Tensor,
        w_out_EFD: Tensor,
        load: list[int],
        activation: ActivationName,
        recompute: bool,
    ) -> Tensor:
        act = ACTIVATIONS[activation].forward
        y_AD = x_AD.new_empty(x_AD.shape[0], w_out_EFD.shape[2])
        kept = []
        for run in _runs(load):
            h = mm(pad_rows(x_AD[run.rows]), w_in_EHD[run.expert].t())
            y_AD[run.rows] = mm(act(h), w_out_EFD[run.expert])[: run.length]
            if not recompute:
                kept.append(h)
        ctx.save_for_backward(x_AD, w_in_EHD, w_out_EFD, *kept)
        ctx.load, ctx.activation = load, activation
        return y_AD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, w_in_EHD, w_out_EFD, *kept = ctx.saved_tensors
        needs_x, needs_in, needs_out = ctx.needs_input_grad[:3]
        act_backward = ACTIVATIONS[ctx.activation].backward
        dx_AD = torch.empty_like(x_AD) if needs_x else None
        # sums over runs must not round to half precision after each
        several = max(ctx.load, default=0) > _LONGEST
        dtype = acc_dtype(x_AD) if several else x_AD.dtype
        dw_in_EHD = torch.empty_like(w_in_EHD, dtype=dtype) if needs_in else None
        dw_out_EFD = torch.empty_like(w_out_EFD, dtype=dtype) if needs_out else None
        for number, run in enumerate(_runs(ctx.load)):
            x, dy = pad_rows(x_AD[run.rows]), pad_rows(dy_AD[run.rows].contiguous())
            w_in, w_out = w_in_EHD[run.expert], w_out_EFD[run.expert]
            h = kept[number] if kept else mm(x, w_in.t())
            dh, a = act_backward(mm(dy, w_out.t()), h)
            if dw_out_EFD is not None:
                mm_into(dw_out_EFD[run.expert], a.t(), dy, add=not run.first)
            if dw_in_EHD is not None:
                mm_into(dw_in_EHD[run.expert], dh.t(), x, add=not run.first)
            if dx_AD is not None:
                dx_AD[run.rows] = mm(dh, w_in)[: run.length]
        dw = [None if d is None else d.to(x_AD.dtype) for d in (dw_in_EHD, dw_out_EFD)]
        return dx_AD, *dw, None, None, None


class _Run(NamedTuple):
    """Rows of one expert that are computed together."""

    expert: int
    rows: slice
    first: bool
    """No run of this expert came before."""

    @property
    def length(self) -> int:
        return self.rows.stop - self.rows.start


def _runs(load: list[int]) -> Iterator[_Run]:
    """Up to ``_LONGEST`` rows each; an expert without rows has one empty run."""
    begin = 0
    for expert, rows in enumerate(load):
        end = begin + rows
        for start in range(begin, max(end, begin + 1), _LONGEST):
            yield _Run(expert, slice(start, min(start + _LONGEST, end)), start == begin)
        begin = end
