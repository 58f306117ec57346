"""The fused kernels, thread by thread on the host: virtual ranks against plain loops in float64.

What a tensor core or a bulk copy would do is done in plain C++ (product_on_host.h, courier.cuh);
plan, order of tiles, flags, who moves which row, and all that is computed of sums are the kernels'
own. Memory that nobody has written holds NaN.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compile_on_host import CSRC, check_under_sanitizers, load, mutated_root, sanitized
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.comm.exchange.plan import most_tiles, places, pools, tiles
from coterie.csrc import fused, fused_launch, fused_ops
from coterie.csrc.fused_launch import TILE_COLUMNS, Manner
from coterie.csrc.fused_plan import TILE
from coterie.csrc.fused_plan import plan as plan_of
from coterie.launch import child
from tests.fused_layer import Found, Fused, Layer, check_errors, errors, reference


def on_host() -> Any:
    """All kernels; with sanitizers, where they take long to compile, those of 256 columns alone."""
    kernels = "*_256.cu" if sanitized() else "*.cu"
    return load(CSRC / "plan.cu", *sorted((CSRC / "fused_kernels").glob(kernels)))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels compiled for the host; ``torch.empty`` gives NaN."""
    monkeypatch.setattr(fused_ops, "library", on_host())
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def check(layer: Layer, manner: Manner, **how: bool) -> Found:
    given = layer.inputs()
    truth = reference(given, torch.float64)
    found = Fused(given).run(manner, **how)
    check_errors(errors(found, truth), errors(reference(given, torch.bfloat16), truth))
    return found


def same(mine: Found, other: Found) -> bool:
    """Bit by bit."""
    return all(torch.equal(mine[name], other[name]) for name in mine | other)


PLAIN = Layer(2, 4, 2, 70, 64, 128, seed=1)
CASES = {
    "alone": Layer(1, 2, 1, 5, 64, 128),
    "plain": PLAIN,
    "tails": Layer(3, 6, 3, 30, 320, 384, seed=2),
    "experts without rows": Layer(2, 8, 2, 9, 128, 128, seed=3),
    "several tiles": Layer(2, 4, 4, 70, 64, 128, seed=4, hot=1),
    "all from one to one": Layer(3, 3, 1, 20, 64, 128, seed=5, hot=2, busy=0),
    "nobody sends": Layer(2, 2, 1, 3, 64, 128, seed=6, busy=-1),
    "four ranks": Layer(4, 8, 2, 5, 64, 128, seed=9),
    "eight ranks": Layer(8, 8, 3, 2, 64, 128, seed=10),
}
NARROW = ("plain", "tails", "experts without rows", "eight ranks")
"""For tiles of 128 columns."""
WIDE = [case for case in CASES if case != "eight ranks"]


@pytest.mark.parametrize(
    ("case", "columns"), [*((case, 256) for case in WIDE), *((case, 128) for case in NARROW)]
)
def test_both_passes(case: str, columns: int) -> None:
    check(CASES[case], Manner(communication=1, slabs=2, blocks=2, tile_columns=columns))


def test_what_was_not_kept_is_computed_again() -> None:
    manner = Manner(communication=1, slabs=1, blocks=3)
    kept = check(PLAIN, manner)
    for how in ({"keep": False}, {"again": True}):
        assert same(check(PLAIN, manner, **how), kept)


def test_gradients_of_weights_may_be_left_out() -> None:
    manner = Manner(communication=1, slabs=1, blocks=2)
    virtual = Fused(PLAIN.inputs())
    whole, part = virtual.run(manner), virtual.run(manner, of_weights=False)
    nothing = {"dw_in": torch.empty(0), "dw_out": torch.empty(0)}
    assert same(part, whole | nothing)


@pytest.mark.parametrize(
    ("columns", "width", "manners"),
    [
        (256, 576, [Manner(1, 1, 1), Manner(2, 3, 4), Manner(1, 2, 3), Manner(2, 3, 4)]),
        (128, 320, [Manner(1, 1, 1), Manner(2, 3, 4)]),
    ],
    ids=["256", "128"],
)
def test_no_bit_depends_on_the_manner_or_on_order(
    columns: int, width: int, manners: list[Manner]
) -> None:
    virtual = Fused(Layer(2, 4, 2, 40, width, 128, seed=7).inputs())
    first, *others = (virtual.run(manner._replace(tile_columns=columns)) for manner in manners)
    for other in others:
        assert same(first, other)


