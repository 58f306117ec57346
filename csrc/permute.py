"""Row gather: copy each token's row to every place that an assignment sends it."""

from typing import Any

import torch
from torch import Tensor

from coterie.csrc import loader
from coterie.csrc.inverse import Inverse, check_rows


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_A: Tensor, inverse: Inverse) -> Tensor:
        ctx.save_for_backward(*inverse)
        return loader.kernel("permute", x_TD.device.type)(x_TD, token_A, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor, None, None]:
        row_A, offset_T1 = ctx.saved_tensors
        unpermute = loader.kernel("unpermute", dy_AD.device.type)
        return unpermute(dy_AD, None, row_A, offset_T1), None, None


def permute(x_TD: Tensor, token_A: Tensor, inverse: Inverse) -> Tensor:
    """y_AD with ``y[a] = x[token[a]]``; the gradient sums the rows of each token in order.

    x_TD: float32, float64, bfloat16 or float16. token_A: int64, token numbers below T.
    inverse: ``invert(token_A, T)``, which makes the backward pass free of atomics, hence
    deterministic.

    Raises ValueError for shapes, dtypes or devices that do not fit. A token number out of range
    raises RuntimeError or IndexError on the CPU and stops the kernel on a GPU.
    """
    check_rows("x_TD", x_TD, inverse.offset_T1.numel() - 1, token_A, inverse)
    return _Permute.apply(x_TD, token_A, inverse)
