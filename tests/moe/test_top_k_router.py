"""The top-k router: its choices and weights, its noise, and tokens that are padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.random import fold_in, key
from coterie.moe.routers.top_k import TopKConfig, TopKRouter
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import error, identity_router, randn, randomise

T, D, E = 24, 6, 8


def _router(**settings: Any) -> TopKRouter:
    router = TopKRouter(D, E, TopKConfig.model_validate(settings)).double()
    randomise(router)
    return router


def _keys(count: int = T) -> Tensor:
    return fold_in(torch.full((count,), key("noise")), torch.arange(count))


def _choose(
    logits: list[float], k: int, groups: int, top_groups: int, score: str
) -> dict[int, float]:
    """Plain loops: the chosen experts and their unscaled, unnormalised scores."""
    raw = torch.tensor(logits, dtype=torch.float64)
    scores = (raw.softmax(0) if score == "softmax" else raw.sigmoid()).tolist()
    size = len(scores) // groups
    best_two = [
        sum(sorted(scores[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(groups)
    ]
    open_groups = sorted(range(groups), key=lambda g: -best_two[g])[:top_groups]
    experts = [e for e in range(len(scores)) if e // size in open_groups]
    return {e: scores[e] for e in sorted(experts, key=lambda e: -scores[e])[:k]}


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_choices_and_weights_equal_plain_loops(
    k: int, renormalise: bool, score: str, groups: tuple[int, int]
) -> None:
    router = _router(
        k=k,
        renormalise=renormalise,
        score=score,
        scale=1.7,
        groups=groups[0],
        top_groups=groups[1],
    )
    x_TD = randn(T, D, seed=1)
    rows = router(x_TD, TokenInfo()).assignment
    found: dict[tuple[int, int], float] = {
        (t, e): w
        for t, e, w in zip(
            rows.token_A.tolist(), rows.expert_A.tolist(), rows.weight_A.tolist(), strict=True
        )
    }
    truth: dict[tuple[int, int], float] = {}
    for t, logits in enumerate((x_TD @ router.weight.t()).tolist()):
        chosen = _choose(logits, k, *groups, score)
        total = sum(chosen.values()) if renormalise else 1.0
        truth |= {(t, e): 1.7 * s / total for e, s in chosen.items()}
    assert found.keys() == truth.keys()
    for place, weight in truth.items():
        assert found[place] == pytest.approx(weight, rel=1e-12)


def test_closed_groups_stay_closed_when_scores_underflow() -> None:
    """Scores of zero in the open group still beat those of closed groups."""
    router = identity_router(TopKConfig(k=3, groups=2, top_groups=1), experts=E).float()
    open_last = torch.tensor([-500.0] * 4 + [0.0, -300.0, -400.0, -500.0])
    logits = torch.stack([open_last, open_last.flip(0)])  # whichever way ties among zeros go
    assert int((logits.softmax(-1) == 0).sum()) == 14
    rows = router(logits, TokenInfo()).assignment
    assert torch.equal(rows.expert_A // 4, 1 - rows.token_A)


def test_no_losses_outside_training_and_none_for_zero_coefficients() -> None:
    x_TD = randn(T, D, seed=2)
    assert _router().eval()(x_TD, TokenInfo()).losses == {}
    assert _router(balance_loss=0, z_loss=0).train()(x_TD, TokenInfo()).losses == {}
    assert set(_router().train()(x_TD, TokenInfo()).losses) == {"balance", "z"}


def test_choices_do_not_change_under_autocast() -> None:
    router = _router(k=3).float()
    x_TD = randn(400, D, seed=3).float()
    plain = router(x_TD, TokenInfo()).assignment
    with torch.autocast("cpu", torch.bfloat16):
        half = router(x_TD, TokenInfo()).assignment
    assert torch.equal(plain.expert_A, half.expert_A)
    assert torch.equal(plain.weight_A, half.weight_A)


def test_jitter_needs_training_keys_and_a_width() -> None:
    x_TD = randn(T, D, seed=4)
    info = TokenInfo(key_T=_keys())
    calm = _router().train()(x_TD, info).assignment.weight_A
    shaken = _router(jitter=0.3)
    assert not torch.equal(shaken.train()(x_TD, info).assignment.weight_A, calm)
    assert torch.equal(shaken.train()(x_TD, TokenInfo()).assignment.weight_A, calm)
    assert torch.equal(shaken.eval()(x_TD, info).assignment.weight_A, calm)


def test_jitter_multiplies_the_input_by_numbers_around_one() -> None:
    count = 4000
    router = identity_router(TopKConfig(jitter=0.25), experts=4).train()
    x_TD = torch.full((count, 4), 2.0, dtype=torch.float64)
    noise = router._logits(x_TD, TokenInfo(key_T=_keys(count))) / 2
    assert 0.75 <= float(noise.min().detach()) < 0.751
    assert 1.249 < float(noise.max().detach()) < 1.25
    assert float(noise.mean().detach()) == pytest.approx(1.0, abs=0.005)
    assert float(noise.var().detach()) == pytest.approx(0.5**2 / 12, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jitter_of_a_token_depends_on_its_key_alone(dtype: torch.dtype) -> None:
    router = _router(jitter=0.5, k=3).train().to(dtype)
    x_TD, key_T = randn(T, D, seed=5).to(dtype), _keys()
    whole = router._logits(x_TD, TokenInfo(key_T=key_T))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    for part in (*order.split(7), torch.tensor([3])):
        alone = router._logits(x_TD[part], TokenInfo(key_T=key_T[part]))
        torch.testing.assert_close(alone, whole[part], rtol=1e-6, atol=1e-6)
    rows = router._logits(x_TD[:1].expand(2, D), TokenInfo(key_T=key_T[:2]))
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_padding_changes_nothing(score: str, capacity: float | None) -> None:
    """Not rows, weights, losses, statistics nor gradients; and padding gets no gradient."""
    router = _router(score=score, capacity_factor=capacity, jitter=0.2).train()
    real = torch.rand(T, generator=torch.Generator().manual_seed(6)) < 0.6
    place_T = real.nonzero().flatten()
    x_TD, key_T = randn(T, D, seed=6), _keys()
    x_TD[~real] *= 100
    x_TD.requires_grad_()

    def weigh(routing: Any) -> Tensor:
        return (routing.assignment.weight_A**2).sum() + sum(routing.losses.values())

    padded = router(x_TD, TokenInfo(padding_T=~real, key_T=key_T))
    dx_TD, dw_padded = torch.autograd.grad(weigh(padded), (x_TD, router.weight))
    compact_x = x_TD[real].detach().requires_grad_()
    compact = router(compact_x, TokenInfo(key_T=key_T[real]))
    dx_compact, dw_compact = torch.autograd.grad(weigh(compact), (compact_x, router.weight))

    assert torch.equal(padded.assignment.token_A, place_T[compact.assignment.token_A])
    assert torch.equal(padded.assignment.expert_A, compact.assignment.expert_A)
    assert error(padded.assignment.weight_A, compact.assignment.weight_A) < 1e-13
    assert padded.losses.keys() == compact.losses.keys()
    for name, loss in compact.losses.items():
        assert error(padded.losses[name], loss) < 1e-13
    assert torch.equal(padded.stats.load_E, compact.stats.load_E)
    assert torch.equal(padded.stats.dropped_E, compact.stats.dropped_E)
    assert int(padded.stats.tokens) == int(compact.stats.tokens) == int(real.sum())
    assert error(padded.stats.entropy, compact.stats.entropy) < 1e-13
    assert not dx_TD[~real].any()
    assert error(dx_TD[real], dx_compact) < 1e-12
    assert error(dw_padded, dw_compact) < 1e-12


def test_all_padding_is_no_rows_and_zero_losses() -> None:
    router = _router().train()
    x_TD = randn(T, D, seed=7)
    routing = router(x_TD, TokenInfo(padding_T=torch.ones(T, dtype=torch.bool)))
    assert routing.assignment.token_A.numel() == 0
    assert int(routing.stats.tokens) == int(routing.stats.load_E.sum()) == 0
    for loss in routing.losses.values():
        assert float(loss.detach()) == 0.0


def test_statistics_count_rows_tokens_and_entropy() -> None:
    uniform = identity_router(TopKConfig(k=2), experts=4)
    stats = uniform(torch.zeros(5, 4, dtype=torch.float64), TokenInfo()).stats
    assert int(stats.load_E.sum()) == 10
    assert int(stats.tokens) == 5
    assert float(stats.entropy) == pytest.approx(5 * torch.tensor(4.0).log().item(), rel=1e-6)
    both = stats + stats
    assert torch.equal(both.load_E, 2 * stats.load_E)
    assert int(both.tokens) == 10
