"""What the ranks run on: rates, bandwidths and memory, from a file in ``configs/machines``."""

from pydantic import Field

from coterie.core.config import Config
from coterie.parallel.planner.workload import Compute, Device


class Link(Config):
    """A way between ranks."""

    bandwidth: float = Field(gt=0)
    """Of one rank in one direction, GB/s (10⁹ bytes)."""
    latency: float = Field(ge=0)
    """Of one collective, µs."""
    efficiency: float = Field(default=1.0, gt=0, le=1)
    """Share of the bandwidth that collectives reach."""

    def seconds(self, volume: float) -> float:
        """To move ``volume`` bytes."""
        return self.latency * 1e-6 + volume / (self.bandwidth * 1e9 * self.efficiency)


class Machine(Config):
    """One rank's device, and its links."""

    name: str
    """As people call it."""
    device: Device
    """What PyTorch calls it."""
    ranks_per_node: int = Field(ge=1)
    """Ranks that share a node, where `--nodes` does not say."""
    memory: float = Field(gt=0)
    """Of one rank, GB."""
    usable: float = Field(default=1.0, gt=0, le=1)
    """Share of it that tensors can take: the rest is context, fragments and library workspaces."""
    peak: dict[Compute, float]
    """Matrix products by precision, TFLOP/s, dense."""
    efficiency: float = Field(gt=0, le=1)
    """Share of the peak that the matrix products of training reach."""
    memory_bandwidth: float = Field(gt=0)
    """GB/s."""
    node: Link
    """Between ranks of a node."""
    network: Link
    """Between ranks of different nodes."""

    @property
    def bytes(self) -> float:
        """That tensors can take on one rank."""
        return self.memory * 1e9 * self.usable

    def nodes(self, world: int) -> int:
        """That ``world`` ranks need."""
        return -(-world // self.ranks_per_node)
