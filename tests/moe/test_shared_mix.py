"""A dense layer and the best expert, weighed by softmax (residual MoE), by plain loops."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from coterie.moe.experts import ExpertsConfig
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.top_k import TopKConfig
from tests.moe.test_moe_layer import feed_forward
from tests.moe.tiny import error, randn, randomise

T, D, HIDDEN = 9, 6, 5


def layer(mix: bool) -> MoELayer:
    config = MoEConfig(
        experts=ExpertsConfig(count=4, hidden=HIDDEN),
        router=TopKConfig(k=1, renormalise=False),
        shared=FeedForwardConfig(hidden=HIDDEN),
        shared_mix=mix,
    )
    module = MoELayer(D, config).double()
    randomise(module, seed=2)
    return module


def by_loops(module: MoELayer, x_TD: Tensor) -> Tensor:
    """deepspeed.moe.layer.MoE with use_residual: output · coef[0] + mlp · coef[1]."""
    assert module.shared is not None and module.shared_mix is not None
    rows = []
    for x_D in x_TD:
        scores = (module.router.weight @ x_D).softmax(0)
        best = int(scores.argmax())
        w_in = module.experts.w_in_EPFD[best].flatten(0, 1)
        routed_D = scores[best] * feed_forward(x_D, w_in, module.experts.w_out_EFD[best], "swiglu")
        dense = module.shared
        dense_D = feed_forward(x_D, dense.w_in_PFD.flatten(0, 1), dense.w_out_FD, "swiglu")
        coefficient = (module.shared_mix.weight @ x_D + module.shared_mix.bias).softmax(0)
        rows.append(coefficient[0] * routed_D + coefficient[1] * dense_D)
    return torch.stack(rows)


def test_output_and_gradients_by_loops() -> None:
    module = layer(mix=True)
    x_TD = randn(T, D, seed=1).requires_grad_()
    leaves = [x_TD, *module.parameters()]
    ours, right = module(x_TD).y, by_loops(module, x_TD)
    assert error(ours, right) < 1e-13
    dy_TD = randn(T, D, seed=3)
    mine = torch.autograd.grad(ours, leaves, dy_TD)
    for gradient, true in zip(mine, torch.autograd.grad(right, leaves, dy_TD), strict=True):
        assert error(gradient, true) < 1e-12
    plain = layer(mix=False)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if "mix" not in n})
    assert error(plain(x_TD).y, right) > 1e-2  # there the two are added


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_mix": True}, "shared_mix needs shared experts"),
        (
            {"shared_mix": True, "shared_gate": True, "shared": {"hidden": 4}},
            "shared_mix and shared_gate are two ways",
        ),
    ],
)
def test_what_does_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig.model_validate({"experts": {"count": 4, "hidden": 4}, **settings})
