"""The feed-forward of many experts over rows sorted by expert."""

from collections.abc import Iterator, Sequence
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
        passes = FFNPasses(w_in_EHD, w_out_EFD, activation)
        y_AD, kept = passes.forward(x_AD, load, keep=not recompute)
        ctx.save_for_backward(x_AD, w_in_EHD, w_out_EFD, *kept)
        ctx.load, ctx.activation = load, activation
        return y_AD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, w_in_EHD, w_out_EFD, *kept = ctx.saved_tensors
        needs_x, *needs_weights = ctx.needs_input_grad[:3]
        passes = FFNPasses(w_in_EHD, w_out_EFD, ctx.activation)
        dx_AD = torch.empty_like(x_AD) if needs_x else None
        # sums over runs must not round to half precision after each
        several = max(ctx.load, default=0) > _LONGEST
        sums = passes.weight_sums(needs_weights, acc_dtype(x_AD) if several else x_AD.dtype)
        for part in passes.hidden_gradients(dy_AD, x_AD, ctx.load, kept):
            sums.add(part)
            if dx_AD is not None:
                dx_AD[part.rows] = passes.row_gradient(part)
        return dx_AD, *sums.to(x_AD.dtype), None, None, None


class Hidden(NamedTuple):
    """Hidden activations of one run of rows; A: its rows, padded as products like."""

    expert: int
    rows: slice
    """Those that are not padding."""
    h_AH: Tensor
    """The first product."""
    a_AF: Tensor
    """Its activations."""


class HiddenGradient(NamedTuple):
    """What the gradients of one run of rows are made of; A: its rows, padded as products like."""

    expert: int
    rows: slice
    """Those that are not padding."""
    x_AD: Tensor
    dy_AD: Tensor
    """Gradient of the results, before they were weighted."""
    dh_AH: Tensor
    """Gradient of the first product."""
    a_AF: Tensor
    """The hidden activations, weighted as the results were."""
    dweight_A: Tensor | None
    """Gradient of the weights, where there were any; no padding."""


class FFNPasses:
    """The two passes of :func:`grouped_ffn` in parts, without autograd.

    For callers that do something else between parts, such as waiting for rows.
    """

    def __init__(self, w_in_EHD: Tensor, w_out_EFD: Tensor, activation: ActivationName) -> None:
        self.w_in_EHD, self.w_out_EFD = w_in_EHD, w_out_EFD
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_AD: Tensor, load: list[int], keep: bool) -> tuple[Tensor, list[Tensor]]:
        """(y_AD, with ``keep`` the first product of each run), one run after the other."""
        y_AD = x_AD.new_empty(x_AD.shape[0], self.w_out_EFD.shape[2])
        kept = []
        for part in self.hidden(x_AD, load):
            y_AD[part.rows] = self.result(part)
            if keep:
                kept.append(part.h_AH)
        return y_AD, kept

    def hidden(self, x_AD: Tensor, load: list[int]) -> Iterator[Hidden]:
        """Of each run of ``x_AD``, sorted by expert, ``load`` rows for each."""
        for run in _runs(load):
            h = mm(pad_rows(x_AD[run.rows]), self.w_in_EHD[run.expert].t())
            yield Hidden(run.expert, run.rows, h, self.activation.forward(h))

    def result(self, part: Hidden, columns: slice = slice(None)) -> Tensor:
        """Columns of y of a run."""
        return mm(part.a_AF, self.w_out_EFD[part.expert][:, columns])[: _length(part.rows)]

    def hidden_gradients(
        self,
        dy_AD: Tensor,
        x_AD: Tensor,
        load: list[int],
        kept: list[Tensor],
        weight_A: Tensor | None = None,
    ) -> Iterator[HiddenGradient]:
        """Of each run. ``kept``: first products of all runs, or nothing: they are computed again.

        ``weight_A``: ``dy_AD`` is the gradient of weighted results. The weights' own gradient is
        ⟨dy, y⟩ = ⟨dy · w_outᵀ, a⟩, for which no result need be kept.
        """
        for number, run in enumerate(_runs(load)):
            x, dy = pad_rows(x_AD[run.rows]), pad_rows(dy_AD[run.rows].contiguous())
            h = kept[number] if kept else mm(x, self.w_in_EHD[run.expert].t())
            da = mm(dy, self.w_out_EFD[run.expert].t())
            dh, a = self.activation.backward(da, h)
            dweight_A = None
            if weight_A is not None:
                length = _length(run.rows)
                dweight_A = (a[:length] * da[:length]).sum(1, dtype=weight_A.dtype)
                weight = weight_A[run.rows, None].to(a.dtype)
                dh[:length].mul_(weight)
                a[:length].mul_(weight)
            yield HiddenGradient(run.expert, run.rows, x, dy, dh, a, dweight_A)

    def row_gradient(self, part: HiddenGradient, columns: slice = slice(None)) -> Tensor:
        """Columns of dx of a run."""
        return mm(part.dh_AH, self.w_in_EHD[part.expert][:, columns])[: _length(part.rows)]

    def weight_sums(self, needs: Sequence[bool], dtype: torch.dtype) -> "WeightSums":
        """Empty sums of ``w_in``'s and ``w_out``'s gradients; None where they are not needed."""
        weights = (self.w_in_EHD, self.w_out_EFD)
        return WeightSums(
            *(
                torch.empty_like(w, dtype=dtype) if need else None
                for w, need in zip(weights, needs, strict=True)
            )
        )


class WeightSums:
    """Gradients of the weights, summed over runs in the order in which they are added.

    Of each expert at least one run is to be added; it may be empty.
    """

    def __init__(self, dw_in_EHD: Tensor | None, dw_out_EFD: Tensor | None) -> None:
        self.dw_in_EHD, self.dw_out_EFD = dw_in_EHD, dw_out_EFD
        self._begun: set[int] = set()

    def add(self, run: HiddenGradient) -> None:
        """Add what ``run`` contributes."""
        begun = run.expert in self._begun
        if begun and not _length(run.rows):
            return
        self._begun.add(run.expert)
        if self.dw_out_EFD is not None:
            mm_into(self.dw_out_EFD[run.expert], run.a_AF.t(), run.dy_AD, add=begun)
        if self.dw_in_EHD is not None:
            mm_into(self.dw_in_EHD[run.expert], run.dh_AH.t(), run.x_AD, add=begun)

    def to(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(dw_in_EHD, dw_out_EFD)"""
        dw_in_EHD, dw_out_EFD = (
            None if d is None else d.to(dtype) for d in (self.dw_in_EHD, self.dw_out_EFD)
        )
        return dw_in_EHD, dw_out_EFD


class _Run(NamedTuple):
    """Rows of one expert that are computed together."""

    expert: int
    rows: slice


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _runs(load: list[int]) -> Iterator[_Run]:
    """Up to ``_LONGEST`` rows each; an expert without rows has one empty run."""
    begin = 0
    for expert, rows in enumerate(load):
        end = begin + rows
        for start in range(begin, max(end, begin + 1), _LONGEST):
            yield _Run(expert, slice(start, min(start + _LONGEST, end)))
        begin = end
