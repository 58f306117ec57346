"""Small float64 layers for tests, and how two results are compared."""

import torch
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.moe.activations import ActivationName
from coterie.moe.experts import ExpertsConfig
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.top_k import TopKConfig, TopKRouter


def error(ours: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest value of the truth."""
    ours, truth = ours.detach(), truth.detach()
    assert ours.shape == truth.shape
    assert ours.dtype == truth.dtype
    if truth.numel() == 0:
        return 0.0
    scale = float(truth.abs().max())
    return float((ours - truth).abs().max()) / (scale or 1.0)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, std: float = 0.5) -> None:
    """Fill every parameter; none is zero, one or symmetric by luck."""
    gen = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=gen, dtype=torch.float64) * std)


def tiny_layer(
    router: TopKConfig,
    *,
    width: int = 6,
    experts: int = 4,
    hidden: int = 5,
    activation: ActivationName = "swiglu",
    shared: int | None = None,
    shared_gate: bool = False,
    axes: Axes = Axes(),
    seed: int = 0,
) -> MoELayer:
    """A layer in float64 with random weights."""
    config = MoEConfig(
        experts=ExpertsConfig(count=experts, hidden=hidden, activation=activation),
        router=router,
        shared=None if shared is None else FeedForwardConfig(hidden=shared, activation=activation),
        shared_gate=shared_gate,
    )
    layer = MoELayer(width, config, axes).double()
    randomise(layer, seed)
    return layer


def identity_router(config: TopKConfig, experts: int, width: int | None = None) -> TopKRouter:
    """A float64 router whose logits are the first ``experts`` columns of its input."""
    router = TopKRouter(width or experts, experts, config).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts, width or experts))
    return router
