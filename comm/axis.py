"""A rank's place among those that split something."""

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """Rank ``rank`` of ``size`` along one axis of the layout.

    ``group`` is None when the axis has one rank, and when a model is only planned: a model can be
    built for any place without a process group, and then shows the shapes it has there.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    def part(self, length: int) -> range:
        """This rank's indices of ``length``, split as ``torch.chunk`` does: parts of
        ⌈length / size⌉, the last ones shorter or empty."""
        each = -(-length // self.size)
        return range(min(self.rank * each, length), min((self.rank + 1) * each, length))


ALONE = Axis()
"""Nothing is split."""
