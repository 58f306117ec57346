"""Sinkhorn routing against Megatron's function, and over ranks."""

from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.moe.routers.sinkhorn import SinkhornConfig, SinkhornRouter, log_factors
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.tiny import error, randn, tiny_layer

T, E = 96, 8
ALONE = Axis("data")


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    return pytest.importorskip(
        "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed"
    )


def _router(k: int, data: Axis = ALONE) -> SinkhornRouter:
    """Its logits are its input."""
    router = SinkhornRouter(E, E, SinkhornConfig(k=k), data).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    return router.train()


def _logits(seed: int, tokens: int = T) -> Tensor:
    """Some experts are much liked."""
    return randn(tokens, E, seed=seed) + torch.linspace(0, 3, E, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2])
def test_choices_are_those_of_megatron(k: int, megatron: ModuleType) -> None:
    logits_TE = _logits(k)
    truth_TE = megatron.sinkhorn(logits_TE)
    routing = _router(k)(logits_TE, TokenInfo())
    rows = routing.assignment
    chosen_TE = torch.zeros(T, E, dtype=torch.bool)
    chosen_TE[rows.token_A, rows.expert_A] = True
    wanted_TE = torch.zeros_like(chosen_TE).scatter_(1, truth_TE.topk(k, dim=1).indices, True)
    assert torch.equal(chosen_TE, wanted_TE)
    assert not torch.equal(
        wanted_TE, torch.zeros_like(chosen_TE).scatter_(1, logits_TE.topk(k, dim=1).indices, True)
    )
    score_TE = logits_TE.sigmoid() if k == 1 else logits_TE.softmax(-1)
    assert error(rows.weight_A, score_TE[rows.token_A, rows.expert_A]) < 1e-14
    assert routing.losses == {}


def test_the_scaled_matrix_is_balanced(megatron: ModuleType) -> None:
    logits_TE = _logits(3)
    ours_TE = (logits_TE + log_factors(logits_TE, None, ALONE)).softmax(-1) / T
    assert error(ours_TE, megatron.sinkhorn(logits_TE)) < 1e-3
    assert error(ours_TE.sum(0), torch.full((E,), 1 / E, dtype=torch.float64)) < 1e-3


def test_in_evaluation_it_is_plain_top_k() -> None:
    logits_TE = _logits(4)
    rows = _router(1).eval()(logits_TE, TokenInfo()).assignment
    chosen_T = torch.empty(T, dtype=torch.int64)
    chosen_T[rows.token_A] = rows.expert_A
    assert torch.equal(chosen_T, logits_TE.argmax(-1))


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_large_logits_neither_overflow_nor_underflow(shift: float) -> None:
    logits_TE = _logits(5)
    factor_E = log_factors(logits_TE + shift, None, ALONE)
    assert bool(factor_E.isfinite().all())
    assert error(factor_E, log_factors(logits_TE, None, ALONE)) < 1e-9
    assert bool(log_factors(logits_TE.float() * 300, None, ALONE).isfinite().all())


def test_padding_is_not_balanced() -> None:
    logits_TE = _logits(6)
    padding_T = torch.rand(T, generator=torch.Generator().manual_seed(6)) < 0.3
    logits_TE[padding_T] *= 50
    padded = _router(2)(logits_TE, TokenInfo(padding_T=padding_T))
    compact = _router(2)(logits_TE[~padding_T], TokenInfo())
    place_T = (~padding_T).nonzero().flatten()
    assert torch.equal(padded.assignment.token_A, place_T[compact.assignment.token_A])
    assert torch.equal(padded.assignment.expert_A, compact.assignment.expert_A)
    empty = _router(2)(logits_TE, TokenInfo(padding_T=torch.ones_like(padding_T)))
    assert empty.assignment.token_A.numel() == 0


def test_gradients_equal_finite_differences() -> None:
    layer = tiny_layer(SinkhornConfig(k=2)).train()
    x_TD = randn(6, 6, seed=7).requires_grad_()
    torch.autograd.gradcheck(lambda x: layer(x).y, (x_TD,), fast_mode=True)


def _on_rank(rank: int, world: int) -> tuple[Tensor, ...]:
    router = _router(2, Axis("data", rank, world, dist.group.WORLD))
    logits_TE = _logits(8).split([T - 20 * (world - 1)] + [20] * (world - 1))[rank]
    rows = router(logits_TE, TokenInfo()).assignment
    return rows.load_E, rows.token_A, rows.expert_A


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_balance_together(world: int) -> None:
    found = run_ranks(world, _on_rank, world)
    truth = _router(2)(_logits(8), TokenInfo()).assignment
    pairs = set(zip(truth.token_A.tolist(), truth.expert_A.tolist(), strict=True))
    first, ours = 0, set()
    for rank, (_, token_A, expert_A) in enumerate(found):
        ours |= set(zip((token_A + first).tolist(), expert_A.tolist(), strict=True))
        first += T - 20 * (world - 1) if rank == 0 else 20
    assert ours == pairs
    assert torch.equal(sum(load_E for load_E, _, _ in found), truth.load_E)
