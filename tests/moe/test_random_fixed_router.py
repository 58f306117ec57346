"""SMoE-Dropout's router: its schedule, its choices, its gradient, and any number of experts."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.moe.routers.random_fixed import RandomFixedConfig, RandomFixedRouter
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import error, randn, randomise, tiny_layer

T, D, E = 24, 6, 8


def _router(**given: Any) -> RandomFixedRouter:
    router = RandomFixedRouter(D, E, RandomFixedConfig.model_validate(given)).double()
    randomise(router)
    return router


def test_the_linear_schedule_is_that_of_the_authors() -> None:
    """8 to 16 over 400,000 steps: the steps after which k changes, as their code has them."""
    config = RandomFixedConfig(first_k=8, k=16)
    for number, change in enumerate(range(25_000, 400_000, 50_000)):
        after = 8 + number + 1
        # halves go to the even neighbour: up from 9.5, down from 8.5
        first = change if after % 2 == 0 else change + 1
        assert [config.k_at(step, 400_000) for step in (first - 1, first)] == [after - 1, after]
    assert config.k_at(25_000, 400_000) == 8 and config.k_at(25_001, 400_000) == 9
    assert config.k_at(75_000, 400_000) == 10 and config.k_at(375_000, 400_000) == 16


@given(
    first=st.integers(1, 16),
    more=st.integers(0, 16),
    steps=st.integers(1, 2000),
    schedule=st.sampled_from(["constant", "linear", "cosine", "exponential", "multi_step"]),
)
@settings(max_examples=60, deadline=None)
def test_k_only_grows_from_the_first_to_the_last(
    first: int, more: int, steps: int, schedule: Any
) -> None:
    config = RandomFixedConfig(first_k=first, k=first + more, schedule=schedule)
    ks = [config.k_at(step, steps) for step in range(steps + 1)]
    assert ks == sorted(ks) and first <= ks[0] and ks[-1] <= first + more
    assert ks[0] == (first + more if schedule == "constant" else first)
    if schedule in ("linear", "cosine", "multi_step"):
        assert ks[steps] == first + more


def test_other_schedules_at_points_worked_out_by_hand() -> None:
    cosine = RandomFixedConfig(first_k=1, k=16, schedule="cosine")
    assert [cosine.k_at(t, 300) for t in (0, 150, 250, 300)] == [1, 5, 12, 16]
    slow = RandomFixedConfig(first_k=1, k=16, schedule="exponential")
    assert slow.k_at(3 * 69, 900) == 16 - round(15 * 0.99**69) == 9
    assert slow.k_at(150, 200) == 16 - round(15 * 0.99**150)  # fewer than 300 steps
    doubling = RandomFixedConfig(first_k=1, k=16, schedule="multi_step")
    assert [doubling.k_at(t, 100) for t in range(0, 100, 10)] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    assert doubling.k_at(19, 100) == 1 and doubling.k_at(20, 100) == 2


@pytest.mark.parametrize("k", [1, 3, 8])
def test_choices_and_weights_equal_plain_loops(k: int) -> None:
    router, x_TD = _router(k=5, scale=1.7), randn(T, D, seed=1)
    rows = router(x_TD, TokenInfo(k=k)).assignment
    truth = torch.zeros(T, E, dtype=torch.float64)
    for t, logits in enumerate((x_TD @ router.weight.t()).tolist()):
        chosen = sorted(range(E), key=lambda e: -logits[e])[:k]
        total = sum(math.exp(logits[e]) for e in chosen)
        for e in chosen:
            truth[t, e] = 1.7 * math.exp(logits[e]) / total
    found = torch.zeros_like(truth)
    found[rows.token_A, rows.expert_A] = rows.weight_A
    assert rows.token_A.numel() == T * k
    assert error(found, truth) < 1e-13
    assert error(found.sum(1), torch.full((T,), 1.7, dtype=torch.float64)) < 1e-13


def test_without_a_given_k_it_is_the_last_one() -> None:
    router, x_TD = _router(first_k=1, k=5), randn(T, D, seed=2)
    assert router(x_TD, TokenInfo()).assignment.token_A.numel() == 5 * T


def test_a_k_that_cannot_be_is_refused() -> None:
    router, x_TD = _router(), randn(T, D, seed=2)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k {k} must be from 1 to the number of experts, 8"):
            router(x_TD, TokenInfo(k=k))


def test_the_gradient_goes_through_the_weights_to_the_input_alone() -> None:
    layer = tiny_layer(RandomFixedConfig(k=2))
    x_TD = randn(5, 6, seed=3).requires_grad_()
    torch.autograd.gradcheck(lambda x: layer(x).y, (x_TD,), fast_mode=True)

    layer(x_TD).y.sum().backward()
    assert layer.router.get_parameter("weight").grad is None
    frozen: list[Tensor] = []
    right = x_TD.grad
    x_TD.grad = None
    layer.router.register_forward_hook(
        lambda _m, _i, routing: routing._replace(
            assignment=type(routing.assignment)(
                **{**vars(routing.assignment), "weight_A": routing.assignment.weight_A.detach()}
            )
        )
    )
    layer(x_TD).y.sum().backward()
    frozen.append(x_TD.grad)
    assert error(frozen[0], right) > 1e-3  # what a router under no_grad would give


def test_at_initial_weights_all_experts_weigh_about_the_same() -> None:
    """Logits with a standard deviation of .02 √D: the output is nearly a mean."""
    router = RandomFixedRouter(64, E, RandomFixedConfig(k=E)).double()
    randomise(router, std=0.02)
    weights = router(randn(200, 64, seed=4), TokenInfo()).assignment.weight_A
    assert float((weights * E - 1).abs().mean()) < 0.2


@given(seed=st.integers(0, 99), k=st.integers(1, E))
@settings(max_examples=20, deadline=None)
def test_permuting_tokens_permutes_the_result(seed: int, k: int) -> None:
    layer = tiny_layer(RandomFixedConfig(k=1), experts=E)
    x_TD = randn(T, D, seed=seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    whole = layer(x_TD, TokenInfo(k=k)).y
    assert error(layer(x_TD[order], TokenInfo(k=k)).y, whole[order]) < 1e-12


def test_padding_has_no_rows_and_is_not_counted() -> None:
    router, x_TD = _router(k=3), randn(T, D, seed=5)
    padding_T = torch.rand(T, generator=torch.Generator().manual_seed(6)) < 0.4
    padded = router(x_TD, TokenInfo(padding_T=padding_T))
    compact = router(x_TD[~padding_T], TokenInfo())
    place_T = (~padding_T).nonzero().flatten()
    assert torch.equal(padded.assignment.token_A, place_T[compact.assignment.token_A])
    assert torch.equal(padded.assignment.expert_A, compact.assignment.expert_A)
    assert torch.equal(padded.stats.load_E, compact.stats.load_E)
    assert int(padded.stats.tokens) == int(compact.stats.tokens) == len(place_T)
    assert error(padded.stats.entropy, compact.stats.entropy) < 1e-12
    assert padded.losses == {}
