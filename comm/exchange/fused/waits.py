"""How long launches waited for other ranks, noted by themselves: which rank came late."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Waits:
    """Of the launches of one layer between the ranks of ``group``; counts while ``on``.

    Nothing here waits for the device.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.on = False
        self.members = dist.get_process_group_ranks(group)
        """The ranks of the group, by their number in the run."""
        self._ns_2R: Tensor | None = None

    def of_launch(self, device: torch.device) -> Tensor | None:
        """Where a launch adds what it waits (``Here.waits_2R``); None: it is not to."""
        if self.on and self._ns_2R is None:
            self._ns_2R = torch.zeros(2, len(self.members), dtype=torch.int64, device=device)
        return self._ns_2R if self.on else None

    def take(self) -> Tensor | None:
        """float64 seconds since the last call, (2, R): for each rank's rows, for its end; None:
        nothing was launched."""
        ns_2R, self._ns_2R = self._ns_2R, None
        return None if ns_2R is None else ns_2R.double() * 1e-9
