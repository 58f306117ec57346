"""Memory that all ranks of an NVLink domain reach, made once for all layers.

A window holds what its rank sends and what comes back to it. A launch ends when all ranks are done
with each other's windows, so that layers take turns with the same ones.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.core.errors import UserError
from coterie.csrc.fused_launch import Here, Windows
from coterie.csrc.fused_plan import Plan
from coterie.csrc.loader import fused_missing


class Memory(NamedTuple):
    """Of one rank, and where this process reaches that of all ranks."""

    own: Tensor
    """uint8, on the device."""
    address_R: Tensor
    """int64, on the device: where each rank's begins."""
    keeps: object = None
    """What has to live as long."""


MakeMemory = Callable[[ProcessGroup, int, torch.device], Memory]
"""Of so many bytes on each rank of a group. All ranks call."""


class Domain:
    """Ranks that exchange rows of ``width`` through each other's windows, and how often they have.

    All of them call alike: so they count alike, and make larger windows at the same time.
    """

    def __init__(self, group: ProcessGroup, width: int, make: MakeMemory) -> None:
        self.group, self.width, self.make = group, width, make
        self.capacity = 0
        """Rows that a rank can send at a time."""
        self.epoch = 0
        """Of the last dispatch, counted from 1 since the windows were made."""
        self._windows: Windows | None = None
        self._memory: Memory | None = None

    def here(self, plan: Plan, rows: int) -> Here:
        """For the next dispatch and its combine. ``rows``: the most that any rank sends."""
        if self._windows is None or rows > self.capacity:
            self._windows = self._larger(rows + rows // 4, plan.begin_S.device)
        self.epoch += 1
        return Here(plan, self._windows, self.epoch)

    def _larger(self, capacity: int, device: torch.device) -> Windows:
        """New windows, once nobody uses the old ones."""
        self._meet(device)
        self._windows = self._memory = None
        self.capacity, self.epoch = max(capacity, 1), 0
        size = Windows.bytes_for(self.capacity, self.width)
        self._memory = own = self.make(self.group, size, device)
        own.own.zero_()  # flags begin at 0
        self._meet(device)
        return Windows.of(own.own, own.address_R, self.capacity, self.width)

    def _meet(self, device: torch.device) -> None:
        """Until all ranks, and what they have launched, have come here."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier(self.group)


@cache
def domain_of(group: ProcessGroup, width: int) -> Domain:
    """The one that all layers of ``width`` share."""
    return Domain(group, width, symmetric_memory)


def symmetric_memory(group: ProcessGroup, size: int, device: torch.device) -> Memory:
    """GPU memory that the GPUs of the group reach over NVLink.

    Raises:
        UserError: they cannot, or cannot run the kernels that need it.
    """
    from torch.distributed import _symmetric_memory

    check_usable()
    try:
        own = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        handle = _symmetric_memory.rendezvous(own, group)
    except RuntimeError as error:
        raise UserError(
            f"model.moe.exchange.kind is fused, but rank {dist.get_rank()} does not reach the "
            f"memory of the other GPUs ({str(error).splitlines()[0]}): accepted are ranks whose "
            "GPUs are connected by NVLink, or another kind"
        ) from error
    address = [
        handle.get_remote_tensor(rank, (size,), torch.uint8).data_ptr()
        for rank in range(group.size())
    ]
    return Memory(own, torch.tensor(address, device=device), handle)


def check_usable() -> None:
    """Raises UserError where this rank cannot run the fused kernels."""
    reason, fix = fused_missing()
    if reason:
        raise UserError(
            f"model.moe.exchange.kind is fused, but rank {dist.get_rank()} cannot run the fused "
            f"kernels ({reason}): accepted is another kind{f', or first: {fix}' if fix else ''}"
        )
