"""A rank's part of the model: its pipeline stages, its slices, its shards, by global names."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coterie.comm.exchange.fused.waits import Waits
from coterie.comm.exchange.meter import Meter
from coterie.models import Decoder, DecoderConfig, initialise
from coterie.models.decoder import Recompute
from coterie.moe import MoELayer
from coterie.parallel.distributed import Ranks
from coterie.parallel.part import Part
from coterie.parallel.placement import Place, places_of, stage_parts
from coterie.parallel.sharding import shard


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
        for part in stage_parts(blocks, ranks.layout, ranks.rank):
            with torch.device("meta"):
                decoder = Decoder(config, ranks.axes, part, recompute)
            decoder = decoder.to(dtype).to_empty(device=ranks.device)
            decoder.tie()
            initialise(decoder, seed, residual_branches=2 * config.layers)
            self.places |= places_of(decoder, ranks.layout, ranks.rank)
            stage = Stage(decoder)
            shard(stage, decoder, ranks)
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.pipelines: dict[tuple[int, tuple[int, ...]], Any] = {}
        """By number and shape of micro-batches; made when they are first used."""
        self._moe_layers = [module for module in self.modules() if isinstance(module, MoELayer)]

    @property
    def decoders(self) -> Iterator[Decoder]:
        """This rank's stages, in the order of the model."""
        for stage in self.each_stage():
            yield stage.decoder

    def each_stage(self) -> Iterable[Stage]:
        """The same, as the modules that are called."""
        return cast(Iterable[Stage], self.stages)

    @property
    def meters(self) -> list[Meter]:
        """Of its layers' exchanges, in the order of the model; none where no rows leave a rank."""
        return [meter for layer in self._moe_layers for meter in layer.exchange.meters]

    @property
    def waits(self) -> list[Waits]:
        """Of their launches, where these wait for other ranks."""
        return [waits for layer in self._moe_layers for waits in layer.exchange.waits]

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by global name; sharded ones are DTensors."""
        for decoder in self.decoders:
            yield from decoder.named_parameters()

    def part(self, name: str, tensor: Tensor) -> Part:
        """``tensor`` (a parameter, its gradient or a moment) as this rank's part of the whole."""
        place = self.places[name]
        return Part(local(tensor.detach()), place.box, place.owner)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; a tensor that is not sharded is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
