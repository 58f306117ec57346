"""The CUDA row kernels, run on the host, against their twins; and what the host run finds out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.csrc import twins
from tests.csrc.compile_on_host import (
    CSRC,
    check_under_sanitizers,
    load,
    mutated,
    under_sanitizers,
)

ROWS = CSRC / "rows.cu"


@pytest.fixture(scope="module")
def ops() -> Any:
    return load(ROWS)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 12),
    rows=st.integers(0, 40),
    width=st.sampled_from([1, 2, 7, 8, 31, 33, 64, 130, 264]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_row_kernels_equal_their_twins(
    ops: Any, tokens: int, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, width, generator=g, dtype=torch.float64).to(dtype)
    x_AD = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    weight_A = torch.randn(rows, generator=g).to(twins.acc_dtype(x_TD))
    token_A = torch.randint(tokens, (rows,), generator=g)
    inverse = twins.invert_reference(token_A, tokens)

    for weight in (None, weight_A):
        close(ops.permute(x_TD, token_A, weight), twins.permute_reference(x_TD, token_A, weight))
        y_TD = ops.unpermute(x_AD, weight, *inverse)
        close(y_TD, twins.unpermute_reference(x_AD, weight, *inverse))
    dx_AD, dweight_A = ops.unpermute_backward(x_TD, x_AD, weight_A, token_A)
    expected = twins.unpermute_backward_reference(x_TD, x_AD, weight_A, token_A)
    close(dx_AD, expected[0])
    close(dweight_A, expected[1])


def close(actual: Tensor, expected: Tensor) -> None:
    """To a few roundings of the largest number; the other order of a sum is all that differs."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    eps = torch.finfo(actual.dtype).eps
    size = 1 + expected.double().abs().max() if expected.numel() else 1
    assert ((actual.double() - expected.double()).abs() <= 16 * eps * size).all()


def test_views_that_16_bytes_do_not_divide(ops: Any) -> None:
    x_TD = torch.randn(5, 65)[:, 1:]  # a row copy is made
    flat = torch.randn(4 * 64 + 1)[1:].view(4, 64)  # contiguous, 4 bytes off
    token_A = torch.tensor([3, 0, 0, 2])
    assert torch.equal(ops.permute(x_TD, token_A, None), x_TD[token_A])
    assert torch.equal(ops.permute(flat, token_A, None), flat[token_A])


@pytest.mark.parametrize("token", [-1, 3])
def test_an_index_out_of_range_traps(ops: Any, token: int) -> None:
    with pytest.raises(RuntimeError, match="kernel on the host: trap"):
        ops.permute(torch.randn(3, 40), torch.tensor([0, token, 1]), None)


@pytest.fixture(scope="module")
def examples() -> Any:
    return load(Path(__file__).parent / "example_kernels.cu")


def test_named_barriers(examples: Any) -> None:
    x = torch.randint(1000, (50, 32))
    assert torch.equal(examples.relay(x.flatten()).view(50, 32), x.flip(1))


def test_blocks_that_wait_for_each_other_must_run_together(examples: Any) -> None:
    x = torch.randint(1000, (20,))
    assert torch.equal(examples.chain(x, torch.zeros_like(x), True, 100_000), x.cumsum(0))
    with pytest.raises(RuntimeError, match="kernel on the host: trap"):  # out of patience
        examples.chain(x, torch.zeros_like(x), False, 1000)


def test_a_barrier_that_some_never_reach(examples: Any) -> None:
    with pytest.raises(RuntimeError, match="threads wait at barriers that others never reach"):
        examples.stuck(torch.zeros(1, dtype=torch.int64))


def test_under_the_sanitizers() -> None:
    check_under_sanitizers(__file__)


PERMUTE = """
import sys, torch
from pathlib import Path
from tests.csrc.compile_on_host import load
ops = load(Path(sys.argv[1]))
ops.permute(torch.randn(3, 40), torch.tensor([0, 2, 1]), None)
"""


LOOP = "for (int64_t d = threadIdx.x; d {} width; d += kWarp) {{\n      Pack<T, N> p = from[d];"
POINTERS = "{}, data<int64_t>(token),\n        data_or_null<Acc<T>>(weight)"


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        # one pack too many of the last row
        (LOOP.format("<"), LOOP.format("<="), "heap-buffer-overflow"),
        # packs of 16 bytes, 4 bytes off
        (
            POINTERS.format("data<P>(x)"),
            POINTERS.format("reinterpret_cast<const P*>(data<T>(x) + 1)"),
            "misaligned address",
        ),
    ],
    ids=["out of bounds", "misaligned"],
)
def test_sanitizers_find_a_planted_error(tmp_path: Path, old: str, new: str, finding: str) -> None:
    wrong = under_sanitizers("-c", PERMUTE, str(mutated(ROWS, tmp_path, old, new)))
    assert wrong.returncode != 0 and finding in wrong.stderr, wrong.stderr
    assert "permute_kernel" in wrong.stderr
