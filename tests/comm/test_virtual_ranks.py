"""The overlapped exchange on virtual ranks: every order of its steps ends, with the same result."""

from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.exchange.virtual.backward import Backward
from coterie.comm.exchange.virtual.forward import Forward
from coterie.comm.exchange.virtual.group import VirtualExperts, VirtualGroup, VirtualRank
from coterie.comm.exchange.virtual.passes import Pass
from coterie.comm.exchange.virtual.steps import Flag, Step, execute
from coterie.moe.activations import ACTIVATIONS
from coterie.moe.assignment import Assignment, from_choices
from tests.comm.orders import Order, explore
from tests.moe.tiny import error, randn

D, F = 5, 3


def group(
    ranks: int, local: int, tokens: list[int], k: int, seed: int, hot: int | None = None,
    keep: float = 1.0, activation: Any = "gelu", **options: Any,
) -> VirtualGroup:  # fmt: skip
    """Random tokens and choices; ``hot``: an expert that all choose; ``keep``: what is not
    dropped."""
    experts, found = ranks * local, []
    chosen = ACTIVATIONS[activation]
    for rank in range(ranks):
        score_TE = randn(tokens[rank], experts, seed=seed + 100 + rank)
        if hot is not None:
            score_TE[:, hot] = 9.0
        expert_TK = score_TE.topk(k).indices
        keep_TK = torch.rand(expert_TK.shape, generator=torch.Generator().manual_seed(seed)) < keep
        weight_TK = score_TE.gather(1, expert_TK).sigmoid()
        w_in_LHD = randn(local, chosen.parts * F, D, seed=rank + 7)
        found.append(
            VirtualRank(
                randn(tokens[rank], D, seed=seed + rank),
                from_choices(expert_TK, weight_TK, experts, keep_TK),
                VirtualExperts(w_in_LHD, randn(local, F, D, seed=rank + 8), chosen),
            )
        )
    return VirtualGroup(found, **options)


def gradients(made: VirtualGroup) -> list[Tensor]:
    return [randn(*rank.x_TD.shape, seed=50 + n) for n, rank in enumerate(made.ranks)]


Pick = Callable[[list[str]], str]


def both(made: VirtualGroup, pick: Pick) -> tuple[Forward, Backward]:
    """Both passes, each in an order of its own. Results are no more when the gradients come."""
    forward = Forward(made)
    execute(forward.workers(), pick)
    backward = Backward(forward, gradients(made))
    for buffer in (*forward.result_PD, *forward.a_PF, *forward.slot_RTD):
        buffer.fill_(torch.nan)
    execute(backward.workers(), pick)
    return forward, backward


def results(forward: Forward, backward: Backward) -> dict[str, list[Tensor]]:
    names = ("dx_TD", "dweight_A", "dw_in_LHD", "dw_out_LFD")
    return {"y_TD": forward.y_TD, **{name: getattr(backward, name) for name in names}}


def truth(made: VirtualGroup) -> dict[str, list[Tensor]]:
    """Row by row, and by autograd."""
    x = [rank.x_TD.clone().requires_grad_() for rank in made.ranks]
    rows: list[Assignment] = [rank.assignment for rank in made.ranks]  # type: ignore[misc]
    weight = [own.weight_A.clone().requires_grad_() for own in rows]
    w_in = [rank.experts.w_in_LHD.clone().requires_grad_() for rank in made.ranks]
    w_out = [rank.experts.w_out_LFD.clone().requires_grad_() for rank in made.ranks]
    local = len(w_in[0])
    activation = made.ranks[0].experts.activation.forward
    y = []
    for rank, own in enumerate(rows):
        y.append(0 * x[rank])
        for row, (t, e) in enumerate(zip(own.token_A.tolist(), own.expert_A.tolist(), strict=True)):
            w_in_HD, w_out_FD = w_in[e // local][e % local], w_out[e // local][e % local]
            a_1F = activation(x[rank][t, None] @ w_in_HD.T)
            y_1D = weight[rank][row] * (a_1F @ w_out_FD)
            y[rank] = y[rank].index_add(0, torch.tensor([t]), y_1D)
    leaves = [*x, *weight, *w_in, *w_out]
    found = torch.autograd.grad(
        y, leaves, gradients(made), allow_unused=True, materialize_grads=True
    )
    names = ("dx_TD", "dweight_A", "dw_in_LHD", "dw_out_LFD")
    each = iter(found)
    return {"y_TD": y, **{name: [next(each) for _ in made.ranks] for name in names}}


def anywhere(seed: int) -> Pick:
    return Random(seed).choice


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    ranks, local = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    return {
        "ranks": ranks,
        "local": local,
        "tokens": draw(st.lists(st.integers(0, 7), min_size=ranks, max_size=ranks)),
        "k": draw(st.integers(1, min(3, ranks * local))),
        "seed": draw(st.integers(0, 5)),
        "hot": draw(st.none() | st.integers(0, ranks * local - 1)),
        "keep": draw(st.sampled_from([1.0, 0.6, 0.0])),
        "activation": draw(st.sampled_from(["gelu", "swiglu"])),
        "tile": draw(st.sampled_from([1, 2, 7])),
        "slabs": draw(st.integers(1, 4)),
    }


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(0, 1000))
def test_any_order_gives_the_results_of_plain_loops(case: dict[str, Any], seed: int) -> None:
    """Results, and gradients by tokens, combine weights and experts' weights."""
    made = group(**case)
    found = results(*both(made, anywhere(seed)))
    for name, expected in truth(made).items():
        for ours, theirs in zip(found[name], expected, strict=True):
            assert error(ours, theirs) < 1e-12, name


