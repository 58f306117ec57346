"""A limit on the rows one expert takes from one sequence."""

import torch
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.comm.sequence import gather
from coterie.moe.tokens import TokenInfo


def within_shared_capacity(
    expert_TK: Tensor,
    score_TK: Tensor,
    info: TokenInfo,
    sequence: Axis,
    num_experts: int,
    capacity_factor: float,
    by_score: bool,
) -> Tensor:
    """:func:`within_capacity` where the ranks of ``sequence`` hold parts of the same sequences.

    Each of them looks at all tokens of the sequences, in the order of their positions.
    """
    routed_T = None if info.padding_T is None else ~info.padding_T
    if sequence.size == 1:
        return within_capacity(
            expert_TK,
            score_TK,
            routed_T,
            info.sequence_T,
            num_experts,
            capacity_factor,
            by_score,
        )
    tokens = expert_TK.shape[0]
    if info.position_T is None or info.sequence_T is None:
        raise ValueError("capacity over parts of sequences needs their sequence_T and position_T")
    if routed_T is None:
        routed_T = torch.ones(tokens, dtype=torch.bool, device=expert_TK.device)
    facts_TN = torch.stack([info.sequence_T, info.position_T, routed_T.long()], 1)
    choices = expert_TK.shape[1]
    all_TN = gather(torch.cat([expert_TK, facts_TN], 1), 0, sequence)
    expert_all_TK, facts_all_TN = all_TN.split([choices, 3], 1)
    order_T = facts_all_TN[:, 1].argsort(stable=True)
    keep_all_TK = torch.empty_like(expert_all_TK, dtype=torch.bool)
    keep_all_TK[order_T] = within_capacity(
        expert_all_TK[order_T],
        gather(score_TK, 0, sequence)[order_T],
        facts_all_TN[order_T, 2].bool(),
        facts_all_TN[order_T, 0],
        num_experts,
        capacity_factor,
        by_score,
    )
    return keep_all_TK[sequence.rank * tokens : (sequence.rank + 1) * tokens]


def within_capacity(
    expert_TK: Tensor,
    score_TK: Tensor,
    routed_T: Tensor | None,
    sequence_T: Tensor | None,
    num_experts: int,
    capacity_factor: float,
    by_score: bool,
) -> Tensor:
    """bool (T, K): the choices that fit, when each expert takes at most C rows of each sequence.

    C = ⌈capacity_factor · n · K / E⌉ with n the sequence's routed tokens (Switch, arXiv 2101.03961,
    eq. 3, counted per sequence so that the result does not depend on the layout). Of too many, the
    first in the sequence stay, or with ``by_score`` those with the highest ``score_TK`` (earlier
    first among equals). ``routed_T``: False for padding, which takes no place; None: all routed.
    ``sequence_T``: int64 sequence of each token, None: one sequence.
    """
    tokens, choices = expert_TK.shape
    device = expert_TK.device
    if sequence_T is None:
        sequence_T = torch.zeros(tokens, dtype=torch.int64, device=device)
    if routed_T is None:
        routed_T = torch.ones(tokens, dtype=torch.bool, device=device)

    # one queue for each (sequence, expert); padding waits in a queue of its own, at the end
    queue_TK = sequence_T[:, None] * num_experts + expert_TK
    queues = tokens * num_experts
    queue_A = torch.where(routed_T[:, None], queue_TK, queues).flatten()

    order_A = torch.arange(queue_A.numel(), device=device)
    if by_score:
        order_A = score_TK.flatten().argsort(descending=True, stable=True)
    order_A = order_A[queue_A[order_A].argsort(stable=True)]
    sorted_A = queue_A[order_A]
    place_A = torch.arange(sorted_A.numel(), device=device) - torch.searchsorted(sorted_A, sorted_A)

    length_B = torch.zeros(tokens, dtype=torch.int64, device=device)
    length_B.scatter_add_(0, sequence_T, routed_T.to(torch.int64))
    exact_B = length_B.to(torch.float64) * (capacity_factor * choices / num_experts)
    # a product such as 1.1 · 10 = 11.000000000000002 must not round up to 12
    capacity_B = (exact_B - 1e-9).ceil().to(torch.int64)

    sequence_A = sequence_T.repeat_interleave(choices)[order_A]
    fits_A = (place_A < capacity_B[sequence_A]) & (sorted_A < queues)
    keep = torch.empty_like(fits_A)
    keep[order_A] = fits_A
    return keep.view(tokens, choices)
