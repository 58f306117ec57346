"""Experts that choose tokens, with and without modalities: by plain loops, and over ranks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.axis import Axes, Axis, expert_parallel
from coterie.moe.layer import MoELayer
from coterie.moe.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from coterie.moe.routers.modality import ModalityConfig, modality_of_experts
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.choosing import (
    Config,
    D,
    E,
    T,
    config_of,
    info_of,
    keys,
    part_of_layer,
    router_of,
    weights_of,
)
from tests.moe.tiny import error, randn, randomise, tiny_layer

SETTINGS: list[dict[str, Any]] = [
    {},
    {"score": "sigmoid", "capacity_factor": 2},
    {"score": "sigmoid", "capacity_factor": 0.3},
    {"kind": "modality", "experts": [1, 3], "noise": False},
    {"kind": "modality", "experts": [2, 2], "score": "softmax", "noise": False},
    {"kind": "modality", "experts": [1, 1, 2], "noise": False, "capacity_factor": 0.9},
]


def _by_loops(
    config: Config, x_TD: Tensor, weight: Tensor, info: TokenInfo
) -> dict[tuple[int, int], float]:
    """(token, expert) → weight, one modality and one expert after the other."""
    assert info.modality_T is not None and info.padding_T is not None
    groups = modality_of_experts(config.experts) if isinstance(config, ModalityConfig) else (0,) * E
    found = {}
    for group in set(groups):
        experts = [e for e in range(E) if groups[e] == group]
        tokens = [
            t
            for t in range(len(x_TD))
            if not info.padding_T[t]
            and (isinstance(config, ExpertChoiceConfig) or int(info.modality_T[t]) == group)
        ]
        scores = {}
        for t in tokens:
            logits = [float(x_TD[t] @ weight[e]) for e in experts]
            total = sum(math.exp(value) for value in logits)
            for e, value in zip(experts, logits, strict=True):
                softmax = config.score == "softmax"
                scores[t, e] = math.exp(value) / total if softmax else 1 / (1 + math.exp(-value))
        take = max(1, math.floor(config.capacity_factor * len(tokens) / len(experts) + 1e-9))
        for e in experts:
            for t in sorted(tokens, key=lambda t: -scores[t, e])[:take]:
                found[t, e] = scores[t, e]
    return found


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_choices_and_weights_equal_plain_loops(given: dict[str, Any], seed: int) -> None:
    config = config_of(given)
    router, x_TD, info = router_of(config, seed), randn(T, D, seed=seed), info_of(seed)
    routing = router(x_TD, info)
    rows = routing.assignment
    pairs = list(zip(rows.expert_A.tolist(), rows.token_A.tolist(), strict=True))
    assert pairs == sorted(pairs)
    truth = _by_loops(config, x_TD, router.weight.detach(), info)
    assert {(t, e) for e, t in pairs} == truth.keys()
    for (e, t), weight in zip(pairs, rows.weight_A.tolist(), strict=True):
        assert weight == pytest.approx(truth[t, e], rel=1e-12)
    assert rows.load_E.tolist() == [sum(e == expert for e, _ in pairs) for expert in range(E)]
    assert routing.losses == {} and not routing.stats.dropped_E.any()


def test_rows_are_those_of_a_dense_layer() -> None:
    """Σ k_e is the number of tokens of the modality, where the experts divide it."""
    router = router_of(config_of({"kind": "modality", "experts": [2, 2], "noise": False}))
    modality_T = torch.tensor([0] * 16 + [1] * 8)
    load_E = router(randn(T, D, seed=1), TokenInfo(modality_T=modality_T)).assignment.load_E
    assert load_E.tolist() == [8, 4, 8, 4]


@given(
    seed=st.integers(0, 99),
    given_=st.sampled_from(SETTINGS),
    tokens=st.integers(0, 12),
)
@settings(max_examples=60, deadline=None)
def test_every_expert_takes_its_share_and_never_padding(
    seed: int, given_: dict[str, Any], tokens: int
) -> None:
    config = config_of(given_)
    router, info = router_of(config, seed), info_of(seed, tokens)
    assert info.padding_T is not None and info.modality_T is not None
    rows = router(randn(tokens, D, seed=seed), info).assignment
    assert not info.padding_T[rows.token_A].any()
    for expert, group in enumerate(router.groups):
        size = router.groups.count(group)
        mine_T = ~info.padding_T
        if isinstance(config, ModalityConfig):
            mine_T = mine_T & (info.modality_T == group)
        available = int(mine_T.sum())
        share = math.floor(config.capacity_factor * available / size + 1e-9)
        assert int(rows.load_E[expert]) == min(max(share, 1), available)


@given(seed=st.integers(0, 99), given_=st.sampled_from(SETTINGS))
@settings(max_examples=25, deadline=None)
def test_permuting_tokens_permutes_the_result(seed: int, given_: dict[str, Any]) -> None:
    layer = tiny_layer(config_of(given_), seed=seed)
    x_TD, info = randn(T, D, seed=seed), info_of(seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    permuted = layer(x_TD[order], info.map(lambda x_T: x_T[order])).y
    assert error(permuted, layer(x_TD, info).y[order]) < 1e-12


@pytest.mark.parametrize("given", SETTINGS[1:5], ids=str)
def test_a_token_that_no_expert_takes_gives_exact_zeros(given: dict[str, Any]) -> None:
    layer = tiny_layer(config_of(given))
    x_TD, info = randn(T, D, seed=2), info_of(2)
    layer.router.register_forward_hook(lambda _m, _i, found: seen.append(found))
    seen: list[Any] = []
    y_TD = layer(x_TD, info).y
    taken_T = torch.zeros(T, dtype=torch.bool)
    taken_T[seen[0].assignment.token_A] = True
    assert (~taken_T).any() and taken_T.any()
    assert not y_TD[~taken_T].any() and bool((y_TD[taken_T] != 0).any(1).all())


def test_images_leave_the_text_alone() -> None:
    """Other image tokens, and the text's result is the same to the last bit."""
    layer = tiny_layer(config_of({"kind": "modality", "experts": [2, 2], "noise": True})).train()
    info = info_of(3)
    assert info.modality_T is not None
    image_T = info.modality_T == 1
    one_TD = randn(T, D, seed=3)
    other_TD = torch.where(image_T[:, None], randn(T, D, seed=4), one_TD)
    one, other = layer(one_TD, info).y, layer(other_TD, info).y
    assert torch.equal(one[~image_T], other[~image_T])
    assert not torch.equal(one[image_T], other[image_T])


