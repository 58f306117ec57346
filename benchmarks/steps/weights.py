"""The weights that every contestant starts from, so that their losses can be held side by side."""

import torch
from torch import Tensor

from benchmarks.steps.model import Model
from benchmarks.steps.ours import run_config
from coterie.models import Decoder, initialise


def whole_weights(model: Model, seed: int = 0) -> dict[str, Tensor]:
    """Every weight of the model by the name that ours gives it, whole.

    Experts: ``blocks.N.moe.experts.w_in_EPFD`` (gate, up) and ``…w_out_EFD``.
    """
    config = run_config(model).model
    decoder = Decoder(config)
    with torch.no_grad():
        initialise(decoder, seed, residual_branches=2 * config.layers)
    return {name: p.detach() for name, p in decoder.named_parameters()}
