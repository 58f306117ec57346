"""Weighted row sum: bring the experts' rows back to their tokens."""

from typing import Any

import torch
from torch import Tensor

from coterie.csrc import loader
from coterie.csrc.inverse import Inverse, check_rows
from coterie.csrc.twins import acc_dtype


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, weight_A: Tensor | None, token_A: Tensor, inverse: Inverse
    ) -> Tensor:
        # The rows are kept only where the weights' gradient needs them.
        x_kept = x_AD if weight_A is not None and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x_kept, weight_A, token_A)
        return loader.kernel("unpermute", x_AD.device.type)(x_AD, weight_A, *inverse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_AD, weight_A, token_A = ctx.saved_tensors
        device = dy_TD.device.type
        if x_AD is None:
            return loader.kernel("permute", device)(dy_TD, token_A, weight_A), None, None, None
        backward = loader.kernel("unpermute_backward", device)
        dx_AD, dweight_A = backward(dy_TD, x_AD, weight_A, token_A)
        return dx_AD if ctx.needs_input_grad[0] else None, dweight_A, None, None


def unpermute(x_AD: Tensor, weight_A: Tensor | None, token_A: Tensor, inverse: Inverse) -> Tensor:
    """y_TD with ``y[t]`` the sum of ``weight[a] * x[a]`` over the rows a that token t owns.

    x_AD: float32, float64, bfloat16 or float16; y has its dtype. weight_A: A numbers of x's dtype
    or of the dtype of its sums (float64 for float64 rows, else float32); None means all ones.
    token_A: int64, the token of each row. inverse: ``invert(token_A, T)``. The rows of a token are
    summed in ascending order; a token without rows gets zeros. Gradients go to x and the weights.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_rows("x_AD", x_AD, token_A.numel(), token_A, inverse)
    if weight_A is not None:
        weight_A = _checked_weight(weight_A, x_AD)
    return _Unpermute.apply(x_AD, weight_A, token_A, inverse)


def _checked_weight(weight_A: Tensor, x_AD: Tensor) -> Tensor:
    wanted = acc_dtype(x_AD)
    if weight_A.dim() != 1 or weight_A.shape[0] != x_AD.shape[0]:
        raise ValueError(
            f"weight_A must hold one number for each of the {x_AD.shape[0]} rows, "
            f"got shape {tuple(weight_A.shape)}"
        )
    if weight_A.dtype not in (wanted, x_AD.dtype) or weight_A.device != x_AD.device:
        raise ValueError(
            f"weight_A must be {wanted} or {x_AD.dtype} on {x_AD.device}, "
            f"got {weight_A.dtype} on {weight_A.device}"
        )
    return weight_A.to(wanted)
