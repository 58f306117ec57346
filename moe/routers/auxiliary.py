"""Auxiliary routers (MoMa, arXiv 2407.21770, §2.4): a choice among all tokens, foreseen from one.

Experts that choose tokens, and blocks that choose which tokens pass them, compare a token with all
others, later ones too. A small predictor of that choice, trained when all else is finished, makes
inference causal: the token goes where the prediction is above one half. Its weight there is still
the main router's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.comm.axis import Axis
from coterie.comm.reduce import sum_over


class AuxiliaryRouter(nn.Module):
    """σ(SiLU(x·W1)·W2) for tokens of ``width``: W1 D × D/2, W2 D/2 × ``choosers``.

    The choosers are the experts of one modality, or one block. Parameters are uninitialised until
    :func:`coterie.models.initialise.initialise`.
    """

    def __init__(self, width: int, choosers: int) -> None:
        super().__init__()
        hidden = -(-width // 2)
        self.w_in = nn.Parameter(torch.empty(hidden, width))
        self.w_out = nn.Parameter(torch.empty(choosers, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, choosers): above zero, the token is foreseen to be chosen. No gradient goes to
        ``x_TD``."""
        x_TD = x_TD.detach().to(self.w_in.dtype)
        return F.silu(x_TD @ self.w_in.t()) @ self.w_out.t()


def foresight_loss(
    logits_TE: Tensor, chosen_TE: Tensor, open_TE: Tensor, data: Axis = Axis("data")
) -> Tensor:
    """Binary cross-entropy of what was foreseen and what was ``chosen_TE``: the mean over the pairs
    of token and chooser that are ``open_TE``, of all ranks of ``data``; this rank's share of it.
    All of them call."""
    pairs = sum_over(open_TE.sum(), data.group).clamp(min=1)
    return _cross_entropy(logits_TE, chosen_TE, open_TE).sum() / pairs


@torch.no_grad()
def foresight(logits_TE: Tensor, chosen_TE: Tensor, open_TE: Tensor) -> Tensor:
    """float64 (4,), sums over the pairs of token and chooser that are ``open_TE``: how many there
    are, how many were foreseen right, how many were chosen, and their cross-entropy in nats."""
    right_TE = ((logits_TE > 0) == chosen_TE) & open_TE
    sums = (
        open_TE.sum(),
        right_TE.sum(),
        (chosen_TE & open_TE).sum(),
        _cross_entropy(logits_TE, chosen_TE, open_TE).double().sum(),
    )
    return torch.stack([part.double() for part in sums])


def train_auxiliary_alone(model: nn.Module) -> None:
    """Freeze every parameter of ``model`` but those of its auxiliary routers."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AuxiliaryRouter):
            module.requires_grad_(True)


def _cross_entropy(logits_TE: Tensor, chosen_TE: Tensor, open_TE: Tensor) -> Tensor:
    each_TE = F.binary_cross_entropy_with_logits(
        logits_TE, chosen_TE.to(logits_TE.dtype), reduction="none"
    )
    return each_TE.masked_fill(~open_TE, 0.0)
