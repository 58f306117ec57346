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

ActivationName = Literal["swiglu", "gelu", "relu2"]


class Activation(NamedTuple):
    """``parts``: H / F. ``forward``: h → a (A × F). ``backward``: (da, h) → (dh, a)."""

    parts: int
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _swiglu(h_AH: Tensor) -> Tensor:
    gate_AF, up_AF = h_AH.chunk(2, -1)
    return F.silu(gate_AF) * up_AF


def _swiglu_backward(da_AF: Tensor, h_AH: Tensor) -> tuple[Tensor, Tensor]:
    gate_AF, up_AF = h_AH.chunk(2, -1)
    silu_AF = F.silu(gate_AF)
    dh_AH = torch.empty_like(h_AH)
    dgate_AF, dup_AF = dh_AH.chunk(2, -1)
    torch.mul(da_AF, silu_AF, out=dup_AF)
    torch.ops.aten.silu_backward.grad_input(da_AF * up_AF, gate_AF, grad_input=dgate_AF)
    return dh_AH, silu_AF.mul_(up_AF)


def _gelu_backward(da_AF: Tensor, h_AF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.gelu_backward(da_AF, h_AF), F.gelu(h_AF)


def _relu2(h_AF: Tensor) -> Tensor:
    return h_AF.relu().square()


def _relu2_backward(da_AF: Tensor, h_AF: Tensor) -> tuple[Tensor, Tensor]:
    relu_AF = h_AF.relu()
    return 2 * da_AF * relu_AF, relu_AF.square()


ACTIVATIONS: dict[ActivationName, Activation] = {
    "swiglu": Activation(2, _swiglu, _swiglu_backward),
    "gelu": Activation(1, F.gelu, _gelu_backward),
    "relu2": Activation(1, _relu2, _relu2_backward),
}