@pytest.mark.parametrize("slabs", [1, 3])
def test_the_order_changes_no_bit(slabs: int) -> None:
    found = []
    for seed in range(8):
        made = group(4, 2, [9, 3, 0, 5], k=3, seed=1, tile=2, slabs=slabs)
        passes = both(made, [min, max][seed] if seed < 2 else anywhere(seed))
        values = [value for each in results(*passes).values() for value in each]
        found.append(torch.cat([value.flatten() for value in values]))
    assert all(torch.equal(one, found[0]) for one in found)


def small(**case: Any) -> tuple[Forward, Backward]:
    """Passes that are yet to run."""
    forward = Forward(group(**case))
    return forward, Backward(forward, gradients(forward.group))


def buffers(made: Pass) -> dict[str, list[Tensor]]:
    """What the steps of a pass write, of all ranks."""
    found = {name: value for name, value in vars(made).items() if isinstance(value, list)}
    del found["token_TD"]
    return found


def poison(written: list[Tensor]) -> int:
    return sum(int(buffer.isnan().sum()) for buffer in written)


def test_in_each_round_all_ranks_pull_from_and_put_to_different_ones() -> None:
    """Their own rows come first, and their own results last: others wait for the rest."""
    forward = Forward(group(4, 1, [2] * 4, k=4, seed=1, tile=8))
    workers = forward.workers()
    for rank in range(4):
        pulled = []
        for step in workers[f"pull {rank}"]:
            step.run()
            there_P = forward.pool_PD[rank].isfinite().all(1)
            place_A = [forward.group.place_A[s][forward.group.sent_A(s, rank)] for s in range(4)]
            pulled += [s for s in range(4) if there_P[place_A[s]].all() and s not in pulled]
        assert pulled == [(rank - number) % 4 for number in range(4)]
        put = [flag[1] for step in workers[f"put {rank}"] for flag, _ in step.raises]
        assert put == [(rank + number) % 4 for number in (1, 2, 3, 4)]


class Trial:
    """A pass whose steps are run one by one, from poison each time."""

    def __init__(self, made: Pass) -> None:
        self.order = Order.of(made.workers())
        self.buffers = [buffer for own in buffers(made).values() for buffer in own]
        self.poisoned = [buffer.clone() for buffer in self.buffers]
        self.fills = [self._filled(step) for step in self.order.steps]
        """How many numbers each step writes where there was poison, when all is well."""

    def _filled(self, step: Step) -> int:
        before = poison(self.buffers)
        step.run()
        return before - poison(self.buffers)

    def works_after(self, steps: set[int], number: int) -> bool:
        """Whether a step finds all it reads, when only those ``steps`` were run before."""
        for buffer, values in zip(self.buffers, self.poisoned, strict=True):
            buffer.copy_(values)
        for at in sorted(steps):
            self.order.steps[at].run()
        return self._filled(self.order.steps[number]) == self.fills[number]


PROVEN = {
    "two ranks": {"ranks": 2, "local": 1, "tokens": [3, 2], "k": 2, "seed": 3, "slabs": 2},
    "three ranks": {"ranks": 3, "local": 2, "tokens": [2, 0, 3], "k": 2, "seed": 5},
    "dropped rows": {"ranks": 3, "local": 1, "tokens": [3, 3, 3], "k": 2, "seed": 4, "keep": 0.5},
    "a hot expert": {"ranks": 4, "local": 1, "tokens": [2, 1, 2, 0], "k": 1, "seed": 3, "hot": 1},
}


def trials(case: dict[str, Any]) -> Iterator[Trial]:
    forward, backward = small(tile=2, **case)
    yield Trial(forward)  # which leaves the forward pass done
    yield Trial(backward)


