"""What a router is: from activations to an assignment."""

from typing import NamedTuple

from torch import Tensor, nn

from coterie.moe.assignment import Assignment
from coterie.moe.stats import RoutingStats
from coterie.moe.tokens import TokenInfo


class Routing(NamedTuple):
    """A router's answer for one micro-batch."""

    assignment: Assignment
    losses: dict[str, Tensor]
    """Scalars to add to the training loss, each this rank's share, its coefficient applied."""
    stats: RoutingStats


class Router(nn.Module):
    """Base class. Subclasses say, for T tokens of width D, which rows go to which expert."""

    def forward(self, x_TD: Tensor, info: TokenInfo) -> Routing:
        """Route ``x_TD`` (float, T × D)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")
