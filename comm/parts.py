"""A tensor that ranks hold parts of, whole again."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed it, and warns of the name that 2.11 has
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def joined(part: Tensor, dim: int, length: int, group: ProcessGroup) -> Tensor:
    """All ranks' parts along ``dim``, ``length`` long in the whole and split as
    :meth:`coterie.comm.axis.Axis.part` says, so perhaps unevenly. Without gradient."""
    each = -(-length // group.size())
    mine = part.movedim(dim, 0)
    if len(mine) < each:
        mine = mine.new_zeros(each, *mine.shape[1:]).index_copy_(
            0, torch.arange(len(mine), device=mine.device), mine
        )
    mine = mine.contiguous()
    whole = mine.new_empty(group.size() * each, *mine.shape[1:])
    all_gather(whole, mine, group=group)
    return whole[:length].movedim(0, dim)
