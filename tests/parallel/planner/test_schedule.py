"""The order of a pipeline's work is the one that torch's schedules run, and it can be played."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules

from coterie.parallel.layout import Layout, Schedule
from coterie.parallel.planner.schedule import Action, order
from coterie.parallel.planner.time import Passes, play

TORCH: dict[str, Any] = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}
EVEN = Passes(forward=1.0, backward=2.0, sending=0.0, compute=3.0)


def passes(layout: Layout) -> dict[int, Passes]:
    return dict.fromkeys(range(layout.stages), EVEN)


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "micro"),
    [
        ("interleaved", 4, 2, 8),
        ("interleaved", 2, 3, 4),
        ("zero_bubble", 4, 1, 8),
        ("zero_bubble", 4, 2, 8),
        ("zbv", 4, 2, 8),
        ("zbv", 2, 2, 2),
    ],
)
def test_order_is_that_of_a_real_schedule(
    schedule: Schedule, pp: int, vpp: int, micro: int
) -> None:
    layout = Layout(pp=pp, vpp=vpp, schedule=schedule)
    stages = [
        SimpleNamespace(
            num_stages=pp * vpp, group_size=pp, group_rank=0, stage_index=s, submod=None
        )
        for s in layout.stages_of(0)
    ]
    real = TORCH[schedule](stages, micro).pipeline_order
    ours = order(layout, micro)
    for rank in range(pp):
        expected = [
            Action(a.computation_type.value, a.stage_index, a.microbatch_index)
            for a in real[rank]
            if a is not None
        ]
        assert list(ours[rank]) == expected


@settings(deadline=None, max_examples=40)
@given(
    schedule=st.sampled_from(["1f1b", "interleaved", "zero_bubble", "zbv"]),
    pp=st.integers(2, 6),
    rounds=st.integers(1, 4),
)
def test_every_order_runs_to_its_end(schedule: Schedule, pp: int, rounds: int) -> None:
    vpp = 2 if schedule in ("interleaved", "zbv") else 1
    layout, micro = Layout(pp=pp, vpp=vpp, schedule=schedule), pp * rounds
    actions = order(layout, micro)
    timeline = play(actions, layout, passes(layout))
    assert timeline.busy == [pytest.approx(3.0 * micro * vpp)] * pp
    assert max(timeline.ends) >= max(timeline.busy)
    for rank, own in enumerate(actions):
        forwards = [(a.stage, a.micro_batch) for a in own if a.kind == "F"]
        assert sorted(forwards) == [
            (s, n) for s in sorted(layout.stages_of(rank)) for n in range(micro)
        ]


@pytest.mark.parametrize(("pp", "micro"), [(2, 4), (4, 8), (4, 4), (8, 32)])
def test_bubble_of_1f1b_is_the_known_one(pp: int, micro: int) -> None:
    """(p - 1) / (m + p - 1) of the time (PipeDream-Flush, arXiv 2006.09503)."""
    layout = Layout(pp=pp)
    timeline = play(order(layout, micro), layout, passes(layout))
    share = 1 - sum(timeline.busy) / (pp * max(timeline.ends))
    assert share == pytest.approx((pp - 1) / (micro + pp - 1))


def test_interleaving_and_zero_bubble_shrink_the_bubble() -> None:
    def span(schedule: Schedule, vpp: int) -> float:
        layout = Layout(pp=4, vpp=vpp, schedule=schedule)
        each = Passes(1.0 / vpp, 2.0 / vpp, 0.0, 3.0 / vpp)
        return max(play(order(layout, 8), layout, dict.fromkeys(range(4 * vpp), each)).ends)

    assert span("interleaved", 2) < span("1f1b", 1)
    assert span("zero_bubble", 1) < span("1f1b", 1)
    assert span("zbv", 2) < span("zero_bubble", 1)


def test_a_deadlock_is_told() -> None:
    layout = Layout(pp=2)
    waits = ((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0)))
    with pytest.raises(RuntimeError, match="waits for itself"):
        play(waits, layout, passes(layout))
