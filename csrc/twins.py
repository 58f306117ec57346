"""The plain PyTorch twin of each native op: same arguments, same results, any device.

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


def sort_by_expert_reference(
    expert_A: Tensor, num_experts: int, keep_A: Tensor | None
) -> tuple[Tensor, Tensor]:
    """order_A, stable by expert and what is not kept at the end, and load_E, what each one has."""
    counted_A = torch.ones_like(expert_A) if keep_A is None else keep_A.long()
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_A.device)
    load_E.scatter_add_(0, expert_A, counted_A)  # bincount would wait for a GPU
    if keep_A is not None:
        expert_A = expert_A.masked_fill(~keep_A, num_experts)
    return expert_A.argsort(stable=True), load_E


def gate_reference(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """expert_TK, the k best by score + bias in the best groups; weight_TK; score_TE."""
    score_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    rank_TE = score_TE if bias_E is None else score_TE + bias_E
    if top_groups < groups:
        rank_TGE = rank_TE.unflatten(1, (groups, -1))
        best_TG = _best(rank_TGE.topk(2, dim=-1).values.sum(-1), top_groups)
        shut_TG = torch.ones_like(rank_TGE[..., 0], dtype=torch.bool).scatter_(1, best_TG, False)
        # not zero: a score may underflow to that
        rank_TE = rank_TGE.masked_fill(shut_TG[..., None], -torch.inf).flatten(1)
    expert_TK = _best(rank_TE, k)
    weight_TK = score_TE.gather(1, expert_TK).to(acc_dtype(score_TE))
    if renormalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return expert_TK, (weight_TK * scale).to(score_TE.dtype), score_TE


def gate_backward_reference(
    dweight_TK: Tensor | None,
    dscore_TE: Tensor | None,
    score_TE: Tensor,
    expert_TK: Tensor,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
) -> Tensor:
    """dlogits_TE from the gradients of the weights and of the scores; None: there is none."""
    dtype, acc = score_TE.dtype, acc_dtype(score_TE)
    score_TE = score_TE.to(acc)
    dscore_TE = torch.zeros_like(score_TE) if dscore_TE is None else dscore_TE.to(acc)
    if dweight_TK is not None:
        dchosen_TK = dweight_TK.to(acc) * scale
        if renormalise:
            chosen_TK = score_TE.gather(1, expert_TK)
            sum_T1 = chosen_TK.sum(-1, keepdim=True) + 1e-20
            mean_T1 = (dchosen_TK * chosen_TK).sum(-1, keepdim=True) / sum_T1
            dchosen_TK = (dchosen_TK - mean_T1) / sum_T1
        dscore_TE = dscore_TE.scatter_add(1, expert_TK, dchosen_TK)
    if sigmoid:
        return (dscore_TE * score_TE * (1 - score_TE)).to(dtype)
    dot_T1 = (dscore_TE * score_TE).sum(-1, keepdim=True)
    return ((dscore_TE - dot_T1) * score_TE).to(dtype)


def _best(rank_TE: Tensor, k: int) -> Tensor:
    """The ids of the k largest, in descending order; of equals the lowest first (``topk`` takes
    any). A few are found one by one as fast as by ``topk``, sooner than by a sort."""
    if k > _FEW:
        return rank_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    chosen, rank_TE = [], rank_TE.clone()
    for _ in range(k):
        chosen.append(rank_TE.argmax(-1, keepdim=True))
        rank_TE.scatter_(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, 1)


_FEW = 16


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
