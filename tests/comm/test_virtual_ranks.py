"""The overlapped exchange on virtual ranks: every order of its steps ends, with the same result."""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.exchange.virtual import (
    Flag,
    VirtualExchange,
    VirtualRank,
    Workers,
    execute,
    ready,
)
from coterie.moe.assignment import Assignment, from_choices
from tests.moe.tiny import error, randn

D, F = 5, 3


@dataclass(frozen=True)
class Gelu:
    """Experts x ↦ gelu(x · w_in) · w_out."""

    w_in_EDF: Tensor
    w_out_EFD: Tensor

    def first(self, expert: int, x_PD: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x_PD @ self.w_in_EDF[expert])

    def second(self, expert: int, hidden_PF: Tensor, columns: slice) -> Tensor:
        return hidden_PF @ self.w_out_EFD[expert][:, columns]


def exchange(
    ranks: int, local: int, tokens: list[int], k: int, seed: int, hot: int | None = None,
    keep: float = 1.0, **options: Any,
) -> VirtualExchange:  # fmt: skip
    """Random tokens and choices; ``hot``: an expert that all choose; ``keep``: what is not
    dropped."""
    experts = ranks * local
    found = []
    for rank in range(ranks):
        x_TD = randn(tokens[rank], D, seed=seed + rank)
        score_TE = randn(tokens[rank], experts, seed=seed + 100 + rank)
        if hot is not None:
            score_TE[:, hot] = 9.0
        expert_TK = score_TE.topk(k).indices
        keep_TK = torch.rand(expert_TK.shape, generator=torch.Generator().manual_seed(seed)) < keep
        weight_TK = score_TE.gather(1, expert_TK).sigmoid()
        assignment = from_choices(expert_TK, weight_TK, experts, keep_TK)
        weights = (randn(local, D, F, seed=rank + 7), randn(local, F, D, seed=rank + 8))
        found.append(VirtualRank(x_TD, assignment, Gelu(*weights)))
    return VirtualExchange(found, **options)


def truth(made: VirtualExchange, rank: int) -> Tensor:
    """Row by row."""
    mine = made.ranks[rank]
    rows: Assignment = mine.assignment  # type: ignore[assignment]
    y_TD = torch.zeros_like(mine.x_TD)
    for t, e, w in zip(rows.token_A.tolist(), rows.expert_A.tolist(), rows.weight_A, strict=True):
        holder, expert = divmod(e, rows.load_E.numel() // len(made.ranks))
        experts = made.ranks[holder].experts
        y_TD[t] += w * experts.second(expert, experts.first(expert, mine.x_TD[t]), slice(None))
    return y_TD


def anywhere(seed: int) -> Any:
    return Random(seed).choice


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    ranks, local = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    return {
        "ranks": ranks,
        "local": local,
        "tokens": draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)),
        "k": draw(st.integers(1, min(3, ranks * local))),
        "seed": draw(st.integers(0, 5)),
        "hot": draw(st.none() | st.integers(0, ranks * local - 1)),
        "keep": draw(st.sampled_from([1.0, 0.6, 0.0])),
        "tile": draw(st.sampled_from([1, 2, 7])),
        "slabs": draw(st.integers(1, 4)),
    }


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(0, 1000))
def test_any_order_gives_the_result_of_plain_loops(case: dict[str, Any], seed: int) -> None:
    made = exchange(**case)
    execute(made.workers(), anywhere(seed))
    for rank, y_TD in enumerate(made.y_TD):
        assert error(y_TD, truth(made, rank)) < 1e-12


@pytest.mark.parametrize("slabs", [1, 3])
def test_the_order_changes_no_bit(slabs: int) -> None:
    results = []
    for seed in range(8):
        made = exchange(4, 2, [9, 3, 0, 5], k=3, seed=1, tile=2, slabs=slabs)
        execute(made.workers(), [min, max][seed] if seed < 2 else anywhere(seed))
        results.append(torch.cat(made.y_TD))
    assert all(torch.equal(result, results[0]) for result in results)


def stuck(workers: Workers) -> list[dict[str, int]]:
    """Every reachable state in which somebody has steps left, and nobody can go on."""
    names = list(workers)
    seen, found = set(), []
    todo = [(0,) * len(names)]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        flags: Counter[Flag] = Counter()
        for name, at in zip(names, state, strict=True):
            for step in workers[name][:at]:
                flags.update(dict(step.raises))
        left = [i for i, at in enumerate(state) if at < len(workers[names[i]])]
        free = [i for i in left if ready(workers[names[i]][state[i]], flags)]
        todo += [(*state[:i], state[i] + 1, *state[i + 1 :]) for i in free]
        if left and not free:
            found.append(dict(zip(names, state, strict=True)))
    assert len(seen) > len(names)
    return found


SMALL = {
    "two ranks": {"ranks": 2, "local": 1, "tokens": [2, 1], "k": 2, "seed": 3, "tile": 2},
    "a hot expert": {"ranks": 2, "local": 1, "tokens": [2, 2], "k": 1, "seed": 3, "hot": 0},
    "a rank with nothing": {"ranks": 2, "local": 2, "tokens": [3, 0], "k": 1, "seed": 1},
    "slabs": {"ranks": 2, "local": 1, "tokens": [1, 1], "k": 1, "seed": 2, "slabs": 2},
    "three ranks": {"ranks": 3, "local": 1, "tokens": [1, 1, 1], "k": 1, "seed": 5},
}


@pytest.mark.parametrize("name", SMALL)
def test_no_order_of_arrival_gets_stuck(name: str) -> None:
    """All of them, explored one by one."""
    assert stuck(exchange(**{"tile": 1, **SMALL[name]}).workers()) == []


def test_the_exploration_finds_a_flag_that_nobody_raises() -> None:
    workers = exchange(**{"tile": 1, **SMALL["two ranks"]}).workers()
    name = next(name for name, steps in workers.items() if name.startswith("compute") and steps)
    workers[name][-1] = workers[name][-1]._replace(raises=())
    assert stuck(workers)
    with pytest.raises(RuntimeError, match=r"no worker can go on: put . for .*'done'"):
        execute(workers, min)


def test_a_tile_that_does_not_wait_reads_poison() -> None:
    made = exchange(2, 1, [4, 4], k=1, seed=3, tile=2)
    workers = {
        name: [step._replace(waits=()) if name.startswith("compute") else step for step in steps]
        for name, steps in made.workers().items()
    }
    execute(workers, min)  # "compute" comes before "pull"
    assert torch.cat(made.y_TD).isnan().any()
