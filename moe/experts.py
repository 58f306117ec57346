"""The experts of one layer that live on this rank, as stacked weights."""

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.core.config import Config
from coterie.moe.activations import ACTIVATIONS, ActivationName
from coterie.moe.grouped_ffn import grouped_ffn


class ExpertsConfig(Config):
    """The routed experts of a layer."""

    count: int = Field(ge=1)
    """Number of experts E, over all ranks."""
    hidden: int = Field(ge=1)
    """Hidden width F of each."""
    activation: ActivationName = "swiglu"
    """SwiGLU (gated), GELU (exact) or squared ReLU."""


class Experts(nn.Module):
    """E / R feed-forward experts, without biases; rank r of R holds those from r · E / R on.

    ``w_in_EHD``: for SwiGLU H = 2F, gate then up; else H = F. ``w_out_EFD``. E counts local ones.
    """

    def __init__(self, width: int, config: ExpertsConfig, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        if config.count % ranks:
            raise ValueError(f"{config.count} experts do not divide over {ranks} ranks")
        local = config.count // ranks
        self.activation = config.activation
        self.first = rank * local
        """Global id of the first local expert."""
        parts = ACTIVATIONS[config.activation].parts
        self.w_in_EHD = nn.Parameter(torch.empty(local, parts * config.hidden, width))
        self.w_out_EFD = nn.Parameter(torch.empty(local, config.hidden, width))

    def forward(self, x_AD: Tensor, load_E: Tensor) -> Tensor:
        """``x_AD``: rows sorted by local expert, ``load_E``: int64 rows for each → y_AD."""
        w_in_EHD: Tensor = self.w_in_EHD
        w_out_EFD: Tensor = self.w_out_EFD
        if torch.is_autocast_enabled(x_AD.device.type):
            half = torch.get_autocast_dtype(x_AD.device.type)
            x_AD, w_in_EHD, w_out_EFD = x_AD.to(half), w_in_EHD.to(half), w_out_EFD.to(half)
        return grouped_ffn(x_AD, w_in_EHD, w_out_EFD, load_E, self.activation)
