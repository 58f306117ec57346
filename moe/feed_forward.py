"""A dense feed-forward layer: the model's dense layers and the shared experts."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coterie.core.config import Config
from coterie.moe.activations import ACTIVATIONS, ActivationName


class FeedForwardConfig(Config):
    """A feed-forward layer that every token passes."""

    hidden: int = Field(ge=1)
    """Hidden width F."""
    activation: ActivationName = "swiglu"
    """SwiGLU (gated), GELU (exact) or squared ReLU."""


class FeedForward(nn.Module):
    """y = act(x · w_inᵀ) · w_out, without biases. ``w_in`` is H × D: gate then up for SwiGLU."""

    def __init__(self, width: int, config: FeedForwardConfig) -> None:
        super().__init__()
        act = ACTIVATIONS[config.activation]
        self.activation = act.forward
        self.w_in_HD = nn.Parameter(torch.empty(act.parts * config.hidden, width))
        self.w_out_FD = nn.Parameter(torch.empty(config.hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (..., D) → (..., D)."""
        return self.activation(F.linear(x, self.w_in_HD)) @ self.w_out_FD
