"""Starting the process groups of a run, on CPU with gloo and on CUDA with NCCL alike."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from coterie.comm.objects import gather_objects
from coterie.core.errors import UserError
from coterie.parallel.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run, and the groups it belongs to (None: a single process)."""

    rank: int
    world: int
    device: torch.device
    layout: Layout
    mesh: DeviceMesh | None = None
    """Two-dimensional: ("replica", "ep")."""
    control: ProcessGroup | None = None
    """gloo, all ranks: for objects on the host."""
    saving: ProcessGroup | None = None
    """gloo, all ranks: for the thread that saves checkpoints while the main thread uses others."""

    @property
    def data_group(self) -> ProcessGroup | None:
        """All ranks: each has data of its own."""
        return dist.group.WORLD if self.mesh is not None else None

    @property
    def expert_group(self) -> ProcessGroup | None:
        """The ranks that share the experts."""
        return self.mesh.get_group("ep") if self.mesh is not None else None

    @property
    def replica_group(self) -> ProcessGroup | None:
        """The ranks that hold the same experts as this one."""
        return self.mesh.get_group("replica") if self.mesh is not None else None


def world_from_environment() -> tuple[int, int]:
    """(rank, world) as torchrun's variables say; (0, 1) without them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start(layout: Layout, timeout: float) -> Ranks:
    """Join the run: one CUDA device for each local rank where there is one, else the CPU.

    ``timeout``: seconds that a collective may take before it ends with an error.
    """
    rank, world = world_from_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _device_index())
        torch.cuda.set_device(device)
    if world == 1:
        return Ranks(rank, world, device, layout)

    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=limit))
    # an elastic agent's store outlives a restart: each incarnation needs keys of its own
    incarnation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"incarnation{incarnation}", store),
        rank=rank,
        world_size=world,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    return make_groups(layout, device, limit)


def _device_index() -> int:
    """This rank's CUDA device: its local number, or the only one that the scheduler shows it."""
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1:
        return 0
    if local >= visible:
        raise UserError(
            f"local rank {local} has no GPU: this machine shows {visible}; start at most as many "
            "processes on it"
        )
    return local


def make_groups(layout: Layout, device: torch.device, timeout: timedelta) -> Ranks:
    """The run's groups, out of the default process group; all its ranks call."""
    shape = (layout.replicas, layout.ep)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replica", "ep"))
    for name in ("replica", "ep"):  # a mesh makes its groups with the backend's default limit
        dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))
    control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Ranks(dist.get_rank(), layout.world, device, layout, mesh, control, saving)


def agreed(ranks: Ranks, function: Callable[[], T]) -> T:
    """``function()`` of this rank; a UserError on any rank is raised on all, so that none waits."""
    result: T | None = None
    problem: str | None = None
    try:
        result = function()
    except UserError as error:
        problem = str(error)
    for found in gather_objects(problem, ranks.control):
        if found is not None:
            raise UserError(found)
    return cast(T, result)


def stop() -> None:
    """Leave the run's process groups, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()
