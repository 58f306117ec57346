"""What a layer counts by modality, against plain loops, and without waiting for a device."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.moe.assignment import from_choices
from coterie.moe.layer import MoELayer
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.stats import LayerStats, layer_stats, routing_stats
from coterie.moe.tokens import TokenInfo
from tests.moe.tiny import randn, tiny_layer

E, M = 4, 3


def info_of(modality: list[int], padding: list[bool] | None = None, m: int = M) -> TokenInfo:
    padding_T = None if padding is None else torch.tensor(padding, dtype=torch.bool)
    return TokenInfo(
        modality_T=torch.tensor(modality, dtype=torch.int64), modalities=m, padding_T=padding_T
    )


def counted(choices: list[set[int]], info: TokenInfo) -> LayerStats:
    """Of tokens that go to these experts, each to at most three."""
    tokens = len(choices)
    experts = [[*sorted(c), 0, 0, 0][:3] for c in choices]
    expert_TK = torch.tensor(experts, dtype=torch.int64).view(tokens, 3)
    kept = [[place < len(c) for place in range(3)] for c in choices]
    keep_TK = torch.tensor(kept, dtype=torch.bool).view(tokens, 3)
    assignment = from_choices(expert_TK, torch.ones(tokens, 3), E, keep_TK)
    stats = routing_stats(assignment, torch.full((tokens, E), 1 / E), info.padding_T)
    return layer_stats(stats, assignment, info, tokens)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[list[set[int]], list[int], list[bool]]:
    """Experts of each token (none of padding), modality, padding."""
    number = draw(st.integers(0, 12))
    padding = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    experts = st.sets(st.integers(0, E - 1), max_size=3)
    choices = [set() if pad else draw(experts) for pad in padding]
    ids = [draw(st.integers(-5, 9)) if pad else draw(st.integers(0, M - 1)) for pad in padding]
    return choices, ids, padding


@settings(max_examples=60, deadline=None)
@given(tokens())
def test_counts_are_those_of_a_loop(drawn: tuple[list[set[int]], list[int], list[bool]]) -> None:
    choices, modality, padding = drawn
    rows = [[0] * E for _ in range(M)]
    seen, unrouted = [0] * M, [0] * M
    for experts, kind, pad in zip(choices, modality, padding, strict=True):
        if pad:
            continue
        seen[kind] += 1
        unrouted[kind] += not experts
        for expert in experts:
            rows[kind][expert] += 1
    stats = counted(choices, info_of(modality, padding))
    assert stats.load_ME.tolist() == rows
    assert stats.tokens_M.tolist() == seen and stats.unrouted_M.tolist() == unrouted
    together = counted(choices, info_of(modality, padding, m=1))
    assert together.load_ME.tolist() == [stats.load_E.tolist()]
    assert together.tokens_M.tolist() == [sum(seen)] == [int(together.tokens)]
    assert together.unrouted_M.tolist() == [sum(unrouted)]
    if not any(padding):
        plain = counted(choices, info_of(modality))
        for name, value in vars(plain).items():
            assert value is None or torch.equal(value, vars(stats)[name]), name


def test_stats_add() -> None:
    a = counted([{0, 1}, set()], info_of([0, 2]))
    total = a + counted([{3}], info_of([1]))
    assert isinstance(total, LayerStats)
    assert total.load_ME.tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert total.tokens_M.tolist() == [1, 1, 1] and total.unrouted_M.tolist() == [0, 0, 1]
    assert int(total.tokens) == 3


@pytest.mark.parametrize("wrong", [-1, M, M + 1])
@pytest.mark.parametrize("choices", [set(), {1}, {3}])
def test_an_unknown_modality_is_no_silent_miscount(wrong: int, choices: set[int]) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of"):
        counted([choices, {0}], info_of([wrong, 0]))


def test_modalities_without_ids_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="counting 3 modalities needs the modality_T"):
        counted([{0}], TokenInfo(modalities=3))


class Waits(TorchDispatchMode):
    """Fails where the host would have to wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "bincount",
            "unique",
            "_to_copy",
        )
        name = func.overloadpacket.__name__
        assert name not in waiting and not name.startswith("item"), f"{name} waits"
        assert not (name == "index" and any(_is_mask(i) for i in args[1])), "a mask waits"
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool


def test_counting_does_not_wait_for_the_device() -> None:
    info = info_of([0, 2, 1, 1], [False, False, True, False])
    expert_TK = torch.tensor([[1], [0], [2], [3]])
    keep_TK = torch.tensor([[True], [True], [False], [False]])
    assignment = from_choices(expert_TK, torch.ones(4, 1), E, keep_TK)
    stats = routing_stats(assignment, torch.full((4, E), 1 / E), info.padding_T)
    with Waits():
        found = layer_stats(stats, assignment, info, 4)
    assert found.unrouted_M.tolist() == [0, 1, 0]
    with pytest.raises(AssertionError, match="waits"), Waits():
        int(stats.tokens)


def test_the_layer_counts_for_its_router() -> None:
    layer: MoELayer = tiny_layer(TopKConfig(k=2, capacity_factor=0.5), experts=E)
    info = info_of([0, 1, 1, 0, 1, 2, 2, 0], [False] * 7 + [True])
    stats = layer(randn(8, 6, seed=1), info).stats
    assert torch.equal(stats.load_ME.sum(0), stats.load_E)
    assert stats.tokens_M.tolist() == [2, 3, 2] and int(stats.unrouted_M.sum()) > 0
    assert int((stats.load_E + stats.dropped_E).sum()) == 14
    assert stats.load_ME.requires_grad is False
