"""Floor 1: row operations of a mixture of experts, native where they could be compiled.

``permute`` gathers token rows for the experts, ``unpermute`` brings them back weighted; both are
differentiable and share one ``invert``. ``loader.status()`` says which ops run native.
"""

from coterie.csrc.inverse import Inverse, invert
from coterie.csrc.permute import permute
from coterie.csrc.unpermute import unpermute

__all__ = ["Inverse", "invert", "permute", "unpermute"]
