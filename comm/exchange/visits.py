"""Tokens that go to several experts of one rank, but cross the wire once (deduplicated dispatch).

On the way back the rank sends the weighted sum of their results (pre-reduction). Legend: B tokens
that are sent, each as often as there are ranks with experts for it; A rows; R ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Visits(NamedTuple):
    """Which tokens go to which rank."""

    token_B: Tensor
    """int64: the token of each visit, sorted by rank, then by token."""
    visit_A: Tensor
    """int64: the visit of each row, counted among those to the same rank."""
    count_R: Tensor
    """int64: visits to each rank."""


def visits(token_A: Tensor, sent_R: list[int], tokens: int) -> Visits:
    """Of rows sorted by rank, ``sent_R`` to each, out of ``tokens`` tokens; waits for the
    device."""
    ranks = len(sent_R)
    rank = torch.arange(ranks, device=token_A.device)
    rank_A = rank.repeat_interleave(
        torch.tensor(sent_R, device=token_A.device), output_size=len(token_A)
    )
    goes_RT = torch.zeros(ranks, tokens, dtype=torch.bool, device=token_A.device)
    goes_RT[rank_A, token_A] = True
    place_RT = goes_RT.cumsum(1) - 1
    return Visits(goes_RT.nonzero()[:, 1], place_RT[rank_A, token_A], goes_RT.sum(1))
