"""Losses that keep a router healthy.

Each returns this rank's *share*: the sum over ranks is the loss of the global micro-batch, equal
to what one process holding all its tokens computes. So shares are added, never averaged, and
gradients are summed over ranks. The totals come from :func:`global_counts`.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.reduce import sum_over


def global_counts(
    load_E: Tensor, tokens: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(load_E, tokens) of the global micro-batch: both int64, summed over ``group`` in one go."""
    total = sum_over(torch.cat([load_E, tokens.view(1)]), group)
    return total[:-1], total[-1]


def switch_balance(prob_TE: Tensor, load_total_E: Tensor, tokens_total: Tensor, k: int) -> Tensor:
    """E · Σ_e f_e · P_e (Switch Transformer, arXiv 2101.03961, eq. 4–6): 1 at perfect balance.

    ``prob_TE``: routing probabilities of the local tokens, zero rows for padding; P_e is their
    mean over the global micro-batch. f_e, without gradient, is the expert's share of the T·k
    choices, counted before any is dropped. Hugging Face's Mixtral uses k times this value,
    Megatron this value.
    """
    tokens = tokens_total.clamp(min=1)
    fraction_E = load_total_E.to(prob_TE.dtype) / (tokens * k)
    return load_total_E.numel() * (fraction_E * prob_TE.sum(0) / tokens).sum()


def z_loss(logits_TE: Tensor, padding_T: Tensor | None, tokens_total: Tensor) -> Tensor:
    """Mean over the global micro-batch of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, eq. 5)."""
    square_T = logits_TE.logsumexp(-1).square()
    if padding_T is not None:
        square_T = square_T.masked_fill(padding_T, 0.0)
    return square_T.sum() / tokens_total.clamp(min=1)
