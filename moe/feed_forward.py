"""A dense feed-forward layer: the model's dense layers and the shared experts."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coterie.comm.axis import Axis, Cut
from coterie.comm.sequence import gather, reduce_scatter
from coterie.core.config import Config
from coterie.moe.activations import ACTIVATIONS, ActivationName


class FeedForwardConfig(Config):
    """A feed-forward layer that every token passes."""

    hidden: int = Field(ge=1)
    """Hidden width F."""
    activation: ActivationName = "swiglu"
    """SwiGLU (gated), GELU (exact), squared ReLU or ReGLU (gated: relu(gate) · up)."""


class FeedForward(nn.Module):
    """y = act(x · w_inᵀ) · w_out, without biases. ``w_in_PFD``: P = 2, gate then up, for SwiGLU and
    ReGLU, else 1.

    ``tp`` splits the hidden width F (Megatron-LM, arXiv 1909.08053, §3); each of its ranks has
    tokens of its own before and after. ``recompute``: keep only the tokens, and compute the hidden
    activations again in the backward pass.
    """

    def __init__(
        self,
        width: int,
        config: FeedForwardConfig,
        tp: Axis = Axis("tp"),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        if config.hidden % tp.size:
            raise ValueError(f"hidden {config.hidden} does not divide over {tp.size} ranks")
        act = ACTIVATIONS[config.activation]
        self.activation = act.forward
        self.tp = tp
        hidden = config.hidden // tp.size
        self.w_in_PFD = nn.Parameter(torch.empty(act.parts, hidden, width))
        self.w_out_FD = nn.Parameter(torch.empty(hidden, width))
        self.cuts = {
            "w_in_PFD": (Cut(1, tp, config.hidden),),
            "w_out_FD": (Cut(0, tp, config.hidden),),
        }

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., D) → (..., D)."""
        x_TD = gather(x.reshape(-1, x.shape[-1]), 0, self.tp)
        if self.recompute:
            y_TD = checkpoint(self._compute, x_TD, use_reentrant=False)
        else:
            y_TD = self._compute(x_TD)
        return reduce_scatter(y_TD, 0, self.tp).view_as(x)

    def _compute(self, x_TD: Tensor) -> Tensor:
        return self.activation(F.linear(x_TD, self.w_in_PFD.flatten(0, 1))) @ self.w_out_FD
