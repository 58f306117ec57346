"""What one rank holds of a tensor that ranks share: a box of the whole."""

from dataclasses import dataclass
from math import prod

from torch import Tensor


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

    def cut(self, dim: int, indices: range) -> "Box":
        """The part of this one that ``indices`` of its dimension ``dim`` select."""
        offset, shape = list(self.offset), list(self.shape)
        offset[dim] += indices.start
        shape[dim] = len(indices)
        return Box(self.whole, tuple(offset), tuple(shape))


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor. ``tensor`` has the box's shape; writing to it fills the model."""

    tensor: Tensor
    box: Box
    owner: bool = True
    """Of the ranks that hold this same part, exactly one owns it: sums count it there."""

    @staticmethod
    def whole(tensor: Tensor, owner: bool = True) -> "Part":
        """A tensor that is not split."""
        return Part(tensor, Box.all_of(tuple(tensor.shape)), owner)
