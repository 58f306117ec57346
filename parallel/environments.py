"""Environments over ranks: each has a home, which owns its context, and a host, which solves it.

The host is a rank that holds the environment's expert. Environments migrate when the gate changes,
not every step. All ranks know every environment's expert, hence its host: who sends how many rows
to whom needs no asking. E counts environments.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from coterie.comm.axis import Axis
from coterie.comm.exchange.meter import Meter
from coterie.comm.exchange.rows import all_to_all_rows
from coterie.core.box import Box
from coterie.core.digest import digest_int64
from coterie.moe.assignment import count


@dataclass(frozen=True)
class ExpertGrid:
    """The world as replicas × ep, ep fastest: experts are spread over ep, and each is copied on the
    ranks of ``replicas`` (expert data parallelism)."""

    world: Axis = Axis("world")
    ep: Axis = Axis("ep")
    replicas: Axis = Axis("expert_replicate")


def expert_grid(ep: int, device: str = "cpu") -> ExpertGrid:
    """Over all ranks of the default process group. Every rank calls."""
    world = dist.get_world_size()
    if world % ep:
        raise ValueError(f"{world} ranks do not divide by ep {ep}")
    mesh = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("expert_replicate", "ep"))

    def axis(name: str) -> Axis:
        group = mesh.get_group(name)
        return Axis(name, group.rank(), group.size(), group)

    everyone = Axis("world", dist.get_rank(), world, dist.group.WORLD)
    return ExpertGrid(everyone, axis("ep"), axis("expert_replicate"))


def homes(environments: int, world: Axis) -> Tensor:
    """int64 rank that owns each environment's context, in equal parts of the environments."""
    each = max(1, -(-environments // world.size))
    return torch.arange(environments) // each


def hosts(expert_E: Tensor, experts: int, grid: ExpertGrid) -> Tensor:
    """int64 rank that solves each environment; an expert's replicas take turns."""
    order_E = expert_E.argsort(stable=True)
    start_M = count(expert_E, experts).cumsum(0) - count(expert_E, experts)
    turn_E = torch.empty_like(expert_E)
    turn_E[order_E] = torch.arange(len(expert_E), device=expert_E.device)
    replica_E = (turn_E - start_M[expert_E]) % grid.replicas.size
    return replica_E * grid.ep.size + expert_E // (experts // grid.ep.size)


def move(rows_A: Tensor, from_E: Tensor, to_E: Tensor, axis: Axis) -> Tensor:
    """Send environments' rows from their ranks ``from_E`` to ``to_E`` (-1 in both: not moved).

    ``rows_A``: those of this rank, in the order of the environments; so is what is returned. Every
    rank of ``axis`` calls, also one that has none.
    """
    if axis.size == 1 or axis.group is None:
        return rows_A
    there_A, here_A = to_E[from_E == axis.rank], from_E[to_E == axis.rank]
    order_A = there_A.argsort(stable=True)
    received_A = all_to_all_rows(
        rows_A.flatten(1)[order_A],
        count(there_A, axis.size).tolist(),
        count(here_A, axis.size).tolist(),
        Meter(axis.group),
    )
    moved_A = torch.empty_like(received_A)
    moved_A[here_A.argsort(stable=True)] = received_A
    return moved_A.unflatten(1, rows_A.shape[1:])


def gather_rows(rows_A: Tensor, from_E: Tensor, axis: Axis) -> Tensor:
    """All environments' rows on all ranks, each from its rank ``from_E``."""
    if axis.size == 1 or axis.group is None:
        return rows_A
    counts = count(from_E, axis.size).tolist()
    padded = rows_A.new_zeros(max(counts), *rows_A.shape[1:])
    padded[: len(rows_A)] = rows_A
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=axis.group)
    rows_E = rows_A.new_empty(len(from_E), *rows_A.shape[1:])
    for rank, (part, size) in enumerate(zip(parts, counts, strict=True)):
        rows_E[from_E == rank] = part[:size]
    return rows_E


def assert_same(what: str, axis: Axis, *tensors: Tensor) -> None:
    """Raise ``RuntimeError`` on all ranks when a tensor is not the same on each, bit by bit."""
    if axis.group is None:
        return
    sums = torch.stack([digest_int64(x, Box.all_of(tuple(x.shape))) for x in tensors])
    parts = [torch.empty_like(sums) for _ in range(axis.size)]
    dist.all_gather(parts, sums, group=axis.group)
    odd = [rank for rank, part in enumerate(parts) if not torch.equal(part, parts[0])]
    if odd:
        raise RuntimeError(f"{what} of ranks {odd} differ from rank 0's")
