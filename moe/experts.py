"""The experts of one layer that live on this rank, as stacked weights."""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.comm.axis import Axis, Cut
from coterie.comm.exchange.base import Exchange, Rows
from coterie.core.config import Config
from coterie.moe.activations import ACTIVATIONS, ActivationName
from coterie.moe.grouped_ffn import FFNPasses, grouped_ffn


class ExpertsConfig(Config):
    """The routed experts of a layer."""

    count: int = Field(ge=1)
    """Number of experts E, over all ranks."""
    hidden: int = Field(ge=1)
    """Hidden width F of each."""
    activation: ActivationName = "swiglu"
    """SwiGLU (gated), GELU (exact), squared ReLU or ReGLU (gated: relu(gate) · up)."""


class Experts(nn.Module):
    """The feed-forward experts of this rank, without biases: those that ``ep`` gives it, of each
    the slice of the hidden width that ``etp`` gives it.

    ``w_in_EPFD``: P = 2, gate then up, for SwiGLU and ReGLU, else 1. ``w_out_EFD``. E and F count
    local ones. A sliced expert's output is its part of the sum over slices. ``recompute``: keep
    only the rows, and compute hidden activations again in the backward pass.
    """

    def __init__(
        self,
        width: int,
        config: ExpertsConfig,
        ep: Axis = Axis("ep"),
        etp: Axis = Axis("etp"),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for what, count, axis in (("experts", config.count, ep), ("hidden", config.hidden, etp)):
            if count % axis.size:
                raise ValueError(f"{what} {count} does not divide over {axis.size} ranks")
        self.activation = config.activation
        self.recompute = recompute
        mine = ep.part(config.count)
        self.first = mine.start
        """Global id of the first local expert."""
        parts, hidden = ACTIVATIONS[config.activation].parts, config.hidden // etp.size
        self.w_in_EPFD = nn.Parameter(torch.empty(len(mine), parts, hidden, width))
        self.w_out_EFD = nn.Parameter(torch.empty(len(mine), hidden, width))
        experts = Cut(0, ep, config.count)
        self.cuts = {
            "w_in_EPFD": (experts, Cut(2, etp, config.hidden)),
            "w_out_EFD": (experts, Cut(1, etp, config.hidden)),
        }

    def forward(self, x_AD: Tensor, load_E: Tensor) -> Tensor:
        """``x_AD``: rows sorted by local expert, ``load_E``: int64 rows for each → y_AD."""
        w_in_EHD, w_out_EFD = self.weights()
        x_AD = x_AD.to(w_in_EHD.dtype)
        return grouped_ffn(x_AD, w_in_EHD, w_out_EFD, load_E, self.activation, self.recompute)

    def weights(self) -> tuple[Tensor, Tensor]:
        """(w_in_EHD, w_out_EFD), in the dtype of autocast where it is on."""
        w_in_EHD, w_out_EFD = self.w_in_EPFD.flatten(1, 2), self.w_out_EFD
        device = w_in_EHD.device.type
        if not torch.is_autocast_enabled(device):
            return w_in_EHD, w_out_EFD
        half = torch.get_autocast_dtype(device)
        return w_in_EHD.to(half), w_out_EFD.to(half)

    def over(self, exchange: Exchange, x_TD: Tensor, assignment: Rows) -> Tensor:
        """The tokens sent through these experts by ``exchange``: (T, D) → (T, D).

        However many rounds that takes, weights that are sharded are gathered once: ranks that
        share them but exchange with others need not have as many rounds.
        """
        return exchange(x_TD, assignment, _Split(self))


class _Split(NamedTuple):
    """``experts`` as exchanges see them; a call is no call of the module, and runs none of its
    hooks."""

    experts: Experts

    @property
    def activation(self) -> ActivationName:
        return self.experts.activation

    @property
    def keeps(self) -> bool:
        return not self.experts.recompute

    def __call__(self, x_AD: Tensor, load_E: Tensor) -> Tensor:
        return self.experts.forward(x_AD, load_E)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.experts.weights()

    def passes(self, *weights: Tensor) -> FFNPasses:
        w_in_EHD, w_out_EFD = weights
        return FFNPasses(w_in_EHD, w_out_EFD, self.experts.activation)
