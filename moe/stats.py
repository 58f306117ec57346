"""What a router saw: counts that add up over micro-steps, ranks and recomputed passes."""

from dataclasses import dataclass, fields

from torch import Tensor


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

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        return RoutingStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )
