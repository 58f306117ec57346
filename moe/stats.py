"""What a layer saw: counts that add up over micro-steps, ranks and recomputed passes.

A router reports what it alone knows (:class:`RoutingStats`). The rest is counted by the layer, for
every router alike, from the rows it decided on and the facts about its tokens
(:class:`LayerStats`).
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from coterie.moe.assignment import Assignment, count
from coterie.moe.tokens import TokenInfo


@dataclass(frozen=True)
class RoutingStats:
    """Counts of one router on this rank; every field is a sum, so stats add with ``+``."""

    load_E: Tensor
    """int64: rows sent to each (global) expert."""
    dropped_E: Tensor
    """int64: rows each expert refused because it was over capacity."""
    tokens: Tensor
    """int64 scalar: tokens routed (padding excluded)."""
    entropy: Tensor
    """float scalar: sum over tokens of the router's entropy, nats."""

    def __add__(self, other: Self) -> Self:
        names = (field.name for field in fields(self))
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class LayerStats(RoutingStats):
    """Counts of one layer on this rank, also by modality (M = ``TokenInfo.modalities``)."""

    load_ME: Tensor
    """int64: rows of each modality sent to each expert; sums to ``load_E`` over M."""
    tokens_M: Tensor
    """int64: tokens of each modality (padding excluded); sums to ``tokens``."""
    unrouted_M: Tensor
    """int64: of these, tokens that no expert has: not chosen, or dropped by all they chose."""


def routing_stats(
    assignment: Assignment, prob_TE: Tensor, padding_T: Tensor | None
) -> RoutingStats:
    """Of a router that drops nothing. ``prob_TE``: each token's probabilities, without gradient."""
    if padding_T is not None:
        prob_TE = prob_TE.masked_fill(padding_T[:, None], 0.0)
        tokens = (~padding_T).sum()
    else:
        tokens = torch.full((), prob_TE.shape[0], dtype=torch.int64, device=prob_TE.device)
    return RoutingStats(
        load_E=assignment.load_E,
        dropped_E=torch.zeros_like(assignment.load_E),
        tokens=tokens,
        entropy=torch.special.entr(prob_TE).sum(),
    )


@torch.no_grad()
def layer_stats(
    stats: RoutingStats, assignment: Assignment, info: TokenInfo, num_tokens: int
) -> LayerStats:
    """``stats``, and what ``assignment`` says of the ``num_tokens`` tokens that ``info`` is about.

    Nothing here waits for the device. A modality id outside 0 … ``info.modalities`` - 1 is an
    index out of range.
    """
    idle_T = torch.ones(num_tokens, dtype=torch.bool, device=assignment.token_A.device)
    idle_T.index_fill_(0, assignment.token_A, False)
    if info.padding_T is not None:
        idle_T &= ~info.padding_T
    if info.modalities == 1:
        load_ME, tokens_M, unrouted_M = stats.load_E[None], stats.tokens[None], idle_T.sum()[None]
    else:
        load_ME, tokens_M, unrouted_M = _by_modality(stats, assignment, info, idle_T)
    return LayerStats(**vars(stats), load_ME=load_ME, tokens_M=tokens_M, unrouted_M=unrouted_M)


def _by_modality(
    stats: RoutingStats, assignment: Assignment, info: TokenInfo, idle_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, tokens, unrouted tokens) of each modality; ``idle_T``: tokens without a row."""
    modality_T, modalities = info.modality_T, info.modalities
    if modality_T is None:
        raise ValueError(f"counting {modalities} modalities needs the modality_T of the tokens")
    if info.padding_T is not None:
        modality_T = modality_T.masked_fill(info.padding_T, 0)
    tokens_M2 = count(2 * modality_T + idle_T, 2 * modalities).view(modalities, 2)
    tokens_M = tokens_M2.sum(1)
    if info.padding_T is not None:  # it was counted among the first
        tokens_M[0] -= idle_T.numel() - stats.tokens
    experts = stats.load_E.numel()
    cell_A = modality_T[assignment.token_A] * experts + assignment.expert_A
    load_ME = count(cell_A, modalities * experts).view(modalities, experts)
    return load_ME, tokens_M, tokens_M2[:, 1]
