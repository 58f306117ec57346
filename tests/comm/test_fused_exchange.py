"""The fused exchange between real processes: its kernels run on the host, windows are files.

Against one process in float64 its error is at most twice that of the plain exchange in bfloat16.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.axis import Axes, Axis, expert_parallel
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.config import ExchangeConfig
from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.exchange import FusedExchange
from coterie.comm.exchange.fused.windows import Domain
from coterie.csrc import fused_ops, fused_plan
from coterie.csrc.fused_launch import Here, Manner
from coterie.csrc.fused_plan import Plan
from coterie.launch import child
from coterie.moe.assignment import from_choices
from coterie.moe.experts import Experts, ExpertsConfig
from tests.comm.files import files, kernels
from tests.distributed import run_ranks

D, F = 64, 128
EACH = 2  # experts of a rank
MANNER = Manner(communication=1, slabs=1, blocks=2, patience=600.0)
"""The tests' own time limits end what waits for ever."""


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...] = (9, 5, 7, 3)
    k: int = 2
    experts: tuple[int, ...] | None = None
    """The only ones that are chosen."""
    recompute: bool = False
    factor: float | None = None


CASES = {
    "uneven": Case(),
    "recompute": Case(recompute=True),
    "one expert": Case(k=1, experts=(1,)),
    "all to one rank": Case(experts=(2, 3)),
    "rounds": Case(experts=(2, 3), factor=1.0),
    "rounds, recompute": Case(experts=(0, 1, 3), factor=1.0, recompute=True),
    "a rank without tokens": Case(tokens=(0, 9, 4, 4)),
    "nobody has tokens": Case(tokens=(0, 0, 0, 0)),
    "two tiles and larger windows": Case(tokens=(140, 6, 2, 0), experts=(0, 3)),
    "small again": Case(tokens=(4, 6, 2, 5), k=4),
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Once, before processes start; skips where it cannot be done."""
    kernels()


@cache
def domain(group: ProcessGroup, width: int) -> Domain:
    return Domain(group, width, files)


def fused_exchange(group: ProcessGroup, factor: float | None = None) -> FusedExchange:
    return FusedExchange(group, factor, MANNER, domain)


def _everyone() -> ProcessGroup:
    fused_ops.library = kernels()
    # memory that nobody has written to holds NaN
    torch.use_deterministic_algorithms(True)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@dataclass(frozen=True)
class Given:
    """What one rank starts from; all of it can be told in bfloat16."""

    x_TD: Tensor
    choice_TK: Tensor
    weight_TK: Tensor
    dy_TD: Tensor


def _given(case: Case, world: int) -> list[Given]:
    random = torch.Generator().manual_seed(world)
    chosen = torch.tensor(case.experts or tuple(range(world * EACH)))
    k = min(case.k, len(chosen))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16().float()

    found = []
    for tokens in case.tokens[:world]:
        score = torch.rand(tokens, len(chosen), generator=random)
        choice_TK = chosen[score.topk(k).indices]
        weight_TK = torch.rand(tokens, k, generator=random).bfloat16().float() + 0.25
        found.append(Given(normal(tokens, D), choice_TK, weight_TK, normal(tokens, D)))
    return found


def _experts(group: ProcessGroup, recompute: bool = False, seed: int = 5) -> Experts:
    axes = expert_parallel(group)
    count = axes.ep.size * EACH
    random = torch.Generator().manual_seed(seed)
    w_in_EPFD = torch.randn(count, 2, F, D, generator=random) / D**0.5
    w_out_EFD = torch.randn(count, F, D, generator=random) / F**0.5
    experts = Experts(D, ExpertsConfig(count=count, hidden=F), axes.ep, recompute=recompute)
    mine = slice(experts.first, experts.first + EACH)
    with torch.no_grad():
        experts.w_in_EPFD.copy_(w_in_EPFD[mine].bfloat16())
        experts.w_out_EFD.copy_(w_out_EFD[mine].bfloat16())
    return experts


def _step(
    exchanges: Sequence[Exchange], layers: Sequence[Experts], batches: Sequence[Given]
) -> list[Tensor]:
    """Results and gradients of micro-batches that go through all layers before any goes backward,
    in bfloat16, or all in float64 where the weights are."""
    dtype = layers[0].w_in_EPFD.dtype
    inputs, results = [], []
    for given in batches:
        y_TD = x_TD = given.x_TD.to(dtype, copy=True).requires_grad_()
        weight_TK = given.weight_TK.to(dtype, copy=True).requires_grad_()
        for exchange, experts in zip(exchanges, layers, strict=True):
            rows = from_choices(given.choice_TK, weight_TK, dist.get_world_size() * EACH)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                y_TD = experts.over(exchange, y_TD, rows)
        inputs += [x_TD, weight_TK]
        results.append(y_TD)
    weights = [w for layer in layers for w in layer.parameters() if w.requires_grad]
    dy = [given.dy_TD.to(y.dtype) for given, y in zip(batches, results, strict=True)]
    grads = torch.autograd.grad(results, [*inputs, *weights], dy)
    return [*(y.detach() for y in results), *grads]


def _errors(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Root mean squares of the differences."""
    return [
        float((own.double() - true).square().mean().sqrt()) if own.numel() else 0.0
        for own, true in zip(ours, truth, strict=True)
    ]


Make = Callable[[ProcessGroup, float | None], Exchange]
Errors = tuple[list[float], list[float]]
"""Of the fused exchange, and of the plain one."""


def plain_exchange(group: ProcessGroup, factor: float | None = None) -> Exchange:
    return AllToAllExchange(group, factor, deduplicate=True)


def _compare(
    group: ProcessGroup,
    case: Case,
    *more: Case,
    layers: int = 1,
    made: Make = fused_exchange,
    plain: Make = plain_exchange,
) -> Errors:
    """In bfloat16, against the plain exchange in float64."""
    batches = [_given(each, group.size())[group.rank()] for each in (case, *more)]

    def step(make: Make, dtype: torch.dtype) -> list[Tensor]:
        experts = [_experts(group, case.recompute, seed).to(dtype) for seed in range(layers)]
        return _step([make(group, case.factor) for _ in experts], experts, batches)

    truth = step(plain, torch.float64)
    return _errors(step(made, torch.float32), truth), _errors(step(plain, torch.float32), truth)


def _cases(rank: int, world: int) -> dict[str, Errors]:
    group = _everyone()
    found = {name: _compare(group, case) for name, case in CASES.items()}
    several = [CASES[name] for name in ("uneven", "two tiles and larger windows", "small again")]
    assert domain(group, D).capacity > CASES["uneven"].tokens[0] * 2  # they have grown
    found["two layers, three micro-batches"] = _compare(group, *several, layers=2)
    return found


@cache
def _compared(world: int) -> list[dict[str, Errors]]:
    return run_ranks(world, _cases, world, timeout=240.0)


def _is_right(ours: list[float], theirs: list[float]) -> bool:
    return all(own <= 2 * other for own, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [*CASES, "two layers, three micro-batches"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_error_of_bfloat16(world: int, name: str) -> None:
    for results in _compared(world):
        assert _is_right(*results[name]), results[name]


def _inside_nodes(rank: int, world: int) -> list[Errors]:
    """Two nodes of two ranks: all-to-all across, fused inside."""
    group = _everyone()
    nodes = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    acrosses = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    node, across = nodes[rank // 2], acrosses[rank % 2]

    def over(inside: Make) -> Make:
        return lambda _, factor: AllToAllExchange(
            across, deduplicate=True, onward=inside(node, factor)
        )

    across_ = Axis("expert_across", rank // 2, 2, across)
    axes = Axes(
        expert=Axis("expert", rank, 4, group),
        expert_node=Axis("", rank % 2, 2, node),
        expert_across=across_,
    )
    config = ExchangeConfig(kind="fused", route="nodes", slabs=3, tile_columns=128)
    chosen = config.over(axes, 1.5)
    assert type(chosen) is AllToAllExchange and type(chosen.onward) is FusedExchange
    assert (chosen.group, chosen.onward.group) == (across, node)
    manner = chosen.onward.manner
    assert (chosen.onward.max_rows_factor, manner.slabs, manner.tile_columns) == (1.5, 3, 128)
    flat = ExchangeConfig(kind="fused", communication=5).over(expert_parallel(group))
    assert type(flat) is FusedExchange and (flat.group, flat.manner.communication) == (group, 5)

    names = ("uneven", "rounds")
    made, plain = over(fused_exchange), over(plain_exchange)
    return [_compare(group, CASES[name], made=made, plain=plain) for name in names]


def test_inside_nodes() -> None:
    for results in run_ranks(4, _inside_nodes, 4, timeout=240.0):
        assert all(_is_right(*errors) for errors in results), results


class Again(NamedTuple):
    """What one rank sees when it repeats itself."""

    equal: dict[str, bool]
    kept: list[bool]
    """Whether the first product was, in each forward pass."""


def _again(rank: int, world: int) -> Again:
    group = _everyone()
    given = _given(CASES["uneven"], world)[rank]
    experts, exchange = _experts(group), fused_exchange(group)
    kept = []
    forward = passes.forward

    def noted(*given: Any) -> Any:
        kept.append(given[-1])
        return forward(*given)

    with patch.object(passes, "forward", noted):
        first, second = (_step([exchange], [experts], [given]) for _ in range(2))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rows = from_choices(given.choice_TK, given.weight_TK, world * EACH)
            without = experts.over(exchange, given.x_TD, rows)
        x_TD = given.x_TD.clone().requires_grad_()
        weight_TK = given.weight_TK.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            rows = from_choices(given.choice_TK, weight_TK, world * EACH)
            y_TD = experts.over(exchange, x_TD, rows)
    # as zero-bubble schedules do
    weights = list(experts.parameters())
    dy_TD = given.dy_TD.to(y_TD.dtype)
    split = torch.autograd.grad(y_TD, [x_TD, weight_TK], dy_TD, retain_graph=True)
    split += torch.autograd.grad(y_TD, weights, dy_TD)
    experts.requires_grad_(False)
    frozen = _step([exchange], [experts], [given])
    equal = {
        "again": all(map(torch.equal, first, second)),
        "without gradients": torch.equal(without, first[0]),
        "in two passes": all(map(torch.equal, split, first[1:])),
        "with frozen experts": all(map(torch.equal, frozen, first[:3])),
    }
    return Again(equal, kept)


def test_equal_inputs_give_equal_bits() -> None:
    for found in run_ranks(2, _again, 2):
        assert all(found.equal.values()), found
        assert found.kept == [True, True, False, True]


def _alone(rank: int, world: int) -> tuple[int, str]:
    """What is told where the last rank fails before its first launch."""
    group = _everyone()
    exchange = fused_exchange(group)
    exchange.manner = MANNER._replace(patience=1.0)
    given, experts = _given(CASES["uneven"], world)[rank], _experts(group)
    try:
        with patch.object(passes, "_fill", _fails if rank == 1 else _FILL):
            _step([exchange], [experts], [given])
    except RuntimeError as error:
        return child.explain(error)
    raise AssertionError("nothing failed")


def _fails(here: Any, sent_VD: Any) -> None:
    raise RuntimeError("out of memory, say")


def test_who_waits_in_vain_says_for_what() -> None:
    waited, failed = run_ranks(2, _alone, 2)
    assert waited == (
        1,
        "fused exchange: rank 0 waited for the rows of rank 1 (epoch 1; that rank is in 0)",
    )
    assert "out of memory, say" in failed[1] and "Traceback" in failed[1]


def _late(here: Any, sent_VD: Any) -> None:
    """One rank fills its window long after the others."""
    if here[0].plan.rank == 1:
        time.sleep(0.2)
    _FILL(here, sent_VD)


def _same_epoch(domain: Domain, plan: Plan, rows: int) -> Here:
    return _HERE(domain, plan, rows)._replace(epoch=1)


def _unweighted(load_SL: Tensor, visit_N: Tensor, weight_N: Tensor, *more: Any) -> Plan:
    return _PLAN(load_SL, visit_N, torch.ones_like(weight_N), *more)


def _begun_elsewhere(load_SL: Tensor, *more: Any) -> Plan:
    *same, begin_S, rank = more
    return _PLAN(load_SL, *same, [0] * len(begin_S), rank)


_FILL, _HERE, _PLAN = passes._fill, Domain.here, fused_plan.plan
PLANTED = {
    "nothing": (passes, "_fill", _late),
    "an epoch is told again": (Domain, "here", _same_epoch),
    "weights are 1": (fused_plan, "plan", _unweighted),
    "rows begin elsewhere": (fused_plan, "plan", _begun_elsewhere),
}


def _planted(rank: int, world: int) -> dict[str, Errors]:
    group, found = _everyone(), {}
    for name, (place, what, wrong) in PLANTED.items():
        with patch.object(passes, "_fill", _late), patch.object(place, what, wrong):
            found[name] = _compare(group, CASES["uneven"])
        domain.cache_clear()
    return found


def test_errors_are_found() -> None:
    results = run_ranks(2, _planted, 2, timeout=240.0)
    right = {name: all(_is_right(*found[name]) for found in results) for name in PLANTED}
    assert right == {name: name == "nothing" for name in PLANTED}
