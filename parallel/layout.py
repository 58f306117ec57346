"""Which ranks share what: a pure function of the config and the world size.

Ranks count through two grids of the same shape, each with pipeline stages outermost:

* dense parameters: (pp, replicate, shard, tp), where cp lies inside shard, or inside replicate
  when nothing is sharded;
* experts: (pp, expert_replicate, expert_shard, ep, etp), folded over the same ranks of a stage
  apart from attention's split (MoE parallel folding, arXiv 2504.14960).

So all groups of a job of any size can be listed without starting a process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch.distributed import ProcessGroup

from coterie.comm.axis import Axes, Axis
from coterie.core.config import Config

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "zbv"]

Grid = npt.NDArray[np.int64]


class LayoutConfig(Config):
    """How the work is split over ranks. The numbers of a run do not depend on it."""

    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size: ranks that split attention heads, feed-forward width and vocabulary.
    Between them the activations are split along the sequence (sequence parallelism)."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel size: ranks in a row that each hold some of the layers."""
    vpp: int = Field(default=1, ge=1)
    """Virtual pipeline stages on each rank."""
    schedule: Schedule | None = None
    """Order of micro-batches in the pipeline; null: `1f1b`, or `interleaved` when vpp > 1. `zbv`
    (zero-bubble, V-shaped) has vpp 2."""
    stages: tuple[int, ...] | None = None
    """Blocks of each of the pp · vpp stages, in order; null: evenly. The first may be 0 (embedding
    alone), the last too (output layer and loss alone)."""
    cp: int = Field(default=1, ge=1)
    """Context-parallel size: ranks that split each sequence."""
    ep: int = Field(default=1, ge=1)
    """Expert-parallel size: ranks that share the experts of a layer. Laid over dp, cp and tp."""
    etp: int = Field(default=1, ge=1)
    """Expert-tensor-parallel size: ranks that split the width of each expert. Like ep it is laid
    over dp, cp and tp."""
    dp_shard: int = Field(default=1, ge=1)
    """Data-parallel ranks that split parameters, gradients and optimizer state among them (FSDP);
    1: these are whole on each rank."""
    dp_replicate: int | None = Field(default=None, ge=1)
    """Data-parallel copies of all that (HSDP when dp_shard > 1); null: what is left of the number
    of processes."""
    node: int | None = Field(default=None, ge=1)
    """Ranks on each node, which are numbered node by node; null: as the launcher says
    (LOCAL_WORLD_SIZE). Only `model.moe.exchange` asks for it, with route `nodes` or kind
    `fused`."""


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on each axis of a layout."""

    pp: int
    replicate: int
    shard: int
    cp: int
    tp: int
    dp: int
    """Which part of the global batch: 0 to ``Layout.dp`` - 1."""
    expert_replicate: int
    expert_shard: int
    ep: int
    etp: int


_AXES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pp": ("data_grid", ("pp",)),
    "tp": ("data_grid", ("tp",)),
    "cp": ("data_grid", ("cp",)),
    "sequence": ("data_grid", ("cp", "tp")),
    "data": ("data_grid", ("dp", "cp", "tp")),
    "replicate": ("dense_grid", ("replicate",)),
    "shard": ("dense_grid", ("shard",)),
    "expert": ("expert_grid", ("ep", "etp")),
    "expert_node": ("expert_grid", ("ep", "etp")),
    "expert_across": ("expert_grid", ("ep", "etp")),
    "etp": ("expert_grid", ("etp",)),
    "expert_replicate": ("expert_grid", ("expert_replicate",)),
    "expert_shard": ("expert_grid", ("expert_shard",)),
}
AXES = tuple(_AXES)
"""The kinds of process group: ``pp`` a pipeline; ``tp``, ``cp``; ``sequence`` the ranks that hold
parts of the same sequences (cp × tp); ``data`` all that hold tokens of the same stage;
``replicate`` and ``shard`` of dense parameters; ``expert`` the ranks that rows travel between
(ep × etp), ``expert_node`` those of them on one node, ``expert_across`` those with the same place
on each; ``etp`` those that split the same experts, and the ``expert_replicate`` and
``expert_shard`` of expert parameters."""

_DIMENSIONS = {
    "data_grid": ("pp", "dp", "cp", "tp"),
    "dense_grid": ("pp", "replicate", "shard", "tp"),
    "expert_grid": ("pp", "expert_replicate", "expert_shard", "ep", "etp"),
}


@dataclass(frozen=True)
class Layout:
    """A layout that fits its world; :func:`coterie.parallel.rules.layout_of` makes it."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    schedule: Schedule = "1f1b"
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    node: int | None = None
    """Ranks on each node; None: all are on one."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold tokens of the same pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Parts that the global batch is split into."""
        return self.dp_replicate * self.dp_shard

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.pp * self.vpp

    @property
    def shard(self) -> int:
        """Ranks that each dense parameter's tensor-parallel part is split over."""
        return self.dp_shard * self.cp if self.dp_shard > 1 else 1

    @property
    def replicate(self) -> int:
        """Ranks that hold the same part of a dense parameter that tp splits."""
        return self.stage_ranks // (self.shard * self.tp)

    @property
    def expert_shard(self) -> int:
        """Ranks that each expert parameter's (ep, etp) part is split over."""
        if self.dp_shard == 1:
            return 1
        return max(1, self.dp_shard * self.cp * self.tp // (self.ep * self.etp))

    @property
    def expert_replicate(self) -> int:
        """Ranks that hold the same part of an expert parameter."""
        return self.stage_ranks // (self.expert_shard * self.ep * self.etp)

    @cached_property
    def expert_node(self) -> int:
        """Ranks of an exchange that share a node; 1 where it has more on one node than on
        another."""
        node_GR = self.groups("expert") // (self.node or self.world)
        each = int((node_GR == node_GR[:, :1]).sum(1).min())
        if node_GR.shape[1] % each:
            return 1
        node_GNR = node_GR.reshape(len(node_GR), -1, each)
        alike = (node_GNR == node_GNR[:, :, :1]).all() and (np.diff(node_GNR[:, :, 0]) > 0).all()
        return each if alike else 1

    @cached_property
    def _grids(self) -> dict[str, Grid]:
        sizes = {
            "data_grid": (self.pp, self.dp, self.cp, self.tp),
            "dense_grid": (self.pp, self.replicate, self.shard, self.tp),
            "expert_grid": (
                self.pp,
                self.expert_replicate,
                self.expert_shard,
                self.ep,
                self.etp,
            ),
        }
        return {name: np.arange(prod(size)).reshape(size) for name, size in sizes.items()}

    def groups(self, axis: str) -> Grid:
        """(groups, size): the ranks of each group of ``axis`` (see ``AXES``), in order."""
        name, chosen = _AXES[axis]
        grid, dimensions = self._grids[name], _DIMENSIONS[name]
        last = [dimensions.index(dimension) for dimension in chosen]
        first = [n for n in range(grid.ndim) if n not in last]
        size = prod(grid.shape[n] for n in last)
        groups = grid.transpose(first + last).reshape(-1, size)
        if axis == "expert_node":
            return groups.reshape(-1, self.expert_node)
        if axis == "expert_across":
            by_node = groups.reshape(len(groups), -1, self.expert_node)
            return by_node.transpose(0, 2, 1).reshape(-1, by_node.shape[1])
        return groups

    @property
    def beside(self) -> tuple[str, ...]:
        """Axes whose collectives run on streams of their own while their ranks compute: FSDP's and
        the pipeline's. Others are waited for before anything else is done."""
        found = ["pp"] if self.pp > 1 else []
        for kind, shards in (("", self.shard), ("expert_", self.expert_shard)):
            if shards > 1:
                found += [kind + "shard", kind + "replicate"]
        return tuple(axis for axis in found if self.groups(axis).shape[1] > 1)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` is."""
        found: dict[str, int] = {}
        for name, grid in self._grids.items():
            place = np.unravel_index(rank, grid.shape)
            found.update(zip(_DIMENSIONS[name], map(int, place), strict=True))
        return Coordinates(**found)

    def axes(self, rank: int, groups: Mapping[str, ProcessGroup] = MappingProxyType({})) -> Axes:
        """What the layers of a model on ``rank`` are split over, with the process groups of those
        axes that have one."""
        place = self.coordinates(rank)
        expert, experts = place.ep * self.etp + place.etp, self.ep * self.etp
        sizes = {
            "tp": (place.tp, self.tp),
            "cp": (place.cp, self.cp),
            "ep": (place.ep, self.ep),
            "etp": (place.etp, self.etp),
            "expert": (expert, experts),
            "expert_node": (expert % self.expert_node, self.expert_node),
            "expert_across": (expert // self.expert_node, experts // self.expert_node),
            "sequence": (place.cp * self.tp + place.tp, self.cp * self.tp),
            "data": (
                (place.dp * self.cp + place.cp) * self.tp + place.tp,
                self.stage_ranks,
            ),
        }
        return Axes(**{name: Axis(name, *at, groups.get(name)) for name, at in sizes.items()})

    def sharding_grid(self, kind: Literal["dense", "expert"], rank: int) -> Grid:
        """(replicate, shard): the ranks that share the parameters which ``rank`` holds."""
        place = self.coordinates(rank)
        if kind == "dense":
            return self._grids["dense_grid"][place.pp, :, :, place.tp]
        return self._grids["expert_grid"][place.pp, :, :, place.ep, place.etp]

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """The stages that pipeline rank ``pp`` holds, in the order of the model."""
        if self.schedule == "zbv":
            return (pp, self.stages - 1 - pp)
        return tuple(pp + turn * self.pp for turn in range(self.vpp))

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds ``stage``."""
        if self.schedule == "zbv" and stage >= self.pp:
            return self.stages - 1 - stage
        return stage % self.pp

    def describe(self) -> str:
        """Short: the axes that are not 1, as in ``tp 2 · pp 2 · ep 4``."""
        named = {
            "pp": self.pp,
            "vpp": self.vpp,
            "tp": self.tp,
            "cp": self.cp,
            "ep": self.ep,
            "etp": self.etp,
            "dp_shard": self.dp_shard,
            "dp_replicate": self.dp_replicate,
        }
        parts = [f"{name} {size}" for name, size in named.items() if size > 1]
        if self.pp > 1:
            parts.append(self.schedule)
        return " · ".join(parts) or "one process"


def stage_blocks(layers: int, stages: int) -> tuple[int, ...]:
    """Blocks of each stage when ``layers`` are split evenly.

    What is left over goes to the middle: the first stage also has the embedding, the last the
    output layer.
    """
    each, left = divmod(layers, stages)
    first = (stages - left) // 2
    return tuple(each + (first <= stage < first + left) for stage in range(stages))
