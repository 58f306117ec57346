"""Capacity: which rows stay, against plain loops."""

import math
from dataclasses import fields
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.comm.sequence import sequence_part
from coterie.moe.routers.capacity import within_capacity
from coterie.moe.routers.top_k import TopKConfig
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.tiny import identity_router, randn

FACTORS = ["0.1", "0.25", "0.5", "0.7", "0.9", "1", "1.1", "1.25", "1.3", "2", "8"]


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Tensor | int]:
    """Tokens of several sequences, some padding, each with K different experts and scores."""
    experts = draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    lengths = draw(st.lists(st.integers(1, 9), max_size=4))
    tokens = sum(lengths)
    expert_TK = torch.empty(tokens, k, dtype=torch.int64)
    for t in range(tokens):
        expert_TK[t] = torch.tensor(draw(st.permutations(range(experts)))[:k])
    few = st.integers(0, 4).map(lambda n: n / 4)  # so that scores are often equal
    scores = draw(st.lists(few, min_size=tokens * k, max_size=tokens * k))
    routed = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return {
        "experts": experts,
        "expert_TK": expert_TK,
        "score_TK": torch.tensor(scores).view(tokens, k),
        "routed_T": torch.tensor(routed, dtype=torch.bool),
        "sequence_T": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long()),
    }


def _plain(
    expert_TK: Tensor,
    score_TK: Tensor,
    routed_T: Tensor,
    sequence_T: Tensor,
    experts: int,
    factor: str,
    by_score: bool,
) -> Tensor:
    """Each expert looks at each sequence: whom does it keep?"""
    tokens, k = expert_TK.shape
    keep_TK = torch.zeros(tokens, k, dtype=torch.bool)
    for sequence in range(tokens):
        members = [t for t in range(tokens) if sequence_T[t] == sequence and routed_T[t]]
        capacity = math.ceil(Fraction(factor) * len(members) * k / experts)
        for e in range(experts):
            queue = [(t, c) for t in members for c in range(k) if expert_TK[t, c] == e]
            if by_score:
                queue.sort(key=lambda row: -float(score_TK[row]))  # stable: earlier first
            for row in queue[:capacity]:
                keep_TK[row] = True
    return keep_TK


@settings(max_examples=150, deadline=None)
@given(choices(), st.sampled_from(FACTORS), st.booleans())
def test_rows_within_capacity_equal_plain_loops(
    drawn: dict[str, Tensor], factor: str, by_score: bool
) -> None:
    experts = int(drawn.pop("experts"))
    keep_TK = within_capacity(
        **drawn, num_experts=experts, capacity_factor=float(factor), by_score=by_score
    )
    truth_TK = _plain(**drawn, experts=experts, factor=factor, by_score=by_score)
    assert torch.equal(keep_TK, truth_TK)


@settings(max_examples=30, deadline=None)
@given(choices(), st.sampled_from(FACTORS), st.booleans())
def test_one_sequence_without_padding_needs_no_tensors_that_say_so(
    drawn: dict[str, Tensor], factor: str, by_score: bool
) -> None:
    expert_TK, score_TK = drawn["expert_TK"], drawn["score_TK"]
    experts, tokens = int(drawn["experts"]), expert_TK.shape[0]
    keep_TK = within_capacity(expert_TK, score_TK, None, None, experts, float(factor), by_score)
    routed_T, sequence_T = torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens).long()
    truth = _plain(expert_TK, score_TK, routed_T, sequence_T, experts, factor, by_score)
    assert torch.equal(keep_TK, truth)


@pytest.mark.parametrize(
    ("tokens", "factor", "kept"), [(20, 0.55, 11), (100, 0.07, 7), (9, 0.5, 5)]
)
def test_a_product_that_rounds_up_opens_no_place(tokens: int, factor: float, kept: int) -> None:
    """20 · 0.55 is 11.000000000000002 in floating point: eleven places, not twelve."""
    expert_TK = torch.zeros(tokens, 1, dtype=torch.int64)
    keep = within_capacity(expert_TK, expert_TK.float(), None, None, 1, factor, False)
    assert int(keep.sum()) == kept


