"""Starting the process groups of a run, on CPU with gloo and on CUDA with NCCL alike."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from coterie.comm import nccl
from coterie.comm.axis import Axes
from coterie.comm.gloo import schedule_as_batch
from coterie.comm.objects import gather_objects
from coterie.core.errors import UserError
from coterie.parallel.layout import AXES, Coordinates, Layout, LayoutConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run, and the groups it belongs to."""

    rank: int
    device: torch.device
    layout: Layout
    groups: dict[str, ProcessGroup] = field(default_factory=dict)
    """By axis (``coterie.parallel.layout.AXES``); an axis of one rank has none."""
    control: ProcessGroup | None = None
    """gloo, all ranks: for objects on the host. None: a single process."""
    saving: ProcessGroup | None = None
    """gloo, all ranks: for the thread that saves checkpoints while the main thread uses others."""
    ctas: int | None = None
    """What NCCL may take for a collective that runs beside the fused exchange; None: all it likes,
    or there is none."""

    @property
    def world(self) -> int:
        """All ranks of the run."""
        return self.layout.world

    @cached_property
    def place(self) -> Coordinates:
        """This rank's place on each axis."""
        return self.layout.coordinates(self.rank)

    @property
    def everyone(self) -> ProcessGroup | None:
        """All ranks, on their device."""
        return dist.group.WORLD if self.control is not None else None

    @cached_property
    def axes(self) -> Axes:
        """What the model's layers are split over."""
        return self.layout.axes(self.rank, self.groups)

    def sharding_mesh(self, kind: Literal["dense", "expert"]) -> DeviceMesh:
        """(replicate, shard), or (shard) without replicas: for ``fully_shard``."""
        names = [f"{kind}_{dim}" if kind == "expert" else dim for dim in ("replicate", "shard")]
        groups = [self.groups[name] for name in names if name in self.groups]
        ranks = self.layout.sharding_grid(kind, self.rank)
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], self.device.type, mesh_dim_names=("shard",))
        return DeviceMesh.from_group(
            groups, self.device.type, mesh=ranks.tolist(), mesh_dim_names=("replicate", "shard")
        )


def world_from_environment() -> tuple[int, int]:
    """(rank, world) as torchrun's variables say; (0, 1) without them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def on_nodes(config: LayoutConfig) -> LayoutConfig:
    """``config`` with the ranks on each node that the launcher names, if it names none itself."""
    found = os.environ.get("LOCAL_WORLD_SIZE")
    if config.node is not None or found is None:
        return config
    return config.model_copy(update={"node": int(found)})


def start(layout: Layout, timeout: float, gpus: bool = True, fused: bool = False) -> Ranks:
    """Join the run: one CUDA device for each local rank where there is one, else the CPU; without
    ``gpus`` always that.

    ``timeout``: seconds that a collective may take before it ends with an error. ``fused``: leave
    room for the fused exchange.
    """
    rank, world = world_from_environment()
    device = torch.device("cpu")
    if gpus and torch.cuda.is_available():
        device = torch.device("cuda", _device_index())
        torch.cuda.set_device(device)
    if world == 1:
        return Ranks(rank, device, layout)

    ctas = nccl.ctas(len(layout.beside)) if fused and device.type == "cuda" else None
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=limit))
    if device.type == "cpu":
        schedule_as_batch()
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
    if layout.node is not None and len(set(gather_objects(layout.node, dist.group.WORLD))) > 1:
        raise UserError(
            "nodes have different numbers of ranks: set parallel.node, or a model.moe.exchange "
            "that does not ask for nodes, as route nodes and kind fused do"
        )
    return make_groups(layout, device, limit, ctas)


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


_made: dict[tuple[str, tuple[int, ...]], ProcessGroup] = {}
"""Groups of this process: one for each set of ranks and use, also over several layouts."""


def make_groups(
    layout: Layout, device: torch.device, timeout: timedelta, ctas: int | None = None
) -> Ranks:
    """The run's groups, out of the default process group; all its ranks call. ``ctas``: see
    ``Ranks``; those of a group are for as long as it lives."""
    rank = dist.get_rank()
    groups: dict[str, ProcessGroup] = {}
    for axis in AXES:
        # axes over the same ranks share a group, but what moves parameters has groups of its own:
        # it runs beside what moves activations
        use = "state" if "shard" in axis or "replicate" in axis else "activations"
        options = nccl.options(ctas) if ctas is not None and axis in layout.beside else None
        if options is not None:
            use = f"{ctas} CTAs beside fused"
        for members in layout.groups(axis).tolist():
            if len(members) == 1:
                continue
            key = (use, tuple(members))
            if key not in _made:
                _made[key] = dist.new_group(members, timeout=timeout, pg_options=options)
            if rank in members:
                groups[axis] = _made[key]
    for name in ("control", "saving"):
        key = (name, tuple(range(layout.world)))
        if key not in _made:
            _made[key] = dist.new_group(backend="gloo", timeout=timeout)
    everyone = tuple(range(layout.world))
    return Ranks(
        rank, device, layout, groups, _made["control", everyone], _made["saving", everyone], ctas
    )


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
        _made.clear()
