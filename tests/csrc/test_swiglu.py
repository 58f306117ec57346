"""SwiGLU: native, its twin, and float64 formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.csrc import loader
from coterie.csrc.swiglu import swiglu, swiglu_backward

pytestmark = pytest.mark.usefixtures("threads")

HALF = (torch.bfloat16, torch.float16)


def formula(h_AH: Tensor) -> Tensor:
    gate_AF, up_AF = h_AH.double().chunk(2, -1)
    return gate_AF / (1 + (-gate_AF).exp()) * up_AF


def derivative(da_AF: Tensor, h_AH: Tensor) -> Tensor:
    gate_AF, up_AF = h_AH.double().chunk(2, -1)
    sigmoid_AF = 1 / (1 + (-gate_AF).exp())
    slope_AF = sigmoid_AF * (1 + gate_AF * (1 - sigmoid_AF))
    return torch.cat([da_AF.double() * up_AF * slope_AF, da_AF.double() * gate_AF * sigmoid_AF], -1)


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).abs().max() / truth.abs().max()).item()


def test_the_native_ops_are_what_runs_here() -> None:
    """Otherwise the comparisons below compare the twin with itself."""
    records = {r.op: r for r in loader.status() if r.device == "cpu"}
    if records["permute"].native:
        assert records["swiglu"].native and records["swiglu_backward"].native


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 9), width=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_equals_the_formula_for_any_shape(rows: int, width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for dtype, limit in ((torch.float32, 8 * 2.0**-23), (torch.float64, 1e-15)):
        h_AH = torch.randn(rows, 2 * width, generator=draw, dtype=dtype) * 4
        da_AF = torch.randn(rows, width, generator=draw, dtype=dtype)
        truth_AF = formula(h_AH)
        dh_AH, a_AF = swiglu_backward(da_AF, h_AH)
        assert a_AF.shape == truth_AF.shape and dh_AH.shape == h_AH.shape
        if rows:
            assert error(swiglu(h_AH), truth_AF) <= limit
            assert error(a_AF, truth_AF) <= limit
            assert error(dh_AH, derivative(da_AF, h_AH)) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_error_is_at_most_twice_the_twins(dtype: torch.dtype) -> None:
    h_AH, da_AF = (torch.randn(300, 512) * 5).to(dtype), torch.randn(300, 256).to(dtype)
    native = swiglu(h_AH), swiglu_backward(da_AF, h_AH)[0]
    with loader.twins_only():
        twin = swiglu(h_AH), swiglu_backward(da_AF, h_AH)[0]
    for ours, theirs, truth in zip(
        native, twin, (formula(h_AH), derivative(da_AF, h_AH)), strict=True
    ):
        assert error(ours, truth) <= 2 * error(theirs, truth) + 1e-9


@pytest.mark.parametrize("gate", [-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4])
def test_far_arguments_stay_finite_and_right(gate: float) -> None:
    h_AH = torch.tensor([[gate] * 20 + [3.0] * 20])
    a_AF, (dh_AH, _) = swiglu(h_AH), swiglu_backward(torch.ones(1, 20), h_AH)
    torch.testing.assert_close(a_AF.double(), formula(h_AH).nan_to_num(), rtol=1e-6, atol=1e-30)
    assert dh_AH.isfinite().all()


def test_nan_is_not_hidden() -> None:
    h_AH = torch.ones(3, 40)
    h_AH[1, 5] = torch.nan
    assert swiglu(h_AH).isnan().nonzero().tolist() == [[1, 5]]
    assert swiglu_backward(torch.ones(3, 20), h_AH)[0].isnan().any()


def test_gradient_by_finite_differences_and_in_three_dimensions() -> None:
    h = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert swiglu(h).shape == (2, 3, 5)
    assert torch.autograd.gradcheck(swiglu, h)


def test_refuses_an_odd_width() -> None:
    with pytest.raises(RuntimeError):
        swiglu(torch.randn(2, 5))
