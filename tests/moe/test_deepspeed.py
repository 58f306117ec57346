"""Gates and the residual layer of DeepSpeed's mixture of experts: where ours agree, where not."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from coterie.moe.experts import ExpertsConfig
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.top_k import TopKConfig
from tests.moe.hugging_face import InDouble
from tests.moe.test_oracles import LIMIT, E, T, dense, route
from tests.moe.tiny import error, randn, randomise


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    return pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed")


def gating(deepspeed: ModuleType, logits_TE: Tensor, k: int, **options: Any) -> tuple[Any, Tensor]:
    """(l_aux, combine weights by token and expert), nothing drawn at random."""
    with InDouble():
        if k == 1:
            loss, weight_TEC, *_ = deepspeed.top1gating(
                logits_TE, min_capacity=0, use_rts=False, **options
            )
        else:
            loss, weight_TEC, *_ = deepspeed.topkgating(
                logits_TE, k, min_capacity=0, drop_policy="position", **options
            )
    return loss, weight_TEC.sum(-1)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_and_loss_are_deepspeeds(k: int, deepspeed: ModuleType) -> None:
    logits_TE = randn(T, E, seed=8)
    loss, truth_TE = gating(deepspeed, logits_TE, k, capacity_factor=float(E))  # room for all
    routing = route(logits_TE, k=k, renormalise=k > 1, balance_loss=1.0, z_loss=0.0)
    assert error(dense(routing), truth_TE) < LIMIT
    assert error(routing.losses["balance"], loss) < LIMIT


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_drops_are_deepspeeds(factor: float, deepspeed: ModuleType) -> None:
    """⌈factor · T / E⌉ rows of each expert stay, the first ones as in topkgating. Which ones stay
    in top1gating is up to torch.topk's order of equal numbers."""
    logits_TE = randn(T, E, seed=9)
    routing = route(logits_TE, k=1, renormalise=False, capacity_factor=factor)
    ours_TE = dense(routing)
    _, first_TE = gating(deepspeed, logits_TE, 1, capacity_factor=factor)
    assert torch.equal((ours_TE > 0).sum(0), (first_TE > 0).sum(0))
    both_TE = (ours_TE > 0) & (first_TE > 0)
    assert error(ours_TE[both_TE], first_TE[both_TE]) < LIMIT
    with InDouble():
        _, kept_TEC, *_ = deepspeed.topkgating(logits_TE, 1, factor, 0, drop_policy="position")
    assert torch.equal(ours_TE > 0, kept_TEC.sum(-1) > 0)
    assert int(routing.stats.dropped_E.sum()) == T - int((ours_TE > 0).sum()) > 0


def test_a_dropped_rows_weight_is_lost_here_and_shared_out_there(deepspeed: ModuleType) -> None:
    """The same rows stay, but DeepSpeed renormalises after drops, here it is done before."""
    logits_TE = randn(T, E, seed=10)
    _, theirs_TE = gating(deepspeed, logits_TE, 2, capacity_factor=0.5)
    ours_TE = dense(route(logits_TE, k=2, capacity_factor=0.5))
    assert torch.equal(ours_TE > 0, theirs_TE > 0) and error(ours_TE, theirs_TE) > 0.1
    whole_T = (theirs_TE > 0).sum(1) == 2
    assert 0 < int(whole_T.sum()) < T
    assert error(ours_TE[whole_T], theirs_TE[whole_T]) < LIMIT


def test_top_2_gating_has_a_loss_of_its_own(deepspeed: ModuleType) -> None:
    """It counts first choices alone, as GShard does; topkgating and ours count both."""
    logits_TE = randn(T, E, seed=11)
    with InDouble():
        loss, weight_TEC, *_ = deepspeed.top2gating(
            logits_TE, float(E), 0, top2_2nd_expert_sampling=False
        )
    ours = route(logits_TE, k=2, balance_loss=1.0, z_loss=0.0)
    assert error(dense(ours), weight_TEC.sum(-1)) < LIMIT
    first = route(logits_TE, k=1, renormalise=False, balance_loss=1.0, z_loss=0.0)
    assert error(first.losses["balance"], loss) < LIMIT
    assert error(ours.losses["balance"], loss) > 1e-3


def test_the_residual_layer_is_deepspeeds(deepspeed: ModuleType) -> None:
    """The expert's output and the dense layer's, weighed by softmax (PR-MoE), and all gradients."""
    from deepspeed.moe.layer import MoE

    width, hidden = 6, 5
    dense_layer = nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )
    theirs = MoE(width, dense_layer, 4, use_residual=True, use_rts=False, capacity_factor=4.0)
    randomise(theirs.double(), seed=2)

    def under_our_names(of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        experts = theirs.deepspeed_moe.experts.deepspeed_experts
        return {
            "router.weight": of(theirs.deepspeed_moe.gate.wg.weight),
            "experts.w_in_EPFD": torch.stack([of(expert[0].weight)[None] for expert in experts]),
            "experts.w_out_EFD": torch.stack([of(expert[2].weight).T for expert in experts]),
            "shared.w_in_PFD": of(theirs.mlp[0].weight)[None],
            "shared.w_out_FD": of(theirs.mlp[2].weight).T,
            "shared_mix.weight": of(theirs.coefficient.weight),
            "shared_mix.bias": of(theirs.coefficient.bias),
        }

    config = MoEConfig(
        experts=ExpertsConfig(count=4, hidden=hidden, activation="gelu"),
        router=TopKConfig(k=1, renormalise=False, balance_loss=1.0, z_loss=0.0),
        shared=FeedForwardConfig(hidden=hidden, activation="gelu"),
        shared_mix=True,
    )
    ours = MoELayer(width, config).double().train()
    ours.load_state_dict(under_our_names(lambda parameter: parameter.detach()))
    x_TD, dy_TD = randn(32, width, seed=1), randn(32, width, seed=3)
    output = ours(x_TD)
    ((output.y * dy_TD).sum() + output.losses["balance"]).backward()
    with InDouble():
        right_TD, loss, _ = theirs(x_TD)
        ((right_TD * dy_TD).sum() + loss).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    right = under_our_names(lambda parameter: cast(Tensor, parameter.grad))
    assert gradients.keys() == right.keys()
    assert error(output.y, right_TD) < LIMIT
    assert error(output.losses["balance"], loss) < LIMIT
    for name, gradient in gradients.items():
        assert error(cast(Tensor, gradient), right[name]) < LIMIT, name
