"""Routing by the token's id."""

import pytest
import torch

from coterie.moe.routers.hash import HashConfig, HashRouter
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import error, randn, tiny_layer

D, E = 6, 8


def test_equal_ids_have_equal_experts_wherever_they_are() -> None:
    router = HashRouter(E, HashConfig(k=2))
    token_T = torch.tensor([5, 9, 5, 300, 9, 5])
    rows = router(randn(6, D, seed=0), TokenInfo(token_T=token_T)).assignment
    chosen = [set(rows.expert_A[rows.token_A == t].tolist()) for t in range(6)]
    assert all(len(experts) == 2 for experts in chosen)
    assert chosen[0] == chosen[2] == chosen[5] and chosen[1] == chosen[4]
    assert rows.weight_A.tolist() == [0.5] * 12
    order = torch.tensor([3, 1])
    part = router(randn(2, D, seed=1), TokenInfo(token_T=token_T[order])).assignment
    assert [set(part.expert_A[part.token_A == t].tolist()) for t in (0, 1)] == [
        chosen[3],
        chosen[1],
    ]


@pytest.mark.parametrize("k", [1, 3])
def test_ids_spread_evenly_and_seeds_differ(k: int) -> None:
    info, x_TD = TokenInfo(token_T=torch.arange(20_000)), torch.zeros(20_000, 1)
    assignments = [HashRouter(E, HashConfig(k=k, seed=s))(x_TD, info).assignment for s in (0, 1)]
    for found in assignments:
        share_E = found.load_E / (20_000 * k)
        assert float((share_E * E - 1).abs().max()) < 0.06
    assert not torch.equal(assignments[0].token_A, assignments[1].token_A)


def test_padding_k_and_mistakes() -> None:
    router = HashRouter(E, HashConfig())
    info = TokenInfo(token_T=torch.arange(10), padding_T=torch.arange(10) > 6, k=3)
    routing = router(randn(10, D, seed=2), info)
    assert routing.assignment.token_A.unique().tolist() == list(range(7))
    assert int(routing.stats.tokens) == 7 and int(routing.stats.load_E.sum()) == 21
    assert (
        error(
            routing.stats.entropy,
            torch.tensor(7 * 3.0, dtype=torch.float64)
            .div(3)
            .mul(torch.tensor(3.0, dtype=torch.float64).log()),
        )
        < 1e-12
    )
    with pytest.raises(ValueError, match="needs the token_T"):
        router(randn(10, D, seed=2), TokenInfo())
    with pytest.raises(ValueError, match="k 9 must be from 1 to the number of experts, 8"):
        HashConfig(k=9).check(E)


def test_a_layer_without_router_weights_learns() -> None:
    layer = tiny_layer(HashConfig(k=2)).train()
    x_TD = randn(5, D, seed=3).requires_grad_()
    info = TokenInfo(token_T=torch.tensor([1, 2, 3, 1, 2]))
    torch.autograd.gradcheck(lambda x: layer(x, info).y, (x_TD,), fast_mode=True)
    layer(x_TD, info).y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