def test_selection_sees_the_future_but_a_sigmoid_weight_does_not() -> None:
    router = router_of(config_of({"score": "sigmoid", "capacity_factor": 1}))
    x_TD, info = randn(T, D, seed=5), TokenInfo()
    whole, prefix = (weights_of(router(x, info)) for x in (x_TD, x_TD[: T // 2]))
    assert {pair for pair in whole if pair[0] < T // 2} != prefix.keys()
    for pair in whole.keys() & prefix.keys():
        assert whole[pair] == pytest.approx(prefix[pair], rel=1e-14)


@pytest.mark.parametrize("given", [*SETTINGS, {"kind": "modality", "experts": [2, 2]}], ids=str)
def test_gradients_equal_finite_differences(given: dict[str, Any]) -> None:
    layer = tiny_layer(config_of(given)).train()
    info = info_of(6, tokens=7)
    names = ["router.weight", "experts.w_in_EPFD"]

    def run(x_TD: Tensor, *weights: Tensor) -> Tensor:
        given_weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given_weights, (x_TD, info)).y

    leaves = [randn(7, D, seed=6).requires_grad_()]
    leaves += [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]
    torch.autograd.gradcheck(run, tuple(leaves), fast_mode=True)


@pytest.mark.parametrize("missing", [0, 1, None])
def test_a_modality_without_tokens_stays_in_the_graph(missing: int | None) -> None:
    layer = tiny_layer(config_of({"kind": "modality", "experts": [2, 2]})).train()
    modality_T = torch.full((T,), 1 - (missing or 0))
    padding_T = torch.full((T,), missing is None)
    y_TD = layer(randn(T, D, seed=7), TokenInfo(modality_T=modality_T, padding_T=padding_T)).y
    y_TD.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        for expert, modality in enumerate((0, 1, 0, 1)):
            used = missing is not None and modality != missing
            assert bool(parameter.grad[expert].any()) == used, (name, expert)


def test_equal_tokens_are_told_apart_by_their_place() -> None:
    """Also where rounding has made them differ a little."""
    router = router_of(config_of({"score": "sigmoid"}))
    x_TD = randn(1, D, seed=8).repeat(T, 1)
    for noise in (0.0, 1e-15):
        rows = router(x_TD + noise * randn(T, D, seed=9), TokenInfo()).assignment
        assert rows.token_A.tolist() == list(range(T // E)) * E


def test_scores_that_saturate_or_underflow_still_rank() -> None:
    router = router_of(config_of({"score": "sigmoid"}))
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    x_TD = torch.zeros(T, D, dtype=torch.float64)
    x_TD[:, 0] = 50.0 + torch.arange(T)  # sigmoids of exactly one
    x_TD[:, 1] = -800.0 - torch.arange(T)
    rows = router(x_TD, TokenInfo()).assignment
    assert rows.token_A[rows.expert_A == 0].tolist() == list(range(T - T // E, T))
    assert rows.token_A[rows.expert_A == 1].tolist() == list(range(T // E))


def test_noise_is_that_of_two_gumbels_in_training_alone() -> None:
    count = 20_000
    router = ExpertChoiceConfig(score="sigmoid", noise=True).build(D, E, Axes()).double()
    assert isinstance(router, ExpertChoiceRouter)
    randomise(router)
    x_TD, info = torch.zeros(count, D, dtype=torch.float64), TokenInfo(key_T=keys(count))
    noise = router.train()._logits(x_TD, info).detach()
    gumbel = [
        -(-torch.rand(count * E, generator=torch.Generator().manual_seed(s)).log()).log()
        for s in (0, 1)
    ]
    wanted = (gumbel[0] - gumbel[1]).double()
    points = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)
    quantiles = [x.flatten().quantile(points) for x in (noise, wanted)]
    torch.testing.assert_close(*quantiles, rtol=0.05, atol=0.05)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 3, rel=0.03)
    assert abs(float(torch.corrcoef(noise.t())[0, 1])) < 0.03
    part = router._logits(x_TD[5:9], TokenInfo(key_T=keys(count)[5:9]))
    assert torch.equal(part, noise[5:9])
    assert not router.eval()._logits(x_TD, info).any()
    assert not router.train()._logits(x_TD, TokenInfo()).any()


@given(
    experts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    ranks=st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_modalities_are_spread_over_ranks(experts: list[int], ranks: int) -> None:
    groups = modality_of_experts(tuple(experts))
    assert [groups.count(m) for m in range(len(experts))] == experts
    if len(groups) % ranks:
        return
    each = len(groups) // ranks
    for rank in range(ranks):
        held = groups[rank * each : (rank + 1) * each]
        for modality, count in enumerate(experts):
            if all(n % ranks == 0 for n in experts):
                assert held.count(modality) == count // ranks
            assert abs(held.count(modality) - count / ranks) < len(experts)


def test_mistakes_are_named() -> None:
    x_TD = randn(T, D, seed=1)
    router = router_of(config_of({"kind": "modality", "experts": [2, 2]}))
    with pytest.raises(ValueError, match="needs the modality_T"):
        router(x_TD, TokenInfo())
    with pytest.raises(ValueError, match="modality 2, but there are experts of 2 only"):
        router(x_TD, TokenInfo(modality_T=torch.full((T,), 2)))
    with pytest.raises(ValueError, match=r"\[2, 3\] add up to 5, but experts.count is 4"):
        config_of({"kind": "modality", "experts": [2, 3]}).check(4)
    with pytest.raises(ValueError, match="capacity_factor 5 exceeds the 4 experts"):
        config_of({"capacity_factor": 5}).check(4)
    with pytest.raises(ValueError, match="this router has no k"):
        router(x_TD, TokenInfo(modality_T=torch.zeros(T), k=2))
    with pytest.raises(ValueError, match="noise needs score sigmoid"):
        config_of({"noise": True})


# ---- over ranks


ROWS, LENGTH = 8, 6
OVER_RANKS = [*SETTINGS, {"kind": "modality", "experts": [2, 2], "noise": True}]


def _micro_batch(seed: int) -> tuple[Tensor, TokenInfo]:
    """Tokens of 8 sequences, of which some are the same in several sequences."""
    x_BSD = randn(ROWS, LENGTH, D, seed=seed)
    x_BSD[:, 0] = x_BSD[0, 0]
    info = replace(info_of(seed, ROWS * LENGTH), key_T=keys(ROWS * LENGTH))
    position_BS = torch.arange(LENGTH).expand(ROWS, LENGTH)
    sequence_BS = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH)
    info = replace(info, position_T=position_BS.flatten(), sequence_T=sequence_BS.flatten())
    return x_BSD.view(-1, D), info


def _results(layer: MoELayer, x_TD: Tensor, info: TokenInfo) -> tuple[Tensor, ...]:
    """Output, and the gradients of x, router and experts for a fixed loss."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD, info).y
    y_TD.square().sum().backward()
    grads = [p.grad for p in (layer.router.weight, layer.experts.w_in_EPFD)]
    return (y_TD.detach(), x_TD.grad, *grads)  # type: ignore[return-value]


def _on_rank(rank: int, world: int, part_of: str) -> list[tuple[Tensor, ...]]:
    found = []
    group = dist.group.WORLD
    for number, settings_ in enumerate(OVER_RANKS):
        config = config_of(settings_)
        axes = expert_parallel(group)
        x_TD, info = _micro_batch(number)
        place_BS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
        if part_of == "sequences":
            axes = replace(axes, sequence=Axis("sequence", rank, world, group))
            mine = place_BS[:, torch.arange(LENGTH) % world == world - 1 - rank].flatten()
        else:
            mine = place_BS.chunk(world)[rank].flatten()
        local = info.map(lambda x_T, mine=mine: x_T[mine])
        if part_of == "batch":
            assert local.sequence_T is not None
            local = replace(local, sequence_T=local.sequence_T - local.sequence_T.min())
        found.append((mine, *_results(part_of_layer(config, axes), x_TD[mine], local)))
    return found


@pytest.mark.parametrize(("world", "part_of"), [(2, "batch"), (4, "batch"), (2, "sequences")])
def test_global_scope_is_one_process(world: int, part_of: str) -> None:
    parts = run_ranks(world, _on_rank, world, part_of)
    for number, settings_ in enumerate(OVER_RANKS):
        config = config_of(settings_)
        truth = _results(part_of_layer(config, Axes()), *_micro_batch(number))
        mine = torch.cat([part[number][0] for part in parts])
        for place in (1, 2):  # y and dx
            ours = torch.empty_like(truth[place - 1])
            ours[mine] = torch.cat([part[number][place] for part in parts])
            assert error(ours, truth[place - 1]) < 1e-12, (settings_, place)
        assert error(sum(part[number][3] for part in parts), truth[2]) < 1e-12
        assert error(torch.cat([part[number][4] for part in parts]), truth[3]) < 1e-12


def _own_rank(rank: int, tokens: list[int]) -> Tensor:
    """Each rank for itself, then all together."""
    x_TD = randn(sum(tokens), D, seed=1).split(tokens)[rank]
    layers = (
        part_of_layer(config_of({"scope": scope}), expert_parallel(dist.group.WORLD))
        for scope in ("rank", "global")
    )
    return torch.stack([layer(x_TD).y.detach() for layer in layers])


@pytest.mark.parametrize("tokens", [[9, 5], [0, 7]], ids=str)
def test_scope_rank_is_each_rank_alone_and_ranks_may_differ_in_tokens(tokens: list[int]) -> None:
    own, all_ = torch.cat(run_ranks(2, _own_rank, tokens), 1).unbind()
    layer = part_of_layer(config_of({}), Axes())
    x_TD = randn(sum(tokens), D, seed=1)
    alone = torch.cat([layer(part).y for part in x_TD.split(tokens)])
    assert error(own, alone) < 1e-12
    assert error(all_, layer(x_TD).y) < 1e-12
    assert (error(alone, layer(x_TD).y) > 1e-3) == (0 not in tokens)
