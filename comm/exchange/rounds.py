"""How the rows of one exchange are spread over rounds, so that no rank takes too many at once.

Every rank computes the same plan from the same counts: no further message is needed. Legend: S and
R source and receiving ranks (both all ranks of the group), E global experts, n rounds.
"""

import math

import torch
from torch import Tensor


def plan(load_SE: Tensor, sent_SR: list[list[int]], factor: float | None) -> Tensor | None:
    """``load_nSE``: int64 rows of each round from each source for each expert; None: one round.

    ``sent_SR``: rows between ranks, on the host. Up to ``factor`` times the mean over ranks the
    busiest rank takes its rows in one round; beyond that in rounds of about the mean, so that the
    more skewed exchange needs no more memory than the balanced one. ("About": counts are whole, so
    that a round may hold up to one row too many for each pair of source and local expert.) The
    first round holds what is left over; on the busiest rank all others are full.
    """
    most = max(map(sum, zip(*sent_SR, strict=True)))
    if factor is None:
        return None
    mean = sum(map(sum, sent_SR)) / len(sent_SR)
    if most <= math.ceil(factor * mean):
        return None
    limit = math.ceil(mean)
    count = math.ceil(most / limit)
    # of each pair's rows, all rounds take the shares that they take of the busiest rank's
    starts = [0, *(most - limit * left for left in reversed(range(count)))]
    start_n1 = torch.tensor(starts, device=load_SE.device)
    return (load_SE * start_n1[:, None, None] // most).diff(dim=0)


def rows_of_rounds(load_nE: Tensor) -> list[Tensor]:
    """For each round the places of its rows, ascending, in rows that are sorted by expert."""
    rounds = torch.arange(load_nE.shape[0], device=load_nE.device)
    round_A = rounds.repeat(load_nE.shape[1]).repeat_interleave(load_nE.t().flatten())
    order_A = round_A.argsort(stable=True)
    return list(order_A.split(load_nE.sum(1).tolist()))
