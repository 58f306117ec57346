"""Experts that choose tokens: their routers, tokens for them, and parts of their layers."""

from typing import Any

import torch
from torch import Tensor

from coterie.comm.axis import Axes
from coterie.core.random import fold_in, key
from coterie.moe.layer import MoELayer
from coterie.moe.routers.base import Routing
from coterie.moe.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from coterie.moe.routers.modality import ModalityConfig
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import randomise, tiny_layer

T, D, E = 24, 6, 4
Config = ExpertChoiceConfig | ModalityConfig


def config_of(given: dict[str, Any], **more: Any) -> Config:
    kind = ModalityConfig if given.get("kind") == "modality" else ExpertChoiceConfig
    return kind.model_validate({**given, **more})


def router_of(config: Config, seed: int = 0) -> ExpertChoiceRouter:
    """In float64, with random weights, for evaluation."""
    router = config.build(D, E, Axes())
    assert isinstance(router, ExpertChoiceRouter)
    randomise(router.double(), seed)
    return router.eval()


def keys(count: int = T) -> Tensor:
    return fold_in(torch.full((count,), key("noise")), torch.arange(count))


def info_of(seed: int, tokens: int = T, modalities: int = 2, padding: float = 0.3) -> TokenInfo:
    gen = torch.Generator().manual_seed(seed)
    return TokenInfo(
        modality_T=torch.randint(0, modalities, (tokens,), generator=gen),
        padding_T=torch.rand(tokens, generator=gen) < padding,
        key_T=keys(tokens),
    )


def weights_of(routing: Routing) -> dict[tuple[int, int], float]:
    """(token, expert) → weight."""
    rows = routing.assignment
    pairs = zip(rows.token_A.tolist(), rows.expert_A.tolist(), strict=True)
    return dict(zip(pairs, rows.weight_A.tolist(), strict=True))


def part_of_layer(config: Config, axes: Axes) -> MoELayer:
    """This rank's part of a layer that is the same in every layout, for training."""
    whole, layer = tiny_layer(config), tiny_layer(config, axes=axes).train()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            truth = whole.get_parameter(name)
            if name.startswith("experts."):
                truth = truth.chunk(axes.ep.size)[axes.ep.rank]
            parameter.copy_(truth)
    return layer
