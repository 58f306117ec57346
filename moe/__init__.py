"""Floor 3: the mixture-of-experts layer, its routers, experts, losses and statistics."""

from coterie.moe.assignment import Assignment
from coterie.moe.layer import MoEConfig, MoELayer, MoEOutput
from coterie.moe.tokens import TokenInfo

__all__ = ["Assignment", "MoEConfig", "MoELayer", "MoEOutput", "TokenInfo"]
