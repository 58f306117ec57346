"""Small float64 decoders for tests."""

from typing import Any

import torch
from torch import Tensor

from coterie.comm.axis import Axes
from coterie.models.config import DecoderConfig
from coterie.models.decoder import Decoder, Recompute
from coterie.models.initialise import initialise

VOCABULARY = 23


def config(router: dict[str, Any] | None = None, **settings: Any) -> DecoderConfig:
    """Three layers, the first one dense, the others with four experts; ``settings`` override."""
    tree: dict[str, Any] = {
        "vocabulary": VOCABULARY,
        "width": 16,
        "layers": 3,
        "attention": {"heads": 4, "kv_heads": 2},
        "feed_forward": {"hidden": 12},
        "moe": {
            "experts": {"count": 4, "hidden": 6},
            "router": {"k": 2, **(router or {})},
            "shared": {"hidden": 5},
            "shared_gate": True,
        },
        "dense_layers": [0],
    }
    return DecoderConfig.model_validate(tree | settings)


def decoder(
    settings: DecoderConfig,
    axes: Axes = Axes(),
    recompute: Recompute = "none",
    seed: int = 0,
) -> Decoder:
    """Initialised; embedding, routers and experts large enough for every choice to matter."""
    model = Decoder(settings, axes, recompute=recompute).double()
    initialise(model, seed, residual_branches=2 * settings.layers)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.mul_(50)
            if "experts.w_out" in name:
                parameter.mul_(10)
    return model


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, columns), generator=gen)
