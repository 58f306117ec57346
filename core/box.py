"""A box of a tensor that ranks share: what one of them holds."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """Where a part lies: its ``offset`` and ``shape`` in a tensor of shape ``whole``."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def all_of(shape: tuple[int, ...]) -> "Box":
        """The whole tensor."""
        return Box(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Elements in the part."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects the part from the whole."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def cut(self, dim: int, indices: range) -> "Box":
        """The part of this one that ``indices`` of its dimension ``dim`` select."""
        offset, shape = list(self.offset), list(self.shape)
        offset[dim] += indices.start
        shape[dim] = len(indices)
        return Box(self.whole, tuple(offset), tuple(shape))