def test_sequences_do_not_compete() -> None:
    """Routing two sequences together drops the same rows as routing each alone."""
    config = TopKConfig(k=2, capacity_factor=0.6, drop="score")
    router = identity_router(config, experts=4)
    first, second = randn(9, 4, seed=1), randn(14, 4, seed=2)
    sequence_T = torch.tensor([0] * 9 + [1] * 14)
    together = router(torch.cat([first, second]), TokenInfo(sequence_T=sequence_T))
    alone = [router(x, TokenInfo()) for x in (first, second)]
    rows = together.assignment
    pairs = {*zip(rows.token_A.tolist(), rows.expert_A.tolist(), strict=True)}
    expected = set()
    for begin, routing in zip((0, 9), alone, strict=True):
        own = routing.assignment
        expected |= {*zip((own.token_A + begin).tolist(), own.expert_A.tolist(), strict=True)}
    assert pairs == expected
    dropped = sum(routing.stats.dropped_E for routing in alone)
    assert torch.equal(together.stats.dropped_E, dropped)
    assert int(dropped.sum()) == 2 * 23 - len(pairs) > 0


# --- parts of sequences -------------------------------------------------------------------------

ROWS, LENGTH, EXPERTS = 3, 16, 4
DROPS = [
    {"drop": drop, "capacity_factor": factor}
    for drop in ("position", "score")
    for factor in (0.5, 1.0)
]


def whole_sequences() -> tuple[Tensor, TokenInfo]:
    x_TD = randn(ROWS * LENGTH, EXPERTS, seed=8)
    x_TD[:, 0] += 1.0  # one expert is crowded
    place_T = torch.arange(ROWS * LENGTH)
    return x_TD, TokenInfo(
        padding_T=place_T % LENGTH >= 13,
        sequence_T=place_T // LENGTH,
        position_T=place_T % LENGTH,
    )


def parts_of(x_TD: Tensor, cp: Axis, tp: Axis) -> Tensor:
    """What a rank holds of ROWS whole sequences."""
    return sequence_part(x_TD.unflatten(0, (ROWS, LENGTH)), cp, tp).flatten(0, 1)


def parts_on_rank(rank: int, cp_size: int, tp_size: int) -> list[dict[str, Tensor]]:
    cp, tp = Axis("cp", rank // tp_size, cp_size), Axis("tp", rank % tp_size, tp_size)
    sequence = Axis("sequence", rank, cp_size * tp_size, dist.group.WORLD)
    x_TD, info = whole_sequences()
    facts = {field.name: getattr(info, field.name) for field in fields(info)}
    own = {n: parts_of(x, cp, tp) if isinstance(x, Tensor) else x for n, x in facts.items()}
    place_T = parts_of(torch.arange(ROWS * LENGTH), cp, tp)
    found = []
    for drop in DROPS:
        router = identity_router(TopKConfig.model_validate({"k": 2, **drop}), EXPERTS)
        router.sequence = sequence
        routing = router(parts_of(x_TD, cp, tp), TokenInfo(**own))
        rows = routing.assignment
        pairs = torch.stack([place_T[rows.token_A], rows.expert_A], 1)
        found.append({"pairs": pairs, "dropped": routing.stats.dropped_E, "load": rows.load_E})
    return found


@pytest.mark.parametrize(("cp_size", "tp_size"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_with_parts_of_sequences_drop_what_one_process_drops(
    cp_size: int, tp_size: int
) -> None:
    ranks = run_ranks(cp_size * tp_size, parts_on_rank, cp_size, tp_size)
    x_TD, info = whole_sequences()
    for number, drop in enumerate(DROPS):
        router = identity_router(TopKConfig.model_validate({"k": 2, **drop}), EXPERTS)
        truth = router(x_TD, info)
        rows = truth.assignment
        pairs = {*zip(rows.token_A.tolist(), rows.expert_A.tolist(), strict=True)}
        found = [tuple(pair) for rank in ranks for pair in rank[number]["pairs"].tolist()]
        assert len(found) == len(pairs) and {*found} == pairs
        for name, expected in (("dropped", truth.stats.dropped_E), ("load", rows.load_E)):
            assert torch.equal(sum(rank[number][name] for rank in ranks), expected)
        assert int(truth.stats.dropped_E.sum()) > 0


def test_parts_of_sequences_need_their_positions() -> None:
    router = identity_router(TopKConfig(k=2, capacity_factor=1.0), EXPERTS)
    router.sequence = Axis("sequence", 0, 2)
    with pytest.raises(ValueError, match="sequence_T and position_T"):
        router(randn(4, EXPERTS, seed=1), TokenInfo())
