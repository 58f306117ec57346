"""The losses and scores of the router against Hugging Face's and Megatron's functions."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.moe.routers.base import Routing
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.tokens import TokenInfo
from tests.moe.hugging_face import InDouble
from tests.moe.tiny import error, identity_router, randn

T, E = 40, 8
LIMIT = 1e-12


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    return pytest.importorskip(
        "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed"
    )


@pytest.fixture
def padding_T() -> Tensor:
    return torch.rand(T, generator=torch.Generator().manual_seed(5)) < 0.3


def _route(
    config: TopKConfig, logits_TE: Tensor, padding_T: Tensor | None = None
) -> tuple[Routing, Tensor]:
    """The routing of given logits, and the leaf that they come from."""
    leaf_TE = logits_TE.clone().requires_grad_()
    router = identity_router(config, E).train()
    return router(leaf_TE, TokenInfo(padding_T=padding_T)), leaf_TE


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_times_k_is_the_loss_of_hugging_face(
    k: int, padded: bool, padding_T: Tensor
) -> None:
    mixtral = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed"
    )
    logits = randn(T, E, seed=1) * 2
    padding = padding_T if padded else None
    routing, ours = _route(TopKConfig(k=k, balance_loss=0.7, z_loss=0), logits, padding)
    theirs = logits.clone().requires_grad_()
    mask = None if padding is None else (~padding).long()
    with InDouble():
        truth = mixtral.load_balancing_loss_func((theirs,), E, k, mask)
    assert set(routing.losses) == {"balance"}
    assert error(routing.losses["balance"] * k / 0.7, truth) <= LIMIT
    assert error(_gradient(routing.losses["balance"] * k / 0.7, ours), _gradient(truth, theirs)) < (
        LIMIT
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 3])
def test_balance_is_the_loss_of_megatron(
    k: int, score: str, padded: bool, padding_T: Tensor, megatron: ModuleType
) -> None:
    logits = randn(T, E, seed=2) * 2
    padding = padding_T if padded else None
    config = TopKConfig.model_validate({"k": k, "score": score, "balance_loss": 0.3, "z_loss": 0})
    routing, ours = _route(config, logits, padding)
    theirs = logits.clone().requires_grad_()
    with InDouble():
        chosen_TE, prob_TE = megatron.compute_routing_scores_for_aux_loss(
            theirs, k, score, padding_mask=padding
        )
        tokens = T if padding is None else int((~padding).sum())
        truth = megatron.switch_load_balancing_loss_func(
            prob_TE, chosen_TE.sum(0), tokens, k, E, 0.3
        )
    assert error(routing.losses["balance"], truth) <= LIMIT
    assert error(_gradient(routing.losses["balance"], ours), _gradient(truth, theirs)) <= LIMIT
    assert torch.equal(routing.stats.load_E, chosen_TE.sum(0))


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_is_that_of_megatron(padded: bool, padding_T: Tensor, megatron: ModuleType) -> None:
    logits = randn(T, E, seed=3) * 2
    padding = padding_T if padded else None
    routing, ours = _route(TopKConfig(balance_loss=0, z_loss=0.2), logits, padding)
    theirs = logits.clone().requires_grad_()
    truth = megatron.z_loss_func(theirs, 0.2, padding)
    assert set(routing.losses) == {"z"}
    assert error(routing.losses["z"], truth) <= LIMIT
    assert error(_gradient(routing.losses["z"], ours), _gradient(truth, theirs)) <= LIMIT


def test_balance_is_one_when_all_is_even_and_counts_choices_before_drops() -> None:
    logits = torch.eye(E, dtype=torch.float64).repeat(3, 1)
    routing, _ = _route(TopKConfig(k=1, balance_loss=1.0), logits)
    assert float(routing.losses["balance"].detach()) == pytest.approx(1.0, abs=1e-12)

    crowded = logits.clone()
    crowded[:, 0] += 3
    free, _ = _route(TopKConfig(k=1, balance_loss=1.0), crowded)
    tight, _ = _route(TopKConfig(k=1, balance_loss=1.0, capacity_factor=0.5), crowded)
    assert int(tight.stats.dropped_E.sum()) > 0
    assert tight.losses["balance"] == free.losses["balance"]


ROUTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax of the chosen": (
        {"k": 3},
        {"topk": 3, "use_pre_softmax": False},
    ),
    "softmax of all": (
        {"k": 3, "renormalise": False},
        {"topk": 3, "use_pre_softmax": True},
    ),
    "scaled": (
        {"k": 2, "renormalise": False, "scale": 1.7},
        {"topk": 2, "use_pre_softmax": True, "scaling_factor": 1.7},
    ),
    "switch": ({"k": 1, "renormalise": False}, {"topk": 1, "use_pre_softmax": True}),
    "sigmoid": (
        {"k": 3, "score": "sigmoid"},
        {"topk": 3, "score_function": "sigmoid"},
    ),
    "sigmoid top-1": (
        {"k": 1, "score": "sigmoid", "renormalise": False},
        {"topk": 1, "score_function": "sigmoid"},
    ),
    # Megatron ranks groups by their best k / group_topk scores: as here when that is two
    "groups": (
        {"k": 4, "score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5},
        {
            "topk": 4,
            "score_function": "sigmoid",
            "num_groups": 4,
            "group_topk": 2,
            "scaling_factor": 2.5,
        },
    ),
    "groups of softmax": (
        {"k": 2, "groups": 2, "top_groups": 1, "renormalise": False},
        {"topk": 2, "use_pre_softmax": True, "num_groups": 2, "group_topk": 1},
    ),
}


def _dense(routing: Routing) -> Tensor:
    """The assignment as a T × E matrix of weights."""
    rows = routing.assignment
    weight_TE = torch.zeros(T, E, dtype=rows.weight_A.dtype)
    return weight_TE.index_put((rows.token_A, rows.expert_A), rows.weight_A, accumulate=True)


@pytest.mark.parametrize("name", ROUTINGS)
def test_scores_are_those_of_megatron(name: str, megatron: ModuleType) -> None:
    config, arguments = ROUTINGS[name]
    logits, dweight = randn(T, E, seed=4) * 2, randn(T, E, seed=5)
    routing, ours = _route(TopKConfig.model_validate(config), logits)
    theirs = logits.clone().requires_grad_()
    with InDouble():
        prob_TE, map_TE = megatron.topk_routing_with_score_function(theirs, **arguments)
    weight_TE = _dense(routing)
    assert torch.equal(weight_TE != 0, map_TE)
    assert error(weight_TE, prob_TE) <= LIMIT
    ours_gradient = _gradient((weight_TE * dweight).sum(), ours)
    assert error(ours_gradient, _gradient((prob_TE * dweight).sum(), theirs)) <= LIMIT


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 1.4])
def test_drops_by_score_are_those_of_megatron(factor: float, megatron: ModuleType) -> None:
    logits = randn(T, E, seed=6)
    free, _ = _route(TopKConfig(k=2), logits)
    kept, _ = _route(TopKConfig(k=2, capacity_factor=factor, drop="score"), logits)
    weight_TE = _dense(free).detach()
    _, map_TE = megatron.apply_router_token_dropping(weight_TE, weight_TE != 0, 2, factor)
    assert torch.equal(_dense(kept) != 0, map_TE)
    assert int(kept.stats.dropped_E.sum()) == 2 * T - int(map_TE.sum()) > 0
