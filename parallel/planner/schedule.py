"""The order in which each pipeline rank works through its micro-batches, as PyTorch has it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

from torch.distributed.pipelining import schedules

from coterie.parallel.layout import Layout, Schedule

Kind = Literal["F", "B", "I", "W"]
"""Forward, whole backward, backward to the input alone, the weights' rest of it."""


@dataclass(frozen=True)
class Action:
    """One piece of work on one micro-batch of one stage."""

    kind: Kind
    stage: int
    micro_batch: int


Order = tuple[tuple[Action, ...], ...]
"""By pipeline rank."""


def order(layout: Layout, micro_batches: int) -> Order:
    """What each rank of a pipeline does in a step, in order.

    Without a pipeline: micro-batches one after the other.

    Raises ValueError where the schedule does not take this number of micro-batches.
    """
    return _order(layout.schedule, layout.pp, layout.vpp, micro_batches)


@cache
def _order(schedule: Schedule, pp: int, vpp: int, micro_batches: int) -> Order:
    if pp == 1:
        return (tuple(Action(kind, 0, n) for n in range(micro_batches) for kind in ("F", "B")),)
    if schedule == "1f1b":
        return tuple(_one_forward_one_backward(rank, pp, micro_batches) for rank in range(pp))
    return _ORDERS[schedule](pp, vpp, micro_batches)


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> tuple[Action, ...]:
    """``Schedule1F1B`` runs this order; the one it lists for others differs in the warm-up."""
    ahead = min(micro_batches, pp - rank)
    actions = [Action("F", rank, n) for n in range(ahead)]
    for done in range(micro_batches):
        actions.append(Action("B", rank, done))
        if ahead < micro_batches:
            actions.append(Action("F", rank, ahead))
            ahead += 1
    return tuple(actions)


def _interleaved(pp: int, vpp: int, micro_batches: int) -> Order:
    return _by_torch(schedules.ScheduleInterleaved1F1B, pp, vpp, micro_batches)


def _zero_bubble(pp: int, vpp: int, micro_batches: int) -> Order:
    return _by_torch(schedules.ScheduleInterleavedZeroBubble, pp, vpp, micro_batches)


def _zbv(pp: int, vpp: int, micro_batches: int) -> Order:
    return _by_torch(schedules.ScheduleZBVZeroBubble, pp, vpp, micro_batches)


_ORDERS: dict[str, Callable[[int, int, int], Order]] = {
    "interleaved": _interleaved,
    "zero_bubble": _zero_bubble,
    "zbv": _zbv,
}


def _by_torch(kind: Any, pp: int, vpp: int, micro_batches: int) -> Order:
    """The order that a schedule of torch computes, without stages, processes or sends."""
    rounds = max(1, micro_batches // pp)
    if kind is not schedules.ScheduleZBVZeroBubble and micro_batches % rounds:
        raise ValueError(f"{micro_batches} micro-batches do not divide into {rounds} rounds")
    facts = SimpleNamespace(
        pp_group_size=pp,
        n_local_stages=vpp,
        num_stages=pp * vpp,
        _n_microbatches=micro_batches,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
    )
    return tuple(
        tuple(
            Action(action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in kind._calculate_single_rank_operations(facts, rank)
            if action is not None
        )
        for rank in range(pp)
    )
