"""Every parameter's shape, what cuts it, and so how many elements each rank owns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from coterie.comm.axis import Axes
from coterie.models import DecoderConfig
from coterie.moe.activations import ACTIVATIONS
from coterie.parallel.layout import Layout
from coterie.parallel.muon import takes
from coterie.parallel.placement import shard_dim
from coterie.parallel.planner.workload import Workload

Kind = Literal["dense", "expert"]
Unit = tuple[str, int]
"""What FSDP gathers at once: ("block", n) a block without its experts, ("experts", n),
("embedding", 0) and ("head", 0) with the last norm."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    unit: Unit
    cuts: tuple[tuple[int, str], ...] = ()
    """(dimension, axis) of each split: ``tp``, ``ep`` or ``etp``."""
    frozen: bool = False
    """Without gradient and optimizer state."""

    @property
    def kind(self) -> Kind:
        """Experts are split over other ranks than all else."""
        return "expert" if self.unit[0] == "experts" else "dense"

    @property
    def of_muon(self) -> bool:
        """Whether Muon would update it."""
        return not self.frozen and takes(self.name, self.shape)

    def part(self, layout: Layout) -> tuple[int, ...]:
        """The shape on the rank with the largest part, before FSDP."""
        shape = list(self.shape)
        for dim, axis in self.cuts:
            shape[dim] = -(-shape[dim] // getattr(layout, axis))
        return tuple(shape)

    def elements(self, layout: Layout) -> int:
        """What FSDP leaves of the largest part."""
        part, dim = self.part(layout), self.shard_dim(layout)
        shards = layout.expert_shard if self.kind == "expert" else layout.shard
        return -(-part[dim] // shards) * (prod(part) // part[dim])

    def shard_dim(self, layout: Layout) -> int:
        """The dimension that FSDP splits."""
        ranks = layout.expert_shard if self.kind == "expert" else layout.shard
        return shard_dim(self.part(layout), ranks)


def parameters(config: DecoderConfig) -> Iterator[Parameter]:
    """All parameters, named as the model names them."""
    width, vocabulary = config.width, config.vocabulary
    table, split, frozen = (vocabulary, width), ((0, "tp"),), config.auxiliary
    yield Parameter("embedding.weight", table, ("embedding", 0), split, frozen)
    for layer in range(config.layers):
        for name, shape, cuts, in_experts in _block(config, layer):
            if config.first_like(layer) < layer and not _own(name):
                continue
            unit = ("experts" if in_experts else "block", layer)
            fixed = _frozen(config, name)
            yield Parameter(f"blocks.{layer}.{name}", shape, unit, cuts, fixed)
    yield Parameter("norm.weight", (width,), ("head", 0), frozen=frozen)
    if not config.tie_embeddings:
        yield Parameter("head.weight", table, ("head", 0), split, frozen)


def _own(name: str) -> bool:
    """Whether a block has it for itself where blocks share their layers."""
    return name.split(".")[0] in ("attention_norm", "feed_forward_norm", "depths")


_Entry = tuple[str, tuple[int, ...], tuple[tuple[int, str], ...], bool]


def _block(config: DecoderConfig, layer: int) -> Iterator[_Entry]:
    """(name, shape, cuts, whether it is in the experts) of a block's parameters."""
    width, attention = config.width, config.attention
    head = attention.head_width or width // attention.heads
    kv_heads = attention.kv_heads or attention.heads
    each = (config.untie.modalities,) if config.untie.qkvo else ()
    yield from _norm(config, "attention_norm", width)
    for name, heads in (("q", attention.heads), ("k", kv_heads), ("v", kv_heads)):
        shape = (*each, heads * head, width)
        yield f"attention.{name}.weight", shape, ((len(each), "tp"),), False
    shape = (*each, width, attention.heads * head)
    yield "attention.out.weight", shape, ((len(each) + 1, "tp"),), False
    if gates := attention.gate_width(head):
        yield "attention.gate.weight", (*each, gates, width), ((len(each), "tp"),), False
    if attention.qk_norm:
        yield from _norm(config, "attention.q_norm", head)
        yield from _norm(config, "attention.k_norm", head)
    yield from _norm(config, "feed_forward_norm", width)
    if depths := config.depths_of(layer):
        yield "depths.weight_D", (width,), (), False
        if depths.foresees:
            hidden = -(-width // 2)
            yield "depths.predictor.w_in", (hidden, width), (), False
            yield "depths.predictor.w_out", (1, hidden), (), False
    if not config.is_moe(layer):
        assert config.feed_forward is not None
        ff = config.feed_forward
        parts = ACTIVATIONS[ff.activation].parts
        if config.untie.ffn:
            number = config.untie.modalities
            shape_in = (number, parts, ff.hidden, width)
            yield "feed_forward.w_in_MPFD", shape_in, ((2, "tp"),), False
            yield "feed_forward.w_out_MFD", (number, ff.hidden, width), ((1, "tp"),), False
        else:
            yield from _feed_forward("feed_forward", width, ff.hidden, parts)
        return
    moe = config.moe_of(layer)
    experts, shared = moe.experts, moe.shared
    parts = ACTIVATIONS[experts.activation].parts
    for name, parameter in _router(config, experts.count).items():
        yield name, tuple(parameter.shape), (), False
    shape = (experts.count, parts, experts.hidden, width)
    yield "moe.experts.w_in_EPFD", shape, ((0, "ep"), (2, "etp")), True
    shape_out = (experts.count, experts.hidden, width)
    yield "moe.experts.w_out_EFD", shape_out, ((0, "ep"), (1, "etp")), True
    if shared is not None:
        parts = ACTIVATIONS[shared.activation].parts
        yield from _feed_forward("moe.shared", width, shared.hidden, parts)
    if moe.shared_mix:
        yield "moe.shared_mix.weight", (2, width), (), False
        yield "moe.shared_mix.bias", (2,), (), False
    if moe.shared_gate:
        yield "moe.shared_gate_D", (width,), (), False


@cache
def _router(config: DecoderConfig, count: int) -> dict[str, torch.nn.Parameter]:
    """The parameters of the router of a layer with ``count`` experts, by their names in a block;
    without storage."""
    assert config.moe is not None
    with torch.device("meta"):
        router = config.moe.router.build(config.width, count, Axes())
    return {f"moe.router.{name}": parameter for name, parameter in router.named_parameters()}


def _frozen(config: DecoderConfig, name: str) -> bool:
    """Whether a parameter of a block, by its name there, is not trained."""
    if config.auxiliary:
        return not name.startswith(("moe.router.auxiliary.", "depths.predictor."))
    if config.moe is None:
        return False
    router = _router(config, config.moe.experts.count)
    return name in router and not router[name].requires_grad


def _norm(config: DecoderConfig, name: str, width: int) -> Iterator[_Entry]:
    untie = config.untie
    for inner in [f".{m}" for m in range(untie.modalities)] if untie.norm else [""]:
        yield f"{name}{inner}.weight", (width,), (), False


def _feed_forward(name: str, width: int, hidden: int, parts: int) -> Iterator[_Entry]:
    yield f"{name}.w_in_PFD", (parts, hidden, width), ((1, "tp"),), False
    yield f"{name}.w_out_FD", (hidden, width), ((0, "tp"),), False


@dataclass(frozen=True)
class UnitSize:
    """Elements of one FSDP unit on the rank with the largest part."""

    whole: int
    """Gathered: what tp, ep and etp leave."""
    sharded: int
    """What FSDP leaves of that."""
    trained: int
    """Of these, elements that have gradients and optimizer state."""
    largest: int
    """Of its biggest parameter, gathered."""
    tensors: int
    matrices: int
    """What FSDP leaves of the parameters that Muon would update."""

    def moments(self, work: Workload) -> int:
        """Elements that the optimizer keeps: two for each of AdamW's, one for each of Muon's."""
        return 2 * self.trained - (self.matrices if work.optimizer == "muon" else 0)


@cache
def unit_sizes(config: DecoderConfig, layout: Layout) -> dict[Unit, UnitSize]:
    """The size of every unit of the model."""
    grouped: dict[Unit, list[Parameter]] = {}
    for parameter in representatives(config):
        grouped.setdefault(parameter.unit, []).append(parameter)
    sizes = {unit: _unit_size(members, layout) for unit, members in grouped.items()}
    for layer, like in enumerate(_likes(config)):
        for part in ("block", "experts"):
            if (part, like) in sizes:
                sizes[part, layer] = sizes[part, like]
    return sizes


@cache
def _likes(config: DecoderConfig) -> tuple[int, ...]:
    """Of each layer the first one with the same parameters."""
    kinds = [
        (config.experts_of(n), config.first_like(n) == n, config.depths_of(n) is None)
        for n in range(config.layers)
    ]
    return tuple(map(kinds.index, kinds))


def uses(config: DecoderConfig, unit: Unit) -> int:
    """How often a pass over the model runs a unit: more than once where blocks share layers."""
    name, layer = unit
    shared = name in ("block", "experts") and config.first_like(layer) == layer
    return config.shared_depth if shared else 1


@cache
def representatives(config: DecoderConfig) -> tuple[Parameter, ...]:
    """The parameters of all units, of equal blocks only the first."""
    kept = set(_likes(config))
    return tuple(
        p for p in parameters(config) if p.unit[0] in ("embedding", "head") or p.unit[1] in kept
    )


def _unit_size(members: list[Parameter], layout: Layout) -> UnitSize:
    whole = sharded = trained = largest = matrices = 0
    for parameter in members:
        part = parameter.part(layout)
        whole += prod(part)
        sharded += parameter.elements(layout)
        trained += 0 if parameter.frozen else parameter.elements(layout)
        largest = max(largest, prod(part))
        matrices += parameter.elements(layout) if parameter.of_muon else 0
    return UnitSize(whole, sharded, trained, largest, len(members), matrices)


def units_of(work: Workload, stage: int) -> list[Unit]:
    """The units of a pipeline stage, in the order of the forward pass."""
    units: list[Unit] = [("embedding", 0)] if stage == 0 else []
    for layer in work.layers(stage):
        units.append(("block", layer))
        if work.model.is_moe(layer) and work.model.first_like(layer) == layer:
            units.append(("experts", layer))
    if stage == work.layout.stages - 1:
        units.append(("head", 0))
    return units


def owned(
    work: Workload, which: Callable[[Parameter], bool] = lambda parameter: True
) -> npt.NDArray[np.int64]:
    """(world, 2): elements of dense and of expert parameters that each rank stores, of those
    ``which`` chooses."""
    layout = work.layout
    table = np.zeros((layout.world, 2), dtype=np.int64)
    dense, expert = _elements_by_stage(work, which)
    for pp in range(layout.pp):
        ranks = slice(pp * layout.stage_ranks, (pp + 1) * layout.stage_ranks)
        mine = layout.stages_of(pp)
        table[ranks, 0] = sum(dense[stage] for stage in mine)
        table[ranks, 1] = sum(expert[stage] for stage in mine)
    return table


def _elements_by_stage(
    work: Workload, which: Callable[[Parameter], bool]
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]]:
    """Elements of each stage's dense and expert parameters, by rank inside the stage."""
    layout, config = work.layout, work.model
    by_unit: dict[Unit, npt.NDArray[np.int64]] = {}
    for parameter in representatives(config):
        held = _held(parameter, layout) * which(parameter)
        by_unit[parameter.unit] = by_unit.get(parameter.unit, 0) + held
    dense, expert = [], []
    nothing = np.zeros(layout.stage_ranks, dtype=np.int64)
    likes = _likes(config)
    for stage in range(layout.stages):
        sums = {"dense": nothing, "expert": nothing}
        for name, layer in units_of(work, stage):
            like = layer if name in ("embedding", "head") else likes[layer]
            kind = "expert" if name == "experts" else "dense"
            sums[kind] = sums[kind] + by_unit[name, like]
        dense.append(sums["dense"])
        expert.append(sums["expert"])
    return dense, expert


def _held(parameter: Parameter, layout: Layout) -> npt.NDArray[np.int64]:
    """Elements of ``parameter`` on each rank of a stage: parts as ``torch.chunk`` makes them."""
    axes: dict[str, int]
    if parameter.kind == "expert":
        axes = {"": layout.expert_replicate, "shard": layout.expert_shard}
        axes |= {"ep": layout.ep, "etp": layout.etp}
    else:
        axes = {"": layout.replicate, "shard": layout.shard, "tp": layout.tp}
    places = np.indices(tuple(axes.values())).reshape(len(axes), -1)
    place = dict(zip(axes, places, strict=True))
    lengths = [np.full(layout.stage_ranks, length, dtype=np.int64) for length in parameter.shape]
    for dim, axis in (*parameter.cuts, (parameter.shard_dim(layout), "shard")):
        each = -(-lengths[dim] // axes[axis])
        lengths[dim] = (lengths[dim] - place[axis] * each).clip(0, each)
    return np.prod(lengths, axis=0)
