"""A whole mixture-of-experts layer, forward and backward, on the CUDA sources of its light kernels.

They run on the host in the place of the CPU's ops; the layer must come out as with the plain
PyTorch twins.
"""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.csrc import loader
from coterie.moe.layer import MoELayer, MoEOutput
from coterie.moe.routers.mlp import MLPConfig
from coterie.moe.routers.random_fixed import RandomFixedConfig
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.tokens import TokenInfo
from tests.csrc.compile_on_host import CSRC, check_under_sanitizers, standing_in
from tests.moe.tiny import error, randn, tiny_layer

SOURCES = [CSRC / name for name in ("gate.cu", "rows.cu", "sort.cu")]
ROUTERS = {
    "mixtral": TopKConfig(k=2),
    "switch": TopKConfig(k=1, renormalise=False, capacity_factor=1.0),
    "deepseek": TopKConfig(
        k=3, score="sigmoid", scale=2.5, groups=4, top_groups=2, bias_update=0.001
    ),
    "dropped by score": TopKConfig(k=2, capacity_factor=0.75, drop="score", sequence_loss=0.1),
    "mlp": MLPConfig(k=1, skip=True, bias_update=0.01, hidden=7),
    "random": RandomFixedConfig(first_k=1, k=3),
}


def results(layer: MoELayer, tokens: int, padded: bool) -> tuple[MoEOutput, dict[str, Tensor]]:
    """The layer's output and all gradients, for one set of tokens."""
    x_TD = randn(tokens, 6, seed=tokens).requires_grad_()
    padding_T = torch.arange(tokens) % 5 == 3 if padded else None
    layer.zero_grad()
    out = layer(x_TD, TokenInfo(padding_T=padding_T))
    loss = (out.y * randn(tokens, 6, seed=99)).sum() + sum(out.losses.values())
    loss.backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert x_TD.grad is not None
    return out, {"x": x_TD.grad, **grads}


@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_equals_that_of_the_twins(router: str, padded: bool, tokens: int) -> None:
    layer = tiny_layer(ROUTERS[router], experts=8)
    with loader.twins_only():
        expected, expected_grads = results(layer, tokens, padded)
    with standing_in(*SOURCES):
        actual, grads = results(layer, tokens, padded)

    assert error(actual.y, expected.y) < 1e-12
    assert actual.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert error(actual.losses[name], loss) < 1e-12
    for field in fields(expected.stats):
        ours, theirs = (getattr(out.stats, field.name) for out in (actual, expected))
        assert torch.equal(ours, theirs) or error(ours, theirs) < 1e-12
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert error(grads[name], grad) < 1e-12, name


def test_the_kernels_are_called() -> None:
    """Each of them, in a forward and a backward pass; else the test above would show nothing."""
    layer = tiny_layer(ROUTERS["mixtral"], experts=8)
    called = set()

    def counted(name: str, run: Any) -> Any:
        def call(*arguments: Any) -> Any:
            called.add(name)
            return run(*arguments)

        return call

    with standing_in(*SOURCES):
        for (op, device), run in list(loader._CHOSEN.items()):
            if "on_host" in str(run):
                loader._CHOSEN[op, device] = counted(op, run)
        results(layer, 5, padded=False)
    assert called == {
        *("gate", "gate_backward", "sort_by_expert", "invert"),
        *("permute", "unpermute", "unpermute_backward"),
    }


def test_under_the_sanitizers() -> None:
    check_under_sanitizers(__file__)
