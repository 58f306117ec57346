"""Hot experts in rounds: the numbers of one round in float64, and the memory of balanced rows."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from coterie.comm.axis import Axis
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.moe.assignment import from_choices
from coterie.moe.experts import Experts, ExpertsConfig
from tests.distributed import run_ranks
from tests.moe.tiny import error, randn, randomise

D, K = 6, 2
LIMIT = 1e-12
CASES: dict[str, tuple[float, list[int]]] = {
    # skew (the busiest rank's rows over the mean; at most the world's size), tokens by rank
    "balanced": (1, [8] * 8),
    "skew 2": (2, [8] * 8),
    "skew 8": (8, [8] * 8),
    "uneven tokens": (1.7, [9, 0, 5, 16, 0, 1, 7, 2]),
    "tokens on one rank": (8, [24, 0, 0, 0, 0, 0, 0, 0]),
    "no tokens": (8, [0] * 8),
}
WAYS: dict[str, tuple[float | None, bool]] = {
    # factor, a checkpoint around the whole
    "one round": (None, False),
    "rounds": (1.0, False),
    "wide rounds": (1.3, False),
    "rounds under a checkpoint": (1.0, True),
}


class Recorder:
    """Experts that note how many rows each call had."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.rows: list[int] = []

    def __call__(self, x_AD: Tensor, load_E: Tensor) -> Tensor:
        self.rows.append(int(load_E.sum()))
        return self.experts(x_AD, load_E)


def chosen(tokens: int, skew: float, world: int, local: int) -> Tensor:
    """expert_TK; of the rows skew / world, as exactly as can be, go to the last rank."""
    rows = tokens * K
    hot = round(rows * min(skew / world, 1.0))
    others = torch.arange(rows - hot) % max(world - 1, 1)
    rank_A = torch.cat([others, torch.full((hot,), world - 1)])
    expert_A = rank_A * local + torch.arange(rows) % local
    return expert_A[torch.randperm(rows, generator=torch.Generator().manual_seed(rows))].view(-1, K)


def step(
    rank: int, world: int, case: str, exchange: AllToAllExchange, outer: bool
) -> tuple[dict[str, Tensor], list[int]]:
    """Outputs and gradients of one pass, and the rows of each call of the experts."""
    skew, tokens = CASES[case]
    local = 2
    experts = Experts(
        D, ExpertsConfig(count=world * local, hidden=5), Axis("ep", rank, world)
    ).double()
    randomise(experts, seed=rank)
    recorder = Recorder(experts)
    router = randn(D, K, seed=7).requires_grad_()
    x_TD = randn(tokens[rank], D, seed=rank).requires_grad_()
    expert_TK = chosen(tokens[rank], skew, world, local)

    def run(x_TD: Tensor) -> Tensor:
        weight_TK = (x_TD @ router).softmax(1)
        return exchange(x_TD, from_choices(expert_TK, weight_TK, world * local), recorder)

    y_TD = checkpoint(run, x_TD, use_reentrant=False) if outer else run(x_TD)
    y_TD.backward(randn(tokens[rank], D, seed=100 + rank))
    result = {"y": y_TD.detach()}
    leaves = {"x": x_TD, "router": router, **dict(experts.named_parameters())}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        result[f"d {name}"] = leaf.grad
    return result, recorder.rows


def on_rank(rank: int, world: int) -> dict[tuple[str, str], tuple[dict[str, Tensor], list[int]]]:
    group = dist.group.WORLD
    assert group is not None
    return {
        (case, way): step(rank, world, case, AllToAllExchange(group, factor), outer)
        for case in CASES
        for way, (factor, outer) in WAYS.items()
    }


@cache
def on_ranks(world: int) -> list[dict[tuple[str, str], tuple[dict[str, Tensor], list[int]]]]:
    return run_ranks(world, on_rank, world)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "one round"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_rounds_equal_one_round(world: int, way: str, case: str) -> None:
    for rank, results in enumerate(on_ranks(world)):
        (ours, _), (truth, _) = results[case, way], results[case, "one round"]
        for key, true in truth.items():
            assert error(ours[key], true) <= LIMIT, (rank, key)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_no_rank_computes_more_rows_at_once_than_the_bound(world: int, way: str, case: str) -> None:
    factor, outer = WAYS[way]
    received = [results[case, "one round"][1][0] for results in on_ranks(world)]
    mean = sum(received) / world
    at_once = math.inf if factor is None else math.ceil(factor * mean)
    several = max(received) > at_once
    limit = math.ceil(mean) if several else at_once
    count = math.ceil(max(received) / limit) if several else 1
    for whole, results in zip(received, on_ranks(world), strict=True):
        rows = results[case, way][1]
        assert max(rows) <= limit + 2 * world
        assert sum(rows[:count]) == whole
        # all but the last run again; a checkpoint around it all repeats everything before that
        assert len(rows) == count + (count - 1) + (count if outer else 0)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_cases_are_what_their_names_say(world: int) -> None:
    def skew(case: str) -> float:
        received = [results[case, "one round"][1][0] for results in on_ranks(world)]
        return max(received) * world / sum(received)

    assert skew("balanced") == 1
    assert skew("skew 2") == pytest.approx(2)
    assert skew("skew 8") == skew("tokens on one rank") == world
    rounds = [results["skew 8", "rounds"][1] for results in on_ranks(world)]
    assert [max(rows) == 0 for rows in rounds] == [True] * (world - 1) + [False]


def peaks(rank: int, world: int, layers: int, recompute: bool) -> dict[tuple[float, Any], int]:
    """Peak bytes of a stack of layers, by skew and factor."""
    group = dist.group.WORLD
    assert group is not None
    width, tokens = 64, 512
    config = ExpertsConfig(count=world, hidden=128)
    stack = [
        Experts(width, config, Axis("ep", rank, world), recompute=recompute) for _ in range(layers)
    ]
    for experts in stack:
        randomise(experts)

    def passes(skew: float, factor: float | None) -> Callable[[], None]:
        exchange = AllToAllExchange(group, factor)
        weight_TK = torch.rand(tokens, K, requires_grad=True)
        rows = from_choices(chosen(tokens, skew, world, 1), weight_TK, world)
        x_TD = torch.randn(tokens, width, requires_grad=True)

        def run() -> None:
            y_TD = x_TD
            for experts in stack:
                y_TD = y_TD + exchange(y_TD, rows, experts)
            y_TD.sum().backward()

        for experts in stack:
            experts.zero_grad(set_to_none=True)
        return run

    return {
        # the least of a few: gloo's threads may let go late of what they sent
        (skew, factor): min(peak_bytes(passes(skew, factor)) for _ in range(3))
        for skew in (1.0, 2.0, float(world))
        for factor in (None, 1.0, 1.5)
    }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_peak_does_not_grow_with_skew(layers: int, recompute: bool) -> None:
    world = 4
    ranks = run_ranks(world, peaks, world, layers, recompute)
    highest = {case: max(peak[case] for peak in ranks) for case in ranks[0]}
    balanced = highest[1.0, None]
    assert highest[1.0, 1.0] == balanced  # one round: nothing else is done
    assert highest[4.0, None] > 2 * balanced
    for skew in (2.0, 4.0):
        assert highest[skew, 1.0] < 1.15 * balanced
        assert highest[skew, 1.5] < 1.15 * balanced  # beyond the factor rounds are of the mean
