"""What every assignment must be, whatever was chosen."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.moe.assignment import count, from_choices


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
