"""What every assignment must be, whatever was chosen."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.core.box import Box
from coterie.models.placement import box_of
from coterie.moe.activations import ActivationName
from coterie.moe.assignment import count, from_choices, sliced
from coterie.moe.experts import Experts, ExpertsConfig
from tests.moe.tiny import error, randn, randomise


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Tensor | None]:
    experts, tokens = draw(st.integers(1, 7)), draw(st.integers(0, 12))
    k = draw(st.integers(1, experts))
    expert_TK = torch.empty(tokens, k, dtype=torch.int64)
    for t in range(tokens):
        expert_TK[t] = torch.tensor(draw(st.permutations(range(experts)))[:k])
    seed = draw(st.integers(0, 999))
    weight_TK = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).double()
    keep = draw(st.none() | st.lists(st.booleans(), min_size=tokens * k, max_size=tokens * k))
    keep_TK = None if keep is None else torch.tensor(keep, dtype=torch.bool).view(tokens, k)
    return expert_TK, weight_TK, experts, keep_TK


@settings(max_examples=150, deadline=None)
@given(choices())
def test_an_assignment_holds_the_kept_choices_sorted(
    drawn: tuple[Tensor, Tensor, int, Tensor | None],
) -> None:
    expert_TK, weight_TK, experts, keep_TK = drawn
    rows = from_choices(expert_TK, weight_TK, experts, keep_TK)
    truth = sorted(
        (int(expert_TK[t, c]), t, float(weight_TK[t, c]))
        for t in range(expert_TK.shape[0])
        for c in range(expert_TK.shape[1])
        if keep_TK is None or keep_TK[t, c]
    )
    found = [
        *zip(rows.expert_A.tolist(), rows.token_A.tolist(), rows.weight_A.tolist(), strict=True)
    ]
    assert found == truth
    assert rows.load_E.tolist() == [sum(e == f for f, _, _ in truth) for e in range(experts)]
    assert int(rows.load_E.sum()) == rows.token_A.numel()
    assert rows.token_A.dtype == rows.expert_A.dtype == rows.load_E.dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(choices())
def test_weights_carry_the_gradient_of_kept_choices(
    drawn: tuple[Tensor, Tensor, int, Tensor | None],
) -> None:
    expert_TK, weight_TK, experts, keep_TK = drawn
    weight_TK.requires_grad_()
    from_choices(expert_TK, weight_TK, experts, keep_TK).weight_A.sum().backward()
    kept = torch.ones_like(weight_TK) if keep_TK is None else keep_TK.double()
    assert weight_TK.grad is not None
    assert torch.equal(weight_TK.grad, kept)


def test_count_equals_bincount() -> None:
    expert_A = torch.tensor([3, 0, 3, 3, 1])
    assert torch.equal(count(expert_A, 6), torch.bincount(expert_A, minlength=6))
    assert count(expert_A[:0], 3).tolist() == [0, 0, 0]


# --- experts in slices --------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(choices(), st.integers(1, 4), st.integers(1, 3))
def test_sliced_rows_go_to_every_slice_of_their_expert(
    drawn: tuple[Tensor, Tensor, int, Tensor | None], slices: int, each: int
) -> None:
    """They count by (rank, slice, expert of that rank)."""
    expert_TK, weight_TK, ep, keep_TK = drawn
    rows = from_choices(expert_TK * each, weight_TK, ep * each, keep_TK)
    cut = sliced(rows, ep, slices)
    truth = sorted(
        ((e // each * slices + s) * each + e % each, t, w)
        for e, t, w in zip(
            rows.expert_A.tolist(), rows.token_A.tolist(), rows.weight_A.tolist(), strict=True
        )
        for s in range(slices)
    )
    found = [*zip(cut.expert_A.tolist(), cut.token_A.tolist(), cut.weight_A.tolist(), strict=True)]
    assert found == truth
    assert torch.equal(cut.load_E, count(cut.expert_A, ep * each * slices))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2", "reglu"])
@pytest.mark.parametrize(("ep", "slices"), [(1, 2), (1, 3), (2, 3), (4, 2), (2, 1)])
def test_experts_in_slices_give_the_same_output_and_gradients(
    ep: int, slices: int, activation: ActivationName
) -> None:
    """The slices of all ranks, run one after the other as one longer list of thinner experts."""
    tokens, width, experts, hidden, k = 9, 5, 4, 6, 3
    gen = torch.Generator().manual_seed(3)
    expert_TK = torch.stack([torch.randperm(experts, generator=gen)[:k] for _ in range(tokens)])
    config = ExpertsConfig(count=experts, hidden=hidden, activation=activation)
    whole = Experts(width, config).double()
    randomise(whole, seed=4)
    parts = []
    for rank, part in product(range(ep), range(slices)):
        own = Experts(width, config, Axis("ep", rank, ep), Axis("etp", part, slices)).double()
        parts.append((own, boxes(own)))
    with torch.no_grad():
        for own, (in_box, out_box) in parts:
            own.w_in_EPFD.copy_(whole.w_in_EPFD[in_box.slices])
            own.w_out_EFD.copy_(whole.w_out_EFD[out_box.slices])

    def run(cut: bool) -> list[Tensor]:
        x_TD = randn(tokens, width, seed=5).requires_grad_()
        weight_TK = randn(tokens, k, seed=6).requires_grad_()
        rows = from_choices(expert_TK, weight_TK, experts)
        if cut:
            rows = sliced(rows, ep, slices)
        x_AD = x_TD[rows.token_A]
        if cut:
            loads = rows.load_E.view(len(parts), -1)
            pieces = x_AD.split(loads.sum(1).tolist())
            y_AD = torch.cat(
                [own(x, load) for (own, _), x, load in zip(parts, pieces, loads, strict=True)]
            )
        else:
            y_AD = whole(x_AD, rows.load_E)
        y_AD = y_AD * rows.weight_A[:, None]
        y_TD = torch.zeros_like(x_TD).index_add(0, rows.token_A, y_AD)
        grads = torch.autograd.grad(y_TD, [x_TD, weight_TK], randn(tokens, width, seed=7))
        return [y_TD.detach(), *grads]

    for ours, true in zip(run(cut=True), run(cut=False), strict=True):
        assert error(ours, true) < 1e-13


def boxes(experts: Experts) -> tuple[Box, Box]:
    return box_of(experts, "w_in_EPFD"), box_of(experts, "w_out_EFD")


def test_whole_experts_are_left_alone() -> None:
    rows = from_choices(torch.tensor([[1], [0]]), torch.ones(2, 1), 2)
    assert sliced(rows, 2, 1) is rows
