"""What a router saw: counts that add up over micro-steps, ranks and recomputed passes."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from coterie.moe.assignment import Assignment


@dataclass(frozen=True)
class RoutingStats:
    """Counts of one layer on this rank; every field is a sum, so stats add with ``+``."""

    load_E: Tensor
    """int64: rows sent to each (global) expert."""
    dropped_E: Tensor
    """int64: rows each expert refused because it was over capacity."""
    tokens: Tensor
    """int64 scalar: tokens routed (padding excluded)."""
    entropy: Tensor
    """float scalar: sum over tokens of the router's entropy, nats."""
    foresight: Tensor | None = None
    """float64 (4,): how well auxiliary routers foresaw the choice
    (:func:`coterie.moe.routers.auxiliary.foresight`); None: there are none, or they chose."""

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        sums: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            sums[field.name] = None if mine is None else mine + theirs
        return RoutingStats(**sums)


def routing_stats(
    assignment: Assignment,
    prob_TE: Tensor,
    padding_T: Tensor | None,
    foresight: Tensor | None = None,
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
        foresight=foresight,
    )
