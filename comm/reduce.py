"""Sums over the ranks of a group."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The element-wise sum of ``tensor`` over ``group``, without gradient; None: one process.

    The argument is left as it was.
    """
    if group is None or group.size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total
