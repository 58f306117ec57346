"""Which ranks share what: a pure function of the config and the world size."""

from dataclasses import dataclass

from pydantic import Field

from coterie.core.config import Config
from coterie.core.errors import UserError


class LayoutConfig(Config):
    """How the work is split over ranks. What is left of the world size is data parallelism."""

    ep: int = Field(default=1, ge=1)
    """Expert-parallel size: ranks that share the experts. Each rank also has data of its own."""


@dataclass(frozen=True)
class Layout:
    """``world`` ranks in ``replicas`` rows of ``ep``; rank r holds expert shard r mod ep."""

    world: int
    ep: int

    @property
    def replicas(self) -> int:
        """How many ranks hold the same experts."""
        return self.world // self.ep


def layout_of(config: LayoutConfig, world: int, num_experts: int | None) -> Layout:
    """The layout of ``world`` ranks; UserError names the rule that an impossible one breaks."""
    if world % config.ep:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(
            f"parallel.ep is {config.ep}, but {world} processes do not divide into groups of "
            f"{config.ep}: use ep from {fitting}, or a multiple of {config.ep} processes"
        )
    if config.ep > 1 and num_experts is None:
        raise UserError(f"parallel.ep is {config.ep}, but the model has no experts: use ep 1")
    if num_experts is not None and num_experts % config.ep:
        fitting = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise UserError(
            f"parallel.ep is {config.ep}, but model.moe.experts.count {num_experts} does not "
            f"divide by it: use ep from {fitting}"
        )
    return Layout(world, config.ep)
