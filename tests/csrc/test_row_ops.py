"""permute and unpermute, native and twin, against plain loops in fp64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.csrc import Inverse, invert, loader, permute, twins, unpermute

pytestmark = pytest.mark.usefixtures("threads")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
OPS = ("permute", "unpermute", "unpermute_backward", "invert")


def native(op: str) -> Callable[..., Any]:
    """The native op on the CPU; skips with the reason where it could not be built."""
    record = next(r for r in loader.status() if (r.op, r.device) == (op, "cpu"))
    if not record.native:
        pytest.skip(f"native {op} is not loaded: {record.reason}")
    return loader.kernel(op, "cpu")


def twin(op: str) -> Callable[..., Any]:
    return getattr(twins, f"{op}_reference")


WAYS = pytest.mark.parametrize("way", [native, twin])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill every new tensor with NaN: an output number that is never written is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def loop_permute(x_TD: Tensor, token_A: Tensor, weight_A: Tensor | None) -> Tensor:
    y_AD = torch.zeros(len(token_A), x_TD.shape[1], dtype=torch.float64)
    for a, t in enumerate(token_A.tolist()):
        y_AD[a] = x_TD[t].double() * (1.0 if weight_A is None else weight_A[a].double())
    return y_AD


def loop_unpermute(x_AD: Tensor, weight_A: Tensor | None, token_A: Tensor, tokens: int) -> Tensor:
    y_TD = torch.zeros(tokens, x_AD.shape[1], dtype=torch.float64)
    for a, t in enumerate(token_A.tolist()):
        y_TD[t] += x_AD[a].double() * (1.0 if weight_A is None else weight_A[a].double())
    return y_TD


def loop_backward(
    dy_TD: Tensor, x_AD: Tensor, weight_A: Tensor, token_A: Tensor
) -> tuple[Tensor, Tensor]:
    dx_AD = torch.zeros(x_AD.shape, dtype=torch.float64)
    dweight_A = torch.zeros(len(token_A), dtype=torch.float64)
    for a, t in enumerate(token_A.tolist()):
        dx_AD[a] = weight_A[a].double() * dy_TD[t].double()
        dweight_A[a] = (x_AD[a].double() * dy_TD[t].double()).sum()
    return dx_AD, dweight_A


class Case:
    """Random rows, weights and tokens of one shape and dtype; two seeds never agree."""

    def __init__(self, tokens: int, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.tokens = tokens
        self.x_TD = torch.randn(tokens, width, generator=g, dtype=torch.float64).to(dtype)
        self.x_AD = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
        self.weight_A = torch.randn(rows, generator=g, dtype=torch.float64).to(acc)
        self.token_A = torch.randint(max(tokens, 1), (rows,), generator=g)

    def inverse(self, way: Callable[[str], Callable[..., Any]]) -> Inverse:
        return Inverse(*way("invert")(self.token_A, self.tokens))


# (tokens, rows, width): odd widths, widths around the column block, many rows for few tokens
SHAPES = [(1, 1, 1), (5, 40, 64), (33, 20, 65), (7, 14, 16), (64, 128, 129), (3, 200, 31)]


@WAYS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_equal_loops(
    way: Callable[[str], Callable[..., Any]], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, rows, width = shape
    case = Case(tokens, rows, width, dtype, seed=rows * width)
    x_TD, x_AD, weight_A, token_A = case.x_TD, case.x_AD, case.weight_A, case.token_A
    inverse = case.inverse(way)

    def close(actual: Tensor, expected: Tensor) -> None:
        eps = torch.finfo(actual.dtype).eps
        size = 1 + expected.abs().max() if expected.numel() else 1
        assert (actual.double() - expected).abs().max() <= 16 * eps * size

    assert torch.equal(
        way("permute")(x_TD, token_A, None).double(), loop_permute(x_TD, token_A, None)
    )
    close(way("permute")(x_TD, token_A, weight_A), loop_permute(x_TD, token_A, weight_A))
    for weight in (None, weight_A):
        y_TD = way("unpermute")(x_AD, weight, *inverse)
        assert y_TD.dtype == dtype
        close(y_TD, loop_unpermute(x_AD, weight, token_A, tokens))
    actual = way("unpermute_backward")(x_TD, x_AD, weight_A, token_A)
    for one, other in zip(actual, loop_backward(x_TD, x_AD, weight_A, token_A), strict=True):
        close(one, other)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_error_is_at_most_twice_the_twins(dtype: torch.dtype) -> None:
    case = Case(64, 512, 96, dtype, seed=7)
    inverse = case.inverse(native)

    def error(actual: Tensor, expected: Tensor) -> float:
        return float((actual.double() - expected).abs().max())

    args = (case.x_AD, case.weight_A, *inverse)
    expected = loop_unpermute(case.x_AD, case.weight_A, case.token_A, case.tokens)
    ours, theirs = (error(way("unpermute")(*args), expected) for way in (native, twin))
    assert 0 < ours <= 2 * theirs
    # and below that of summing in half precision, which is what plain index_add does
    naive = torch.zeros(case.tokens, 96, dtype=dtype).index_add_(
        0, case.token_A, case.x_AD * case.weight_A.to(dtype).unsqueeze(1)
    )
    assert ours < error(naive, expected)

    args = (case.x_TD, case.token_A, case.weight_A)
    expected = loop_permute(*args)
    ours, theirs = (error(way("permute")(*args), expected) for way in (native, twin))
    assert 0 < ours <= 2 * theirs

    args = (case.x_TD, case.x_AD, case.weight_A, case.token_A)
    pairs = zip(native("unpermute_backward")(*args), twin("unpermute_backward")(*args), strict=True)
    for (ours_, theirs_), expected in zip(pairs, loop_backward(*args), strict=True):
        assert 0 < error(ours_, expected) <= 2 * error(theirs_, expected)


@given(
    tokens=st.integers(0, 12),
    rows=st.integers(0, 30),
    width=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_native_equals_twin_for_any_shape(
    tokens: int, rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    case = Case(tokens, rows if tokens else 0, width, dtype, seed)
    inverse = case.inverse(native)
    for one, other in zip(inverse, case.inverse(twin), strict=True):
        assert torch.equal(one, other)
    calls = {
        "permute": (case.x_TD, case.token_A, case.weight_A),
        "unpermute": (case.x_AD, case.weight_A, *inverse),
        "unpermute_backward": (case.x_TD, case.x_AD, case.weight_A, case.token_A),
    }
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    for op, args in calls.items():
        torch.testing.assert_close(native(op)(*args), twin(op)(*args), **tolerance)


@WAYS
def test_invert_groups_the_rows_of_each_token_in_order(
    way: Callable[[str], Callable[..., Any]],
) -> None:
    row_A, offset_T1 = way("invert")(torch.tensor([2, 0, 2, 4, 2]), 6)
    assert row_A.tolist() == [1, 0, 2, 4, 3]
    assert offset_T1.tolist() == [0, 1, 1, 4, 4, 5, 5]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    case = Case(700, 2100, 128, torch.float32, seed=3)
    inverse = case.inverse(native)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            y_TD = native("unpermute")(case.x_AD, case.weight_A, *inverse)
            args = (case.x_TD, case.x_AD, case.weight_A, case.token_A)
            results.append((y_TD, *native("unpermute_backward")(*args)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@WAYS
def test_gradients_by_finite_differences(
    way: Callable[[str], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {(op, "cpu"): way(op) for op in OPS}
    monkeypatch.setattr(loader, "kernel", lambda op, device: chosen[op, device])
    case = Case(4, 9, 5, torch.float64, seed=11)
    inverse = invert(case.token_A, case.tokens)
    x_TD, x_AD, weight_A = (t.requires_grad_() for t in (case.x_TD, case.x_AD, case.weight_A))
    check = torch.autograd.gradcheck
    assert check(lambda x: permute(x, case.token_A, inverse), (x_TD,))
    assert check(lambda x, w: unpermute(x, w, case.token_A, inverse), (x_AD, weight_A))
    assert check(lambda x: unpermute(x, None, case.token_A, inverse), (x_AD,))
    assert check(lambda x: unpermute(x, weight_A.detach(), case.token_A, inverse), (x_AD,))
    assert check(lambda w: unpermute(x_AD.detach(), w, case.token_A, inverse), (weight_A,))


def test_rows_are_kept_only_for_the_weights_gradient() -> None:
    case = Case(4, 9, 5, torch.float32, seed=12)
    inverse = invert(case.token_A, case.tokens)

    def saved(weight_A: Tensor | None) -> list[Tensor]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t), t)[1], lambda t: t
        ):
            unpermute(case.x_AD.requires_grad_(), weight_A, case.token_A, inverse)
        return [t for t in kept if t.shape == case.x_AD.shape]

    assert saved(None) == []
    assert saved(case.weight_A) == []
    assert len(saved(case.weight_A.clone().requires_grad_())) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_gives_the_same_gradients(reentrant: bool) -> None:
    case = Case(20, 60, 24, torch.float32, seed=13)
    inverse = invert(case.token_A, case.tokens)

    def layer(x_TD: Tensor, weight_A: Tensor) -> Tensor:
        rows_AD = torch.tanh(permute(x_TD, case.token_A, inverse))
        return unpermute(rows_AD, weight_A, case.token_A, inverse)

    gradients = []
    for recompute in (False, True):
        x_TD = case.x_TD.clone().requires_grad_()
        weight_A = case.weight_A.clone().requires_grad_()
        if recompute:
            y_TD = checkpoint(layer, x_TD, weight_A, use_reentrant=reentrant)
        else:
            y_TD = layer(x_TD, weight_A)
        y_TD.square().sum().backward()
        gradients.append((x_TD.grad, weight_A.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_strides_of_inputs_and_gradients_do_not_matter() -> None:
    case = Case(6, 15, 20, torch.float32, seed=14)
    inverse = invert(case.token_A, case.tokens)
    x_AD = case.x_AD.t().contiguous().t()
    weight_A = torch.stack([case.weight_A, case.weight_A], 1)[:, 1]
    assert not x_AD.is_contiguous() and not weight_A.is_contiguous()
    y_TD = unpermute(x_AD, weight_A, case.token_A, inverse)
    assert torch.equal(y_TD, unpermute(case.x_AD, case.weight_A, case.token_A, inverse))
    x_TD = case.x_TD.requires_grad_()
    permute(x_TD, case.token_A, inverse).sum().backward()  # an expanded gradient, stride 0
    assert x_TD.grad is not None
    assert torch.equal(x_TD.grad, inverse.offset_T1.diff().float().unsqueeze(1).expand(6, 20))


def test_half_rows_take_weights_of_either_dtype() -> None:
    case = Case(6, 15, 20, torch.bfloat16, seed=15)
    inverse = invert(case.token_A, case.tokens)
    for dtype in (torch.float32, torch.bfloat16):
        weight_A = case.weight_A.detach().to(dtype).requires_grad_()
        unpermute(case.x_AD, weight_A, case.token_A, inverse).float().sum().backward()
        assert weight_A.grad is not None and weight_A.grad.dtype == dtype


def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice between kernel and twin included, which the first call makes."""
    native("permute")
    case = Case(6, 15, 20, torch.float32, seed=16)

    def layer(x_TD: Tensor, weight_A: Tensor) -> Tensor:
        inverse = invert(case.token_A, case.tokens)
        rows_AD = permute(x_TD, case.token_A, inverse)
        return unpermute(rows_AD, weight_A, case.token_A, inverse)

    gradients = []
    monkeypatch.setattr(loader, "_CHOSEN", {})
    for function in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        x_TD = case.x_TD.clone().requires_grad_()
        weight_A = case.weight_A.clone().requires_grad_()
        loss = function(x_TD, weight_A).square().sum()
        gradients.append(torch.autograd.grad(loss, (x_TD, weight_A)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(
    not any(r.native for r in loader.status() if r.device == "cuda"),
    reason=f"native CUDA ops: {loader.status()[4].reason}",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (50, 150, 512), (0, 0, 8), (4, 0, 8)], ids=str)
def test_cuda_equals_the_twins(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, width = shape
    case = Case(tokens, rows, width, dtype, seed=18)
    inverse = invert(case.token_A.cuda(), tokens)
    for one, other in zip(inverse, case.inverse(twin), strict=True):
        assert torch.equal(one.cpu(), other)
    calls = {
        "permute": (case.x_TD, case.token_A, case.weight_A),
        "unpermute": (case.x_AD, case.weight_A, *case.inverse(twin)),
        "unpermute_backward": (case.x_TD, case.x_AD, case.weight_A, case.token_A),
    }
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    for op, args in calls.items():
        on_gpu = loader.kernel(op, "cuda")(*(t.cuda() for t in args))
        again = loader.kernel(op, "cuda")(*(t.cuda() for t in args))
        torch.testing.assert_close(on_gpu, twin(op)(*args), check_device=False, **tolerance)
        torch.testing.assert_close(on_gpu, again, rtol=0, atol=0)  # no atomics: the same bits


@pytest.mark.parametrize("op", OPS)
def test_schemas_and_shapes_of_the_native_ops(op: str) -> None:
    case = Case(6, 15, 20, torch.float32, seed=17)
    inverse = case.inverse(native)
    args: dict[str, tuple[Any, ...]] = {
        "permute": (case.x_TD, case.token_A, case.weight_A),
        "unpermute": (case.x_AD, case.weight_A, *inverse),
        "unpermute_backward": (case.x_TD, case.x_AD, case.weight_A, case.token_A),
        "invert": (case.token_A, case.tokens),
    }
    torch.library.opcheck(native(op), args[op], test_utils=("test_schema", "test_faketensor"))
