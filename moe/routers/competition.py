"""Tokens compete for experts, on one rank or over all ranks of the micro-batch."""

from typing import Literal

import torch
from torch import Tensor

from coterie.comm.axis import Axes, Axis
from coterie.comm.sequence import gather
from coterie.moe.tokens import TokenInfo


def chosen(
    rank_TE: Tensor,
    open_TE: Tensor,
    share_E: Tensor,
    info: TokenInfo,
    axes: Axes,
    scope: Literal["global", "rank"],
) -> Tensor:
    """bool (E, T): the tokens that each expert takes, those with the highest ``rank_TE`` first.

    Of n tokens that are ``open_TE`` to it an expert takes ⌊share · n⌋, at least one if there is
    one. Ranks are compared in float32, and equal ones by their place in the micro-batch, earlier
    first: equal tokens whose ranks differ by rounding alone must not be told apart by it.
    ``scope`` global: n counts, and tokens compete, over all ranks of ``axes.data``, which all call.
    """
    rank_TE = rank_TE.float()
    if scope == "rank" or axes.data.size == 1:
        return best(rank_TE.t(), open_TE.t(), share_E)
    mine, everyone = _everyone(rank_TE, open_TE, info, axes)
    open_all_TE = everyone > -torch.inf
    chosen_ET = best(everyone.t(), open_all_TE.t(), share_E)
    return chosen_ET[:, mine]


def best(rank_ET: Tensor, open_ET: Tensor, share_E: Tensor) -> Tensor:
    """bool (E, T): :func:`chosen` of the tokens here, in the order of their places."""
    experts, tokens = rank_ET.shape
    if tokens == 0:
        return torch.zeros(experts, 0, dtype=torch.bool, device=rank_ET.device)
    open_E = open_ET.sum(1)
    # a product such as .1 · 30 = 3.0000000000000004 is whole
    take_E = torch.minimum((share_E * open_E + 1e-9).floor().long().clamp(min=1), open_E)
    most = max(int(take_E.max()), 1)
    rank_ET = rank_ET.contiguous().masked_fill(~open_ET, -torch.inf)
    top_EK = rank_ET.topk(most, dim=1).values
    result_ET = rank_ET >= top_EK.gather(1, take_E.clamp(min=1)[:, None] - 1)
    # others may equal its last; what is no number comes first, and equals nothing
    unclear_E = (result_ET.count_nonzero(1) != take_E) | top_EK[:, 0].isnan()
    unclear_E = unclear_E.nonzero()[:, 0]
    if unclear_E.numel():
        some = (rank_ET[unclear_E], open_ET[unclear_E], take_E[unclear_E])
        result_ET[unclear_E] = _best_by_place(*some)
    return result_ET


def _best_by_place(rank_ET: Tensor, open_ET: Tensor, take_E: Tensor) -> Tensor:
    """bool (E, T): the ``take_E`` best, of equal ones the first."""
    most = int(take_E.max())
    order_ET = _sortable(rank_ET, open_ET).topk(most, dim=1).indices
    taken_ET = torch.arange(most, device=rank_ET.device) < take_E[:, None]
    return torch.zeros_like(open_ET).scatter_(1, order_ET, taken_ET)


def _sortable(rank_ET: Tensor, open_ET: Tensor) -> Tensor:
    """int64 without equals (``topk`` breaks ties as it likes): by rank, then earlier place."""
    tokens = rank_ET.shape[1]
    bits_ET = (rank_ET + 0.0).contiguous().view(torch.int32).long()  # + 0.0: -0.0 equals 0.0
    ordered_ET = torch.where(bits_ET < 0, -(bits_ET & 0x7FFFFFFF), bits_ET)
    ordered_ET = ordered_ET.masked_fill(~open_ET, -(1 << 31))
    place_T = torch.arange(tokens, device=rank_ET.device)
    return (ordered_ET << 31) + (tokens - 1 - place_T)


def _everyone(
    rank_TE: Tensor, open_TE: Tensor, info: TokenInfo, axes: Axes
) -> tuple[Tensor, Tensor]:
    """(places of this rank's tokens, ranks of all tokens by place, -inf where not open).

    A token's place is by data-parallel part, sequence and position: the same in every layout. Ranks
    may have different numbers of tokens.
    """
    data = axes.data
    own_TE = rank_TE.masked_fill(~open_TE, -torch.inf)
    tokens = own_TE.shape[0]
    counts_R = gather(torch.tensor([tokens], device=own_TE.device), 0, data).tolist()
    padded_TE = own_TE.new_full((max(counts_R), own_TE.shape[1]), -torch.inf)
    padded_TE[:tokens] = own_TE
    all_TE = _joined(gather(padded_TE, 0, data), counts_R)
    first = sum(counts_R[: data.rank])
    mine_T = torch.arange(first, first + tokens, device=own_TE.device)
    if axes.sequence.size == 1:
        return mine_T, all_TE
    order_T = _order(info, counts_R, data, axes.sequence, own_TE.device)
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(order_T.numel(), device=own_TE.device)
    return place_T[mine_T], all_TE[order_T]


def _order(
    info: TokenInfo, counts_R: list[int], data: Axis, sequence: Axis, device: torch.device
) -> Tensor:
    """int64: the tokens of all ranks in the order of their places, where ranks of ``sequence`` hold
    parts of the same sequences."""
    if info.sequence_T is None or info.position_T is None:
        raise ValueError("tokens of parts of sequences need their sequence_T and position_T")
    facts_TN = torch.zeros(max(counts_R), 2, dtype=torch.int64, device=device)
    facts_TN[: counts_R[data.rank]] = torch.stack([info.sequence_T, info.position_T], 1)
    sequence_T, position_T = _joined(gather(facts_TN, 0, data), counts_R).unbind(1)
    part_R = torch.arange(data.size, device=device) // sequence.size
    part_T = part_R.repeat_interleave(torch.tensor(counts_R, device=device))
    order_T = position_T.argsort(stable=True)
    order_T = order_T[sequence_T[order_T].argsort(stable=True)]
    return order_T[part_T[order_T].argsort(stable=True)]


def _joined(all_TN: Tensor, counts_R: list[int]) -> Tensor:
    """Without what fills ranks up to the longest."""
    if len(set(counts_R)) == 1:
        return all_TN
    parts = all_TN.split(max(counts_R))
    return torch.cat([part[:count] for part, count in zip(parts, counts_R, strict=True)])
