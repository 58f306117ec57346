"""SwiGLU, a = silu(gate) · up, and its derivative: one pass over memory each."""

from typing import Any

import torch
from torch import Tensor

from coterie.csrc import loader


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_AH: Tensor) -> Tensor:
        ctx.save_for_backward(h_AH)
        return loader.kernel("swiglu", h_AH.device.type)(h_AH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, da_AF: Tensor) -> Tensor:
        (h_AH,) = ctx.saved_tensors
        return swiglu_backward(da_AF, h_AH)[0]


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) · up: ``h`` is (..., H), gate then up in its last dimension → (..., H / 2).

    float32, float64, bfloat16 or float16; half types are computed in float32. Differentiable, and
    only ``h`` is kept for the gradient.
    """
    return _SwiGLU.apply(h.reshape(-1, h.shape[-1])).unflatten(0, h.shape[:-1])


def swiglu_backward(da_AF: Tensor, h_AH: Tensor) -> tuple[Tensor, Tensor]:
    """(dh_AH, a_AF): the gradient of ``h_AH`` given that of the result, and the result anew."""
    return loader.kernel("swiglu_backward", h_AH.device.type)(da_AF, h_AH)
