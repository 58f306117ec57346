"""What holds for every router, whatever the tokens: algebra, symmetry, zeros, gradients."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.core.random import fold_in, key
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.base import Routing
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import error, randn, randomise

D, E, HIDDEN = 5, 6, 3
LIMIT = 1e-12
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "k": 2, "scale": 1.5, "balance_loss": 0.1, "jitter": 0.2},
    "switch": {"kind": "top_k", "k": 1, "renormalise": False, "z_loss": 0.1},
    "first come": {"kind": "top_k", "k": 2, "capacity_factor": 0.7},
    "best come": {"kind": "top_k", "k": 2, "capacity_factor": 0.7, "drop": "score"},
    "deepseek": {
        "kind": "top_k",
        "k": 3,
        "score": "sigmoid",
        "scale": 2.5,
        "groups": 3,
        "top_groups": 2,
        "bias_update": 0.1,
        "sequence_loss": 0.1,
    },
    "mlp": {"kind": "mlp", "k": 2, "hidden": 4, "bias_update": 0.1},
    "mlp, skip": {"kind": "mlp", "hidden": 4, "skip": True, "jitter": 0.1, "bias_update": 0.1},
    "random_fixed": {"kind": "random_fixed", "k": 3, "scale": 2.0},
    "hash": {"kind": "hash", "k": 2},
    "sinkhorn": {"kind": "sinkhorn", "k": 2},
    "sinkhorn top-1": {"kind": "sinkhorn", "k": 1},
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 1.5},
    "noisy expert_choice": {"kind": "expert_choice", "score": "sigmoid", "noise": True},
    "modality": {"kind": "modality", "experts": [4, 2], "capacity_factor": 1.2},
    "foreseen expert_choice": {"kind": "expert_choice", "score": "sigmoid", "auxiliary": True},
    "foreseen modality": {"kind": "modality", "experts": [4, 2], "auxiliary": True},
}
DROPPING = ("first come", "best come")
NORMALISED = {"top_k": 1.5, "deepseek": 2.5, "random_fixed": 2.0, "hash": 1.0}
"""Combine weights of a token add up to this."""
CHOOSING = {
    name: router.get("experts", [E])
    for name, router in ROUTERS.items()
    if router["kind"] in ("expert_choice", "modality")
}
"""Experts choose, so many in each group."""

some = settings(max_examples=10, deadline=None, derandomize=True)


class Batch(NamedTuple):
    """Tokens of a few sequences, and what is known of them."""

    x_TD: Tensor
    info: TokenInfo
    training: bool


@st.composite
def batches(draw: st.DrawFn, most: int = 14) -> Batch:
    lengths = draw(st.lists(st.integers(1, most // 2), min_size=1, max_size=2))
    tokens, seed = sum(lengths), draw(st.integers(0, 10**6))
    gen = torch.Generator().manual_seed(seed)
    padding = draw(st.sampled_from([None, 0.0, 0.4, 1.0]))
    info = TokenInfo(
        token_T=torch.randint(0, 1000, (tokens,), generator=gen),
        modality_T=torch.randint(0, 2, (tokens,), generator=gen),
        padding_T=None if padding is None else torch.rand(tokens, generator=gen) < padding,
        sequence_T=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        key_T=fold_in(torch.full((tokens,), key("noise", seed)), torch.arange(tokens)),
    )
    return Batch(randn(tokens, D, seed=seed), info, draw(st.booleans()))


@cache
def _layer(name: str) -> MoELayer:
    config = MoEConfig.model_validate(
        {"experts": {"count": E, "hidden": HIDDEN}, "router": ROUTERS[name]}
    )
    layer = MoELayer(D, config).double()
    randomise(layer, seed=len(name))
    if name == "mlp, skip":
        with torch.no_grad():
            layer.router.bias.sub_(1.0)  # about that of skipping: some tokens do
    return layer


def layer_of(name: str, training: bool = True) -> MoELayer:
    return _layer(name).train(training)


def route(layer: MoELayer, batch: Batch) -> Routing:
    state_TR = layer.router.state(batch.x_TD, batch.info)
    routing: Routing = layer.router(batch.x_TD, replace(batch.info, router_state_TR=state_TR))
    return routing


def routed(batch: Batch) -> Tensor:
    """bool (T,): not padding."""
    padding_T = batch.info.padding_T
    return torch.ones(len(batch.x_TD), dtype=torch.bool) if padding_T is None else ~padding_T


def dense(routing: Routing, tokens: int) -> Tensor:
    """Combine weights by token and expert."""
    rows = routing.assignment
    weight_TE = torch.zeros(tokens, E, dtype=torch.float64)
    return weight_TE.index_put((rows.token_A, rows.expert_A), rows.weight_A, accumulate=True)


def property_test(
    check: Callable[[str, Batch], None], names: Iterable[str] = ROUTERS
) -> Callable[[str], None]:
    """``check`` for each router of ``names``, on drawn batches."""

    @pytest.mark.parametrize("name", names)
    def test(name: str) -> None:
        some(given(batches())(lambda batch: check(name, batch)))()

    return test


def rows_are_sorted_and_counted(name: str, batch: Batch) -> None:
    routing = route(layer_of(name, batch.training), batch)
    rows = routing.assignment
    pairs = list(zip(rows.expert_A.tolist(), rows.token_A.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert rows.load_E.tolist() == [sum(e == own for own, _ in pairs) for e in range(E)]
    assert torch.equal(routing.stats.load_E, rows.load_E)
    assert rows.weight_A.shape == rows.token_A.shape and bool((rows.weight_A > 0).all())
    assert bool(routed(batch)[rows.token_A].all())
    assert int(routing.stats.tokens) == int(routed(batch).sum())
    assert {*routing.losses} == {*layer_of(name).router.config.loss_names} or not batch.training
    assert all(bool(loss.isfinite()) for loss in routing.losses.values())


def choices_are_rows_or_dropped(name: str, batch: Batch) -> None:
    config = ROUTERS[name]
    stats = route(layer_of(name, batch.training), batch).stats
    rows, dropped = int(stats.load_E.sum()), int(stats.dropped_E.sum())
    choices = config.get("k", 1) * int(routed(batch).sum())
    if config.get("skip"):
        assert rows <= choices and not dropped
    else:
        assert rows + dropped == choices
        assert name in DROPPING or not dropped


def experts_that_choose_have_their_share(name: str, batch: Batch) -> None:
    """Also with auxiliary routers, but where these choose."""
    modality_T, factor = batch.info.modality_T, ROUTERS[name].get("capacity_factor", 1.0)
    asked = batch._replace(info=replace(batch.info, by_choice=True))
    load_E = route(layer_of(name, batch.training), asked).assignment.load_E
    loads = []
    for group, experts in enumerate(CHOOSING[name]):
        own_T = routed(batch) & ((modality_T == group) | (len(CHOOSING[name]) == 1))
        tokens = int(own_T.sum())
        share = math.floor(factor * tokens / experts + 1e-9)
        loads += [min(max(1, share), tokens)] * experts
    assert sorted(load_E.tolist()) == sorted(loads)


def rows_stay_within_capacity(name: str, batch: Batch) -> None:
    rows = route(layer_of(name, batch.training), batch).assignment
    sequence_T, config = batch.info.sequence_T, ROUTERS[name]
    assert sequence_T is not None
    for sequence in range(int(sequence_T.max()) + 1):
        length = int((routed(batch) & (sequence_T == sequence)).sum())
        capacity = math.ceil(config["capacity_factor"] * length * config["k"] / E - 1e-9)
        here_A = sequence_T[rows.token_A] == sequence
        load_E = torch.bincount(rows.expert_A[here_A], minlength=E)
        assert int(load_E.max()) <= capacity


def weights_add_up(name: str, batch: Batch) -> None:
    tokens, config = len(batch.x_TD), layer_of(name).router.config
    assert name in DROPPING or config.weight_sum == NORMALISED.get(name)
    sum_T = dense(route(layer_of(name, batch.training), batch), tokens).sum(1)
    if name in NORMALISED:
        truth_T = routed(batch).double() * NORMALISED[name]
        assert error(sum_T, truth_T) < LIMIT
    elif ROUTERS[name].get("score", "softmax") == "softmax" and "top-1" not in name:
        at_most = E if "modality" in name else 1.0
        assert bool((sum_T <= at_most + LIMIT).all())
    assert not sum_T[~routed(batch)].any()


def permuted_tokens_permute_the_result(name: str, batch: Batch) -> None:
    """In one sequence."""
    order_T = torch.arange(len(batch.x_TD)).flip(0)
    whole = replace(batch.info, sequence_T=None)
    for training in (True, False):
        layer = layer_of(name, training)
        truth = layer(batch.x_TD, whole)
        ours = layer(batch.x_TD[order_T], whole.map(lambda x_T: x_T[order_T]))
        assert error(ours.y, truth.y[order_T]) < LIMIT
        assert torch.equal(ours.stats.load_E, truth.stats.load_E)
        for loss, value in truth.losses.items():
            assert error(ours.losses[loss], value) < LIMIT


def foresight_adds_up(name: str, batch: Batch) -> None:
    """Over all pairs that are open; nothing is told where auxiliary routers choose."""
    assert route(layer_of(name, training=False), batch).foresight == ()
    routing = route(layer_of(name), batch)
    (seen,) = routing.foresight
    pairs, right, chosen, cross_entropy = seen.tolist()
    sizes = torch.tensor((CHOOSING[name] * 2)[:2])  # by modality
    assert batch.info.modality_T is not None
    assert pairs == int(sizes[batch.info.modality_T[routed(batch)]].sum())
    assert chosen == int(routing.assignment.load_E.sum()) and 0 <= right <= pairs
    loss = float(routing.losses["auxiliary"].detach())
    assert loss * pairs == pytest.approx(cross_entropy)


def tokens_without_an_expert_give_exact_zeros(name: str, batch: Batch) -> None:
    layer = layer_of(name, batch.training)
    x_TD = batch.x_TD.clone().requires_grad_()
    y_TD = layer(x_TD, batch.info).y
    alone_T = torch.ones(len(x_TD), dtype=torch.bool)
    alone_T[route(layer, batch).assignment.token_A] = False
    assert not y_TD[alone_T].any() and bool(y_TD[~alone_T].any(1).all())
    (gradient_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD)
    assert not gradient_TD[alone_T].any() and bool(gradient_TD[~alone_T].any(1).all())


test_rows_are_sorted_and_counted = property_test(rows_are_sorted_and_counted)
test_choices_are_rows_or_dropped = property_test(
    choices_are_rows_or_dropped, [name for name in ROUTERS if name not in CHOOSING]
)
test_experts_that_choose_have_their_share = property_test(
    experts_that_choose_have_their_share, CHOOSING
)
test_rows_stay_within_capacity = property_test(rows_stay_within_capacity, DROPPING)
test_weights_add_up = property_test(weights_add_up)
test_permuted_tokens_permute_the_result = property_test(
    permuted_tokens_permute_the_result,
    # who comes first to a full expert depends on the order
    [name for name in ROUTERS if name != "first come"],
)
test_foresight_adds_up = property_test(
    foresight_adds_up, [name for name in CHOOSING if "foreseen" in name]
)
test_tokens_without_an_expert_give_exact_zeros = property_test(
    tokens_without_an_expert_give_exact_zeros
)


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(batch=batches(most=8))
def test_gradients_equal_finite_differences(name: str, batch: Batch) -> None:
    """Of the layer's output and the router's losses, to the input and every parameter; of auxiliary
    routers' loss to theirs alone, where it ends."""
    layer = layer_of(name)
    leaves = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    own = {n: p for n, p in leaves.items() if ".auxiliary." in n}

    def outputs(x_TD: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(
            layer, dict(zip(leaves, values, strict=True)), (x_TD, batch.info)
        )
        return (out.y, *(loss for key, loss in out.losses.items() if key != "auxiliary"))

    def auxiliary(*values: Tensor) -> Tensor:
        given = (batch.x_TD, batch.info)
        out = torch.func.functional_call(layer, dict(zip(own, values, strict=True)), given)
        return out.losses["auxiliary"]

    inputs = (batch.x_TD.clone().requires_grad_(), *leaves.values())
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    if own:
        assert torch.autograd.gradcheck(auxiliary, tuple(own.values()), fast_mode=True)
