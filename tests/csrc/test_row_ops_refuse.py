"""What does not fit is refused with a sentence; an index out of range never reads memory."""

from typing import Any

import pytest
import torch

from coterie.csrc import Inverse, invert, loader, permute, unpermute

TOKEN_A = torch.tensor([1, 0, 1])
X_TD, X_AD, WEIGHT_A = torch.randn(2, 4), torch.randn(3, 4), torch.rand(3)
INVERSE = invert(TOKEN_A, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_AD": torch.randn(3)}, "x_AD must be .* with 2 dimensions"),
        ({"x_AD": torch.ones(3, 4, dtype=torch.int32)}, "got torch.int32"),
        ({"x_AD": torch.randn(2, 4)}, "x_AD must have 3 rows, got 2"),
        ({"x_AD": torch.randn(3, 4, device="meta")}, "must be on one device"),
        ({"token_A": TOKEN_A.int()}, "token_A must be int64"),
        ({"token_A": TOKEN_A[None]}, "token_A must be int64 with 1 dimension"),
        ({"token_A": TOKEN_A[:2], "x_AD": X_AD[:2]}, "the inverse holds 3 rows and token_A 2"),
        ({"weight_A": WEIGHT_A[:2]}, "one number for each of the 3 rows"),
        ({"weight_A": WEIGHT_A[None]}, "one number for each of the 3 rows"),
        ({"weight_A": WEIGHT_A.double()}, "weight_A must be torch.float32"),
    ],
)
def test_unpermute_refuses(changed: dict[str, Any], message: str) -> None:
    arguments = {"x_AD": X_AD, "weight_A": WEIGHT_A, "token_A": TOKEN_A, "inverse": INVERSE}
    unpermute(**arguments)
    with pytest.raises(ValueError, match=message):
        unpermute(**(arguments | changed))


def test_permute_refuses_an_inverse_of_other_tokens() -> None:
    with pytest.raises(ValueError, match="x_TD must have 5 rows, got 2"):
        permute(X_TD, TOKEN_A, invert(TOKEN_A, 5))


@pytest.mark.parametrize("bad", [-1, 2, 2**62, -(2**63)])
def test_a_token_out_of_range_is_an_error_on_the_cpu(bad: int) -> None:
    token_A = torch.tensor([0, bad, 1])
    inverse = Inverse(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]))
    with pytest.raises((RuntimeError, IndexError)):
        permute(X_TD, token_A, inverse)


native_only = pytest.mark.skipif(
    not loader.status()[0].native, reason=f"native ops: {loader.status()[0].reason}"
)


@native_only
@pytest.mark.parametrize("bad", [-1, 2, 2**62, -(2**63)])
def test_the_error_names_the_place_and_the_range(bad: int) -> None:
    with pytest.raises(RuntimeError, match=rf"token_A\[1\] is {bad}, but there are 2 tokens"):
        invert(torch.tensor([0, bad, 1]), 2)


@native_only
@pytest.mark.parametrize(
    ("row", "offset", "message"),
    [
        ([0, 1, 3], [0, 1, 3], r"row_A\[2\] is 3"),
        ([0, 1, -1], [0, 1, 3], r"row_A\[2\] is -1"),
        ([0, 1, 2], [0, 4, 3], "offset_T1 must rise from 0"),
        ([0, 1, 2], [1, 2, 3], "offset_T1 must rise from 0"),
        ([0, 1, 2], [0, 1, 9], "offset_T1 must rise from 0"),
        ([0, 1, 2], [], "at least one number"),
    ],
)
def test_a_broken_inverse_is_an_error(row: list[int], offset: list[int], message: str) -> None:
    op = loader.kernel("unpermute", "cpu")
    with pytest.raises(RuntimeError, match=message):
        op(X_AD, None, torch.tensor(row), torch.tensor(offset, dtype=torch.int64))


@native_only
def test_native_ops_check_what_reaches_them_directly() -> None:
    ops = torch.ops.coterie
    with pytest.raises(RuntimeError, match="2 dimensions"):
        ops.permute(X_TD[0], TOKEN_A, None)
    with pytest.raises(RuntimeError, match="must be float32, float64"):
        ops.permute(X_TD.int(), TOKEN_A, None)
    with pytest.raises(RuntimeError, match="int64"):
        ops.permute(X_TD, TOKEN_A.int(), None)
    with pytest.raises(RuntimeError, match="float32 for all others"):
        ops.permute(X_TD, TOKEN_A, WEIGHT_A.double())
    with pytest.raises(RuntimeError, match="one number per row"):
        ops.unpermute(X_AD, WEIGHT_A[:2], *INVERSE)
    with pytest.raises(RuntimeError, match="width and dtype"):
        ops.unpermute_backward(X_TD[:, :3], X_AD, WEIGHT_A, TOKEN_A)
    with pytest.raises(RuntimeError, match="one entry per row"):
        ops.unpermute_backward(X_TD, X_AD, WEIGHT_A, TOKEN_A[:2])
