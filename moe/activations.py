"""The non-linearities of a feed-forward layer, with their derivatives.

``h_AH`` is the first product's output: H = 2F, gate then up, for SwiGLU; H = F for the others.
The derivatives are written out because the experts' backward pass works through a list of experts
and must not build an autograd graph for each.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.csrc.swiglu import swiglu, swiglu_backward

ActivationName = Literal["swiglu", "gelu", "relu2"]


class Activation(NamedTuple):
    """``parts``: H / F. ``forward``: h → a (A × F). ``backward``: (da, h) → (dh, a)."""

    parts: int
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _gelu_backward(da_AF: Tensor, h_AF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.gelu_backward(da_AF, h_AF), F.gelu(h_AF)


def _relu2(h_AF: Tensor) -> Tensor:
    return h_AF.relu().square()


def _relu2_backward(da_AF: Tensor, h_AF: Tensor) -> tuple[Tensor, Tensor]:
    relu_AF = h_AF.relu()
    return 2 * da_AF * relu_AF, relu_AF.square()


ACTIVATIONS: dict[ActivationName, Activation] = {
    "swiglu": Activation(2, swiglu, swiglu_backward),
    "gelu": Activation(1, F.gelu, _gelu_backward),
    "relu2": Activation(1, _relu2, _relu2_backward),
}
