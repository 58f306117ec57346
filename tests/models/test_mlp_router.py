"""The MLP router with depth averaging: Hugging Face's ZAYA over three layers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.models import Decoder, initialise
from coterie.moe.assignment import Assignment
from coterie.moe.routers.mlp import MLPConfig, MLPRouter
from coterie.moe.tokens import TokenInfo
from tests.models.tiny_decoder import config, tokens
from tests.moe.tiny import error, randn, randomise

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.moe.hugging_face import InDouble, build  # noqa: E402

T, WIDTH, HIDDEN, EXPERTS, LAYERS = 11, 12, 6, 5, 3


def theirs() -> list[nn.Module]:
    from transformers.models.zaya.modeling_zaya import ZayaRouter

    settings = transformers.ZayaConfig(
        hidden_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        router_hidden_size=HIDDEN,
        rms_norm_eps=1e-6,
    )
    routers = [build(lambda c, n=n: ZayaRouter(c, n), settings, seed=n) for n in range(LAYERS)]
    for n, router in enumerate(routers):
        router.balancing_biases = randn(EXPERTS + 1, seed=40 + n) * 0.1 - 0.7
        router.balancing_biases[-1] = -1
        with torch.no_grad():
            for parameter in router.router_mlp.parameters():
                parameter.mul_(5)  # so that tokens differ in their choice
    return routers


def ours(router: Any) -> MLPRouter:
    settings = MLPConfig(hidden=HIDDEN, skip=True, bias_update=0.1)
    module = MLPRouter(WIDTH, EXPERTS, settings).double()
    mlp = router.router_mlp
    pairs = {"down": router.down_proj, "first": mlp.fc1, "second": mlp.fc2, "norm": mlp.norm}
    with torch.no_grad():
        module.weight.copy_(mlp.out_proj.weight)
        for name, layer in pairs.items():
            module.get_submodule(name).load_state_dict(layer.state_dict())
        assert module.depth_R is not None and module.bias is not None
        module.depth_R.copy_(getattr(router, "router_states_scale", torch.ones(HIDDEN)))
        module.bias.copy_(router.balancing_biases[:-1])
    return module


def dense(rows: Assignment) -> Tensor:
    weight_TE = torch.zeros(T, EXPERTS, dtype=rows.weight_A.dtype)
    return weight_TE.index_put((rows.token_A, rows.expert_A), rows.weight_A, accumulate=True)


def test_states_choices_weights_and_gradients_are_zayas() -> None:
    """Over three layers; a token that skips has no row, theirs a weight of zero."""
    xs = [randn(T, WIDTH, seed=number).requires_grad_() for number in range(LAYERS)]
    routers = theirs()
    for x_TD in xs:  # every fourth token likes to skip
        with torch.no_grad():
            x_TD[::4] *= 3
    state, info = None, TokenInfo()
    their_loss, our_loss = torch.zeros((), dtype=torch.float64), torch.zeros(()).double()
    skipped = 0
    for number, (router, x_TD) in enumerate(zip(routers, xs, strict=True)):
        own, dy_TE = ours(router).train(), randn(T, EXPERTS, seed=80 + number)
        with InDouble():
            _, probability_T1, chosen_T1, state = router(x_TD[None], state)
        truth_TE = torch.zeros(T, EXPERTS, dtype=torch.float64)
        truth_TE = truth_TE.scatter(1, chosen_T1, probability_T1)
        alone_TR = own.state(x_TD, TokenInfo())
        info = replace(info, router_state_TR=own.state(x_TD, info))
        assert info.router_state_TR is not None
        assert error(info.router_state_TR, state[0]) < 1e-12
        assert (error(alone_TR, state[0]) > 1e-2) == bool(number)
        routing = own(x_TD, info)
        weight_TE = dense(routing.assignment)
        assert error(weight_TE, truth_TE) < 1e-12
        rows = int((truth_TE > 0).sum())
        assert routing.assignment.token_A.numel() == rows
        load_E = (truth_TE > 0).sum(0)
        assert torch.equal(routing.assignment.load_E, load_E)
        assert torch.equal(routing.stats.load_E, load_E) and not routing.stats.dropped_E.any()
        skipped += T - rows
        their_loss, our_loss = (
            their_loss + (truth_TE * dy_TE).sum(),
            our_loss + ((weight_TE * dy_TE).sum()),
        )
    assert 0 < skipped < LAYERS * T
    mine = torch.autograd.grad(our_loss, xs)
    for gradient, truth in zip(mine, torch.autograd.grad(their_loss, xs), strict=True):
        assert bool(truth.any()) and error(gradient, truth) < 1e-11


@pytest.mark.parametrize("skip", [False, True])
def test_weights_have_a_constant_sum_unless_a_token_may_skip(skip: bool) -> None:
    settings = MLPConfig(
        k=2, hidden=HIDDEN, renormalise=True, scale=2.0, skip=skip, bias_update=0.1
    )
    router, x_TD = MLPRouter(WIDTH, EXPERTS, settings).double(), randn(T, WIDTH, seed=4)
    randomise(router)
    assert router.bias is not None
    with torch.no_grad():
        router.bias.fill_(-1)  # as skipping has: some tokens do
    rows = router(x_TD, TokenInfo(router_state_TR=router.state(x_TD, TokenInfo()))).assignment
    sum_T = dense(rows).sum(1)
    constant = sum_T[0].expand(T)
    assert (error(sum_T, constant) < 1e-12) != skip
    assert settings.weight_sum == (None if skip else pytest.approx(float(constant[0].detach())))


def test_in_single_precision_too() -> None:
    router = theirs()[0].float()
    router.balancing_biases = router.balancing_biases.float()
    own, x_TD = ours(router).float(), randn(T, WIDTH, seed=9).float()
    with torch.no_grad():
        _, probability_T1, chosen_T1, _ = router(x_TD[None])
        rows = own(x_TD, TokenInfo(router_state_TR=own.state(x_TD, TokenInfo()))).assignment
    truth_TE = torch.zeros(T, EXPERTS).scatter(1, chosen_T1, probability_T1)
    assert error(dense(rows), truth_TE) < 1e-6


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def by_loops(router: MLPRouter, x_D: list[float], before_R: list[float]) -> tuple[int, float]:
    """One token, plain numbers: the choice and its probability."""

    def product(layer: nn.Linear, x: list[float]) -> list[float]:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    assert router.depth_R is not None and router.bias is not None
    state = [
        own + scale * old
        for own, scale, old in zip(
            product(router.down, x_D), router.depth_R.tolist(), before_R, strict=True
        )
    ]
    size = math.sqrt(sum(v * v for v in state) / HIDDEN + 1e-6)
    hidden = [v / size * g for v, g in zip(state, router.norm.weight.tolist(), strict=True)]
    for layer in (router.first, router.second):
        hidden = [gelu(v) for v in product(layer, hidden)]
    logits = [
        sum(w * v for w, v in zip(row, hidden, strict=True)) for row in router.weight.tolist()
    ]
    total = sum(math.exp(v) for v in logits)
    scores = [math.exp(v) / total for v in logits]
    ranks = [p + b for p, b in zip(scores, [*router.bias.tolist(), -1.0], strict=True)]
    best = max(range(len(ranks)), key=lambda e: ranks[e])
    return best, scores[best]


def test_a_layer_by_loops() -> None:
    settings = MLPConfig(hidden=HIDDEN, skip=True, bias_update=0.1)
    router = MLPRouter(WIDTH, EXPERTS, settings).double()
    randomise(router, seed=2, std=1.0)
    with torch.no_grad():
        router.bias.copy_(randn(EXPERTS, seed=6) * 0.1 - 0.9)  # type: ignore[union-attr]
    x_TD, before_TR = randn(30, WIDTH, seed=4), randn(30, HIDDEN, seed=5)
    info = TokenInfo(router_state_TR=before_TR)
    rows = router(x_TD, replace(info, router_state_TR=router.state(x_TD, info))).assignment
    found = {
        t: (e, w)
        for t, e, w in zip(
            rows.token_A.tolist(), rows.expert_A.tolist(), rows.weight_A.tolist(), strict=True
        )
    }
    truth = {t: by_loops(router, x_TD[t].tolist(), before_TR[t].tolist()) for t in range(30)}
    assert len({e for e, _ in truth.values()} | {EXPERTS}) > 2 and len(found) not in (0, 30)
    assert found.keys() == {t for t, (e, _) in truth.items() if e != EXPERTS}
    for t, (e, weight) in found.items():
        assert e == truth[t][0] and weight == pytest.approx(truth[t][1], rel=1e-12)


def test_the_bias_is_of_experts_and_follows_their_load() -> None:
    settings = MLPConfig(hidden=HIDDEN, skip=True, bias_update=0.25)
    router = MLPRouter(WIDTH, 4, settings)
    assert router.bias is not None and router.bias.shape == (4,)
    assert router.updates(torch.tensor([9, 1, 5, 5]))["bias"].tolist() == [-0.25, 0.25, 0, 0]


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"skip is a choice beside all.*groups must be 1, not 2"):
        MLPConfig(skip=True, groups=2)
    with pytest.raises(ValueError, match="skip needs bias_update"):
        MLPConfig(skip=True)
    some: dict[str, Any] = {"layers": 4, "mixture_of_depths": {}}
    with pytest.raises(ValueError, match=r"mixture_of_depths needs moe\.router\.depth_average"):
        config(**some, moe=MOE)
    config(**some, moe={**MOE, "router": {**ROUTER, "depth_average": False}})


ROUTER: dict[str, Any] = {"kind": "mlp", "k": 1, "hidden": HIDDEN, "renormalise": False}
MOE: dict[str, Any] = {"experts": {"count": 4, "hidden": 6}, "router": ROUTER}


def test_no_sequences_at_all() -> None:
    """As for a rank without prompts, while others have some."""
    model = Decoder(config(layers=4, dense_layers=[0, 2], moe=MOE))
    initialise(model, 0)
    assert model(tokens(3, 8)[:0]).x.shape[:2] == (0, 8)


@pytest.mark.parametrize("depth_average", [True, False])
def test_a_router_hears_the_mixture_before_it_across_a_dense_layer(depth_average: bool) -> None:
    router = {**ROUTER, "depth_average": depth_average}
    model = Decoder(config(layers=4, dense_layers=[0, 2], moe={**MOE, "router": router})).double()
    initialise(model, 0)
    out = model(tokens(3, 8))
    first = model.blocks["1"].moe.router.down.weight
    states = [model.blocks[n].moe.router for n in ("1", "3")]
    (gradient,) = torch.autograd.grad(out.x.square().mean(), first, retain_graph=True)
    assert gradient.any()
    if depth_average:
        for router_, heard in zip(states, (False, True), strict=True):
            loss = out.x.square().mean()
            (own,) = torch.autograd.grad(
                loss, router_.depth_R, retain_graph=True, allow_unused=True
            )
            assert (own is not None and bool(own.any())) == heard
