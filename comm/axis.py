"""A rank's place among those that split something."""

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """Rank ``rank`` of ``size`` along one axis of the layout.

    ``group`` is None when the axis has one rank, and when a model is only planned: a model can be
    built for any place without a process group, and then shows the shapes it has there.
    """

    name: str = ""
    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def part(self, length: int) -> range:
        """This rank's indices of ``length``, split as ``torch.chunk`` does: parts of
        ⌈length / size⌉, the last ones shorter or empty."""
        each = -(-length // self.size)
        return range(min(self.rank * each, length), min((self.rank + 1) * each, length))


@dataclass(frozen=True)
class Axes:
    """What a model's layers are split over; by default nothing is."""

    tp: Axis = Axis("tp")
    """Tensor parallelism: heads, feed-forward width, vocabulary; activations by sequence."""
    cp: Axis = Axis("cp")
    """Context parallelism: the sequence."""
    ep: Axis = Axis("ep")
    """Place among those that hold different experts (no group of its own: see ``expert``)."""
    etp: Axis = Axis("etp")
    """Place among those that split the width of the same experts."""
    expert: Axis = Axis("expert")
    """The ranks that rows travel between: ep × etp, etp fastest."""
    expert_node: Axis = Axis("expert_node")
    """Those of them that share a node."""
    expert_across: Axis = Axis("expert_across")
    """Those of them, one on each node, that have the same place in it."""
    sequence: Axis = Axis("sequence")
    """The ranks that hold parts of the same sequences: cp × tp, tp fastest."""
    data: Axis = Axis("data")
    """The ranks whose tokens make up the global micro-batch."""


@dataclass(frozen=True)
class Cut:
    """Dimension ``dim`` of a parameter, ``length`` long in the whole, is split over ``axis``."""

    dim: int
    axis: Axis
    length: int


def expert_parallel(group: ProcessGroup) -> Axes:
    """Nothing is split but the experts, over the ranks of ``group``; each has tokens of its own."""
    rank, size = group.rank(), group.size()
    return Axes(
        ep=Axis("ep", rank, size),
        expert=Axis("expert", rank, size, group),
        data=Axis("data", rank, size, group),
    )
