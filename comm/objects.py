"""Small Python objects between ranks, on the host."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


def gather_objects(value: T, group: ProcessGroup | None) -> list[T]:
    """Every rank's ``value``, by rank, on all ranks of ``group``; None: this process alone."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_zero(function: Callable[[], T], group: ProcessGroup | None) -> T:
    """What ``function`` returns on rank 0, or the exception it raises there, on all ranks."""
    answer: list[Any] = [None]
    if group is None or group.rank() == 0:
        try:
            answer = [function()]
        except Exception as error:
            answer = [error]
    if group is not None:
        dist.broadcast_object_list(answer, group_src=0, group=group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return cast(T, answer[0])
