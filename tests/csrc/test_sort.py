"""Counts and stable sort by expert: the twin against loops, the CUDA kernels against the twin."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.csrc import loader, sort_by_expert, twins
from tests.csrc.compile_on_host import (
    CSRC,
    check_under_sanitizers,
    in_new_process,
    load,
    mutated,
    standing_in,
)

SOURCE = CSRC / "sort.cu"
TILE = 2048  # items of a block


@pytest.fixture(scope="module")
def ops() -> Any:
    return load(SOURCE)


def loop_sort(expert: list[int], experts: int, keep: list[bool]) -> tuple[list[int], list[int]]:
    places = range(len(expert))
    order = [a for e in range(experts) for a in places if expert[a] == e and keep[a]]
    load = [sum(expert[a] == e and keep[a] for a in places) for e in range(experts)]
    return order + [a for a in places if not keep[a]], load


def example(count: int, experts: int, skew: str, seed: int) -> tuple[Tensor, Tensor]:
    """Expert ids and what is kept of them: even, one hot expert, or most experts empty."""
    g = torch.Generator().manual_seed(seed)
    expert_A = torch.randint(experts, (count,), generator=g)
    if skew == "hot":
        expert_A[torch.rand(count, generator=g) < 0.9] = experts // 2
    if skew == "empty":
        expert_A = expert_A % 3 * (experts // 3)
    return expert_A, torch.rand(count, generator=g) < 0.7


ANY = {
    "count": st.sampled_from([0, 1, 31, 32, 33, 255, 257, 700]),
    "experts": st.sampled_from([1, 2, 8, 31, 33, 256, 1024]),
    "skew": st.sampled_from(["even", "hot", "empty"]),
    "seed": st.integers(0, 999),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**ANY)
def test_the_twin_equals_loops(count: int, experts: int, skew: str, seed: int) -> None:
    expert_A, keep_A = example(min(count, 60), experts, skew, seed)
    for keep in (None, keep_A):
        order_A, load_E = sort_by_expert(expert_A, experts, keep)
        kept = [True] * len(expert_A) if keep is None else keep.tolist()
        assert (order_A.tolist(), load_E.tolist()) == loop_sort(expert_A.tolist(), experts, kept)


def check_kernel(ops: Any, expert_A: Tensor, experts: int, keep_A: Tensor) -> None:
    for keep in (None, keep_A, torch.zeros_like(keep_A)):
        order_A, load_E = ops.sort_by_expert(expert_A, experts, keep)
        expected = twins.sort_by_expert_reference(expert_A, experts, keep)
        assert torch.equal(order_A, expected[0]) and torch.equal(load_E, expected[1])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(**ANY)
def test_kernel_equals_the_twin_for_any_shape(
    ops: Any, count: int, experts: int, skew: str, seed: int
) -> None:
    expert_A, keep_A = example(count, experts, skew, seed)
    check_kernel(ops, expert_A, experts, keep_A)


@pytest.mark.parametrize("count", [TILE - 1, TILE, TILE + 1, 3 * TILE + 77])
@pytest.mark.parametrize("skew", ["even", "hot"])
def test_kernel_equals_the_twin_over_several_blocks(ops: Any, count: int, skew: str) -> None:
    expert_A, keep_A = example(count, 40, skew, count)
    check_kernel(ops, expert_A, 40, keep_A)


def test_kernel_equals_the_twin_over_more_blocks_than_lanes(ops: Any) -> None:
    expert_A, keep_A = example(34 * TILE + 5, 8, "even", 5)
    order_A, load_E = ops.sort_by_expert(expert_A, 8, keep_A)
    expected = twins.sort_by_expert_reference(expert_A, 8, keep_A)
    assert torch.equal(order_A, expected[0]) and torch.equal(load_E, expected[1])


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [(0, 0), (0, 5), (1, 1), (300, 7), (999, 1024), (2500, 1025), (70, 1 << 21)],
)
def test_invert_equals_its_twin(ops: Any, rows: int, tokens: int) -> None:
    """Token ids of one, two and three digits."""
    token_A = torch.randint(max(tokens, 1), (rows,), generator=torch.Generator().manual_seed(rows))
    row_A, offset_T1 = ops.invert(token_A, tokens)
    expected = twins.invert_reference(token_A, tokens)
    assert torch.equal(row_A, expected[0]) and torch.equal(offset_T1, expected[1])


@pytest.mark.parametrize("expert", [-1, 4, 1 << 40])
def test_an_id_out_of_range(ops: Any, expert: int) -> None:
    expert_A = torch.tensor([0, 3, expert, 1])
    with pytest.raises(RuntimeError, match="kernel on the host: trap"):
        ops.sort_by_expert(expert_A, 4, None)
    with pytest.raises(RuntimeError, match="kernel on the host: trap"):
        ops.invert(expert_A, 4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        sort_by_expert(expert_A, 4)


def test_more_experts_than_the_kernel_takes_are_sorted_by_the_twin() -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the kernel was called")

    with standing_in():
        loader._CHOSEN["sort_by_expert", "cpu"] = refuse
        order_A, load_E = sort_by_expert(torch.tensor([1024, 0]), 1025)
        assert order_A.tolist() == [1, 0] and load_E.sum() == 2
        with pytest.raises(AssertionError, match="was called"):
            sort_by_expert(torch.tensor([0]), 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2).long(), 4), "expert_A must be int64 with 1 dimension"),
        ((torch.zeros(3), 4), "expert_A must be int64 with 1 dimension, got torch.float32"),
        ((torch.zeros(3).long(), 4, torch.ones(2).bool()), "keep_A must be bool of shape"),
        ((torch.zeros(3).long(), 4, torch.ones(3)), "keep_A must be bool of shape"),
    ],
)
def test_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sort_by_expert(*arguments)


def test_under_the_sanitizers() -> None:
    check_under_sanitizers(__file__)


# barriers, each with what precedes it
BARRIERS = {
    "counted too early": "1);\n  }\n  __syncthreads();",
    "places not known": "at += here;\n    }\n  }\n  __syncthreads();",
    "moved before it was read": "items.number(i);\n    }\n    __syncwarp();",
}


SORTS = """
import sys, torch
from pathlib import Path
from tests.csrc.test_sort import TILE, example, load, twins
ops = load(Path(sys.argv[1]))
for seed in range(20):
    expert_A, _ = example(3 * TILE, 300, "hot", seed)
    expected = twins.sort_by_expert_reference(expert_A, 300, None)
    for ours, theirs in zip(ops.sort_by_expert(expert_A, 300, None), expected):
        assert torch.equal(ours, theirs)
print("all right")
"""


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_planted_missing_barrier_is_found(tmp_path: Path, barrier: str) -> None:
    old = BARRIERS[barrier]
    wrong = mutated(SOURCE, tmp_path, old, re.sub("__sync[a-z]+\\(\\);", "", old))
    done = in_new_process("-c", SORTS, str(wrong))  # it may write anywhere
    assert done.returncode != 0 and "all right" not in done.stdout
    assert "AssertionError" in done.stderr or done.returncode < 0, done.stderr


def test_sorts_without_a_planted_error() -> None:
    done = in_new_process("-c", SORTS, str(SOURCE), COTERIE_ON_HOST_SEED="5")
    assert done.returncode == 0 and done.stdout == "all right\n", done.stderr
