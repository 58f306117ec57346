"""Floor 1: the operations of a mixture of experts, native where they could be compiled.

``gate`` chooses experts, ``sort_by_expert`` puts the choices in order, ``permute`` gathers token
rows for the experts, ``unpermute`` brings them back weighted. All but the sort are differentiable,
the last two share one ``invert``. ``loader.status()`` says which ops run native.
"""

from coterie.csrc.gate import Gate, gate
from coterie.csrc.inverse import Inverse, invert
from coterie.csrc.permute import permute
from coterie.csrc.sort import sort_by_expert
from coterie.csrc.unpermute import unpermute

__all__ = ["Gate", "Inverse", "gate", "invert", "permute", "sort_by_expert", "unpermute"]
