"""A rank's part of the model: its pipeline stages, its slices, its shards, by global names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coterie.core.box import Box
from coterie.models import Decoder, DecoderConfig, initialise
from coterie.models.decoder import DecoderPart, Recompute
from coterie.models.placement import boxes_of, cuts_of
from coterie.parallel.distributed import Ranks
from coterie.parallel.part import Part
from coterie.parallel.sharding import shard, sharded_box


class Job(Protocol):
    """What a stage does with a micro-batch."""

    def __call__(self, decoder: Decoder, x: Tensor, micro: int) -> Tensor:
        """Token ids, or activations of the stage before → activations, logits or a loss."""


class Stage(nn.Module):
    """A pipeline stage: the module that FSDP and the pipeline's schedule see."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.job: Job | None = None

    def forward(self, x: Tensor, micro: Tensor) -> Tensor:
        """``micro``: int64 (1,), on the host: the number of the micro-batch."""
        assert self.job is not None
        return self.job(self.decoder, x, int(micro))


@dataclass(frozen=True)
class Place:
    """Where a parameter of this rank belongs."""

    box: Box
    """What this rank keeps of it."""
    expert: bool
    tensor_parallel: bool
    """Whether tp splits it; if not, each rank of tp has a gradient from its own tokens."""
    owner: bool
    """This rank, of those that hold the same box, stands for all."""


class ParallelModel(nn.Module):
    """The stages of the decoder that this rank holds; parameters go by their global names."""

    def __init__(
        self,
        config: DecoderConfig,
        blocks: tuple[range, ...],
        ranks: Ranks,
        recompute: Recompute = "none",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """``blocks``: of each stage of the pipeline. ``seed``: of the initial weights."""
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.places: dict[str, Place] = {}
        self.stage_numbers = ranks.layout.stages_of(ranks.place.pp)
        stages = []
        for number in self.stage_numbers:
            last = number == len(blocks) - 1
            part = DecoderPart(blocks[number], embedding=number == 0, head=last)
            with torch.device("meta"):
                decoder = Decoder(config, ranks.axes, part, recompute)
            decoder = decoder.to(dtype).to_empty(device=ranks.device)
            decoder.tie()
            initialise(decoder, seed, residual_branches=2 * config.layers)
            self.places |= places_of(decoder, ranks)
            stage = Stage(decoder)
            shard(stage, decoder, ranks)
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.pipelines: dict[tuple[int, tuple[int, ...]], Any] = {}
        """By number and shape of micro-batches; made when they are first used."""

    @property
    def decoders(self) -> Iterator[Decoder]:
        """This rank's stages, in the order of the model."""
        for stage in self.each_stage():
            yield stage.decoder

    def each_stage(self) -> Iterable[Stage]:
        """The same, as the modules that are called."""
        return cast(Iterable[Stage], self.stages)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by global name; sharded ones are DTensors."""
        for decoder in self.decoders:
            yield from decoder.named_parameters()

    def part(self, name: str, tensor: Tensor) -> Part:
        """``tensor`` (a parameter, its gradient or a moment) as this rank's part of the whole."""
        place = self.places[name]
        return Part(local(tensor.detach()), place.box, place.owner)


def places_of(decoder: Decoder, ranks: Ranks) -> dict[str, Place]:
    """By name, where each parameter of a stage belongs, before it is sharded."""
    layout, at = ranks.layout, ranks.place
    cuts = cuts_of(decoder)
    places = {}
    for name, box in boxes_of(decoder).items():
        axes = {cut.axis.name for cut in cuts[name]}
        expert = "ep" in axes
        split = "tp" in axes
        first = at.expert_replicate == 0 if expert else at.replicate == 0
        places[name] = Place(
            box=sharded_box(box, expert, layout, at),
            expert=expert,
            tensor_parallel=split,
            owner=first and (expert or split or at.tp == 0),
        )
    return places


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; a tensor that is not sharded is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
