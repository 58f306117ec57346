"""Products by oneDNN: right for every layout of the operands, and as exact as torch.mm."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coterie.csrc import matmul
from coterie.csrc.matmul import mm, mm_into, pad_rows

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t,
    "columns": lambda t: t.t().contiguous().t(),
    "slice": lambda t: torch.cat([t, t])[: len(t)],
}


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("shape", [(256, 128, 384), (37, 500, 300), (512, 96, 71), (3, 2, 4)])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_equals_float64_within_twice_torchs_error(
    shape: tuple[int, int, int], left: str, right: str
) -> None:
    rows, inner, columns = shape
    a = LAYOUTS[left](torch.randn(rows, inner))
    b = LAYOUTS[right](torch.randn(inner, columns))
    truth = a.double() @ b.double()
    # the floor is a few roundings: for small products torch's own error may be luckily small
    assert error(mm(a, b), truth) <= 2 * error(torch.mm(a, b), truth) + 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", [0, 5, 200])
@pytest.mark.parametrize("add", [False, True])
def test_written_to_or_added_to_a_total(add: bool, inner: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(200, inner, dtype=dtype), torch.randn(300, inner, dtype=dtype).t()
    total = torch.randn(2, 200, 300, dtype=torch.promote_types(dtype, torch.float32))
    before = total.clone()
    mm_into(total[1], a, b, add)
    wanted = mm(a, b) + (before[1] if add else 0)
    torch.testing.assert_close(total[1], wanted.to(total.dtype), rtol=1e-4, atol=1e-4)
    assert torch.equal(total[0], before[0])


def test_large_float32_products_go_to_onednn_and_others_do_not() -> None:
    if not matmul._ONEDNN:
        pytest.skip("this torch has no oneDNN")
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    with torch.profiler.profile() as seen:
        mm(a, b)
        mm(a.double(), b.double())
        mm(a[:8, :8], b[:8, :8])
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 1
    assert calls["aten::mm"] == 2


def test_rows_are_padded_with_zeros_only_where_onednn_multiplies() -> None:
    x = torch.randn(45, 7)
    padded = pad_rows(x)
    if matmul._ONEDNN:
        assert padded.shape == (64, 7) and not padded[45:].any() and torch.equal(padded[:45], x)
    assert pad_rows(x.double()).shape == (45, 7)
    assert pad_rows(torch.randn(0, 7)).shape == (0, 7)


def test_the_same_bits_each_time() -> None:
    a, b = torch.randn(200, 300), torch.randn(300, 150)
    first = mm(a, b)
    assert all(torch.equal(mm(a, b), first) for _ in range(20))
