"""Which rank holds what of each parameter: a pure function of the model and the layout."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from coterie.comm.axis import Axis, Cut
from coterie.core.box import Box
from coterie.models import Decoder, DecoderConfig
from coterie.models.decoder import DecoderPart
from coterie.models.placement import boxes_of, cuts_of
from coterie.parallel.layout import Coordinates, Layout


@dataclass(frozen=True)
class Place:
    """Where a parameter of a rank belongs."""

    box: Box
    """What the rank keeps of it."""
    expert: bool
    tensor_parallel: bool
    """Whether tp splits it; if not, each rank of tp has a gradient from its own tokens."""
    owner: bool
    """The rank, of those that hold the same box, stands for all."""
    cuts: tuple[Cut, ...] = ()
    """How the box was cut out of the whole, in that order; axes by the layout's names."""
    frozen: bool = False
    """It is not trained: no gradient, no optimizer state."""


def places(
    config: DecoderConfig, blocks: tuple[range, ...], layout: Layout, rank: int
) -> dict[str, Place]:
    """By name, where each parameter that ``rank`` holds belongs. Starts no process.

    ``blocks``: of each stage of the pipeline (:func:`coterie.parallel.rules.blocks_of_stages`).
    """
    found: dict[str, Place] = {}
    for part in stage_parts(blocks, layout, rank):
        with torch.device("meta"):
            decoder = Decoder(config, layout.axes(rank), part)
        found |= places_of(decoder, layout, rank)
    return found


def stage_parts(blocks: tuple[range, ...], layout: Layout, rank: int) -> Iterator[DecoderPart]:
    """Which parts of the decoder the stages of ``rank`` are."""
    for number in layout.stages_of(layout.coordinates(rank).pp):
        last = number == len(blocks) - 1
        yield DecoderPart(blocks[number], embedding=number == 0, head=last)


def places_of(decoder: Decoder, layout: Layout, rank: int) -> dict[str, Place]:
    """By name, where each parameter of a stage on ``rank`` belongs, before it is sharded."""
    at = layout.coordinates(rank)
    cuts = cuts_of(decoder)
    found = {}
    for name, box in boxes_of(decoder).items():
        axes = {cut.axis.name for cut in cuts[name]}
        expert = "ep" in axes
        split = "tp" in axes
        first = at.expert_replicate == 0 if expert else at.replicate == 0
        shard = shard_cut(box, expert, layout, at)
        found[name] = Place(
            box=box.cut(shard.dim, shard.axis.part(shard.length)) if shard else box,
            expert=expert,
            tensor_parallel=split,
            owner=first and (expert or split or at.tp == 0),
            cuts=(*cuts[name], shard) if shard else cuts[name],
            frozen=not decoder.get_parameter(name).requires_grad,
        )
    return found


def shard_dim(shape: tuple[int, ...], shards: int) -> int:
    """The dimension that a parameter is split along: the first that divides, else the first."""
    return next((dim for dim, length in enumerate(shape) if length % shards == 0), 0)


def shard_cut(box: Box, expert: bool, layout: Layout, place: Coordinates) -> Cut | None:
    """How the rank at ``place`` shards a parameter of which its module has ``box``, if it does."""
    axis = Axis("shard", place.shard, layout.shard)
    if expert:
        axis = Axis("expert_shard", place.expert_shard, layout.expert_shard)
    if axis.size == 1:
        return None
    dim = shard_dim(box.shape, axis.size)
    return Cut(dim, axis, box.shape[dim])
