"""The plan of rounds: every row once, and no rank takes much more than the bound in one."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.comm.exchange.rounds import plan, rows_of_rounds


@st.composite
def loads(draw: st.DrawFn) -> torch.Tensor:
    """Rows from each of R sources for each of R · E_local experts."""
    ranks, local = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    count = ranks * ranks * local
    rows = draw(st.lists(st.integers(0, 200), min_size=count, max_size=count))
    return torch.tensor(rows).view(ranks, ranks * local)


@settings(deadline=None, max_examples=200)
@given(loads(), st.floats(1.0, 3.0))
def test_rounds_hold_every_row_once_within_the_bound(load_SE: torch.Tensor, factor: float) -> None:
    ranks = load_SE.shape[0]
    local = load_SE.shape[1] // ranks
    sent_SR = load_SE.unflatten(1, (ranks, -1)).sum(2)
    received_R = sent_SR.sum(0)
    mean = int(load_SE.sum()) / ranks
    at_once, limit = math.ceil(factor * mean), math.ceil(mean)
    load_nSE = plan(load_SE, sent_SR.tolist(), factor)
    if load_nSE is None:
        assert int(received_R.max()) <= at_once
        return
    assert int(received_R.max()) > at_once
    assert (load_nSE >= 0).all()
    assert torch.equal(load_nSE.sum(0), load_SE)
    assert load_nSE.shape[0] == math.ceil(int(received_R.max()) / limit)
    received_nR = load_nSE.unflatten(2, (ranks, -1)).sum((1, 3))
    assert int(received_nR.max()) <= limit + ranks * local
    # on the busiest rank all rounds but the first are full
    busiest_n = received_nR[1:, int(received_R.argmax())]
    assert ((busiest_n - limit).abs() <= ranks * local).all()

    for source in range(ranks):
        rows_n = rows_of_rounds(load_nSE[:, source])
        expert_A = torch.arange(ranks * local).repeat_interleave(load_SE[source])
        assert torch.equal(torch.cat(rows_n).sort().values, torch.arange(len(expert_A)))
        for rows_A, load_E in zip(rows_n, load_nSE[:, source], strict=True):
            assert (rows_A.diff() > 0).all()
            assert torch.equal(expert_A[rows_A].bincount(minlength=ranks * local), load_E)


def test_without_a_bound_there_is_one_round() -> None:
    assert plan(torch.tensor([[9, 0], [9, 0]]), [[9, 0], [9, 0]], None) is None
    assert plan(torch.zeros(2, 2, dtype=torch.int64), [[0, 0], [0, 0]], 1.0) is None