@pytest.mark.parametrize("name", PROVEN)
def test_no_step_writes_over_what_another_wrote(name: str) -> None:
    """But for the sums of experts' gradients, which one worker makes, tile by tile."""
    for made in small(tile=2, **PROVEN[name]):
        once = [own for name, own in buffers(made).items() if not name.startswith("dw_")]
        written = torch.cat([buffer.flatten() for own in once for buffer in own])
        for step in Order.of(made.workers()).steps:
            before = written
            step.run()
            written = torch.cat([buffer.flatten() for own in once for buffer in own])
            assert torch.equal(before[~before.isnan()], written[~before.isnan()])


@pytest.mark.parametrize("name", PROVEN)
def test_a_step_finds_all_it_reads_as_early_as_it_may_start(name: str) -> None:
    """Hence in every order: nothing is written twice, but sums in the order of tiles."""
    for trial in trials(PROVEN[name]):
        for number in range(len(trial.order.steps)):
            assert trial.works_after(trial.order.past(number), number), trial.order.names[number]


@pytest.mark.parametrize("name", PROVEN)
def test_a_step_waits_for_nothing_that_it_does_not_need(name: str) -> None:
    for trial in trials(PROVEN[name]):
        for number, raisers in enumerate(trial.order.raisers):
            for raiser in raisers:
                lost = trial.order.past(number) - {raiser}
                assert not trial.works_after(lost, number), (
                    trial.order.names[number],
                    trial.order.names[raiser],
                )


EXPLORED = {
    "two ranks": {"ranks": 2, "local": 1, "tokens": [5, 4], "k": 2, "tile": 2, "slabs": 2},
    "a rank with nothing": {"ranks": 2, "local": 2, "tokens": [4, 0], "k": 2, "tile": 1},
    "empty experts": {"ranks": 2, "local": 3, "tokens": [2, 2], "k": 1, "tile": 2, "slabs": 3},
    "a hot expert": {"ranks": 3, "local": 1, "tokens": [2, 2, 2], "k": 1, "hot": 1, "tile": 1},
    "dropped rows": {"ranks": 3, "local": 1, "tokens": [2] * 3, "k": 3, "keep": 0.5, "tile": 1},
    "three ranks": {"ranks": 3, "local": 1, "tokens": [1, 0, 2], "k": 3, "tile": 2},
    "four ranks": {"ranks": 4, "local": 1, "tokens": [1, 1, 1, 0], "k": 2, "tile": 1},
}


@pytest.mark.parametrize("name", EXPLORED)
def test_no_order_of_arrival_gets_stuck(name: str) -> None:
    """All of them, though one would do: flags only rise, so what may start may start ever after."""
    for made in small(seed=5, **EXPLORED[name]):
        seen, stuck = explore(made.workers())
        assert seen > 20
        assert not stuck


@settings(deadline=None)
@given(cases())
def test_flags_are_raised_as_high_as_they_are_waited_for(case: dict[str, Any]) -> None:
    """Lower, and somebody waits forever; higher, and somebody starts early."""
    for made in small(**case):
        raised: Counter[Flag] = Counter()
        awaited: Counter[Flag] = Counter()
        for step in (step for steps in made.workers().values() for step in steps):
            raised.update(dict(step.raises))
            assert not awaited.keys() & dict(step.waits).keys(), "two wait for the same flag"
            awaited.update(dict(step.waits))
        assert raised == awaited


def test_the_exploration_finds_every_flag_that_nobody_raises() -> None:
    """Of all that are raised, one at a time."""
    for made in small(ranks=2, local=1, tokens=[2, 1], k=2, seed=3, tile=2):
        workers = made.workers()
        for name, steps in workers.items():
            for at, step in enumerate(steps):
                for lost in step.raises:
                    raises = tuple(one for one in step.raises if one != lost)
                    broken = [*steps[:at], step._replace(raises=raises), *steps[at + 1 :]]
                    assert explore({**workers, name: broken})[1], (name, lost)


def test_running_into_a_dead_end_says_who_waits_for_what() -> None:
    workers = small(ranks=2, local=1, tokens=[2, 1], k=2, seed=3, tile=2)[0].workers()
    workers["compute 1"][-1] = workers["compute 1"][-1]._replace(raises=())
    with pytest.raises(RuntimeError, match=r"no worker can go on: .*; put 1 for .*'done', 1, 0, 0"):
        execute(workers, min)


@pytest.mark.parametrize("hasty", ["compute", "put", "reduce", "weights"])
def test_a_worker_that_does_not_wait_reads_poison(hasty: str) -> None:
    forward, backward = small(ranks=2, local=1, tokens=[4, 4], k=1, seed=3, tile=2)
    execute(forward.workers(), min)
    workers = {
        name: [step._replace(waits=()) if name.startswith(hasty) else step for step in steps]
        for name, steps in backward.workers().items()
    }
    execute(workers, lambda free: min(free, key=lambda name: not name.startswith(hasty)))
    found = [value for own in results(forward, backward).values() for value in own]
    assert any(value.isnan().any() for value in found)
