"""The fused exchange without GPUs: kernels that run on the host, and windows that are files."""

import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from coterie.comm.exchange.fused.windows import Memory
from tests.csrc.compile_on_host import CSRC, load


def kernels() -> Any:
    """For ``coterie.csrc.fused_ops.library``; skips the test where they cannot be compiled."""
    return load(CSRC / "plan.cu", *sorted((CSRC / "fused_kernels").glob("*.cu")))


def files(group: ProcessGroup, size: int, device: torch.device) -> Memory:
    """Windows that processes share on the host."""
    name = [secrets.token_hex(8)]
    dist.broadcast_object_list(name, group=group, group_src=0)
    paths = [Path(f"/dev/shm/coterie_{name[0]}_{rank}") for rank in range(group.size())]
    paths[group.rank()].write_bytes(b"\xff" * size)
    dist.barrier(group)
    all_R = [
        torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths
    ]
    dist.barrier(group)
    paths[group.rank()].unlink()
    return Memory(all_R[group.rank()], torch.tensor([own.data_ptr() for own in all_R]), all_R)
