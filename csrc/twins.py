"""The plain PyTorch twin of each native row op: same arguments, same results, any device.

They run where the native library is not loaded, and the tests hold the native ops against them.
Like the native ops they take products and sums of half precision rows in fp32, and on a CPU they
sum the rows of a token in ascending order (on a GPU, index_add's order is free unless
``torch.use_deterministic_algorithms`` is on). Shapes: x_TD tokens x width, x_AD rows x width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of weights and sums: float64 for float64 rows, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def permute_reference(x_TD: Tensor, token_A: Tensor, weight_A: Tensor | None) -> Tensor:
    """y_AD with ``y[a] = weight[a] * x[token[a]]``; a weight of None copies the rows."""
    y_AD = x_TD.index_select(0, token_A)
    if weight_A is None:
        return y_AD
    return (y_AD.to(acc_dtype(x_TD)) * weight_A.unsqueeze(1)).to(x_TD.dtype)


def unpermute_reference(
    x_AD: Tensor, weight_A: Tensor | None, row_A: Tensor, offset_T1: Tensor
) -> Tensor:
    """y_TD with ``y[t] = sum of weight[row[j]] * x[row[j]]``, j in [offset[t], offset[t + 1])."""
    values_AD = x_AD.index_select(0, row_A).to(acc_dtype(x_AD))
    if weight_A is not None:
        values_AD = values_AD * weight_A.index_select(0, row_A).unsqueeze(1)
    y_TD = values_AD.new_zeros(offset_T1.numel() - 1, x_AD.shape[1])
    tokens_T = torch.arange(y_TD.shape[0], device=x_AD.device)
    token_A = tokens_T.repeat_interleave(offset_T1.diff(), output_size=row_A.numel())
    return y_TD.index_add_(0, token_A, values_AD).to(x_AD.dtype)


def unpermute_backward_reference(
    dy_TD: Tensor, x_AD: Tensor, weight_A: Tensor, token_A: Tensor
) -> tuple[Tensor, Tensor]:
    """``dx[a] = weight[a] * dy[token[a]]`` and ``dweight[a] = <x[a], dy[token[a]]>``."""
    dy_AD = dy_TD.index_select(0, token_A).to(acc_dtype(x_AD))
    dx_AD = (dy_AD * weight_A.unsqueeze(1)).to(x_AD.dtype)
    return dx_AD, (x_AD.to(acc_dtype(x_AD)) * dy_AD).sum(1)


def invert_reference(token_A: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """row_A, the rows sorted by token (stable), and offset_T1, where each token's rows begin."""
    sorted_A, row_A = torch.sort(token_A, stable=True)
    tokens_T1 = torch.arange(num_tokens + 1, device=token_A.device)
    return row_A, torch.searchsorted(sorted_A, tokens_T1)


def swiglu_reference(h_AH: Tensor) -> Tensor:
    """a_AF = silu(gate) * up, each row of ``h_AH`` being gate then up."""
    gate_AF, up_AF = h_AH.chunk(2, -1)
    return F.silu(gate_AF) * up_AF


def swiglu_backward_reference(da_AF: Tensor, h_AH: Tensor) -> tuple[Tensor, Tensor]:
    """dh_AH and a_AF, given the gradient of the latter."""
    gate_AF, up_AF = h_AH.chunk(2, -1)
    silu_AF = F.silu(gate_AF)
    dh_AH = torch.empty_like(h_AH)
    dgate_AF, dup_AF = dh_AH.chunk(2, -1)
    torch.mul(da_AF, silu_AF, out=dup_AF)
    torch.ops.aten.silu_backward.grad_input(da_AF * up_AF, gate_AF, grad_input=dgate_AF)
    return dh_AH, silu_AF.mul_(up_AF)
