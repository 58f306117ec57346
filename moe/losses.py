"""Losses that keep a router healthy.

Each returns this rank's *share*: the sum over ranks is the loss of the global micro-batch, equal
to what one process holding all its tokens computes. So shares are added, never averaged, and
gradients are summed over ranks. The totals come from :func:`global_counts`.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.axis import Axis
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


def sequence_balance(
    prob_TE: Tensor,
    expert_TK: Tensor,
    sequence_T: Tensor | None,
    padding_T: Tensor | None,
    sequence: Axis,
    data: Axis,
) -> Tensor:
    """Σ_e f_e · P_e inside each sequence, and the mean over sequences (DeepSeek-V3, arXiv
    2412.19437, eq. 17-20): each is 1 at perfect balance.

    ``prob_TE``: zero rows for padding; ``sequence_T``: None is one sequence. ``sequence``: ranks
    that hold parts of the same sequences; ``data``: those of the global micro-batch. Waits for the
    device, to know how many sequences there are.
    """
    tokens, experts = prob_TE.shape
    routed_T = torch.ones(tokens, dtype=torch.int64, device=prob_TE.device)
    if padding_T is not None:
        routed_T = (~padding_T).long()
    if sequence_T is None:
        sequence_T = torch.zeros_like(routed_T)
    rows = int(sequence_T.max()) + 1 if tokens else 0
    load_BE = torch.zeros(rows, experts, dtype=torch.int64, device=prob_TE.device)
    place_TK = sequence_T[:, None] * experts + expert_TK
    load_BE.view(-1).scatter_add_(
        0, place_TK.flatten(), routed_T[:, None].expand_as(expert_TK).flatten()
    )
    load_BE = sum_over(load_BE, sequence.group)
    length_B = load_BE.sum(1) // expert_TK.shape[1]
    # each rank of `sequence` counts the same sequences
    sequences = sum_over((length_B > 0).sum(), data.group) // sequence.size
    length_B1 = length_B.clamp(min=1)[:, None].to(prob_TE.dtype)
    fraction_BE = load_BE * experts / (length_B1 * expert_TK.shape[1])
    prob_BE = torch.zeros_like(fraction_BE).index_add(0, sequence_T, prob_TE) / length_B1
    return (fraction_BE * prob_BE).sum() / sequences.clamp(min=1)


def z_loss(logits_TE: Tensor, padding_T: Tensor | None, tokens_total: Tensor) -> Tensor:
    """Mean over the global micro-batch of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, eq. 5)."""
    square_T = logits_TE.logsumexp(-1).square()
    if padding_T is not None:
        square_T = square_T.masked_fill(padding_T, 0.0)
    return square_T.sum() / tokens_total.clamp(min=1)
