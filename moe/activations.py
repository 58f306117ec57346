"""The non-linearities of a feed-forward layer, with their derivatives.

``h_AH`` is the first product's output: H = 2F, gate then up, for SwiGLU and ReGLU;
H = F for the others. The derivatives are written out because the experts' backward pass works
through a list of experts and must not build an autograd graph for each.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.csrc.swiglu import swiglu, swiglu_backward

ActivationName = Literal["swiglu", "gelu", "relu2", "reglu"]


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


class _ReGLU(torch.autograd.Function):
    """Keeps ``h_AH`` alone, where autograd would keep relu(gate) too."""

    @staticmethod
    def forward(ctx: Any, h_AH: Tensor) -> Tensor:
        ctx.save_for_backward(h_AH)
        gate_AF, up_AF = h_AH.chunk(2, -1)
        return gate_AF.relu() * up_AF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, da_AF: Tensor) -> Tensor:
        return _reglu_backward(da_AF, *ctx.saved_tensors)[0]


def _reglu(h_AH: Tensor) -> Tensor:
    return _ReGLU.apply(h_AH)


def _reglu_backward(da_AF: Tensor, h_AH: Tensor) -> tuple[Tensor, Tensor]:
    gate_AF, up_AF = h_AH.chunk(2, -1)
    relu_AF = gate_AF.relu()
    return torch.cat([da_AF * up_AF * (gate_AF > 0), da_AF * relu_AF], -1), relu_AF * up_AF


ACTIVATIONS: dict[ActivationName, Activation] = {
    "swiglu": Activation(2, swiglu, swiglu_backward),
    "gelu": Activation(1, F.gelu, _gelu_backward),
    "relu2": Activation(1, _relu2, _relu2_backward),
    "reglu": Activation(2, _reglu, _reglu_backward),
}