def test_a_domain_serves_one_layer_after_the_other() -> None:
    domain = None
    for tokens in (20, 7, 20):
        given = Layer(2, 4, 2, tokens, 64, 128, seed=tokens).inputs()
        virtual = Fused(given, domain)
        domain = virtual.domain
        found = errors(virtual.run(Manner(1, 1, 2)), reference(given, torch.float64))
        assert max(largest for largest, _ in found.values()) < 0.1


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_plan_is_that_of_part_one(data: st.DataObject) -> None:
    ranks, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    counts = st.integers(0, 40) | st.sampled_from([127, 128, 129, 300])
    load_SE = torch.tensor(
        data.draw(
            st.lists(
                st.lists(counts, min_size=ranks * experts, max_size=ranks * experts),
                min_size=ranks,
                max_size=ranks,
            )
        )
    )
    rank, run_ = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(1, 4))
    load_SL = load_SE.unflatten(1, (ranks, experts))[:, rank]
    rows = int(load_SL.sum())
    visits_S = [int(own.max()) for own in load_SL]  # a visit has at most one row of each expert
    visit_N = torch.cat([torch.arange(int(n)) for own in load_SL for n in own])
    begin_S = [10 * source for source in range(ranks)]
    plan = plan_of(load_SL, visit_N, torch.ones(rows), visits_S, begin_S, rank, run_)

    pool = pools(load_SE, TILE)
    most = most_tiles(rows, experts, TILE)
    expected = tiles(pool, rank, TILE, most)
    count = int((expected.rows_QS.sum(1) > 0).sum())
    assert plan.tile_7Q[0, -1] == count
    order_Q, expert_Q = plan.tile_7Q[0, :count].long(), plan.tile_7Q[1, :count]
    assert torch.equal(order_Q, expected.first_Q[:count] // TILE)
    assert torch.equal(expert_Q[order_Q].long(), expected.expert_Q[:count])
    assert torch.equal(plan.span_L2.long(), torch.stack([pool.start_RL[rank], load_SL.sum(0)], 1))
    for runs, order in ((plan.tile_7Q[3:5], order_Q), (plan.tile_7Q[5:7], torch.arange(count))):
        check_runs(
            runs.flatten()[: 2 * count].unflatten(0, (-1, 2)).tolist(),
            expert_Q[order].tolist(),
            run_,
        )

    source_N = torch.arange(ranks).repeat_interleave(load_SL.sum(1))
    place_N = torch.cat(
        [
            places(pool, load_SE[source], source, int(load_SE[source].sum()))[
                load_SE[source, : rank * experts].sum() : load_SE[
                    source, : (rank + 1) * experts
                ].sum()
            ]
            for source in range(ranks)
        ]
    )
    assert torch.equal(plan.place_N.long(), place_N)
    source_P = torch.full((count * TILE,), -1)
    source_P[place_N] = source_N
    assert torch.equal(plan.source_P[: count * TILE].long(), source_P)
    assert torch.equal(plan.row_P[place_N].long(), source_N * 10 + visit_N)
    for number, visit in enumerate(zip(source_N.tolist(), visit_N.tolist(), strict=True)):
        at = sum(visits_S[: visit[0]]) + visit[1]
        mine = plan.visited_N[plan.offset_V1[at] : plan.offset_V1[at + 1]]
        assert place_N[number] in mine.tolist()


def test_a_row_is_brought_once_with_the_first_tile_that_needs_it() -> None:
    virtual = Fused(Layer(3, 12, 5, 200, 64, 128, seed=11).inputs())
    ops = load(Path(__file__).parent / "parcels.cu")
    for one in virtual.here():
        plan, w = one.plan, torch.zeros(4, 256, 64, dtype=torch.bfloat16)
        words = fused_launch.table_row(one, Manner(), w, 128, arrival=True).words
        count_P = ops.parcels(torch.tensor(words))
        order_Q = plan.tile_7Q[0, : plan.tile_7Q[0, -1]].tolist()
        turn = {tile: i for i, tile in enumerate(order_Q)}
        expected_P = torch.zeros_like(count_P)
        for first, end in pairwise(plan.offset_V1.tolist()):
            places = plan.visited_N[first:end].tolist()
            expected_P[min(places, key=lambda place: (turn[place // TILE], place))] = len(places)
        assert torch.equal(count_P, expected_P)
        assert (count_P > 1).any() and (count_P > 0).sum() < plan.place_N.numel()


def check_runs(runs: list[list[int]], experts: list[int], most: int) -> None:
    """Each tile says which run it is in; runs are of one expert, as long as they may be."""
    at = 0
    while at < len(runs):
        first, length = runs[at]
        assert first == at and runs[at : at + length] == [[first, length]] * length
        assert length <= most and len(set(experts[at : at + length])) == 1
        if length < most and at + length < len(experts):
            assert experts[at + length] != experts[at]
        at += length


class Planted(NamedTuple):
    """An error in one of the kernels, with tiles of so many columns."""

    kernel: str
    columns: int
    file: str
    old: str
    new: str


ERRORS = {
    "a tile that does not wait for its rows": Planted(
        *("dispatch", 256, "receive.cuh", "kTile, kReadyTile, tile.number", "0, kReadyTile, 0")
    ),
    "padding that is not cleared": Planted(
        *("dispatch", 128, "pull.cuh", "if (parcel.source < 0) clear_row", "if (false) clear_row")
    ),
    "a slab that is put before it is there": Planted(
        *("combine", 128, "put.cuh", "wanted, kSlabDone", "1, kSlabDone")
    ),
    "results put where another rank's belong": Planted(
        *("combine", 256, "put.cuh", "rank.begin_R[source] + i};", "rank.begin_R[source] + i / 2};")
    ),
    "weights that are left out": Planted(
        *("combine", 256, "put.cuh", "rank.weight_P[my_place] : 1.0f", "1.0f : 1.0f")
    ),
}


class Wrong(NamedTuple):
    """The kernels' library with one of them replaced."""

    right: Any
    wrong: Any
    name: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrong if name == self.name else self.right, name)


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_seen(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, columns, file, old, new = ERRORS[error]
    name = f"{kernel}_{columns}"
    root = mutated_root(tmp_path, f"fused_kernels/{file}", old, new)
    wrong = load(root / f"fused_kernels/{name}.cu", root=root)
    monkeypatch.setattr(fused_ops, "library", Wrong(on_host(), wrong, f"fused_{name}"))
    layer = Layer(2, 4, 2, 70, 320, 128, seed=8)
    with pytest.raises(AssertionError):
        for blocks in (2, 3, 4):
            check(layer, Manner(1, 2, blocks, tile_columns=columns))


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    virtual = Fused(PLAIN.inputs())
    monkeypatch.setattr(fused_launch, "_failures", {})
    here = virtual.here()[:1]  # rank 1 does not take part
    with pytest.raises(RuntimeError, match="trap"):
        fused.dispatch(here, virtual.w_in[:1], Manner(1, 1, 2, patience=0.3), keep=False)
    told = fused_launch.complaint()
    assert (
        told == "fused exchange: rank 0 waited for the rows of rank 1 (epoch 1; that rank is in 0)"
    )
    assert child.explain(RuntimeError("unspecified launch failure")) == (1, told)  # by a run


@pytest.mark.parametrize("columns", TILE_COLUMNS)
def test_gradients_of_weights_by_themselves(columns: int) -> None:
    here = Fused(PLAIN.inputs()).here()[:1]
    plan = here[0].plan
    left, right = torch.zeros(plan.pool_rows, 128), torch.zeros(plan.pool_rows, 64)
    expected = torch.zeros(plan.experts, 128, 64)
    for expert, (first, count) in enumerate(plan.span_L2.tolist()):
        rows = slice(first, first + count)
        left[rows], right[rows] = torch.randn(count, 128), torch.randn(count, 64)
        expected[expert] = left[rows].bfloat16().float().T @ right[rows].bfloat16().float()
    manner = Manner(1, 1, 3, tile_columns=columns)
    (made,) = fused.weight_gradient(here, [left.bfloat16()], [right.bfloat16()], manner)
    torch.testing.assert_close(made.float(), expected, rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_refused() -> None:
    here = Fused(PLAIN.inputs()).here()[:1]
    odd = torch.zeros(2, 2 * 96, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="a hidden width that is one of 128 are accepted"):
        fused.dispatch(here, [odd], Manner(), keep=False)
    fits = torch.zeros(2, 2 * 128, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="tiles of 256 or 128 columns are accepted, not of 192"):
        fused.dispatch(here, [fits], Manner(tile_columns=192), keep=False)


def test_fields_are_those_of_the_kernels() -> None:
    text = (CSRC / "fused_kernels" / "rank.h").read_text()
    body = text[text.index("struct Rank {") : text.index("};", text.index("struct Rank {"))]
    names = []
    for line in body.splitlines()[1:]:
        code = line.split("//")[0].strip().rstrip(";")
        if code:
            names += [part.split()[-1].lstrip("*") for part in code.split(",")]
    assert tuple(names) == fused_launch._FIELDS


@pytest.mark.skipif(sanitized(), reason="runs itself")
def test_under_sanitizers() -> None:
    check_under_sanitizers(__file__, "256 and (plain or several or by_themselves)")
