"""The grouped feed-forward against autograd over one expert at a time."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from coterie.comm.axis import Axis
from coterie.moe import grouped_ffn as module
from coterie.moe.activations import ActivationName
from coterie.moe.experts import Experts, ExpertsConfig
from coterie.moe.grouped_ffn import grouped_ffn
from tests.moe.test_moe_layer import ACTIVATIONS, feed_forward
from tests.moe.tiny import error, randn, randomise

D, FH = 6, 5
LOADS = {
    "uneven": [4, 1, 0, 7, 2],
    "first and last empty": [0, 3, 5, 0],
    "all to one": [0, 0, 9],
    "one expert": [6],
    "no rows": [0, 0],
}


def _operands(
    load: list[int], activation: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_AD, w_in_EHD, w_out_EFD, load_E, dy_AD."""
    rows, experts, parts = sum(load), len(load), 2 if activation in ("swiglu", "reglu") else 1
    return (
        randn(rows, D, seed=1).to(dtype),
        randn(experts, parts * FH, D, seed=2).to(dtype),
        randn(experts, FH, D, seed=3).to(dtype),
        torch.tensor(load),
        randn(rows, D, seed=4).to(dtype),
    )


def _plain(leaves: list[Tensor], load: list[int], activation: str) -> Tensor:
    x_AD, w_in, w_out = leaves
    parts = x_AD.split(load)
    return torch.cat(
        [feed_forward(part, w_in[e], w_out[e], activation) for e, part in enumerate(parts)]
    )


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str
)
def test_output_and_gradients(
    load: list[int], activation: ActivationName, dtype: torch.dtype, limit: float
) -> None:
    x_AD, w_in, w_out, load_E, dy_AD = _operands(load, activation, dtype)
    leaves = [tensor.requires_grad_() for tensor in (x_AD, w_in, w_out)]
    y_AD = grouped_ffn(x_AD, w_in, w_out, load_E, activation)
    ours = torch.autograd.grad(y_AD, leaves, dy_AD)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth_AD = _plain(wide, load, activation)
    truth = torch.autograd.grad(truth_AD, wide, dy_AD.double())
    assert y_AD.dtype == dtype
    assert error(y_AD.double(), truth_AD) <= limit
    for own, true in zip(ours, truth, strict=True):
        assert own.dtype == dtype
        assert error(own.double(), true) <= limit


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("needs", [n for n in product([True, False], repeat=3) if any(n)], ids=str)
def test_only_what_needs_a_gradient_gets_one(
    needs: tuple[bool, ...], activation: ActivationName
) -> None:
    x_AD, w_in, w_out, load_E, dy_AD = _operands(LOADS["uneven"], activation)
    leaves = [x_AD, w_in, w_out]
    for leaf, wanted in zip(leaves, needs, strict=True):
        leaf.requires_grad_(wanted)
    grouped_ffn(x_AD, w_in, w_out, load_E, activation).backward(dy_AD)
    wide = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    _plain(wide, LOADS["uneven"], activation).backward(dy_AD)
    for leaf, true, wanted in zip(leaves, wide, needs, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None and true.grad is not None:
            assert error(leaf.grad, true.grad) < 1e-13


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operands_that_are_not_contiguous(activation: ActivationName) -> None:
    x_AD, w_in, w_out, load_E, _ = _operands(LOADS["uneven"], activation)
    strided = [t.mT.contiguous().mT.requires_grad_() for t in (x_AD, w_in, w_out)]
    plain = [t.clone().requires_grad_() for t in (x_AD, w_in, w_out)]
    assert not any(t.is_contiguous() for t in strided)
    y_AD = grouped_ffn(strided[0], strided[1], strided[2], load_E, activation)
    truth_AD = _plain(plain, LOADS["uneven"], activation)
    assert error(y_AD, truth_AD) < 1e-13
    ours = torch.autograd.grad(y_AD.sum(), strided)  # an expanded dy: strides of zero
    for own, true in zip(ours, torch.autograd.grad(truth_AD.sum(), plain), strict=True):
        assert error(own, true) < 1e-13


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_is_bit_identical(activation: ActivationName) -> None:
    x_AD, w_in, w_out, load_E, dy_AD = _operands(LOADS["uneven"], activation)
    leaves = [tensor.requires_grad_() for tensor in (x_AD, w_in, w_out)]
    kept = grouped_ffn(x_AD, w_in, w_out, load_E, activation)
    again = checkpoint(grouped_ffn, x_AD, w_in, w_out, load_E, activation, use_reentrant=False)
    assert torch.equal(kept, again)
    for one, other in zip(
        torch.autograd.grad(kept, leaves, dy_AD),
        torch.autograd.grad(again, leaves, dy_AD),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_backward_passes_add_up(activation: ActivationName) -> None:
    """The results are kept in buffers of their own: an earlier gradient is not overwritten."""
    x_AD, w_in, w_out, load_E, dy_AD = _operands(LOADS["uneven"], activation)
    leaves = [tensor.requires_grad_() for tensor in (x_AD, w_in, w_out)]
    y_AD = grouped_ffn(x_AD, w_in, w_out, load_E, activation)
    first = torch.autograd.grad(y_AD, leaves, dy_AD, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(y_AD, leaves, 2 * dy_AD)
    for own, copy, twice in zip(first, copies, second, strict=True):
        assert torch.equal(own, copy)
        assert torch.equal(2 * own, twice)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(
    activation: ActivationName,
) -> None:
    experts = Experts(D, ExpertsConfig(count=5, hidden=FH, activation=activation))
    randomise(experts)
    load_E = torch.tensor(LOADS["uneven"])
    x_AD, dy_AD = randn(14, D, seed=5).float(), randn(14, D, seed=6).float()
    leaves = [x_AD.requires_grad_(), *experts.parameters()]
    plain_AD = experts(x_AD, load_E)
    plain = torch.autograd.grad(plain_AD, leaves, dy_AD)
    with torch.autocast("cpu", torch.bfloat16):
        half_AD = experts(x_AD, load_E)
    assert half_AD.dtype == torch.bfloat16
    assert 0 < error(half_AD.float(), plain_AD) < 0.02
    for half, full in zip(
        torch.autograd.grad(half_AD, leaves, dy_AD.bfloat16()), plain, strict=True
    ):
        assert half.dtype == torch.float32
        assert error(half, full) < 0.03


def test_experts_of_a_rank_are_numbered_from_its_first() -> None:
    config = ExpertsConfig(count=6, hidden=FH)
    ranks = [Axis("ep", rank, 3) for rank in range(3)]
    assert [Experts(D, config, rank).first for rank in ranks] == [0, 2, 4]
    assert Experts(D, config, ranks[1]).w_in_EPFD.shape == (2, 2, FH, D)
    with pytest.raises(ValueError, match="experts 6 does not divide over 4 ranks"):
        Experts(D, config, Axis("ep", 0, 4))


def test_experts_are_cut_along_their_hidden_width() -> None:
    config, ep = ExpertsConfig(count=4, hidden=6), Axis("ep", 1, 2)
    slices = [Experts(D, config, ep, Axis("etp", rank, 3)) for rank in range(3)]
    for own in slices:
        assert own.first == 2
        assert own.w_in_EPFD.shape == (2, 2, 2, D) and own.w_out_EFD.shape == (2, 2, D)
    with pytest.raises(ValueError, match="hidden 6 does not divide over 4 ranks"):
        Experts(D, config, ep, Axis("etp", 0, 4))


@pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_kept_hidden_activations_the_bits_are_the_same(
    activation: ActivationName, load: list[int]
) -> None:
    x_AD, w_in, w_out, load_E, dy_AD = _operands(load, activation)
    leaves = [tensor.requires_grad_() for tensor in (x_AD, w_in, w_out)]
    results = []
    for recompute in (False, True):
        y_AD = grouped_ffn(x_AD, w_in, w_out, load_E, activation, recompute)
        results.append([y_AD, *torch.autograd.grad(y_AD, leaves, dy_AD)])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_short_runs_give_the_same_numbers(
    dtype: torch.dtype, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_AD, w_in, w_out, load_E, dy_AD = _operands([40, 0, 7, 1], "swiglu", dtype)
    leaves = [tensor.requires_grad_() for tensor in (x_AD, w_in, w_out)]
    whole_AD = grouped_ffn(x_AD, w_in, w_out, load_E, "swiglu")
    whole = [whole_AD, *torch.autograd.grad(whole_AD, leaves, dy_AD)]
    monkeypatch.setattr(module, "_LONGEST", 3)
    short_AD = grouped_ffn(x_AD, w_in, w_out, load_E, "swiglu", recompute)
    short = [short_AD, *torch.autograd.grad(short_AD, leaves, dy_AD)]
    for own, true in zip(short, whole, strict=True):
        assert own.dtype == dtype
        assert error(own.double(), true.double()) < (1e-13 if dtype == torch.float64 else 0.01)


def test_memory_of_hidden_width_is_that_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hot expert, whose hidden activations would be 8 times its rows."""
    monkeypatch.setattr(module, "_LONGEST", 16)
    rows, width, hidden = 512, 32, 128
    experts = Experts(width, ExpertsConfig(count=1, hidden=hidden), recompute=True)
    randomise(experts)
    x_AD = torch.randn(rows, width, requires_grad=True)

    def run() -> None:
        experts(x_AD, torch.tensor([rows])).sum().backward()

    weights = sum(w.numel() * w.element_size() for w in experts.parameters())
    rows_bytes = 4 * rows * width
    # y and dx, gradients of the weights and the product that is added to them; a run's own
    assert peak_bytes(run) < 2.5 * rows_bytes + 2 * weights + 4 * 16 * 10 * hidden
    experts.recompute = False
    assert peak_bytes(run) > 8 * rows_bytes
