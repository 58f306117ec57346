"""Which tokens experts take: against sorting, with ties, shut experts and what is no number."""

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coterie.moe.routers.competition import best

Table = list[list[tuple[float, bool]]]
FEW = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 0.5, 3.0, math.inf, math.nan])


def by_sorting(row: list[tuple[float, bool]], share: float) -> list[bool]:
    """What is no number goes before all others, of equal ranks the first."""
    tokens = [t for t, (_, is_open) in enumerate(row) if is_open]
    take = min(max(1, math.floor(share * len(tokens) + 1e-9)), len(tokens))
    tokens.sort(key=lambda t: math.inf if math.isnan(row[t][0]) else row[t][0], reverse=True)
    tokens.sort(key=lambda t: not math.isnan(row[t][0]))
    return [t in tokens[:take] for t in range(len(row))]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, list[float]]:
    experts, tokens = draw(st.integers(1, 4)), draw(st.integers(0, 9))
    cell = st.tuples(draw(st.sampled_from([FEW, st.floats(-4, 4, width=32)])), st.booleans())
    table = [[draw(cell) for _ in range(tokens)] for _ in range(experts)]
    shares = [draw(st.sampled_from([0.05, 0.3, 0.5, 1.0])) for _ in range(experts)]
    return table, shares


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tables())
@example(([[(0.0, True), (-0.0, True), (0.0, True)]], [0.5]))
@example(([[(-math.inf, True), (-math.inf, False), (-math.inf, True)]], [0.3]))
@example(([[(math.nan, True), (1.0, True), (math.nan, False), (2.0, True)]], [0.5]))
@example(([[(1.0, True), (math.nan, True), (1.0, True)]], [0.67]))
def test_the_best_are_those_of_a_sort(drawn: tuple[Table, list[float]]) -> None:
    table, shares = drawn
    rank_ET = torch.tensor([[rank for rank, _ in row] for row in table]).float()
    open_ET = torch.tensor([[is_open for _, is_open in row] for row in table]).bool()
    found = best(rank_ET, open_ET, torch.tensor(shares, dtype=torch.float64))
    assert found.tolist() == [by_sorting(*pair) for pair in zip(table, shares, strict=True)]
