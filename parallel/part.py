"""What one rank holds of a tensor that ranks share."""

from dataclasses import dataclass

from torch import Tensor

from coterie.core.box import Box

__all__ = ["Box", "Part"]


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
